"""A sweep gives the same results as the commands that it consists of."""

import json
import os
import signal
from pathlib import Path

import pytest

from compress_ssl.pipeline.datasets.digits import Digits
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.signals import Interrupted
from compress_ssl.pipeline.training.run import TrainingRun
from compress_ssl.stages import distill, export_teacher, sweep

STUDENTS = ("convnet:channels=4+6", "convnet:channels=5+6")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "teacher"
    teacher = "convnet:channels=4+8,pretrained=false"
    export_teacher.run(
        export_teacher.Config(data="digits", teacher=teacher, out=out, views=3, image_size=8, limit=60, workers=0)
    )
    return out


def write_file(folder: Path, store: Path, **changes: object) -> Path:
    """Write the file of a sweep with 2 methods, 2 learning rates and 2 students; a change to None leaves a key out."""
    settings = {
        "out": str(folder / "sweep"),
        "store": str(store),
        "student": list(STUDENTS),
        "method": ["compress-1q:bank=20", "regression"],
        "distill": {"steps": 2, "batch-size": 16, "image-size": 8, "workers": 0, "lr": [1, 0.1]},
        "evaluate": {"val": "digits:split=test", "protocol": ["nn"], "workers": 0},
    }
    file = folder / "grid.yaml"
    file.write_text(json.dumps({k: v for k, v in {**settings, **changes}.items() if v is not None}))  # JSON is YAML
    return file


def test_a_sweep_trains_every_combination_and_writes_one_comparison(store: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path, store, method=["regression"])
    result = sweep.run(sweep.Config(file))
    assert result["passes"] == ["regression,lr=1 + regression,lr=0.1"]
    assert len(result["runs"]) == 4
    page = Path(result["page"]).read_text()
    assert all(page.count(student) >= 2 for student in STUDENTS)
    alone = distill.Config(
        store=store, student=STUDENTS[:1], method="regression", out=tmp_path / "alone", steps=2, batch_size=16,
        image_size=8, workers=0, lr=0.1,
    )  # fmt: skip
    distill.run(alone)
    in_the_sweep = Path(result["runs"][2]) / "student.safetensors"
    assert in_the_sweep.read_bytes() == (tmp_path / "alone" / "student.safetensors").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("student.safetensors")}
    assert sweep.run(sweep.Config(file))["runs"] == result["runs"]
    assert before == {path: path.stat().st_mtime_ns for path in before}, "finished runs are not written again"


