"""Distill end to end: a run that is stopped anywhere and resumed equals one that was never stopped, bit for bit."""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.jsonl import read_jsonl
from compress_ssl.pipeline.runtime.lease import Lease
from compress_ssl.pipeline.runtime.signals import Interrupted
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.source_images import open_store_images
from compress_ssl.pipeline.training import checkpoint
from compress_ssl.pipeline.training.run import TrainingRun
from compress_ssl.pipeline.training.sampler import make_sampler
from compress_ssl.stages import distill, export_teacher
from compress_ssl.stages.distill import Config

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "convnet:channels=8+16,pretrained=false"
RESNET = "cifar-resnet:8,width=4,drop_path=0.5"
CONVNET = "convnet:channels=4+8"
STEPS, BATCH, IMAGES = 14, 24, 120  # five steps per epoch


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits in 4 views, embedded by a small random teacher."""
    out = tmp_path_factory.mktemp("store") / "store"
    export(out)
    return out


def export(out: Path, data: str = "digits", **flags: Any) -> None:
    default = {"views": 4, "image_size": 8, "limit": IMAGES, "batch_size": 40, "workers": 0, "device": "cpu"}
    export_teacher.run(export_teacher.Config(data, TEACHER, out, **{**default, **flags}))


def config(store: Path, out: Path, **flags: Any) -> Config:
    default = {
        "student": (RESNET,), "method": "compress-1q", "steps": STEPS, "batch_size": BATCH, "image_size": 8,
        "lr": 0.2, "save_every": 4, "workers": 0, "device": "cpu",
    }  # fmt: skip
    return Config(store=store, out=out, **{**default, **flags})


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run("name", lr=0.1, ...) trains in tmp_path/name."""
    return lambda name="run", **flags: distill.run(config(flags.pop("store", store), tmp_path / name, **flags))


# ---------------------------------------------------------------- comparing runs


