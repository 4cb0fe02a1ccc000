"""Every method in the training loop: resumed, diverging, with several students, and with stores that lack arrays."""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import test_distill as plain
import torch
from test_distill import (
    BATCH,
    CONVNET,
    RESNET,
    assert_same_run,
    at_step,
    crash,
    crashed_at,
    export,
    newest_step,
    stopped_by_signal,
)

from compress_ssl.pipeline.datasets.digits import Digits
from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.runtime.config import to_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore, Shard, done_key
from compress_ssl.pipeline.training import checkpoint
from compress_ssl.stages import distill, label_head

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "convnet:channels=3+6"
fork_server = plain.fork_server

CASES: dict[str, dict[str, Any]] = {
    "regression": {"method": "regression:norm=batch"},
    "crd": {"method": "crd:negatives=30", "views_per_step": 2},
    "simclr-v2": {"method": "simclr-v2:head=HEAD,tau=2"},
    "esvit": {"method": "esvit:bank=50,crops=2", "lr": 0.01, "clip": 3.0, "norm_decay": False},
    "seed in full": {"method": "seed:bank=50,small=true"},
    "dogo": {"method": "dogo", "student": (CONVNET, CONVNET), "lr": 0.01, "ema": None},
    "dogo of three": {"method": "dogo:weight=1", "student": (CONVNET, TINY, CONVNET), "pairing": "fresh", "lr": 0.01},
    "dogo-frozen": {"method": "dogo-frozen", "lr": 0.01, "precision": "bf16"},
    "crd, two students": {"method": "crd:negatives=30", "student": (CONVNET, TINY)},
    "esvit, two students": {"method": "esvit:bank=50,crops=0", "student": (CONVNET, TINY), "lr": 0.01},
}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits in 7 views and 2 local crops, with regions, and a head trained on a fifth of the labels."""
    out = tmp_path_factory.mktemp("rich") / "store"
    export(out, views=7, keep="embedding,regions", local_views=2)
    label_head.run(label_head.Config(store=out, out=out.parent / "head.safetensors", labels="20%"))
    return out


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run("name", method=...) trains in tmp_path/name."""

    def train(name: str = "run", **flags: Any) -> dict[str, Any]:
        method = flags.pop("method").replace("HEAD", str(store.parent / "head.safetensors"))
        flags = {"student": (CONVNET,), **flags}
        return distill.run(plain.config(flags.pop("store", store), tmp_path / name, method=method, **flags))

    return train


def runs_in(out: Path) -> list[Path]:
    """The run folders below a folder, sorted."""
    return sorted(manifest.parent for manifest in out.rglob("manifest.json"))


# ---------------------------------------------------------------- stopped and resumed