def test_a_dry_run_lists_the_passes_and_does_nothing(store: Path, tmp_path: Path) -> None:
    planned = sweep.run(sweep.Config(write_file(tmp_path, store), dry_run=True))
    assert len(planned["passes"]) == 1 and "1 pass over the images for 8 students" in planned["summary"]
    limited = sweep.run(sweep.Config(write_file(tmp_path, store, at_once=4), dry_run=True))["passes"]
    assert limited == [
        "compress-1q-bank=20,lr=1 + compress-1q-bank=20,lr=0.1", "regression,lr=1 + regression,lr=0.1"
    ]  # fmt: skip
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["seed"]}, "unknown key 'methods'; did you mean 'method'"),
        ({"student": None}, "lacks student"),
        ({"distill": {"epoch": 3}}, "has no flag 'epoch'; did you mean 'epochs'"),
        ({"distill": {"epochs": "many"}}, "epochs is 'many', but must be a number"),
        ({"method": "sead"}, "unknown method 'sead'; did you mean 'seed'"),
        ({"distill": {"pairing": "odd"}}, "--pairing is odd, but must be one of same, fresh, cross"),
        ({"distill": {"pairing": 5}}, "pairing is 5, but must be one of same, fresh, cross"),
        ({"distill": {"optimizer": "sdg"}}, "--optimizer is sdg, .*; did you mean 'sgd'"),
        ({"distill": {"workers": "two"}}, "workers is 'two', but must be a whole number or null"),
        ({"evaluate": {"val": "digits:split=test", "precision": "fp8"}}, "--precision is fp8, but must be one of fp32"),
        ({"distill": {"lr": "1.2.3e4"}}, "lr is '1.2.3e4', but must be a number"),
        ({"distill": {"steps": True}}, "steps is True, but must be a whole number or null"),
        ({"evaluate": {"protocol": ["nn"]}}, "needs val"),
        ({"method": ["seed:bank=2", "seed:bank=2"]}, "2 combinations would share the folder seed-bank=2,lr=1"),
        ({"evaluate": {"val": "digits", "out": "here"}}, "has no flag 'out'"),
        ({"evaluate": {"val": "digits", "protocol": ["nnn"]}}, "unknown protocol 'nnn'; did you mean 'nn'"),
        ({"distill": {"lr": [0.01, "1e-2"]}}, "2 combinations would share the folder .*lr=0.01"),
        ({"at_once": 0}, "at_once is 0, but must be a number of students"),
        ({"distill": ["lr"]}, r"distill is \['lr'\], but must hold flags of compress distill"),
        ({"evaluate": 5}, "evaluate is 5, but must hold flags of compress evaluate"),
        ({"out": ["a"]}, r"out is \['a'\], but must be a folder"),
        ({"student": {"a": "b"}}, "student is {'a': 'b'}, but must be a text or a list of texts"),
        ({"student": [["convnet"]]}, r"student is \['convnet'\], but must be a text"),
        ({"method": [None]}, "method is None, but must be a text"),
        ({"distill": {"lr": []}}, "lr is an empty list"),
        ({"distill": {name: list(range(10)) for name in ("lr", "steps", "seed", "clip", "ema")}}, "means 200000 comb"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_trained(
    changes: dict[str, object], message: str, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        sweep.run(sweep.Config(write_file(tmp_path, store, **changes)))
    assert not (tmp_path / "sweep").exists()


def test_a_failing_combination_is_named_in_the_error_and_the_others_are_trained(store: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path, store, method=["compress-1q:bank=500", "regression"], evaluate=None)
    with pytest.raises(UserError, match=r"2 of 4 .* failed, the first is compress-1q-bank=500,lr=1: bank=500.*usable"):
        sweep.run(sweep.Config(file))
    assert len(list((tmp_path / "sweep").rglob("student.safetensors"))) == 4


def test_only_the_student_that_diverges_in_a_shared_pass_fails_and_it_is_not_trained_again(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill_flags = {"steps": 4, "batch-size": 20, "image-size": 8, "workers": 0, "lr": [1e30, 0.1]}
    file = write_file(tmp_path, store, method=["regression"], student=STUDENTS[0], distill=distill_flags, evaluate=None)
    with pytest.raises(UserError, match="1 of 2 .* failed, the first is regression,lr=1e.30: .*(not finite|nan|inf)"):
        sweep.run(sweep.Config(file))
    assert capsys.readouterr().err.count("steps 0 to 4") == 1
    assert (tmp_path / "sweep/regression,lr=0.1/student.safetensors").exists()


FAILS_AT_STEP_3 = """
from compress_ssl.pipeline.methods.regression import Regression
class Late(Regression):
    def forward(self, batch, outputs):
        (loss,) = super().forward(batch, outputs)
        return [loss * float("nan") if batch.step == 3 else loss]
"""


def test_a_run_that_fails_when_it_is_made_longer_is_not_in_the_comparison(store: Path, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(FAILS_AT_STEP_3)
    for steps in (2, 5):
        distill_flags = {"steps": steps, "batch-size": 16, "image-size": 8, "workers": 0}
        file = write_file(
            tmp_path, store, method=["regression", f"python:{tmp_path}/late.py:Late"], distill=distill_flags
        )
        if steps == 2:
            assert len(sweep.run(sweep.Config(file))["runs"]) == 4
    with pytest.raises(UserError, match="1 of 2 combinations failed, .*Late: .*not finite|1 of 2 .*the loss is nan"):
        sweep.run(sweep.Config(file))
    page = (tmp_path / "sweep/compare.html").read_text()
    assert "regression" in page and "late.py" not in page, (
        "the result after two steps is not the one that was asked for"
    )


def test_an_interrupted_sweep_continues_and_ends_with_the_same_bits(store: Path, tmp_path: Path) -> None:
    distill_flags = {"steps": [4, 6], "batch-size": 16, "image-size": 8, "workers": 0}
    for name in ("stopped", "uninterrupted"):
        (tmp_path / name).mkdir()
    file = write_file(tmp_path / "stopped", store, distill=distill_flags, evaluate=None)
    step, steps_taken = TrainingRun.step, []

    def stopping_step(self: TrainingRun, number: int, *arguments: object) -> object:
        steps_taken.append(number)
        if len(steps_taken) == 6:  # the second step of the second pass
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "step", stopping_step)
        with pytest.raises(Interrupted, match="saved at step 2 of 6"):
            sweep.run(sweep.Config(file))
        result = sweep.run(sweep.Config(file))
    assert steps_taken == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5], "no step is taken twice"
    uninterrupted = sweep.run(
        sweep.Config(write_file(tmp_path / "uninterrupted", store, distill=distill_flags, evaluate=None))
    )
    assert len(result["runs"]) == 8
    for resumed, expected in zip(result["runs"], uninterrupted["runs"], strict=True):
        student = (Path(resumed) / "student.safetensors").read_bytes()
        assert student == (Path(expected) / "student.safetensors").read_bytes()


def test_a_missing_store_is_refused_by_a_dry_run_too(tmp_path: Path) -> None:
    file = write_file(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        sweep.run(sweep.Config(file, dry_run=True))


def test_empty_sections_count_as_absent(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    lines = ("out: out", f"store: {store}", f"student: {STUDENTS[0]}", "method: regression", "distill:", "evaluate:")
    file.write_text("\n".join(lines))
    assert sweep.run(sweep.Config(file, dry_run=True))["passes"] == ["regression"]


def test_methods_that_need_the_same_images_share_a_pass_and_equal_runs_trained_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, load = [], Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, i: decoded.append(i) or load(self, i))
    methods = ["compress-2q:bank=20", "regression", "crd:negatives=10", "seed:bank=20"]
    distill_flags = {"steps": 3, "batch-size": [20, 30], "image-size": 8, "workers": 0}
    file = write_file(
        tmp_path, store, method=methods, distill={**distill_flags, "lr": 0.05, "clip": 1.0}, evaluate=None
    )
    result = sweep.run(sweep.Config(file))
    assert [name.count("batch_size=20") for name in result["passes"]] == [4, 0]
    probes = 3  # images that are read first, to check that they are rendered as for the teacher
    assert len(decoded) == 3 * 20 + probes + 3 * 30 + probes, "one decode of an image per step, for eight students"
    for method in methods:
        folder = sweep.folder_part(method) + ",batch_size=20"
        alone = tmp_path / folder
        flags = {"steps": 3, "batch_size": 20, "image_size": 8, "workers": 0, "lr": 0.05, "clip": 1.0}
        distill.run(distill.Config(store=str(store), student=STUDENTS, method=method, out=alone, **flags))
        for file in alone.rglob("student.safetensors"):
            assert file.read_bytes() == (tmp_path / "sweep" / folder / file.relative_to(alone)).read_bytes()


def test_methods_that_need_different_local_crops_are_trained_in_separate_passes(tmp_path: Path) -> None:
    out, flags = tmp_path / "store", {"views": 3, "image_size": 16, "limit": 60, "workers": 0, "local_views": 2}
    export_teacher.run(
        export_teacher.Config(
            "digits", "convnet:channels=4+8,pretrained=false", str(out), keep="embedding,regions", **flags
        )
    )
    distill_flags = {"steps": 2, "batch-size": 20, "image-size": 16, "workers": 0, "views-per-step": 2, "lr": 0.01}
    methods = ["esvit:bank=20,crops=2", "seed:bank=20,small=true"]
    result = sweep.run(sweep.Config(write_file(tmp_path, out, method=methods, distill=distill_flags, evaluate=None)))
    assert len(result["runs"]) == 4
