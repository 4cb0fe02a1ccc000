"""`compress inspect` describes every kind of folder; commands that need a teacher's store refuse other stores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_ssl.pipeline.datasets import image_cache
from compress_ssl.pipeline.datasets.digits import Digits
from compress_ssl.pipeline.evaluators import scored_model
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, evaluate, export_teacher, inspect, label_head, verify

pytestmark = pytest.mark.usefixtures("one_thread")
built: list[str] = []
"""One entry for every time that the fixture `made` builds the live teacher."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 digits in made/store, its teacher scored on other images in made/scored."""
    folder = tmp_path_factory.mktemp("made")
    options: dict[str, Any] = {"batch_size": 20, "workers": 0, "device": "cpu"}
    teacher = "convnet:channels=4+8,pretrained=false"
    export_teacher.run(
        export_teacher.Config("digits", teacher, folder / "store", limit=40, views=2, image_size=8, **options)
    )
    live = scored_model.load_live_teacher
    with pytest.MonkeyPatch.context() as patch:
        count = lambda *arguments: (built.append("teacher"), live(*arguments))[1]  # noqa: E731
        patch.setattr(scored_model, "load_live_teacher", count)
        evaluate.run(
            evaluate.Config(
                val="digits:split=test", train="digits:split=test", limit=60, store=str(folder / "store"),
                out=folder / "scored", protocol=("linear:epochs=3,augment=true",), **options,
            )
        )  # fmt: skip
    return folder


def test_the_live_teacher_is_built_once_for_any_number_of_epochs_of_random_views(made: Path) -> None:
    assert built == ["teacher"]


def test_inspecting_a_store_lists_it_once_and_reads_its_history_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("history", "pending"):
        method: Callable[..., Any] = getattr(FeatureStore, name)
        monkeypatch.setattr(
            FeatureStore, name, lambda self, name=name, method=method: (calls.append(name), method(self))[1]
        )
    found = inspect.run(inspect.Config(str(made / "store")))
    assert sorted(calls) == ["history", "pending"]
    assert found["shards"] == "1 of 1 done, 240 rows each" and found["data"] == "40 images of digits, 10 classes"
    assert found["saves"].startswith("7920 of 8000 teacher forwards for 1 students x 200 epochs")


def test_the_features_of_an_evaluation_are_described_as_such(made: Path) -> None:
    found = inspect.run(inspect.Config(str(made / "scored/features/train")))
    assert found["data"] == "60 images, scored by an evaluation" and found["teacher"] == "what was scored, 8 dimensions"
    assert "saves" not in found and found["kind"] == "store"


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
def test_a_command_that_needs_a_teachers_store_refuses_the_features_of_an_evaluation(
    use: Callable[[str, Path], Any], made: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="scored/features/val holds the features of view 0 .* no teacher's store"):
        use(str(made / "scored/features/val"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_checks_the_digests_of_an_evaluations_features(made: Path) -> None:
    assert "every digest is right" in verify.run(verify.Config(str(made / "scored/features/val"), sample=0))["summary"]


def test_any_other_kind_of_folder_is_described_by_the_settings_it_was_made_with(tmp_path: Path) -> None:
    image_cache.build_cache(Digits().subset(9), tmp_path / "decoded")
    found = inspect.run(inspect.Config(str(tmp_path / "decoded")))
    assert found["kind"] == "decoded images" and '"images": 9' in found["data"] and found["on disk"]
    artifact.claim(Folder(tmp_path / "demo"), "demo", {"teacher": "digits-teacher", "epochs": 2.0})
    found = inspect.run(inspect.Config(str(tmp_path / "demo")))
    assert (found["kind"], found["teacher"], found["epochs"]) == ("demo", "digits-teacher", "2.0")
    assert "  teacher: digits-teacher" in found["summary"]


@pytest.mark.parametrize("odd", [{"epochs": 1e308}, {"epochs": float("inf")}, {"students": 10**30}, {"epochs": 0.0}])
def test_numbers_of_which_no_saving_can_be_computed_are_refused(made: Path, odd: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(odd))} is .*, but must be more than 0 and at most"):
        inspect.run(inspect.Config(str(made / "store"), **odd))
