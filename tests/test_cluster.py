"""An export by dask workers writes the same bytes as an export in one process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from distributed import LocalCluster
from PIL import Image

from compress_ssl.pipeline.extraction.cluster import parse_scheduler, worker_number
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages.export_teacher import Config, run

ROOT = Path(__file__).parent.parent
TEACHER = "convnet:channels=4+8,pretrained=false"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(48):
        pixels = random.integers(0, 256, (20 + number % 5, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def export(images: Path, out: Path, scheduler: str = "local", teacher: str = TEACHER) -> dict:
    how = {"views": 3, "image_size": 16, "batch_size": 4, "shard_size": 8, "workers": 1, "scheduler": scheduler}
    return run(Config(data=str(images), teacher=teacher, out=out, **how))  # type: ignore[arg-type]


def content(store: Path) -> dict[str, bytes]:
    """{file: content} of the features, their done records and the manifest."""
    keys = [p for part in ("features.zarr", "done") for p in (store / part).rglob("*") if p.is_file()]
    return {str(p.relative_to(store)): p.read_bytes() for p in [*keys, store / "manifest.json"]}


def test_a_wrong_scheduler_is_refused_before_anything_starts() -> None:
    assert parse_scheduler("local") == ("local", "")
    assert parse_scheduler("processes:3") == ("processes", "3")
    assert parse_scheduler("tcp://host:8786") == ("cluster", "tcp://host:8786")
    assert parse_scheduler("tls://[::1]:8786") == ("cluster", "tls://[::1]:8786")
    counts = "processes:0", "processes:x", "processes:\N{SUPERSCRIPT TWO}", "processes:" + "9" * 5000, "slurm", ""
    addresses = (
        "tcp://",
        "tcp://host",
        "tcp://host:port",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://[::1",
        "tcp:// a:1",
    )
    for wrong in (*counts, *addresses):
        with pytest.raises(UserError, match="must be local, processes:N or tcp"):
            parse_scheduler(wrong)


def test_worker_processes_write_the_same_bytes_as_one_process(images: Path, tmp_path: Path) -> None:
    export(images, tmp_path / "local")
    made = export(images, tmp_path / "spread", "processes:2")
    assert made["images"] == 48
    assert content(tmp_path / "spread") == content(tmp_path / "local")


COUNTING = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.flatten(1)[:, :4] * self.scale * torch.get_num_threads()
"""


def test_workers_of_this_machine_compute_with_as_many_threads_as_one_process(images: Path, tmp_path: Path) -> None:
    """The last bits of a sum depend on how it is split over threads; the default of dask is one thread per worker."""
    (tmp_path / "counting.py").write_text(COUNTING)
    teacher = f"python:{tmp_path}/counting.py:Net"
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        export(images, tmp_path / "local", teacher=teacher)
        export(images, tmp_path / "spread", "processes:1", teacher=teacher)
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "spread") == content(tmp_path / "local")


def test_workers_that_do_not_start_are_tried_three_times_and_then_reported(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def fail_to_start(**how: object) -> None:
        attempts.append(how)
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("dask.distributed.LocalCluster", fail_to_start)
    with pytest.raises(UserError, match=r"processes of --scheduler processes:2 do not start \(Nanny failed"):
        export(images, tmp_path / "store", "processes:2")
    assert len(attempts) == 3


@pytest.mark.slow
def test_workers_end_when_their_command_is_killed(images: Path, tmp_path: Path) -> None:
    flags = {"data": images, "teacher": TEACHER, "out": tmp_path / "store", "views": 8, "image-size": 16,
             "batch-size": 4, "shard-size": 8, "scheduler": "processes:2"}  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    running = subprocess.Popen([sys.executable, "-m", "compress_ssl.cli", "export-teacher", *words])
    deadline, began = time.monotonic() + 120, psutil.Process(running.pid)
    while len(children := began.children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert len(children) >= 3, "two workers and the resource tracker"
    _, left = psutil.wait_procs(children, timeout=30)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_workers_that_outlive_a_command_use_the_teacher_of_the_next_command(images: Path, tmp_path: Path) -> None:
    """The same command is run again after its teacher has changed: running workers must not keep the old one."""
    own = tmp_path / "own.py"
    text = (
        "import torch\nclass Net(torch.nn.Module):\n"
        "    preprocessing = {'size': 16}\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = torch.nn.Linear(3, 4)\n"
        "    def forward(self, x):\n        return FACTOR * self.net(x.mean((2, 3)))\n"
        "def net():\n    made = Net()\n    torch.nn.init.constant_(made.net.weight, FACTOR)\n    return made\n"
    )
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        stores = []
        for factor in ("1.0", "2.0"):
            own.write_text(text.replace("FACTOR", factor))
            os.utime(own, (0, float(factor)))  # Python recompiles a file when its time has changed
            export(images, tmp_path / "store", cluster.scheduler_address, f"python:{own}:net")
            stores.append(tmp_path / f"store-{factor}")
            (tmp_path / "store").rename(stores[-1])
    one, two = (FeatureStore(Folder(store)).read("embedding", 0) for store in stores)
    assert not np.allclose(one, two)


def test_whatever_dask_raises_for_an_address_is_an_error_with_that_address(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (TypeError("no UCX here"), AssertionError(), RuntimeError("x" * 5000)):

        def refuse(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("dask.distributed.Client", refuse)
        with pytest.raises(
            UserError, match=rf"--scheduler ucx://host:1 cannot be used \({type(error).__name__}"
        ) as refused:
            export(images, tmp_path / "store", "ucx://host:1")
        assert len(str(refused.value)) < 400


def test_the_number_in_a_worker_name_selects_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"gpu-3": 3, "3": 3, "gpu": 0, "gpu-\N{SUPERSCRIPT TWO}": 0, "": 0, "w-" + "9" * 5000: 999_999_999}
    for name, number in names.items():
        monkeypatch.setattr("dask.distributed.get_worker", lambda name=name: SimpleNamespace(name=name))
        assert worker_number() == number


def test_a_scheduler_that_does_not_answer_is_an_error_with_its_address(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dask scheduler answers"):
        export(images, tmp_path / "store", "tcp://127.0.0.1:1")


def test_a_worker_that_is_killed_during_an_export_changes_no_byte(images: Path, tmp_path: Path) -> None:
    """A scheduler and two workers are separate programs; one worker gets SIGKILL after the first shard."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    address, programs = "tcp://127.0.0.1:18786", []
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": tmp_path}
    try:
        begin = [*dask, "scheduler", "--host", "127.0.0.1", "--port", "18786", "--no-dashboard"]
        programs.append(subprocess.Popen(begin, **quiet))  # type: ignore[call-overload]
        for _ in range(2):
            worker = [*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
            programs.append(subprocess.Popen(worker, **quiet))  # type: ignore[call-overload]
        _wait_for_workers(address, 2)

        def kill_after_first_shard() -> None:
            while not list((tmp_path / "spread" / "done").glob("*.json")):
                time.sleep(0.01)
            programs[1].send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill_after_first_shard, daemon=True)
        killer.start()
        export(images, tmp_path / "spread", address)
        killer.join(timeout=10)
        assert programs[1].wait(timeout=10) == -signal.SIGKILL
    finally:
        for program in programs:
            program.kill()
            program.wait()
    export(images, tmp_path / "local")
    assert content(tmp_path / "spread") == content(tmp_path / "local")


def _wait_for_workers(address: str, count: int) -> None:
    from dask.distributed import Client

    with Client(address, timeout=60, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=60)
