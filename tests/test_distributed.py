"""Ranks: N processes with a share of each step make the run that one process makes, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, nn

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods import dogo
from compress_ssl.pipeline.runtime import device, launch_env, signals
from compress_ssl.pipeline.runtime.config import to_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.jsonl import read_jsonl as read_journal
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.training import trainer
from compress_ssl.pipeline.training.learner import Diverged
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.views.groups import LOCAL_CROPS, ViewGroup
from compress_ssl.stages import distill, export_teacher, label_head
from compress_ssl.stages.distill import Config

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "convnet:channels=8+16,pretrained=false"
IMAGES, BATCH, STEPS = 120, 24, 7  # five steps an epoch

SMOOTH = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
"""
"""A student without batch norm: what it makes of an image does not depend on who else is in the batch."""

BROKEN = """
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Method
class Broken(Method):
    def __init__(self, *, context):
        super().__init__()
    def forward(self, batch, outputs):
        loss = outputs[0]["embedding"].pow(2).mean()
        return [loss * float("nan") if batch.step == 2 and collectives.rank() == 1 else loss]
"""
"""A method whose loss is not finite on one rank."""

CASES: dict[str, dict[str, Any]] = {
    "compress-1q": {"method": "compress-1q:bank=50", "views_per_step": 2, "pairing": "cross"},
    "compress-2q": {"method": "compress-2q:bank=50", "clip": 1.0, "ema": 0.9},
    "compress-2q-momentum": {"method": "compress-2q-momentum:bank=50,momentum=0.9"},
    "seed": {"method": "seed:bank=50", "optimizer": "adamw", "lr": 0.01},
    "crd": {"method": "crd:negatives=30"},
    "regression": {"method": "regression:norm=batch"},
    "dogo": {"method": "dogo", "peers": 2, "lr": 0.01},
    "dogo-frozen": {"method": "dogo-frozen", "lr": 0.01},
    "esvit": {"method": "esvit:bank=50,crops=2", "lr": 0.01},
    "simclr-v2": {"method": "simclr-v2:head=HOME/head.safetensors", "lr": 0.01, "optimizer": "lars"},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- runs


def config(home: Path, name: str, **said: Any) -> Config:
    default = {
        "method": "compress-1q:bank=50", "steps": STEPS, "image_size": 8, "lr": 0.2, "schedule": "constant",
        "workers": 0, "device": "cpu", "batch_size": BATCH // collectives.world_size(), "peers": 1,
    }  # fmt: skip
    asked = {**default, **said}
    asked["method"] = asked["method"].replace("HOME", str(home))
    student = (f"python:{home}/smooth.py:net",) * asked.pop("peers")
    return Config(store=str(home / "store"), student=student, out=home / name, **asked)


def train(home: Path, name: str, **said: Any) -> None:
    """A run in home/name, every step of it logged; beside it the buffers and weights of each rank."""

    def close(training_run: Any) -> Any:
        (learner,) = training_run.learners
        states = [learner.models.state_dict(), dict(learner.method.named_buffers())]
        torch.save(states, home / f"{name}.{collectives.rank()}")
        return finish(training_run)

    finish = distill.export_students
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 1)
        patch.setattr(distill, "export_students", close)
        # The real projection head has batch norm, whose statistics depend on the share of a rank.
        patch.setattr(dogo, "build_projection_head", lambda width, out: nn.Linear(width, out))
        distill.run(config(home, name, **said))


def curves(home: Path, name: str) -> list[list[float]]:
    """[[loss, spread, agreement of each step] of each student]"""
    logs = [read_journal(file) for file in sorted((home / name).rglob("metrics.jsonl"))]
    return [[row[key] for row in log for key in ("loss", "spread", "agreement") if key in row] for log in logs]


def left(home: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    """What a rank had learned and kept at the end."""
    students, buffers = torch.load(home / f"{name}.{rank}", weights_only=True)
    return {**students, **{f"method.{key}": value for key, value in buffers.items()}}


def assert_alike(home: Path, name: str, other: str) -> None:
    """Two runs: the same losses, student and banks within float error."""
    one, two = curves(home, name), curves(home, other)
    assert len(one) == len(two) and all(one)
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-5)
    mine, theirs = left(home, name), left(home, other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=2e-3, atol=2e-4, msg=lambda said, key=key: f"{key}: {said}")


# ---------------------------------------------------------------- worlds


