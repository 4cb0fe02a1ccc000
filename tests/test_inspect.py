"""`compress inspect` tells of anything that compress made; what is no teacher's store is refused as one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_ssl.pipeline.datasets import image_cache
from compress_ssl.pipeline.datasets.digits import Digits
from compress_ssl.pipeline.evaluators import scored_model
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, evaluate, export_teacher, inspect, label_head, verify

pytestmark = pytest.mark.usefixtures("one_thread")
built: list[str] = []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 digits in made/store, its teacher scored on other images in made/scored."""
    home = tmp_path_factory.mktemp("made")
    how: dict[str, Any] = {"batch_size": 20, "workers": 0, "device": "cpu"}
    teacher = "convnet:channels=4+8,pretrained=false"
    export_teacher.run(export_teacher.Config("digits", teacher, home / "store", limit=40, views=2, image_size=8, **how))
    live = scored_model.live_teacher
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_model, "live_teacher", lambda *arguments: (built.append("teacher"), live(*arguments))[1])
        evaluate.run(
            evaluate.Config(
                val="digits:split=test", train="digits:split=test", limit=60, store=str(home / "store"),
                out=home / "scored", protocol=("linear:epochs=3,augment=true",), **how,
            )
        )  # fmt: skip
    return home


def test_the_live_teacher_is_built_once_however_many_epochs_of_views_are_wanted(made: Path) -> None:
    assert built == ["teacher"]


def test_a_store_is_listed_and_its_history_read_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("history", "pending"):
        act: Callable[..., Any] = getattr(FeatureStore, name)
        monkeypatch.setattr(FeatureStore, name, lambda self, name=name, act=act: (asked.append(name), act(self))[1])
    told = inspect.run(inspect.Config(str(made / "store")))
    assert sorted(asked) == ["history", "pending"]
    assert told["shards"] == "1 of 1 done, 240 rows each" and told["data"] == "40 images of digits, 10 classes"
    assert told["saves"].startswith("7920 of 8000 teacher forwards for 1 students x 200 epochs")


def test_the_features_of_an_evaluation_are_shown_for_what_they_are(made: Path) -> None:
    told = inspect.run(inspect.Config(str(made / "scored/features/train")))
    assert told["data"] == "60 images, scored by an evaluation" and told["teacher"] == "what was scored, 8 dimensions"
    assert "saves" not in told and told["kind"] == "store"


@pytest.mark.parametrize(
    "use",
    [
        lambda store, out: verify.run(verify.Config(store)),
        lambda store, out: evaluate.run(evaluate.Config(val="digits", store=store)),
        lambda store, out: label_head.run(label_head.Config(store, out)),
        lambda store, out: distill.run(distill.Config(store=store, student=("convnet",), method="seed", out=out)),
    ],
    ids=["verify", "evaluate", "label-head", "distill"],
)
def test_and_are_no_teachers_store(use: Callable[[str, Path], Any], made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scored/features/val holds what an evaluation saw .* no teacher's store"):
        use(str(made / "scored/features/val"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_their_digests_can_be_checked(made: Path) -> None:
    assert "every digest is right" in verify.run(verify.Config(str(made / "scored/features/val"), sample=0))["summary"]


def test_what_is_neither_store_run_nor_evaluation_is_shown_by_what_it_was_made_with(tmp_path: Path) -> None:
    image_cache.build_cache(Digits().subset(9), tmp_path / "decoded")
    told = inspect.run(inspect.Config(str(tmp_path / "decoded")))
    assert told["kind"] == "decoded images" and '"images": 9' in told["data"] and told["on disk"]
    artifact.claim(Folder(tmp_path / "demo"), "demo", {"teacher": "digits-teacher", "epochs": 2.0})
    told = inspect.run(inspect.Config(str(tmp_path / "demo")))
    assert (told["kind"], told["teacher"], told["epochs"]) == ("demo", "digits-teacher", "2.0")
    assert "  teacher: digits-teacher" in told["summary"]