def leaves(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a nested checkpoint."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from leaves(value, f"{name}/{key}")
    elif isinstance(part, list | tuple):
        for number, value in enumerate(part):
            yield from leaves(value, f"{name}/{number}")
    else:
        yield name, part


def logged_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without the numbers that depend on the clock."""
    return [
        {key: value for key, value in row.items() if key not in ("images_per_s", "data_wait")}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: the exported student, every tensor of the last checkpoint, every logged number."""
    a, b = (dict(leaves(checkpoint.load(run / "checkpoints/last.pt"))) for run in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, f"{name} differs"
    assert logged_rows(one) == logged_rows(other)
    assert (one / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()


# ---------------------------------------------------------------- stopped and resumed


class Crash(BaseException):
    """Stands for the death of the process: no code of ours catches it."""


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Call `action` at the beginning of step `number`, counted from 0."""
    step = TrainingRun.step

    def step_with_action(self: TrainingRun, n: int, *rest: Any) -> Any:
        if n == number:
            action()
        return step(self, n, *rest)

    monkeypatch.setattr(TrainingRun, "step", step_with_action)


def stopped_by_signal(train: Callable[[], Any], number: int, signum: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, number, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted) as stop:
            train()
    assert stop.value.signum == signum
    assert f"saved at step {number + 1} of " in str(stop.value) and "repeat the command to continue" in str(stop.value)


def test_no_loader_process_is_left_after_training_was_stopped(run: Callable[..., Any]) -> None:
    """The program would wait for it without end when it exits, because loader processes ignore signals."""
    before = set(psutil.Process().children())
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted) as stop:
            run(workers=1)
    assert stop.traceback  # it keeps every frame of the training alive, and so the loader's objects
    assert set(psutil.Process().children()) <= before


def crash(*_: Any, **__: Any) -> None:
    raise Crash


def crashed_at(train: Callable[[], Any], number: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        at_step(patch, number, crash)
        train()


def crashed_while_saving(train: Callable[[], Any], function: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, function, crash)
        train()


DROPOUT = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
"""

CASES: dict[str, dict[str, Any]] = {
    "compress-2q": {"method": "compress-2q:bank=50"},
    "compress-2q-momentum": {
        "method": "compress-2q-momentum:bank=50,momentum=0.9",
        "pairing": "fresh", "optimizer": "adamw", "lr": 0.01, "clip": 1.0, "warmup_epochs": 0.5,
    },
    "compress-1q": {"pairing": "cross", "views_per_step": 2, "norm_decay": False},
    "seed": {"method": "seed:bank=50", "precision": "bf16", "val": "digits:split=test", "val_every": 1.0},
    "fp16": {"method": "compress-2q:bank=50", "precision": "fp16", "clip": 1.0, "optimizer": "adamw", "lr": 0.01},
    "a bank that starts with random anchors": {"method": "compress-2q:bank=119,start=random"},
    "dropout": {"method": "compress-2q-momentum:bank=50", "student": ("python:DROPOUT:net",)},
    "a step schedule without a moving average": {"schedule": "step", "method": "seed:bank=50,start=empty", "ema": None},
    "timm": {"student": ("timm:test_resnet,drop_path_rate=0.3,drop_rate=0.2",), "image_size": 32},
}  # fmt: skip


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in CASES), ("compress-2q-momentum", 1)])
def test_a_run_stopped_at_any_step_and_resumed_equals_an_uninterrupted_one_to_the_bit(
    name: str, workers: int, run: Callable[..., Any], tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    case = case_flags(name, tmp_path)

    def train() -> Any:
        return run("stopped", workers=workers, **case)

    stopped_by_signal(train, 0, signal.SIGTERM)
    stopped_by_signal(train, 4, signal.SIGINT)
    crashed_at(train, 5)  # resumes from the checkpoint of step 5
    crashed_at(train, 11)  # the next one resumes from the checkpoint of step 8
    with open(tmp_path / "stopped/metrics.jsonl", "a") as log:
        log.write('{"step": 8, "lo')  # a line that was only partly written
    part = f".step-00000012.pt.0123abcd.{2**22 + 7}.{platform.node()}.part"  # of a process that no longer exists
    (tmp_path / "stopped/checkpoints" / part).write_bytes(b"half a checkpoint")
    crashed_while_saving(train, "link")
    stopped_by_signal(train, 12, signal.SIGTERM)
    train()
    assert_same_run(tmp_path / "stopped", reference(name))
    assert not list((tmp_path / "stopped").rglob("*.part")), "part files of killed processes are left"


def case_flags(name: str, folder: Path) -> dict[str, Any]:
    case = {"ema": 0.9, **CASES[name]}
    if name == "dropout":
        (folder / "dropout.py").write_text(DROPOUT)
        case["student"] = (f"python:{folder / 'dropout.py'}:net",)
    return case


@pytest.fixture
def reference(run: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    """reference(name) trains a case without interruption and returns its folder."""

    def train(name: str) -> Path:
        run("whole", **case_flags(name, tmp_path))
        return tmp_path / "whole"

    return train


def test_a_signal_during_saving_stops_the_run_after_the_next_step(run: Callable[..., Any], tmp_path: Path) -> None:
    save, calls = checkpoint.save, []

    def save_with_signal(*arguments: Any) -> None:
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(arguments)
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="saved at step 5 of 14"):
        patch.setattr(checkpoint, "save", save_with_signal)
        run("stopped", student=TWO["student"])
    assert [newest_step(tmp_path / "stopped" / name) for name in NAMES] == [5, 5]


def test_the_students_of_the_cases_draw_random_numbers_in_every_step(run: Callable[..., Any], tmp_path: Path) -> None:
    """Otherwise the test of resuming would not show that random numbers continue correctly."""
    (tmp_path / "dropout.py").write_text(DROPOUT)
    for number, student in enumerate((RESNET, f"python:{tmp_path / 'dropout.py'}:net")):
        states = []
        for seed in (1, 2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "manual_seed", other_seed(torch.manual_seed, seed))
                run(f"{number}-{seed}", student=(student,), steps=4)
            states.append((tmp_path / f"{number}-{seed}" / "student.safetensors").read_bytes())
        assert states[0] != states[1]


def other_seed(manual_seed: Callable[[int], Any], seed: int) -> Callable[[int], Any]:
    """Keep seed 0, from which the initial weights are drawn, and change every other seed."""
    return lambda asked: manual_seed(asked if asked == 0 else asked ^ seed)


# ---------------------------------------------------------------- processes that are killed

SELF_KILLING = """
import os, signal
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        if self.training and os.environ.get("KILL_AT"):
            name, step = os.environ["KILL_AT"].split(":")
            Net.calls = getattr(Net, "calls", 0) + 1
            if Net.calls == int(step):
                (os.killpg if name == "SIGINT" else os.kill)(os.getpid(), getattr(signal, name))
        return super().forward(x)
def net():
    return Net(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(54, 5))
"""


def command(store: Path, out: Path, student: str, steps: int = 90, method: str = "compress-2q") -> list[str]:
    flags = f"--method {method}:bank=50 --steps {steps} -b {BATCH} --image-size 8 --lr 0.2 --save-every 7 --ema 0.9"
    paths = ["--store", str(store), "--student", student, "--out", str(out)]
    return ["distill", *paths, *flags.split(), "--device", "cpu", "--workers", "1"]


def start_program(line: list[str]) -> "subprocess.Popen[str]":
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "compress_ssl.cli", *line], env=env, **pipes)