def world(size: int, deed: Callable[..., None], *arguments: Any) -> list[int]:
    """Do something in `size` processes that are ranks; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = get_context("spawn")
    processes = [spawn.Process(target=_rank, args=(n, size, port, deed, arguments)) for n in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode is not None, "a rank hangs"
    return [process.exitcode or 0 for process in processes]


def _rank(number: int, size: int, port: int, deed: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with collectives.process_group():
        deed(*arguments)


def in_two(home: Path) -> None:
    """All that two ranks are asked below."""
    for name, case in CASES.items():
        train(home, f"two-{name}", **case)
    train(home, "two-then-one", steps=3)
    train(home, "two-then-four", steps=3)
    train(home, "one-then-two", steps=STEPS)
    gathered(home)
    try:
        train(home, "broken", method=f"python:{home}/broken.py:Broken")
    except Diverged as end:
        (home / f"broken.{collectives.rank()}").write_text(str(end))


def in_four(home: Path) -> None:
    for name in ("compress-1q", "dogo"):
        train(home, f"four-{name}", **CASES[name])
    train(home, "two-then-four")


def gathered(home: Path) -> None:
    """Gradients of an in-batch loss of all ranks' rows, averaged; rows of whole numbers."""
    x, layer = problem()
    network = collectives.wrap_ddp(layer)
    mine = network(x[collectives.rank() :: collectives.world_size()])
    in_batch(collectives.gather(mine)).backward()
    assert layer.weight.grad is not None
    numbers = collectives.gather(torch.arange(6).reshape(6, 1)[collectives.rank() :: collectives.world_size()])
    torch.save([layer.weight.grad, numbers], home / f"gathered.{collectives.rank()}")


def problem() -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    return torch.randn(6, 4), nn.Linear(4, 3)


