"""A default that is changed does not change a run that has begun: what is not given is what the run recorded."""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_version1 as version1

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods import METHODS, compress
from compress_ssl.pipeline.methods.base import Recipe
from compress_ssl.pipeline.methods.compress import OneQueue, TwoQueuesMomentum
from compress_ssl.pipeline.methods.options import find_typed
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.options import require_types
from compress_ssl.pipeline.runtime.spec import Spec
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training import resolve, version1_defaults
from compress_ssl.pipeline.training.learner_spec import Execution
from compress_ssl.pipeline.training.run import TrainingRun
from compress_ssl.pipeline.training.student_choice import own_parameters
from compress_ssl.stages import distill, evaluate, export_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

home, same_arithmetic = version1.home, version1.same_arithmetic  # fixtures

OTHER_RECIPE = Recipe(
    optimizer="adamw", lr=0.5, momentum=0.5, weight_decay=0.1, batch_size=10, epochs=7, schedule="constant",
    warmup_epochs=1.0, norm_decay=False, clip=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits in 4 views, embedded by a small random teacher."""
    out = tmp_path_factory.mktemp("store") / "store"
    teacher = "convnet:channels=4+8,pretrained=false"
    export_teacher.run(
        export_teacher.Config("digits", teacher, str(out), views=4, image_size=8, limit=60, workers=0, device="cpu")
    )
    return out


@pytest.fixture
def train(store: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """train("name", method=..., ...) trains in tmp_path/name; a flag that is not in the call is not given."""

    def train(name: str = "run", **flags: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {"student": ("convnet",), "method": "compress-1q", "workers": 0, "device": "cpu"}
        return distill.run(distill.Config(store=str(store), out=tmp_path / name, **{**usual, **flags}))

    return train


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


# ---------------------------------------------------------------- every default, changed on purpose


def change_method(patch: pytest.MonkeyPatch) -> None:
    for option, value in {"tau": 0.9, "bank": 7, "start": "random"}.items():
        patch.setitem(OneQueue.__init__.__kwdefaults__, option, value)


def change_recipe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OneQueue, "recipe", OTHER_RECIPE)


def change_flags(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resolve, "SEED", 5)
    patch.setattr(resolve, "PAIRING", "cross")
    patch.setattr(resolve, "PRECISION", "bf16")
    patch.setattr(resolve, "EXECUTION", Execution(channels_last=False, compile=False, sync_bn=False))


def change_student(patch: pytest.MonkeyPatch) -> None:
    build: Any = MODELS.resolve("convnet")
    signature = inspect.signature(build)
    other = [p.replace(default=(5, 6)) if p.name == "channels" else p for p in signature.parameters.values()]
    patch.setattr(build, "__signature__", signature.replace(parameters=other))
    patch.setitem(build.__wrapped__.__kwdefaults__, "channels", (5, 6))


def change_published_bank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compress, "PUBLISHED", 7)


CHANGES = (change_method, change_published_bank, change_recipe, change_flags, change_student)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_made_longer_keeps_the_defaults_with_which_it_was_begun(
    change: Callable[[pytest.MonkeyPatch], None], train: Callable[..., Any], tmp_path: Path
) -> None:
    train(epochs=0.02, image_size=8)  # one step
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        train(epochs=3.0)
        changed = train("new", epochs=0.02, image_size=8)
    assert changed["steps"] == 1
    train("kept", epochs=3.0)
    assert weights(tmp_path / "run") == weights(tmp_path / "kept")
    assert manifest(tmp_path / "run") == manifest(tmp_path / "kept")
    assert weights(tmp_path / "new") != weights(tmp_path / "run"), "a new run has the changed default"
    first, other = (manifest(tmp_path / name) for name in ("run", "new"))
    assert first["identity"] != other["identity"] or first["about"] != other["about"]


def test_the_size_of_a_bank_and_the_target_that_were_left_open_are_recorded(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    train(method="seed", steps=1, image_size=8)
    options = manifest(tmp_path / "run")["identity"]["options"]
    assert (options["bank"], options["target"], options["small"]) == (30, "embedding", False)
    for words in ("seed", "seed:bank=none,target=auto", "seed:bank=30"):
        assert train(method=words)["steps"] == 1
    with pytest.raises(Mismatch, match=r"options.bank is 30 there, 29 asked"):
        train(method="seed:bank=29")


def test_a_record_without_options_means_the_published_bank_of_version_1(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(steps=1, image_size=8)
    folder = Folder(tmp_path / "run")
    there = artifact.read(folder)
    identity = {name: entry for name, entry in there.identity.items() if name != "options"}
    artifact.write(folder, "run", identity, there.about)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    train("kept", steps=3)
    change_published_bank(monkeypatch)
    train(steps=3)
    assert weights(tmp_path / "run") == weights(tmp_path / "kept")


@pytest.mark.parametrize("length", [{"epochs": 2.5}, {"steps": 3}])
def test_an_interrupted_run_is_continued_to_its_recorded_length_when_none_is_given(
    length: dict[str, Any], train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"image_size": 8, "batch_size": 20, "save_every": 1}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        train(**flags, **length)
    monkeypatch.setattr(OneQueue, "recipe", OTHER_RECIPE)
    repeated = train()
    monkeypatch.undo()
    whole = train("whole", **flags, **length)
    assert repeated["steps"] == whole["steps"]
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("words", ["compress-2q-momentum", "compress-2q-momentum:bank=32"])
def test_a_run_of_version_1_keeps_the_defaults_of_version_1(
    words: str, home: Path, same_arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option, value in {"tau": 0.9, "momentum": 0.1, "start": "random"}.items():
        monkeypatch.setitem(TwoQueuesMomentum.__init__.__kwdefaults__, option, value)
    monkeypatch.setattr(TwoQueuesMomentum, "recipe", OTHER_RECIPE)
    change_flags(monkeypatch)
    change_student(monkeypatch)
    flags: dict[str, Any] = {"steps": version1.STEPS, "save_every": 5, **version1.CPU}
    config = distill.Config(str(home / "store"), (version1.CONVNET, version1.RESNET), words, home / "runs", **flags)
    version1.go_on(lambda: distill.run(config), same_arithmetic)
    for name in version1.FOLDERS:
        version1.assert_ended_the_same(home / "runs" / name, version1.EXPECTED / "runs" / name, same_arithmetic)


def test_a_run_of_version_1_has_the_epochs_of_version_1(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoQueuesMomentum, "recipe", OTHER_RECIPE)
    config = distill.Config(
        str(home / "store"), (version1.CONVNET, version1.RESNET), "compress-2q-momentum", home / "runs", **version1.CPU
    )
    assert distill.resolve(config).sampling.epochs == 130
    anew = replace(config, overwrite=True)
    assert distill.resolve(anew).sampling.epochs == OTHER_RECIPE.epochs


# ---------------------------------------------------------------- what is taken from the record, and what is refused


def test_keys_of_the_method_and_of_the_student_that_are_not_given_are_those_of_the_run(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    begun = {"method": "compress-2q:bank=32,tau=0.1", "student": ("cifar-resnet:8,width=2,drop_path=0.3",)}
    train(**begun, steps=2, image_size=8)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    train(method="compress-2q", student=("cifar-resnet",), steps=4)
    train("same", **begun, steps=4)
    assert weights(tmp_path / "run") == weights(tmp_path / "same")
    identity = manifest(tmp_path / "run")["identity"]
    assert identity["options"] == {"bank": 32, "tau": 0.1, "start": "empty"}
    assert identity["student"]["options"] == {"depth": 8, "width": 2, "drop_path": 0.3}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "compress-2q:tau=0.07"}, "options.tau is 0.04 there, 0.07 asked (--method tau=)"),
        ({"method": "compress-2q:bank=20"}, "options.bank is 30 there, 20 asked (--method bank=)"),
        ({"student": ("cifar-resnet:14",)}, "student.options.depth is 8 there, 14 asked (--student depth=)"),
        ({"student": ("cifar-resnet:width=3",)}, "student.options.width is 2 there, 3 asked (--student width=)"),
        ({"student": ("cifar-resnet:mean=0.5+0.5+0.5",)}, '"cifar-resnet:mean=0.5+0.5+0.5" asked (--student)'),
        ({"precision": "bf16"}, 'training.precision is "fp32" there, "bf16" asked (--precision)'),
        ({"seed": 0, "lr": 0.5}, "training.lr is 0.00234375 there, 0.5 asked (--lr)"),
        ({"pairing": "fresh"}, 'pairing is "same" there, "fresh" asked (--pairing)'),
        ({"image_size": 12}, "student.preprocessing.size is 8 there, 12 asked (--image-size)"),
    ],
)
def test_a_given_flag_that_differs_is_refused_in_the_words_of_the_command(
    changed: dict[str, Any], words: str, begun: Path, store: Path
) -> None:
    flags = {"student": ("cifar-resnet:8",), "method": "compress-2q", **changed}
    before = (begun / "manifest.json").read_bytes()
    with pytest.raises(Mismatch) as refusal:
        distill.run(distill.Config(store=str(store), out=begun, workers=0, device="cpu", steps=4, **flags))
    assert words in str(refusal.value)
    assert len(refusal.value.differing) <= 2, "what follows from another difference is not listed"
    assert (begun / "manifest.json").read_bytes() == before


@pytest.fixture(scope="module")
def begun(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begun") / "run"
    student = ("cifar-resnet:8,width=2",)
    flags: dict[str, Any] = {"steps": 2, "image_size": 8, "workers": 0, "device": "cpu"}
    distill.run(distill.Config(str(store), student, "compress-2q", out, **flags))
    return out


def test_settings_that_are_given_as_they_were_begun_are_accepted_in_other_words(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    train(steps=2, image_size=8)
    given = train(
        method="compress-1q:tau=0.04,start=store", student=("convnet:channels=16+32+64",), steps=2, seed=0,
        precision="fp32", pairing="same", batch_size=60, lr=0.01 * 60 / 256, optimizer="sgd", views=4,
    )  # fmt: skip
    assert "is finished already" in given["summary"]
    assert manifest(tmp_path / "run")["identity"]["method"] == "compress-1q"


def test_a_run_keeps_its_global_batch_on_another_number_of_devices(
    begun: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = distill.Config(str(store), ("cifar-resnet:8",), "compress-2q", begun, steps=4)
    alone = distill.resolve(config)
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    assert distill.resolve(config) == alone and alone.sampling.batch == 60
    assert distill.resolve(replace(config, batch_size=10)).sampling.batch == 40


def test_with_overwrite_nothing_that_was_recorded_counts(train: Callable[..., Any], tmp_path: Path) -> None:
    train(method="compress-1q:tau=0.1", steps=2, image_size=8, precision="bf16", seed=3)
    train(steps=1, image_size=8, overwrite=True)
    record = manifest(tmp_path / "run")
    assert record["identity"]["options"]["tau"] == 0.04
    assert record["identity"]["training"]["precision"] == "fp32" and record["identity"]["training"]["seed"] == 0
    assert record["about"]["steps"] == 1


def test_a_student_that_is_added_is_trained_like_the_ones_that_have_begun(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    one, other = "convnet:channels=3", "convnet:channels=4"
    train(student=(one, "convnet:channels=5"), steps=2, image_size=8, lr=0.3, method="compress-1q:tau=0.2", seed=4)
    train(student=(one, "convnet:channels=5", other))
    added, first = (manifest(tmp_path / "run" / f"convnet-channels-{n}")["identity"] for n in (4, 3))
    assert added["training"] == first["training"] and added["options"] == first["options"]


def test_how_the_network_is_run_is_recorded_and_kept_and_may_be_changed(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    train(steps=1, image_size=8, channels_last=False)
    assert manifest(tmp_path / "run")["about"]["channels_last"] is False
    train(steps=2)
    assert manifest(tmp_path / "run")["about"]["channels_last"] is False
    train(steps=3, channels_last=True)
    assert manifest(tmp_path / "run")["about"]["channels_last"] is True


MINE = """
from compress_ssl.pipeline.methods.regression import Regression
class Mine(Regression):
    def __init__(self, *, context, scale: float, power=DEFAULT, **more):
        super().__init__(context=context)
        self.scale, self.power, self.more = scale, power, more
    def forward(self, batch, outputs):
        (loss,) = super().forward(batch, outputs)
        return [self.scale * loss ** self.power]
"""


def test_a_method_of_a_users_own_keeps_its_options_too(train: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("DEFAULT", "2"))
    train(method=f"python:{file}:Mine,scale=3,colour=red", steps=2, image_size=8)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert manifest(tmp_path / "run")["identity"]["options"] == {"colour": "red", "power": 2, "scale": 3.0}
    train("kept", method=f"python:{file}:Mine", steps=4)
    file.write_text(MINE.replace("DEFAULT", "1"))
    train(method=f"python:{file}:Mine", steps=4)
    assert weights(tmp_path / "run") == weights(tmp_path / "kept")
    with pytest.raises(UserError, match="needs scale="):
        train("new", method=f"python:{file}:Mine", steps=4, image_size=8)


def test_a_run_with_a_method_and_a_student_from_files_is_continued_and_evaluated_in_another_folder(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    code.mkdir()
    elsewhere.mkdir()
    (code / "mine.py").write_text(MINE.replace("DEFAULT", "2"))
    (code / "nets.py").write_text(
        "from torch import nn\n\ndef tiny(width: int = 4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.chdir(code)
    train(method="python:mine.py:Mine,scale=3", student=("python:nets.py:tiny,width=6",), steps=2, image_size=8)
    recorded = manifest(tmp_path / "run")
    assert recorded["identity"]["method"] == "python:mine.py:Mine,scale=3"
    assert recorded["about"]["student"] == f"python:{code}/nets.py:tiny,width=6"
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    train("kept", method="python:mine.py:Mine", student=("python:nets.py:tiny",), steps=4)
    monkeypatch.chdir(elsewhere)
    train(method="python:../code/mine.py:Mine", student=(f"python:{code}/nets.py:tiny",), steps=4)
    assert weights(tmp_path / "run") == weights(tmp_path / "kept")
    evaluate.run(evaluate.Config(run=tmp_path / "run", val="digits:split=test", protocol=("nn",), workers=0))
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()
    for file in ("mine.py", "nets.py"):  # moved to where the same words name them
        (code / file).rename(elsewhere / file)
    train(method="python:mine.py:Mine", student=("python:nets.py:tiny",), steps=5)
    again = evaluate.Config(run=tmp_path / "run", val="digits:split=test", protocol=("nn",), workers=0, overwrite=True)
    evaluate.run(again)


# ---------------------------------------------------------------- the length of a run


def test_an_unfinished_run_is_not_finished_by_asking_for_fewer_steps(train: Callable[..., Any], tmp_path: Path) -> None:
    from compress_ssl.stages import inspect as inspect_stage

    train(steps=2, image_size=8)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 3)
        train(steps=6, save_every=1)
    before = weights(tmp_path / "run")
    described = inspect_stage.run(inspect_stage.Config(str(tmp_path / "run")))
    assert not described["finished"] and described["steps"] == 6 and described["checkpoints"] == "2, 3"
    for fewer in ({"steps": 3}, {"steps": 1}, {"epochs": 2.0}):
        with pytest.raises(
            UserError, match=r"steps were asked, but the run was begun for 6 \(6 epochs\) and has taken 3"
        ):
            train(**fewer)
    assert weights(tmp_path / "run") == before
    assert "6 steps" in train()["summary"]
    assert inspect_stage.run(inspect_stage.Config(str(tmp_path / "run")))["finished"]
    repeated = train(steps=4)
    assert "is finished already, 6 steps" in repeated["summary"] and repeated["steps"] == 6


def interrupt_at(patch: pytest.MonkeyPatch, number: int) -> None:
    step = TrainingRun.step

    def interrupted(self: TrainingRun, at: int, *rest: Any) -> Any:
        if at == number:
            raise KeyboardInterrupt
        return step(self, at, *rest)

    patch.setattr(TrainingRun, "step", interrupted)


def test_an_unfinished_run_of_version_1_is_not_finished_by_asking_for_fewer_steps(home: Path) -> None:
    flags: dict[str, Any] = {"steps": 8, **version1.CPU}
    config = distill.Config(
        str(home / "store"), (version1.CONVNET, version1.RESNET), "compress-2q-momentum", home / "runs", **flags
    )
    with pytest.raises(UserError, match=r"8 steps were asked, but the run has taken 12 .* is not finished") as refusal:
        distill.run(config)
    if "student.initial" in str(refusal.value):
        pytest.skip("this processor, or this torch, draws other initial weights from a seed")
    assert not list((home / "runs").rglob("student.safetensors"))


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("kind", [kind for kind in METHODS.entries if kind != "python"])
def test_the_table_of_version_1_names_every_option_of_a_method(kind: str) -> None:
    """A new option needs a line: what it is in runs that were begun without it."""
    typed = find_typed(kind)
    table = version1_defaults.METHOD_OPTIONS[kind]
    assert set(typed.keys) == set(table) and kind in version1_defaults.EPOCHS
    require_types(table, typed.keys, kind)


def test_the_table_of_version_1_names_every_option_of_our_networks() -> None:
    kinds = [kind for kind in MODELS.entries if kind != "python"]
    own = {kind: set(own_parameters(Spec(kind))) for kind in kinds if own_parameters(Spec(kind))}
    assert own == {kind: set(options) for kind, options in version1_defaults.STUDENT_OPTIONS.items()}


# ---------------------------------------------------------------- values of every type


ODD = """
import enum
from collections.abc import Sequence
from typing import Literal
from compress_ssl.pipeline.methods.regression import Regression
class Mode(str, enum.Enum):
    A = "a"
class Mine(Regression):
    def __init__(self, *, context, one: list[int] = [1, 2], two: Sequence[int] = (1, 2), three: tuple = (1, 2),
                 four: Literal[1, 2] = 1, five: Mode = Mode.A, six="1", seven="true", eight: float = float("inf"),
                 nine: tuple[str, ...] = ("a+b", "c"), ten: int | str = "3", eleven: int = True, twelve=[1, 2],
                 thirteen: float = float("nan"), fourteen: float = None):
        super().__init__(context=context)
        given = {name: value for name, value in locals().items() if name not in ("self", "context", "__class__")}
        GOT.append(given)
GOT = []
"""


def test_a_method_of_a_users_own_gets_its_defaults_as_its_signature_has_them_when_begun_and_when_repeated(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    import sys

    file = tmp_path / "odd.py"
    file.write_text(ODD)
    for steps in (1, 2):
        train(method=f"python:{file}:Mine", steps=steps, image_size=8)
    module: Any = next(module for name, module in sys.modules.items() if name.endswith(f"/{tmp_path.name}/odd%2Epy"))
    signature = inspect.signature(module.Mine)
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "context"}
    assert len(module.GOT) == 2 and all(repr(got) == repr(defaults) for got in module.GOT)


def test_a_recorded_list_literal_or_infinity_keeps_its_type_when_the_default_has_changed(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    import sys

    file = tmp_path / "odd.py"
    file.write_text(ODD)
    train(method=f"python:{file}:Mine", steps=1, image_size=8)
    changed = ODD
    for old, new in (("=[1, 2]", "=[3]"), ("= [1, 2]", "= [3]"), ("(1, 2)", "(3,)"), ("= 1", "= 2"), ('"inf"', '"2"')):
        changed = changed.replace(old, new)
    file.write_text(changed)
    train(method=f"python:{file}:Mine", steps=2)
    module: Any = next(module for name, module in sys.modules.items() if name.endswith(f"/{tmp_path.name}/odd%2Epy"))
    (got,) = module.GOT
    kept = {name: got[name] for name in ("one", "two", "three", "four", "eight", "twelve")}
    assert repr(kept) == repr(
        {"one": [1, 2], "two": (1, 2), "three": (1, 2), "four": 1, "eight": float("inf"), "twelve": [1, 2]}
    )


@pytest.mark.parametrize(
    ("begun", "repeated"),
    [
        ({"warmup_epochs": 5}, {"warmup_epochs": 5.0}),
        ({"lr": 1.0}, {"lr": 1}),
        ({"method": "python:{}:Mine,scale=1,power=2"}, {"method": "python:{}:Mine,power=2.0"}),
    ],
)
def test_equal_numbers_are_one_setting_also_when_one_is_whole_and_the_other_a_float(
    begun: dict[str, Any], repeated: dict[str, Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("DEFAULT", "2"))
    for steps, flags in ((1, begun), (2, repeated), (None, repeated)):
        named = {key: value.format(file) if key == "method" else value for key, value in flags.items()}
        train(**named, steps=steps, image_size=8)


# ---------------------------------------------------------------- the student's network and its images


def change_preprocessing(patch: pytest.MonkeyPatch) -> None:
    from compress_ssl.pipeline.models.networks import convnet

    patch.setattr(convnet, "IMAGENET", replace(convnet.IMAGENET, mean=(0.1, 0.1, 0.1), interpolation="bicubic"))


@pytest.mark.parametrize("change", [change_student, change_preprocessing])
def test_a_run_is_scored_with_the_network_and_the_preprocessing_with_which_it_was_begun(
    change: Callable[[pytest.MonkeyPatch], None], train: Callable[..., Any], tmp_path: Path
) -> None:
    from compress_ssl.stages import evaluate

    train(steps=1, image_size=8)
    flags: dict[str, Any] = {"val": "digits:split=test", "protocol": ("nn",), "workers": 0, "device": "cpu"}
    as_begun = evaluate.run(evaluate.Config(run=tmp_path / "run", out=tmp_path / "one", **flags))
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        evaluate.run(evaluate.Config(run=tmp_path / "run", out=tmp_path / "one", **flags))
        changed = evaluate.run(evaluate.Config(run=tmp_path / "run", out=tmp_path / "other", **flags))
    assert changed["metrics"] == as_begun["metrics"]
    for name in ("manifest.json", "features/val/manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_run_keeps_the_preprocessing_of_its_images_when_that_of_the_network_changes(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    train(steps=1, image_size=8)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    with pytest.MonkeyPatch.context() as patch:
        change_preprocessing(patch)
        train(steps=3)
    train("kept", steps=3)
    assert weights(tmp_path / "run") == weights(tmp_path / "kept")
    assert manifest(tmp_path / "run") == manifest(tmp_path / "kept")


# ---------------------------------------------------------------- a user's own code that changes

NETWORK = """
from torch import nn
class Tiny(nn.Sequential):
    preprocessing = {"size": 8}
def tiny(width: int = WIDTH, dropout: float = DROP, names: list[str] = ["a", "b,c"], none=None):
    assert names == ["a", "b,c"] and none is None
    return Tiny(nn.Conv2d(3, width, 5, 2), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_a_network_of_a_users_own_keeps_its_options_in_training_and_in_scoring(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    from compress_ssl.stages import evaluate

    file = tmp_path / "nets.py"
    begun, changed = (NETWORK.replace("WIDTH", w).replace("DROP", d) for w, d in (("4", "0.1"), ("6", "0.9")))
    words = (f"python:{file}:tiny",)
    file.write_text(begun)
    train(student=words, steps=1)
    assert manifest(tmp_path / "run")["identity"]["student"]["options"] == {
        "width": 4, "dropout": 0.1, "names": ["a", "b,c"], "none": None,
    }  # fmt: skip
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    train("kept", student=words, steps=3)
    file.write_text(changed)
    train(student=words, steps=3)
    assert weights(tmp_path / "run") == weights(tmp_path / "kept")
    assert manifest(tmp_path / "run") == manifest(tmp_path / "kept")
    config = evaluate.Config("digits:split=test", tmp_path / "run", protocol=("nn",), workers=0, device="cpu")
    assert evaluate.run(config)["metrics"]["model"]["width"] == 4  # type: ignore[index]
    with pytest.raises(Mismatch, match="student.options.width is 4 there, 5 asked"):
        train(student=(f"{words[0]},width=5",), steps=4)


ADDED = """
from compress_ssl.pipeline.methods.regression import Regression
class Mine(Regression):
    def __init__(self, *, context, one=1SECOND):
        super().__init__(context=context)
    def forward(self, batch, outputs):
        return [FACTOR * loss for loss in super().forward(batch, outputs)]
"""


def test_an_option_that_a_users_method_gets_later_is_recorded_when_the_run_goes_on(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"

    def go_on(steps: int, second: str) -> Any:
        file.write_text(ADDED.replace("SECOND", second).replace("FACTOR", "1"))
        train(method=f"python:{file}:Mine", steps=steps, image_size=8)
        return manifest(tmp_path / "run")["identity"]["options"]

    assert go_on(1, "") == {"one": 1}
    assert go_on(2, ", second=2") == {"one": 1, "second": 2}
    assert go_on(3, ", second=3") == {"one": 1, "second": 2}
    with pytest.raises(Mismatch, match="options.second is 2 there, null asked"):
        go_on(4, "")


def test_an_evaluation_of_a_student_that_was_trained_further_is_refused_in_words(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    def score() -> None:
        options: dict[str, Any] = {"protocol": ("nn",), "workers": 0, "device": "cpu"}
        evaluate.run(evaluate.Config(val="digits:split=test", run=tmp_path / "run", **options))

    train(steps=1, image_size=8)
    score()
    train(steps=2)
    with pytest.raises(Mismatch, match="other weights than convnet has now, as after more training; start anew with"):
        score()