SERVER = """
import importlib, json, os, sys
from compress_ssl import cli
for module in sys.argv[1:]:
    importlib.import_module(module)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if not (pid := os.fork()):
        os.setsid()
        for number, name in enumerate(("/dev/null", job["stdout"], job["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.environ["KILL_AT"] = job["kill_at"]
        sys.argv = ["compress", *job["line"]]
        cli.main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
IMPORTED = [  # what a distill command imports, so that a fork starts at once
    "compress_ssl.stages.distill",
    "compress_ssl.pipeline.training.run",
    "compress_ssl.pipeline.methods.compress",
    "compress_ssl.pipeline.models.python",
    "sklearn.datasets",
]


class ForkServer:
    """A process that has imported the program. Every `start` forks it, and the fork runs cli.main."""

    def __init__(self, folder: Path):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, *IMPORTED], cwd=ROOT, env=env, **pipes)
        assert self._answer() == "ready"

    def start(self, line: list[str], kill_at: str = "") -> int:
        """Start the program and return its process id.

        kill_at: "SIGNAL:N" makes the self-killing student send a signal at its Nth forward pass in training.
        """
        job = {
            "line": line,
            "kill_at": kill_at,
            "stdout": str(self.folder / "stdout"),
            "stderr": str(self.folder / "stderr"),
        }
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def wait(self) -> tuple[int, str]:
        """(exit status, or minus the signal that killed the program; its stderr)."""
        return int(self._answer()), (self.folder / "stderr").read_text()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true after {seconds} seconds"
        time.sleep(0.001)


def newest_step(out: Path) -> int:
    return max(checkpoint.list_steps(out / "checkpoints"), default=0)


@pytest.fixture
def self_killing(tmp_path: Path) -> str:
    (tmp_path / "self_killing.py").write_text(SELF_KILLING)
    return f"python:{tmp_path / 'self_killing.py'}:net"


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.mark.slow
def test_the_command_interrupted_terminated_and_killed_ends_with_the_same_bits(
    store: Path, tmp_path: Path, self_killing: str, fork_server: ForkServer
) -> None:
    out = tmp_path / "killed"
    line = command(store, out, self_killing)
    for name, code in (("SIGINT", 130), ("SIGTERM", 143)):
        before = newest_step(out)
        fork_server.start(line, f"{name}:9")
        status, stderr = fork_server.wait()
        assert status == code, stderr
        assert f"stopped: saved at step {before + 9} of 90; repeat the command to continue" in stderr
        assert "Traceback" not in stderr
        assert newest_step(out) == before + 9
    pid = fork_server.start(line)
    wait_until(lambda: newest_step(out) >= 28)  # from here on it may be in a step or saving
    os.kill(pid, signal.SIGKILL)
    assert fork_server.wait()[0] == -signal.SIGKILL
    fork_server.start(line, "SIGKILL:20")
    assert fork_server.wait()[0] == -signal.SIGKILL
    stdout, stderr = start_program(line).communicate(timeout=300)
    assert stdout.splitlines()[-1:] == [f"{out}: 90 steps, student.safetensors"], stderr
    assert not list(out.rglob("*.part")), "part files of killed processes are left"
    whole = config(store, tmp_path / "whole", student=(self_killing,), method="compress-2q:bank=50", steps=90, ema=0.9)
    distill.run(replace(whole, save_every=50))
    assert_same_run(out, tmp_path / "whole")


def test_a_second_command_is_refused_while_a_run_is_being_trained(run: Callable[..., Any], tmp_path: Path) -> None:
    run(steps=4)
    before = snapshot(tmp_path / "run")
    with Lease(Folder(tmp_path / "run")):
        for flags in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=r"run is being written by process \d+"):
                run(**flags)
    assert snapshot(tmp_path / "run") == before
    run()
    assert newest_step(tmp_path / "run") == STEPS


# ---------------------------------------------------------------- finished runs, longer runs, changed settings


def test_repeating_a_finished_command_reports_that_and_changes_no_file(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run()["summary"] == f"{tmp_path / 'run'}: 14 steps, student.safetensors"
    before = snapshot(tmp_path / "run")
    assert run()["summary"] == f"{tmp_path / 'run'}: is finished already, 14 steps, student.safetensors"
    assert snapshot(tmp_path / "run") == before


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_after_a_crash_behind_the_last_step_the_same_command_exports_the_student(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    from compress_ssl.pipeline.training.student import Student

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Student, "export", crash)
        run()
    assert not (tmp_path / "run/student.safetensors").exists()
    run()
    run("whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_more_epochs_continue_a_finished_run_and_keep_its_log(run: Callable[..., Any], tmp_path: Path) -> None:
    run(steps=None, epochs=2.0)
    first = logged_rows(tmp_path / "run")
    run(steps=None, epochs=3.0, schedule=None)
    assert newest_step(tmp_path / "run") == 15
    grown = logged_rows(tmp_path / "run")
    assert grown[: len(first)] == first
    assert [row["step"] for row in grown] == [1, 10, 11, 15]


def test_with_a_constant_rate_a_run_made_longer_equals_one_of_full_length(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    for steps in (5, 9, 14):
        run("grown", steps=steps, schedule="constant", ema=0.9)
    run("whole", schedule="constant", ema=0.9)
    one, other = (checkpoint.load(tmp_path / name / "checkpoints/last.pt") for name in ("grown", "whole"))
    assert all(torch.equal(one["student"][key], value) for key, value in other["student"].items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.1}, "training.lr is 0.2 there, 0.1 asked"),
        ({"momentum": 0.5}, "training.momentum is 0.9 there, 0.5 asked"),
        ({"weight_decay": 0.0}, "training.weight_decay is 0.0001 there, 0.0 asked"),
        ({"norm_decay": False}, "training.norm_decay is true there, false asked"),
        ({"optimizer": "adamw"}, 'training.optimizer is "sgd" there, "adamw" asked'),
        ({"schedule": "cosine"}, 'training.schedule.kind is "step" there, "cosine" asked'),
        ({"warmup_epochs": 1.0}, "training.schedule.warmup_epochs is 0.0 there, 1.0 asked"),
        ({"clip": 1.0}, "training.clip is null there, 1.0 asked"),
        ({"ema": 0.9}, "training.ema is null there, 0.9 asked"),
        ({"precision": "bf16"}, 'training.precision is "fp32" there, "bf16" asked'),
        ({"seed": 1}, "training.seed is 0 there, 1 asked"),
        ({"batch_size": 20}, "batch_size is 24 there, 20 asked"),
        ({"method": "compress-1q:tau=0.05"}, "options.tau is 0.04 there, 0.05 asked (--method tau=)"),
        ({"method": "regression"}, 'method is "compress-1q" there, "regression" asked (--method)'),
        ({"pairing": "cross"}, 'pairing is "same" there, "cross" asked'),
        ({"views_per_step": 2}, "views_per_step is 1 there, 2 asked"),
        ({"views": 3}, "views is [1, 2, 3] there, [1, 2] asked"),
        ({"image_size": 12}, "student.preprocessing.size is 8 there, 12 asked"),
        ({"student": (CONVNET,)}, f'student.spec is "{RESNET}" there, "{CONVNET}" asked'),
    ],
)
def test_changed_settings_are_refused_with_the_list_of_what_differs(
    changed: dict[str, Any], words: str, store: Path, existing_run: Path
) -> None:
    with pytest.raises(Mismatch) as refusal:
        distill.run(config(store, existing_run, steps=3, **changed))
    assert words in str(refusal.value)
    assert "Repeat them, name another folder, or start anew (with --overwrite" in str(refusal.value)


@pytest.fixture(scope="module")
def existing_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("existing") / "run"
    distill.run(config(store, out, steps=2))
    return out


def test_all_differing_settings_are_listed_in_one_error(store: Path, existing_run: Path) -> None:
    with pytest.raises(Mismatch, match=r"batch_size is .*; training.lr is .*; training.seed is "):
        distill.run(config(store, existing_run, lr=0.1, seed=4, batch_size=9))


def test_settings_that_do_not_change_the_result_may_change_between_commands(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run("moved", steps=5)
    changed = {"save_every": 3, "workers": 1, "device": "auto", "val": "digits:split=test", "val_every": 2.0}
    run("moved", **changed)
    run("whole")
    one, other = (tmp_path / name / "student.safetensors" for name in ("moved", "whole"))
    assert one.read_bytes() != other.read_bytes(), "steps=5 had another schedule"
    assert newest_step(tmp_path / "moved") == STEPS


def test_overwrite_starts_anew_and_renames_the_old_run(run: Callable[..., Any], tmp_path: Path) -> None:
    run(lr=0.1)
    old = (tmp_path / "run/student.safetensors").read_bytes()
    run(overwrite=True, views=3)
    run("whole", views=3)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run.old-1/student.safetensors").read_bytes() == old


def test_a_refused_overwrite_leaves_the_old_run_in_its_place(run: Callable[..., Any], tmp_path: Path) -> None:
    run(steps=2)
    before = snapshot(tmp_path)
    for wrong in ({"method": "compress-1q:bank=500"}, {"student": ("cifar-resnet:9",)}, {"views": 9}):
        with pytest.raises(UserError):
            run(overwrite=True, **wrong)
    assert snapshot(tmp_path) == before


def test_a_folder_that_compress_did_not_make_is_not_touched(
    run: Callable[..., Any], tmp_path: Path, store: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no manifest.json of ours; name another folder"):
        run()
    with pytest.raises(UserError, match="--overwrite touches only what compress made"):
        run(overwrite=True)
    with pytest.raises(UserError, match="a store, not a run"):
        distill.run(config(store, store))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_manifest_of_another_program_is_not_taken_for_a_run(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run/extension").mkdir(parents=True)
    (tmp_path / "run/extension/manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(UserError, match="run is not empty and holds no manifest.json of ours"):
        run()


# ---------------------------------------------------------------- changes of the store and of the images


def test_fewer_views_than_stored_may_be_used_but_not_more(run: Callable[..., Any], tmp_path: Path) -> None:
    run(views=2, steps=6)
    identity = json.loads((tmp_path / "run/manifest.json").read_text())["identity"]
    assert identity["views"] == [1]
    bank = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["method"]
    assert bank["bank.views"].unique().tolist() == [1]
    with pytest.raises(UserError, match="--views 5 was asked, but .* has 4; export more, or use fewer"):
        run("other", views=5)
    with pytest.raises(UserError, match="--pairing cross with --views-per-step 1 needs 2"):
        run("other", views=2, pairing="cross")


def test_a_run_continues_with_its_views_when_the_store_has_more_by_then(store: Path, tmp_path: Path) -> None:
    grown, out = tmp_path / "grown", tmp_path / "run"
    shutil.copytree(store, grown)
    stopped_by_signal(lambda: distill.run(config(grown, out)), 5, signal.SIGTERM)
    export(grown, views=6)
    distill.run(config(grown, out))
    distill.run(config(store, tmp_path / "whole"))
    assert_same_run(out, tmp_path / "whole")
    distill.run(config(grown, tmp_path / "new", steps=2))
    assert json.loads((tmp_path / "new/manifest.json").read_text())["identity"]["views"] == [1, 2, 3, 4, 5]


def test_a_run_accepts_its_store_at_another_path_but_no_other_store(store: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "run"
    distill.run(config(store, out, steps=4))
    shutil.copytree(store, moved)
    distill.run(config(moved, out, steps=6))
    export(tmp_path / "other", seed=1)
    with pytest.raises(Mismatch, match="store is .* there, .* asked"):
        distill.run(config(tmp_path / "other", out))


def test_an_unfinished_store_is_refused(store: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(store, half)
    next((half / "done").iterdir()).unlink()
    with pytest.raises(UserError, match="lacks 1 of .* repeat the command that made it"):
        distill.run(config(half, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def write_image(folder: Path, i: int, shift: int = 0) -> Path:
    pixels = np.random.default_rng(i + shift).integers(0, 255, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder / f"{i:02d}.png"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        write_image(folder, i)
    (folder / "07.png").write_bytes(b"no image")
    export(tmp_path / "store", f"folder:{folder}", views=3)
    return folder


def train_on(folder: Path, **flags: Any) -> Any:
    return distill.run(config(folder.parent / "store", folder.parent / "run", **{"batch_size": 6, **flags}))


def test_a_changed_image_is_an_error_in_the_step_that_shows_it(images: Path) -> None:
    write_image(images, 3, shift=100)  # the probe images are 0, 10 and 19
    with pytest.raises(UserError, match="image 03.png changed since the export: its content differs .* put it back"):
        train_on(images)
    write_image(images, 3)
    train_on(images)


def test_an_image_that_became_unreadable_is_an_error_with_its_name_and_the_reason(images: Path) -> None:
    (images / "04.png").write_bytes(b"")
    with pytest.raises(UserError, match="image 04.png changed since the export: the file is empty"):
        train_on(images)


def test_a_changed_probe_image_is_an_error_before_the_first_step(images: Path) -> None:
    write_image(images, 10, shift=100)
    with pytest.raises(UserError, match="1 of 3 probe images do not look as they did .* the first is 10.png"):
        train_on(images)
    assert not (images.parent / "run").exists()


def test_views_that_are_rendered_differently_are_refused_unless_allowed(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compress_ssl.pipeline.store.render_probe.digest_probe_views", lambda *_: "rendered otherwise")
    with pytest.raises(UserError, match="3 of 3 probe images do not look as they did .* --allow-other-pixels"):
        train_on(images)
    train_on(images, allow_other_pixels=True)
    assert "warning: 3 of 3 probe images do not look as they did" in capsys.readouterr().err


def test_missing_and_additional_images_are_refused(images: Path) -> None:
    (images / "05.png").rename(images / "55.png")
    with pytest.raises(UserError, match="1 is gone, as 05.png; 1 is new, as 55.png; give the right ones with --data"):
        train_on(images)


def test_moved_images_are_opened_with_data(images: Path) -> None:
    moved = images.rename(images.with_name("moved"))
    with pytest.raises(UserError, match="images does not exist"):
        train_on(images)
    train_on(images, data=f"folder:{moved}")


def test_bad_images_are_left_out(images: Path) -> None:
    train_on(images, steps=8)
    bank = checkpoint.load(images.parent / "run/checkpoints/last.pt")["method"]["bank.rows"]
    assert 7 not in bank.tolist()
    identity = json.loads((images.parent / "run/manifest.json").read_text())["identity"]
    assert identity["images"] == 19


# ---------------------------------------------------------------- errors

DIVERGING = """
from compress_ssl.pipeline.methods.compress import OneQueue
class Diverging(OneQueue):
    def forward(self, batch, outputs):
        losses = super().forward(batch, outputs)
        return [loss * float("VALUE") if batch.step == 9 else loss for loss in losses]