def in_batch(z: Tensor) -> Tensor:
    return (z @ z.T).log_softmax(1).diagonal().sum()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and every case trained by one process and by two."""
    home = tmp_path_factory.mktemp("ranks")
    (home / "smooth.py").write_text(SMOOTH)
    (home / "broken.py").write_text(BROKEN)
    export_teacher.run(
        export_teacher.Config(
            "digits",
            TEACHER,
            str(home / "store"),
            views=5,
            image_size=8,
            limit=IMAGES,
            batch_size=40,
            workers=0,
            device="cpu",
            keep="embedding,regions",
            local_views=2,
        )
    )
    label_head.run(label_head.Config(store=home / "store", out=home / "head.safetensors", labels="20%"))
    for name, case in CASES.items():
        train(home, f"one-{name}", **case)
    train(home, "one")
    train(home, "one-then-two", steps=3)
    assert world(2, in_two, home) == [0, 0]
    return home


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_half_a_batch_each_train_as_one_process_does(name: str, home: Path) -> None:
    assert_alike(home, f"one-{name}", f"two-{name}")


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_with_the_same_weights_and_banks_to_the_bit(name: str, home: Path) -> None:
    zero, one = left(home, f"two-{name}", 0), left(home, f"two-{name}", 1)
    assert zero.keys() == one.keys()
    for key, value in zero.items():
        assert torch.equal(value, one[key]), key


def test_a_bank_holds_the_images_and_views_of_all_ranks_in_the_order_of_one_process(home: Path) -> None:
    one, two = left(home, "one-compress-1q"), left(home, "two-compress-1q")
    for key in ("method.bank.rows", "method.bank.views"):
        assert torch.equal(one[key], two[key])


def test_gradients_through_a_gathered_batch_are_those_of_one_process(home: Path) -> None:
    x, layer = problem()
    in_batch(layer(x)).backward()
    for rank in range(2):
        gradient, numbers = torch.load(home / f"gathered.{rank}", weights_only=True)
        torch.testing.assert_close(gradient, layer.weight.grad)
        assert numbers.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["two-then-one", "one-then-two"])
def test_a_checkpoint_is_continued_on_another_number_of_ranks(name: str, home: Path) -> None:
    if name == "two-then-one":
        train(home, name)
    assert_alike(home, "one", name)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(home: Path) -> None:
    said = [(home / f"broken.{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and "the loss is nan at step 2" in said[0]


@pytest.mark.slow
def test_four_ranks_train_as_one_and_go_on_where_two_stopped(home: Path) -> None:
    assert world(4, in_four, home) == [0, 0, 0, 0]
    for name in ("compress-1q", "dogo"):
        assert_alike(home, f"one-{name}", f"four-{name}")
    assert_alike(home, "one", "two-then-four")


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_that_are_started_again_do_not_meet_those_of_the_attempt_before(late: int) -> None:
    store = distributed.HashStore()  # torchrun's outlives the ranks
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            meeting = []
            for number in sorted(range(3), key=late.__eq__):
                meeting.append(threads.submit(collectives.agree_on_attempt, store, number, 3))
                time.sleep(0.05)
            names.append({each.result(60) for each in meeting})
    assert [len(found) for found in names] == [1, 1, 1] and len(set.union(*names)) == 3


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("beside", [(), (replace(LOCAL_CROPS, count=2),), (LOCAL_CROPS.fresh(3),)])
def test_the_shares_of_all_ranks_are_the_step(beside: tuple[ViewGroup, ...]) -> None:
    whole = StepSampler(3, np.arange(20), (1, 2, 3), 12, 2, "fresh", 9, beside=beside)
    for step in range(9):
        parts = [replace(whole, rank=rank, size=3) for rank in range(3)]
        for rank, part in enumerate(parts):
            for mine, all_of_it in zip(part.step_indices(step), whole.step_indices(step), strict=True):
                assert np.array_equal(mine, all_of_it[rank::3])
            request, entire = part[step], whole[step]
            assert np.array_equal(request.rows, part.step_indices(step)[0])
            assert list(request.views) == ["global", *(group.name for group in beside)]
            assert all(np.array_equal(views, entire.views[name][rank::3]) for name, views in request.views.items())


@pytest.mark.parametrize(
    ("each", "size", "said"),
    [
        (None, 3, "a batch of 64 images cannot be shared by 3 ranks; give each --batch-size 21, 63 in all"),
        (50, 3, "a batch of 120 images"),  # divisible: all there are
        (50, 7, "a batch of 120 images cannot be shared by 7 ranks; give each --batch-size 17, 119 in all"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest_that_can(
    each: int | None, size: int, said: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_ssl.pipeline.runtime.storage import Folder
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.sampler import make_sampler

    asked = config(home, "never", method="crd", batch_size=each)  # published with 64 images
    store = FeatureStore(Folder(home / "store"))
    monkeypatch.setattr(collectives, "world_size", lambda: size)
    if 120 % size == 0 and each:
        assert make_sampler(store, distill.resolve(asked).sampling, "store").batch == 120
        return
    with pytest.raises(UserError, match=said):
        make_sampler(store, distill.resolve(asked).sampling, "store")


def test_ranks_of_a_machine_have_a_gpu_each_and_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert device.choose_device("auto", 1) == device.choose_device("cuda", 1) == torch.device("cuda", 1)
    assert device.choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match="process 2 of this machine has no CUDA device: 2 are there"):
        device.choose_device("auto", 2)
    with pytest.raises(UserError, match="--device cuda:0 is one device"):
        device.choose_device("cuda:0", 1)
    assert device.loader_workers(None, torch.device("cuda"), beside=4) == 3
    assert device.loader_workers(5, torch.device("cuda"), beside=4) == 5


def test_synchronised_batch_norm_keeps_names_and_activations_and_is_refused_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from timm.layers import BatchNormAct2d

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    names = list(network.state_dict())
    assert collectives.convert_sync_batchnorm(network, torch.device("cpu")) is network  # one process needs none
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--sync-bn needs CUDA"):
        collectives.convert_sync_batchnorm(network, torch.device("cpu"))
    made = collectives.convert_sync_batchnorm(network, torch.device("cuda"))
    assert list(made.state_dict()) == names
    assert all(isinstance(made[n], nn.SyncBatchNorm) for n in (1, 2)) and isinstance(made[2].act, nn.ReLU)


def test_the_flags_of_a_config_make_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress_ssl import cli

    students = ("convnet:channels=4", "-x")
    asked = Config("store", students, "seed", tmp_path, norm_decay=False, overwrite=True, epochs=0.5)
    made = []
    monkeypatch.setattr(distill, "run", lambda config: made.append(config) or {})
    monkeypatch.setattr(sys, "argv", ["compress", "distill", *to_flags(asked)])
    assert cli.app(standalone_mode=False) in (None, 0)
    assert made == [asked]


# ---------------------------------------------------------------- ending together


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A store of twenty pictures, two of which have changed since."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(draw.integers(0, 255, (9, 9, 3), np.uint8)).save(folder / f"{i:02d}.png")
    export_teacher.run(
        export_teacher.Config(
            f"folder:{folder}",
            TEACHER,
            str(tmp_path / "store"),
            views=2,
            image_size=8,
            batch_size=10,
            workers=0,
            device="cpu",
        )
    )
    (tmp_path / "smooth.py").write_text(SMOOTH)
    return tmp_path


def command(*said: Any) -> list[str]:
    return [sys.executable, "-m", "compress_ssl.cli", "distill", *map(str, said)]


def flags(home: Path, out: Path, each: int = BATCH // 2) -> list[Any]:
    return [
        "--store", home / "store", "--student", f"python:{home}/smooth.py:net", "--method", "compress-1q", "--out", out,
        "--image-size", 8, "--lr", 0.2, "--schedule", "constant", "--workers", 0, "--device", "cpu", "-b", each,
        "--save-every", 5,
    ]  # fmt: skip


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_with_one_line_and_status_2(pictures: Path) -> None:
    picture = pictures / "pictures" / "03.png"  # seen by one rank only, as any is
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(picture)
    words = flags(pictures, pictures / "run", each=5)
    done = subprocess.run(command(*words, "--devices", 2, "--steps", 4), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    (line,) = errors(done.stderr)
    assert "image 03.png changed since the export" in line
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_goes_on_to_where_one_process_comes(
    home: Path, tmp_path: Path
) -> None:
    words, out = [*flags(home, tmp_path / "run"), "--devices", 2], tmp_path / "run"
    steps = 200  # a run is not made shorter, so it is killed well before the end of the length that it is to have
    running = subprocess.Popen(command(*words, "--steps", steps), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not (out / "checkpoints/last.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(child(running.pid, "1"), signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 2, said
    (line,) = errors(said)
    assert "rank 1 was killed by SIGKILL; repeat the command" in line
    assert max(int(path.stem[5:]) for path in (out / "checkpoints").glob("step-*.pt")) < steps
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{out}: {steps} steps, student.safetensors"
    alone = config(home, "alone", method="compress-1q", steps=steps)
    distill.run(alone)
    last = [read_journal(folder / "metrics.jsonl")[-1] for folder in (out, alone.out)]
    assert last[0]["step"] == last[1]["step"] == steps
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-3)


BUSY = """
import os, signal, time
from compress_ssl.pipeline.methods.regression import Regression
class Busy(Regression):
    def forward(self, batch, outputs):
        if batch.step == 2:
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(2)
        return super().forward(batch, outputs)