def test_every_registered_method_has_a_case_of_resuming() -> None:
    cases = [*plain.CASES.values(), *CASES.values()]
    assert {case.get("method", "compress-1q").partition(":")[0] for case in cases} == set(METHODS.entries) - {"python"}


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_at_any_step_and_resumed_equals_an_uninterrupted_one_to_the_bit(
    name: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    case = {"ema": 0.9, **CASES[name]}

    def train() -> Any:
        return run("stopped", **case)

    stopped_by_signal(train, 0, signal.SIGTERM)
    crashed_at(train, 6)  # the next one resumes from step 4
    save, calls = checkpoint.save, []

    def save_once(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 1:
            crash()  # one of several students is saved at step 8, the others at step 4
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(plain.Crash):
        patch.setattr(checkpoint, "save", save_once)
        train()
    stopped_by_signal(train, 10, signal.SIGINT)
    train()
    run("whole", **case)
    assert len(runs_in(tmp_path / "whole")) == len(case.get("student", (CONVNET,)))
    for one, other in zip(runs_in(tmp_path / "stopped"), runs_in(tmp_path / "whole"), strict=True):
        assert one.name == other.name or len(case.get("student", (CONVNET,))) == 1
        assert_same_run(one, other)


KILLED = {name: plain.CASES[name] for name in ("compress-1q", "compress-2q", "compress-2q-momentum", "seed")} | CASES


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    name: str, kills: int, store: Path, tmp_path: Path, fork_server: plain.ForkServer
) -> None:
    case = {"student": (CONVNET,), "ema": 0.9, "save_every": 5, **KILLED[name], "val": None}
    case["method"] = case.get("method", "compress-1q").replace("HEAD", str(store.parent / "head.safetensors"))
    whole = plain.config(store, tmp_path / "whole", **case, steps=20 + 20 * kills)
    line, generator = ["distill", *to_flags(replace(whole, out=tmp_path / "killed"))], random.Random(name)

    def steps() -> int:
        return min(map(newest_step, runs_in(tmp_path / "killed")), default=0)

    killed = 0
    for _ in range(kills):
        pid, goal = fork_server.start(line), steps() + 5
        plain.wait_until(lambda goal=goal: steps() >= goal)  # type: ignore[misc]
        time.sleep(generator.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(pid, signal.SIGKILL)
        killed += fork_server.wait()[0] == -signal.SIGKILL
    assert killed
    fork_server.start(line)
    status, stderr = fork_server.wait()
    assert status == 0, stderr
    assert not list((tmp_path / "killed").rglob("*.part")), "part files of killed processes are left"
    distill.run(whole)
    for one, other in zip(runs_in(tmp_path / "killed"), runs_in(tmp_path / "whole"), strict=True):
        assert_same_run(one, other)


@pytest.mark.parametrize("name", ["compress-2q", "compress-2q-momentum", "compress-1q", "seed", *CASES])
def test_a_learning_rate_far_too_high_never_leaves_a_checkpoint_with_bad_weights(
    name: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    case = {**CASES.get(name, {"method": name}), "lr": 1e30, "clip": None}
    with pytest.raises(UserError, match=r"not finite|the loss is (nan|inf)"):
        run(save_every=1, **case)
    assert runs_in(tmp_path / "run")
    for folder in runs_in(tmp_path / "run"):
        assert not (folder / "student.safetensors").exists()
        for file in (folder / "checkpoints").glob("*"):
            saved = checkpoint.load(file)
            assert all(bool(t.isfinite().all()) for t in saved["student"].values())


@pytest.mark.parametrize(("student", "projectors"), [("convnet:channels=4+8", 2), ("convnet:channels=4+16", 0)])
def test_esvit_projects_a_student_whose_width_differs_from_the_teachers(
    student: str, projectors: int, run: Callable[..., Any], tmp_path: Path
) -> None:
    run(method="esvit:bank=50,crops=0", student=(student,), steps=2, lr=0.01)
    saved = checkpoint.load(max((tmp_path / "run/checkpoints").glob("step-*.pt")))
    assert len([name for name in saved["method"] if name.endswith("projector.weight")]) == projectors


# ---------------------------------------------------------------- several students


def test_peers_of_one_spec_have_folders_name_and_name_2_and_different_initial_weights(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(method="dogo", student=(CONVNET, CONVNET, TINY), steps=1, lr=1e-9)
    names = ["convnet-channels-4-8", "convnet-channels-4-8-2", "convnet-channels-3-6"]
    assert [Path(run).name for run in result["runs"]] == names
    one, two = (safetensors.torch.load_file(tmp_path / "run" / name / "student.safetensors") for name in names[:2])
    assert not torch.allclose(one["blocks.0.0.weight"], two["blocks.0.0.weight"])
    identity = json.loads((tmp_path / "run" / names[1] / "manifest.json").read_text())["identity"]
    assert [peer["spec"] for peer in identity["peers"]] == [CONVNET, CONVNET, TINY]


def test_adding_a_peer_to_a_run_is_refused_with_what_differs(run: Callable[..., Any]) -> None:
    flags = {"method": "dogo", "pairing": "fresh", "lr": 1e-9, "steps": 1}
    run(student=(CONVNET, TINY), **flags)
    with pytest.raises(UserError, match=r"other settings: peers\.2 is null there, .*convnet:channels=5.* asked"):
        run(student=(CONVNET, TINY, "convnet:channels=5"), **flags)


def test_independent_peers_see_different_views(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from compress_ssl.pipeline.methods.dogo import Dogo

    seen: list[list[torch.Tensor]] = []
    forward = Dogo.forward

    def recording_forward(self: Dogo, batch: Any, outputs: Any) -> Any:
        seen.append(batch.images)
        assert batch.student_views.shape == (BATCH, 4) and len({*batch.student_views[0].tolist()}) == 4
        assert not batch.teacher, "nothing is read from the store"
        return forward(self, batch, outputs)

    monkeypatch.setattr(Dogo, "forward", recording_forward)
    run(method="dogo", student=(CONVNET, TINY), steps=2, lr=0.01)
    for one, two in seen:
        assert one.shape == two.shape == (2 * BATCH, 3, 8, 8) and not torch.equal(one, two)


def test_peers_that_read_no_features_may_use_more_fresh_views_than_are_stored(run: Callable[..., Any]) -> None:
    flags = {"student": (CONVNET, TINY), "pairing": "fresh", "views": 2, "steps": 3, "lr": 0.01}
    assert len(run("dogo", method="dogo", **flags)["runs"]) == 2, "one random view is stored, and each step shows four"
    words = "^1 view to train on, but --pairing fresh with --views-per-step 2 needs 2; .* --views 3 or more$"
    with pytest.raises(UserError, match=words):
        run("frozen", method="dogo-frozen", **flags)


def test_peers_with_too_few_views_and_a_single_peer_are_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    words = "6 views to train on, but --pairing same with --views-per-step 8 needs 8; .* --views 9 .* --pairing fresh$"
    with pytest.raises(UserError, match=words):
        run(method="dogo", student=(CONVNET, TINY, RESNET, "convnet:channels=5"))
    with pytest.raises(UserError, match="repeat --student"):
        run(method="dogo")
    with pytest.raises(UserError, match="esvit needs --views-per-step 2 or more, not 1"):
        run(method="esvit", views_per_step=1)
    assert not (tmp_path / "run").exists()


DIVERGING = """
from compress_ssl.pipeline.methods.regression import Regression
from compress_ssl.pipeline.methods.dogo import Dogo
class Fragile(Regression):
    def __init__(self, *, context):
        super().__init__(context=context)
        self.breaks = context.students[0].spec == "SPEC"
    def forward(self, batch, outputs):
        (loss,) = super().forward(batch, outputs)
        return [loss * float("nan") if self.breaks and batch.step == 9 else loss]
class Pair(Dogo):
    def forward(self, batch, outputs):
        first, *others = super().forward(batch, outputs)
        return [first * float("nan") if batch.step == 9 else first, *others]
"""


@pytest.fixture
def diverging(tmp_path: Path) -> str:
    (tmp_path / "diverging.py").write_text(DIVERGING.replace("SPEC", TINY))
    return f"python:{tmp_path / 'diverging.py'}"


def test_of_several_students_only_the_one_that_diverges_stops_and_the_final_error_names_it(
    diverging: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    trio = (CONVNET, TINY, "convnet:channels=5")
    for _ in range(2):  # the same command again fails in the same way
        with pytest.raises(UserError) as end:
            run(method=f"{diverging}:Fragile", student=trio)
        assert "convnet-channels-3-6: the loss is nan at step 9" in str(end.value)
        assert "The other 2 students are finished" in str(end.value)
    assert newest_step(tmp_path / "run/convnet-channels-3-6") == 8
    assert not (tmp_path / "run/convnet-channels-3-6/student.safetensors").exists()
    for student, name in ((CONVNET, "convnet-channels-4-8"), ("convnet:channels=5", "convnet-channels-5")):
        run(name, method=f"{diverging}:Fragile", student=(student,))
        assert_same_run(tmp_path / "run" / name, tmp_path / name)


def test_peers_stop_together(diverging: str, run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="convnet-channels-4-8 and .*convnet-channels-3-6: the loss is nan at step 9"):
        run(method=f"{diverging}:Pair", student=(CONVNET, TINY), lr=0.01)
    assert [newest_step(folder) for folder in runs_in(tmp_path / "run")] == [8, 8]
    assert not list((tmp_path / "run").rglob("student.safetensors"))


def test_adding_and_removing_students_between_commands_does_not_change_the_others(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    third = "convnet:channels=5"
    names = {CONVNET: "convnet-channels-4-8", TINY: "convnet-channels-3-6", third: "convnet-channels-5"}
    flags = {"method": "crd:negatives=30"}
    stopped_by_signal(lambda: run("many", student=(CONVNET, TINY), **flags), 5, signal.SIGTERM)
    # one student is removed, one is added
    stopped_by_signal(lambda: run("many", student=(TINY, third), **flags), 3, signal.SIGTERM)
    assert [newest_step(tmp_path / "many" / names[s]) for s in (CONVNET, TINY, third)] == [6, 6, 4]
    run("many", student=(CONVNET, TINY, third), **flags)
    for student, name in names.items():
        run(name, student=(student,), **flags)
        assert_same_run(tmp_path / "many" / name, tmp_path / name)


def test_a_single_student_of_several_continues_its_run_in_its_own_folder(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run(student=(CONVNET, TINY), method="compress-1q", steps=6)
    alone = run(student=(TINY,), method="compress-1q", steps=9)
    assert alone["runs"] == [str(tmp_path / "run/convnet-channels-3-6")]
    assert newest_step(tmp_path / "run/convnet-channels-3-6") == 9
    assert newest_step(tmp_path / "run/convnet-channels-4-8") == 6
    third = run(student=("convnet:channels=5",), method="compress-1q", steps=2)
    assert third["runs"] == [str(tmp_path / "run/convnet-channels-5")]
    assert not (tmp_path / "run/manifest.json").exists()


def test_an_image_is_decoded_once_per_step_for_all_students_sizes_and_crops(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, steps, load = Counter[int](), [], Digits.load

    def counting_load(self: Digits, i: int) -> Any:
        loads[i] += 1
        return load(self, i)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: steps.append(sum(loads.values())))
        patch.setattr(Digits, "load", counting_load)
        students = (CONVNET, TINY, RESNET, "convnet:channels=5")
        run(method="seed:bank=50", student=students, steps=5, views_per_step=3, image_size=None)
    probes = sum(loads.values()) - 5 * BATCH
    assert 0 <= probes <= 4, "probe images that are read before the first step"
    assert steps == [4 * BATCH + probes]


# ---------------------------------------------------------------- exported heads, missing arrays


def test_simclr_v2_exports_the_students_classifier(run: Callable[..., Any], tmp_path: Path) -> None:
    run(method="simclr-v2:head=HEAD", steps=2)
    head = linear_head.load(tmp_path / "run/head.safetensors")
    assert (head.classes, head.width, head.names, head.unit) == (10, 8, tuple("0123456789"), False)
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["method"]
    assert torch.equal(last["classifier.weight"], head.weight) and torch.equal(last["classifier.bias"], head.bias)
    run("other", method="regression", steps=2)
    assert not (tmp_path / "other/head.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("esvit", "esvit needs 'regions' of the teacher, .* export with --keep embedding,regions"),
        ("seed:small=true", "needs 'local_embedding' .* export with --local-views 6"),
        ("seed:target=projection", "needs 'projection' .* --keep embedding,projection .* head=fc"),
        ("dogo-frozen:target=projection", "needs 'projection'"),
        ("simclr-v2", "compress label-head .* or export with --keep embedding,logits"),
    ],
)
def test_a_store_without_an_array_that_a_method_needs_is_refused_with_the_flags_to_export_it(
    method: str, words: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    export(tmp_path / "bare", views=3, limit=20)
    with pytest.raises(UserError, match=words):
        run(method=method, store=tmp_path / "bare")
    assert not (tmp_path / "run").exists()


OWN = """
from compress_ssl.pipeline.methods.base import Method, Needs
class Cross(Method):
    needs = Needs(pairings=("cross",))
    def __init__(self, *, context):
        super().__init__()
    def forward(self, batch, outputs):
        return [out["embedding"].square().mean() for out in outputs]
"""


def test_a_pairing_that_a_method_cannot_use_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    method = f"python:{tmp_path / 'own.py'}:Cross"
    with pytest.raises(UserError, match="needs --pairing cross, not same"):
        run(method=method)
    assert not (tmp_path / "run").exists()
    run(method=method, pairing="cross", steps=1)


@pytest.mark.parametrize("method", ["regression", "compress-1q:bank=24"])
def test_a_feature_that_is_not_finite_is_an_error_in_a_batch_and_among_anchors(
    method: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    export(tmp_path / "damaged", views=2, limit=24, batch_size=8, codec="float32")
    store = FeatureStore(Folder(tmp_path / "damaged"))
    start, stop = store.span(0)
    rows = slice(start, stop)
    values = np.stack([store.stored("embedding", v, rows)[0] for v in (0, 1)], 1)
    values[5, 1, 3] = np.nan
    store.storage.delete(done_key(0, 0, 2))
    tables = store.table("status", rows), store.table("content", rows)
    store.write(Shard(0, start, stop, (0, 1)), {"embedding": (values, None)}, *tables, {})
    with pytest.raises(UserError, match="embedding of image digits/.* in view 1 is not finite; .* compress verify"):
        run(method=method, store=tmp_path / "damaged", batch_size=8)
    assert not (tmp_path / "run/student.safetensors").exists()