"""


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_is_an_error_with_step_and_causes_and_keeps_the_last_checkpoint(
    value: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "diverging.py").write_text(DIVERGING.replace("VALUE", value))
    with pytest.raises(UserError) as stop:
        run(method=f"python:{tmp_path / 'diverging.py'}:Diverging")
    for words in (
        f"the loss is {value} at step 9",
        "learning rate 0.2",
        "lower --lr",
        "--precision bf16",
        "temperature",
    ):
        assert words in str(stop.value)
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert last["step"] == 8
    assert all(bool(t.isfinite().all()) for t in last["student"].values())
    assert [row["step"] for row in logged_rows(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"student": ()}, "no --student was given"),
        ({"student": (CONVNET, CONVNET)}, "would share"),
        ({"student": ("convnet:channels=4,crop=1", "convnet:channels=4-crop=1")}, "would share"),
        ({"epochs": 2.0}, "--epochs and --steps were both given; keep one"),
        ({"steps": 0}, "--steps is 0, but must be more than 0"),
        ({"steps": None, "epochs": float("inf")}, "--epochs is inf"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"momentum": 1.0}, "--momentum is 1.0"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"pairing": "twins"}, "must be one of same, fresh, cross"),
        ({"precision": "fp8"}, "must be one of fp32, bf16, fp16"),
        ({"seed": -1}, "--seed is -1"),
        ({"method": "compress-3q"}, "did you mean 'compress-"),
        ({"method": "compress-1q:tua=1"}, "has no key 'tua'; did you mean 'tau'?"),
        ({"method": "compress-1q:bank=121"}, "bank=121 was asked, but must be from 1 to the 120 usable images"),
        ({"student": ("cifar-resent:8",)}, "did you mean 'cifar-resnet'?"),
        ({"val": "digits", "val_every": 0.0}, "--val-every is 0.0"),
    ],
)
def test_impossible_settings_are_refused_and_nothing_is_written(
    wrong: dict[str, Any], words: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        run(**wrong)
    assert words in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_with_few_images_batch_and_bank_are_smaller_and_a_message_tells_it(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(batch_size=None, steps=2)
    stderr = capsys.readouterr().err
    assert "batch of 120 instead of 256: that is all the usable images" in stderr
    assert "bank of 60 anchors instead of the published 128000: half of 120 images" in stderr
    assert "global batch 120 images x 1 views" in stderr


def test_a_damaged_checkpoint_is_refused_and_after_deleting_it_the_run_resumes_from_an_earlier_one(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    crashed_at(run, 9)
    newest_file = tmp_path / "run/checkpoints/step-00000008.pt"
    newest_file.write_bytes(newest_file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="step-00000008.pt is damaged .*; delete it to continue from an earlier one"):
        run()
    newest_file.unlink()
    run()
    run("whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize(
    ("student", "build_backbone"),
    [
        ("torchvision:resnet18", lambda: without_fc(torchvision.models.resnet18(weights=None))),
        ("timm:test_resnet", lambda: timm.create_model("test_resnet", num_classes=0)),
    ],
)
def test_the_exported_student_loads_strictly_with_its_own_library(
    student: str, build_backbone: Callable[[], nn.Module], ema: float | None, run: Callable[..., Any], tmp_path: Path
) -> None:
    run(student=(student,), steps=2, image_size=32, batch_size=4, ema=ema, save_every=2)
    network = build_backbone()
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "run/student.safetensors"), strict=True)
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    final = last["average" if ema else "student"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, final[f"backbone.{name}"]), name
    assert any(not torch.equal(last["student"][name], tensor) for name, tensor in final.items()) == bool(ema)
    assert (last["average"] is None) == (ema is None)
    with safetensors.safe_open(tmp_path / "run/student.safetensors", "pt") as file:
        assert file.metadata()["model"] == student
        assert json.loads(file.metadata()["preprocessing"])["size"] == 32


def without_fc(network: Any) -> nn.Module:
    network.fc = nn.Identity()
    return network


@pytest.mark.parametrize("method", ["compress-1q", "seed", "compress-2q-momentum"])
def test_heads_and_banks_are_in_the_checkpoint_but_not_exported(
    method: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    run(method=f"{method}:bank=50", steps=2, student=(CONVNET,))
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert any(name.startswith(("head.", "slow.")) for name in last["method"])
    exported = safetensors.torch.load_file(tmp_path / "run/student.safetensors")
    assert {f"backbone.{name}" for name in exported} == set(last["student"])


def test_the_log_holds_loss_learning_rate_speed_spread_and_agreement(run: Callable[..., Any], tmp_path: Path) -> None:
    run(val="digits:split=test", val_every=2.0)
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    assert [(row["step"], row["epoch"]) for row in logged] == [(1, 0.2), (11, 2.2), (14, 2.8)]
    keys = {"step", "epoch", "loss", "lr", "spread", "agreement", "images_per_s", "data_wait"}
    assert all(row.keys() == keys for row in logged)
    assert all(0 <= row["spread"] <= 1 and 0 <= row["agreement"] <= 100 for row in logged)
    assert [row["lr"] for row in logged] == pytest.approx([0.2, 0.04, 0.008]), "drops after 90 and 120 of 130"
    validations = [row for row in rows if "val_nn" in row]
    assert [row["step"] for row in validations] == [10, 14]
    best = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    assert best["best"] == max(row["val_nn"] for row in validations)
    assert best["step"] == max(validations, key=lambda row: row["val_nn"])["step"]
    assert "from step 0" in (tmp_path / "run/train.log").read_text()
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_val_without_labels_is_refused(run: Callable[..., Any], images: Path) -> None:
    with pytest.raises(UserError, match="has no labels, so nearest neighbours cannot be scored; leave --val out"):
        run("other", val=f"folder:{images}")


# ---------------------------------------------------------------- the training loop


def test_a_run_equals_a_plain_loop_over_pixels_and_stored_features(
    run: Callable[..., Any], store: Path, tmp_path: Path
) -> None:
    """The plain loop is SGD on KL(teacher || student), written without the classes under test."""
    from compress_ssl.pipeline.datasets.digits import Digits
    from compress_ssl.pipeline.models import build
    from compress_ssl.pipeline.runtime.storage import Folder
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.sampler import StepSampler
    from compress_ssl.pipeline.views.augment import draw_variates
    from compress_ssl.pipeline.views.render import render_views

    run(student=(CONVNET,), method="compress-2q:bank=30", steps=6, ema=0.5, schedule="cosine")

    source, digits = FeatureStore(Folder(store)), Digits().subset(IMAGES)
    table = np.stack([source.read("embedding", v) for v in range(4)], 1)  # (N, V, D)
    spec = source.identity.views
    sampler = StepSampler(0, np.arange(IMAGES), (1, 2, 3), BATCH, 1, "same", 6)
    torch.manual_seed(0)
    student = build(CONVNET, image_size=8).train()
    average = {name: p.detach().clone() for name, p in student.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    queue: list[tuple[Tensor, Tensor]] = []
    for step in range(6):
        i, v, u = sampler.step_indices(step)
        pixels = [
            render_views(digits.load(j)[0], spec, draw_variates(0, j, w), w, [(8, "bilinear")])[0]
            for j, w in zip(i, v, strict=True)
        ]
        t = nn.functional.normalize(torch.from_numpy(table[i, u[:, 0]]))
        z = nn.functional.normalize(student(student.prepare(torch.cat(pixels))))
        if queue:
            p = (t @ torch.stack([a for a, _ in queue]).T / 0.04).softmax(1)
            log_q = (z @ torch.stack([a for _, a in queue]).T / 0.04).log_softmax(1)
            loss = nn.functional.kl_div(log_q, p, reduction="batchmean")
        else:
            loss = 0 * z.sum()
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in student.named_parameters():
                velocity[name] = 0.9 * velocity[name] + p.grad + 1e-4 * p
                p -= 0.2 * 0.5 * (1 + math.cos(math.pi * step / 6)) * velocity[name]
                average[name] = 0.5 * average[name] + 0.5 * p
        queue = [*queue, *zip(t, z.detach(), strict=True)][-30:]
    exported = safetensors.torch.load_file(tmp_path / "run/student.safetensors")
    for name, p in average.items():
        torch.testing.assert_close(exported[name.removeprefix("backbone.")], p, rtol=1e-4, atol=1e-6)
    for name, buffer in student.named_buffers():
        torch.testing.assert_close(exported[name.removeprefix("backbone.")], buffer, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- several students

TWO = {"student": (RESNET, CONVNET), "ema": 0.9}
NAMES = ("cifar-resnet-8-width-4-drop_path-0.5", "convnet-channels-4-8")


def test_each_of_several_students_equals_the_student_trained_alone_to_the_bit(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    result = run("both", **TWO)
    assert result["runs"] == [str(tmp_path / "both" / name) for name in NAMES]
    for student, name in zip(TWO["student"], NAMES, strict=True):
        run(name, **{**TWO, "student": (student,)})
        assert_same_run(tmp_path / "both" / name, tmp_path / name)


def test_several_students_stopped_anywhere_and_resumed_equal_uninterrupted_ones(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    def train() -> Any:
        return run("stopped", **TWO)

    crashed_at(train, 2)
    stopped_by_signal(train, 2, signal.SIGTERM)
    save, calls = checkpoint.save, []

    def save_once(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise Crash  # one student is saved at step 4, the other at step 3
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "save", save_once)
        train()
    assert [newest_step(tmp_path / "stopped" / name) for name in NAMES] == [4, 3]
    train()  # the student at step 4 waits for the other
    run("whole", **TWO)
    for name in NAMES:
        assert_same_run(tmp_path / "stopped" / name, tmp_path / "whole" / name)


def test_a_student_that_is_added_later_catches_up_while_the_others_wait(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    third = "convnet:channels=3"
    run("both", **TWO)
    shutil.copytree(tmp_path / "both", tmp_path / "before")
    files = {name: snapshot(tmp_path / "both" / name / "checkpoints") for name in NAMES}
    run("both", **{**TWO, "student": (*TWO["student"], third)})
    assert {name: snapshot(tmp_path / "both" / name / "checkpoints") for name in NAMES} == files
    for name in NAMES:
        assert_same_run(tmp_path / "both" / name, tmp_path / "before" / name)
    run("alone", **{**TWO, "student": (third,)})
    assert_same_run(tmp_path / "both/convnet-channels-3", tmp_path / "alone")


def test_overwrite_renames_the_runs_of_several_students(run: Callable[..., Any], tmp_path: Path) -> None:
    run("both", **TWO, steps=2)
    run("both", **TWO, steps=2, lr=0.1, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == sorted([*NAMES, *(f"{n}.old-1" for n in NAMES)])


def test_the_runs_of_several_students_are_refused_in_the_folder_of_a_run(run: Callable[..., Any]) -> None:
    run(steps=2)
    with pytest.raises(UserError, match="is itself a run, so it cannot hold the runs of several"):
        run(**TWO)


# ---------------------------------------------------------------- what the students of a pass share


def prepare_run(config: Config) -> TrainingRun:
    opened, job = FeatureStore(Folder(config.store)), distill.resolve(config)
    return distill.prepare(
        [job], opened, open_store_images(opened, config.data), make_sampler(opened, job.sampling, config.store)
    )


def test_students_with_equal_preprocessing_share_prepared_images(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_run = prepare_run(config(store, tmp_path / "run", student=(CONVNET, "convnet:channels=3", RESNET)))
    students = [student.model for student in training_run.students]
    students[2].preprocessing = replace(students[2].preprocessing, mean=(0.1, 0.2, 0.3))  # needs other images
    calls, prepare = [], Embedder.prepare
    monkeypatch.setattr(Embedder, "prepare", lambda self, x: (calls.append(self), prepare(self, x))[1])
    for step, view_batch in zip((0, 1), training_run.load_views(0), strict=False):
        training_run.step(step, view_batch, False)
    assert [students.index(student) for student in calls] == [0, 2, 0, 2]


def test_a_student_that_writes_into_its_input_does_not_change_that_of_others(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(first):\n"
        "    return nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def in_place(): return net(nn.ReLU(inplace=True))\n"
        "def plain(): return net(nn.Identity())\n"
    )
    in_place, plain = (f"python:{tmp_path}/nets.py:{name}" for name in ("in_place", "plain"))
    both = run("both", student=(in_place, plain), steps=4)["runs"]
    run("alone", student=(plain,), steps=4)
    assert_same_run(Path(both[1]), tmp_path / "alone")


def test_pixels_for_a_gpu_are_in_pinned_memory(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_run, pinned = prepare_run(config(store, tmp_path / "run")), []
    monkeypatch.setattr(
        "compress_ssl.pipeline.training.batches.iterate_views", lambda view_dataset, workers, pin: pinned.append(pin)
    )
    training_run.load_views(2)
    training_run.batches.device = torch.device("cuda")
    training_run.load_views(2)
    assert pinned == [False, True]


def test_an_array_that_only_a_bank_reads_is_not_part_of_the_batches(store: Path, tmp_path: Path) -> None:
    training_run = prepare_run(config(store, tmp_path / "run"))
    training_run.batches.features.clear()  # as for a method that reads no array of the store in its batches
    assert training_run.batches.read_features(torch.tensor([3, 5]), torch.tensor([1, 2])).shape == (2, 16)
    assert training_run.batches.build_batch(0).teacher == {}


def test_the_weights_of_each_peer_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "store", views=7)
    hashed, digest = [], Embedder.digest
    monkeypatch.setattr(Embedder, "digest", lambda self: (hashed.append(self), digest(self))[1])
    prepare_run(config(tmp_path / "store", tmp_path / "run", student=(CONVNET,) * 3, method="dogo"))
    assert len(hashed) == 3