"""
"""A method that kills rank 1 while rank 0 computes, and cannot notice the lost connection."""


@pytest.mark.slow
def test_a_rank_that_is_killed_while_the_others_compute_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    words = [
        *flags(home, tmp_path / "run"),
        "--devices",
        2,
        "--steps",
        9,
        "--method",
        f"python:{tmp_path}/busy.py:Busy",
    ]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=240)
    (line,) = errors(done.stderr)
    assert "rank 1 was killed by SIGKILL; repeat the command" in line
    assert done.returncode == 2 and "Traceback" not in done.stderr


DYING = """
import os, signal
from compress_ssl.pipeline.methods.regression import Regression
class Dying(Regression):
    def forward(self, batch, outputs):
        if batch.step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch, outputs)
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_they_go_on_from_the_last_checkpoint(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    method = f"python:{tmp_path / 'dying.py'}:Dying"
    words = [*command(*flags(home, tmp_path / "run")), "--method", method, "--steps", "9"]  # the last --method counts
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--no-python"]
    done = subprocess.run([*started, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path / 'run'}: 9 steps, student.safetensors"
    assert [f"steps {start} to 9" in done.stderr for start in (0, 5)] == [True, True]


@pytest.mark.slow
def test_torchrun_ends_the_other_ranks_without_a_second_message(pictures: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(pictures / "pictures" / "03.png")
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    words = command(*flags(pictures, pictures / "run", each=5), "--steps", 4)
    done = subprocess.run([*started, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "stopped:" not in done.stderr, done.stderr
    assert ["image 03.png changed" in line for line in errors(done.stderr)] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_a_signal_while_ranks_are_starting_ends_all_with_one_line(delay: float, home: Path, tmp_path: Path) -> None:
    words = [*flags(home, tmp_path / "run"), "--devices", 2, "--steps", 100_000]
    running = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while len(pids := children.read_text().split()) < 2:
        time.sleep(0.001)
    time.sleep(delay)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)  # until no rank holds stderr any more
    assert (running.returncode, said) == (143, "stopped: repeat the command to continue\n")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_command_saves_once_and_ends_all(signum: int, status: int, home: Path, tmp_path: Path) -> None:
    words, out = [*flags(home, tmp_path / "run"), "--devices", 2, "--steps", 100_000], tmp_path / "run"
    running = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not (out / "checkpoints/last.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signum)
    _, said = running.communicate(timeout=120)
    assert running.returncode == status, said
    saved = [line for line in said.splitlines() if line.startswith("stopped: saved at step")]
    assert len(saved) == 1
    assert (out / "checkpoints" / f"step-{int(saved[0].split()[4]):08d}.pt").exists()


def test_a_rank_takes_the_echo_of_a_signal_for_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch_env.LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "2")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        monkeypatch.setattr(signals, "REPEAT_WINDOW", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def child(parent: int, rank: str) -> int:
    """The process of a rank."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank}")
