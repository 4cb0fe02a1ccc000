"""An export that is killed, stopped or out of disk space continues when it is started again, with the same bytes."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from nasty import encoded, noise

from compress_ssl import cli
from compress_ssl.pipeline.runtime.storage import PART, Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore

ROOT = Path(cli.__file__).parent
SHARDS, IMAGES, VIEWS = 6, 96, 5  # 16 rows per shard; 5 views are two blocks of views, so two done records per shard
BATCHES = 2  # per shard, of 8 rows each
BAD_ROW = 80  # row of the file that is not an image
FORWARDS_PER_SHARD = BATCHES * VIEWS
COMPARED = ("features.zarr", "done", "copy", "manifest.json")

SLOW = """
import os, time
import torch

class Slow(torch.nn.Module):
    '''A small network that sleeps in each forward and logs it, so that a signal arrives during the computation.'''
    preprocessing = {"size": 16, "crop_ratio": 1.0}

    def __init__(self, log, seconds):
        super().__init__()
        self.net = torch.nn.Linear(3 * 16, 8)  # a first convolution takes seconds in every new process
        self.log, self.seconds = log, seconds

    def forward(self, images):
        if len(images) == 8:  # not the forward that measures the width
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()}\\n")
            time.sleep(self.seconds)
        return torch.tanh(self.net(images.mean(3).flatten(1)))

def slow():
    here = os.path.dirname(__file__)
    seconds = float(open(os.path.join(here, "seconds")).read())
    return Slow(os.path.join(here, "log"), seconds)
"""


def run_command(words: list[str], output: str) -> None:
    """Run the real command line in a forked child, in its own process group, with its output in a file."""
    os.setsid()
    # as in a program of its own: a child of a forkserver would start its workers by forkserver, too
    multiprocessing.set_start_method("fork", force=True)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["compress", *words]
    cli.main()


@pytest.fixture(scope="module")
def forkserver() -> Iterator[Any]:
    """A context whose processes are forked from one that has loaded torch: they start in a fraction of a second."""
    settings = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "fork",
    }
    context = multiprocessing.get_context("forkserver")
    loaded = ["torch", "torchvision.transforms.v2", "zarr", "distributed", "compress_ssl.stages.export_teacher"]
    loaded += [
        f"compress_ssl.pipeline.{name}"
        for name in ("extraction.dask_worker", "models", "models.python", "store.render_probe", "datasets.folder")
    ]
    context.set_forkserver_preload([*loaded, "test_kills"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    yield context


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        name = folder / f"{'abc'[number % 3]}/{number:03d}.png"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(b"no image" if number == 50 else encoded(noise(number, 18 + number % 7)))
    return folder


class Export:
    """A real `compress export-teacher` command over one store, which can be started several times."""

    def __init__(
        self,
        forkserver: Any,
        data: Path,
        home: Path,
        scheduler: str = "local",
        seconds: float = 0.03,
        out: str = "store",
    ):
        self.forkserver, self.home, self.out = forkserver, home, home / out
        (home / "slow.py").write_text(SLOW)
        (home / "seconds").write_text(str(seconds))
        flags = {"data": data, "teacher": f"python:{home}/slow.py:slow", "out": self.out, "views": VIEWS,
                 "image-size": 16, "batch-size": 8, "shard-size": 16, "device": "cpu", "workers": 1,
                 "scheduler": scheduler}  # fmt: skip
        self.words = ["export-teacher", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]

    def start(self) -> ForkServerProcess:
        process = self.forkserver.Process(
            target=run_command, args=(self.words, str(self.home / "output")), daemon=False
        )
        process.start()
        return process

    def output(self) -> str:
        return (self.home / "output").read_text()

    def end(self, process: ForkServerProcess) -> int:
        """Wait until all processes of its group have ended, and return its exit status."""
        process.join(120)
        assert process.exitcode is not None, "the command did not end within 120 s"
        deadline = time.monotonic() + 30
        while members(process.pid):
            if time.monotonic() > deadline - 20 and process.exitcode == -signal.SIGKILL:
                # workers that were forked side by side hold each other's pipes open, so they do not notice that the
                # command is gone; spawned ones do: tests/test_cluster.py
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"still running: {members(process.pid)}"
            time.sleep(0.02)
        return process.exitcode

    def finish(self) -> None:
        code = self.end(self.start())
        assert code == 0, self.output()
        assert f"{IMAGES} images" in self.output()

    def done(self) -> dict[str, int]:
        """{done record: forward passes whose features it covers}"""
        names = [file.name for file in self.out.glob("done/*.json")]
        return {name: BATCHES * (int(name[-9:-5]) - int(name[-14:-10])) for name in names}

    def inodes(self) -> dict[str, int]:
        """{done record: inode}; a record that is written again has another inode."""
        return {file.name: file.stat().st_ino for file in self.out.glob("done/*.json")}

    def forwards(self) -> int:
        log = self.home / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def wasted(self) -> int:
        """Forward passes whose features are not in the store."""
        return self.forwards() - sum(self.done().values())


def members(group: int | None) -> list[str]:
    """Running processes of a process group."""
    out = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                out.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return out


def send_signal(signum: int, target: str, process: ForkServerProcess) -> str:
    """Send a signal to the `main` process, its whole `group`, or one `worker`. Returns the target, or "nobody"."""
    assert process.pid is not None
    try:
        if target == "worker":
            workers = [p for p in psutil.Process(process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
            if not workers:
                return "nobody"
            workers[-1].send_signal(signum)
        elif target == "group" and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signum)
        else:
            os.kill(process.pid, signum)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return "nobody"
    return target


def wait_until(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    """Wait until the condition holds or the process has ended, 120 s at most."""
    deadline = time.monotonic() + 120
    while not condition() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)


def tree(store: Path) -> dict[str, bytes]:
    """{file: content} of everything that must be the same bytes."""
    files = {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name.startswith(COMPARED)}


@pytest.fixture(scope="module")
def undisturbed(forkserver: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an export that was not interrupted."""
    run = Export(forkserver, images, tmp_path_factory.mktemp("undisturbed"), seconds=0)
    run.finish()
    assert run.forwards() == SHARDS * FORWARDS_PER_SHARD
    return tree(run.out)


def without_teacher(manifest: bytes) -> dict[str, Any]:
    """The manifest without the teacher's spec, which is different here because each export has its own teacher file."""
    record = json.loads(manifest)
    return {**record, "about": {**record["about"], "teacher": ""}, "digest": ""}


def assert_same_files(run: Export, expected: dict[str, bytes]) -> None:
    found = tree(run.out)
    for name in ("manifest.json", "copy/manifest.json"):
        assert without_teacher(found.pop(name)) == without_teacher(expected[name])
    assert found == {name: data for name, data in expected.items() if not name.endswith("manifest.json")}
    FeatureStore(Folder(run.out)).require_complete()
    assert (run.out / "copy/manifest.json").read_bytes() == (run.out / "manifest.json").read_bytes()
    bad_lines = (run.out / "bad-images.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in bad_lines] == ["row", str(BAD_ROW)]
    assert not [*run.out.rglob(f"*{PART}")]


def has_more_than(run: Export, before: dict[str, int]) -> Callable[[], bool]:
    return lambda: len(run.done()) > len(before)


# ---------------------------------------------------------------- a few interruptions


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["local", "processes:2"])
def test_a_killed_or_stopped_export_continues_and_ends_with_the_same_bytes(
    forkserver: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    run = Export(forkserver, images, tmp_path, scheduler, seconds=0.08)
    stops = [(signal.SIGKILL, "group", -9), (signal.SIGTERM, "main", 143), (signal.SIGINT, "group", 130)]
    for signum, target, status in stops:
        before, kept, wasted = run.done(), run.inodes(), run.wasted()
        process = run.start()
        wait_until(has_more_than(run, before), process)
        send_signal(signum, target, process)
        code, complete = run.end(process), len(run.done()) == 2 * SHARDS
        assert code == status or complete, run.output()
        assert len(before) < len(run.done())
        assert kept.items() <= run.inodes().items()  # finished work is neither lost nor repeated
        assert run.wasted() - wasted <= 2 * FORWARDS_PER_SHARD
        assert code not in (143, 130) or "shards are kept; repeat the command to continue" in run.output()
        if complete:  # two workers may have finished before the third signal
            break
    run.finish()
    assert_same_files(run, undisturbed)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_at_most_its_task(
    forkserver: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run = Export(forkserver, images, tmp_path, "processes:2")
    process = run.start()
    wait_until(has_more_than(run, {}), process)
    assert send_signal(signal.SIGKILL, "worker", process) == "worker"
    assert run.end(process) == 0, run.output()
    assert run.wasted() <= FORWARDS_PER_SHARD
    assert_same_files(run, undisturbed)


LATE = """
import os, signal, sys
from compress_ssl import cli

def leave(code):
    os.kill(os.getpid(), signal.SIGNAL)
    raise SystemExit(code)

sys.exit = leave
sys.argv = ["compress", "methods"]
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_after_the_last_line_of_output_prints_no_traceback(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LATE.replace("SIGNAL", name)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == -getattr(signal, name)  # in a shell the status is 143 or 130
    assert "compress-1q" in ended.stdout and ended.stderr == ""


def test_partial_files_of_killed_writers_are_deleted_and_those_of_running_ones_are_not(
    forkserver: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run = Export(forkserver, images, tmp_path, seconds=0)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = os.uname().nodename
    (run.out / "done").mkdir(parents=True)
    of_running = run.out / f"done/.0000000.json.01234567.{os.getpid()}.{host}{PART}"
    for part in (of_running, run.out / f"done/.0000001.json.89abcdef.{dead.stdout.strip()}.{host}{PART}"):
        part.write_bytes(b"half")
    run.finish()
    run.finish()  # an export deletes partial files when it finds an earlier store
    assert [*run.out.rglob(f"*{PART}")] == [of_running]
    of_running.unlink()
    assert_same_files(run, undisturbed)


# ---------------------------------------------------------------- many interruptions: `make soak`


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", ["local", "processes:2"])
def test_an_export_killed_fifty_times_at_random_moments_ends_with_the_same_bytes(
    forkserver: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path, scheduler: str, capsys: Any
) -> None:
    """SIGKILL fifty times, with other signals at random in between."""
    rng, sent, waste = random.Random(0), Counter[str](), Counter[int]()
    targets = ["group", "group", "main"] if scheduler == "local" else ["group", "group", "main", "worker"]
    for number in range(1000):
        home = tmp_path / str(number)
        home.mkdir()
        run = Export(forkserver, images, home, scheduler)
        while len(run.done()) < 2 * SHARDS and sum(sent[f"SIGKILL {target}"] for target in {*targets}) < 50:
            signum = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            target = {signal.SIGTERM: "main", signal.SIGINT: "group"}.get(signum) or rng.choice(targets)
            before, kept, wasted = run.done(), run.inodes(), run.wasted()
            process, moment = run.start(), time.monotonic() + rng.uniform(0, 2)
            early = rng.random() < 0.4  # before the first shard, perhaps before the store exists
            wait_until((lambda at=moment: time.monotonic() > at) if early else has_more_than(run, before), process)
            time.sleep(rng.uniform(0, 0.3))
            target = send_signal(signum, target, process)
            code = run.end(process)
            sent[f"{signum.name} {target}"] += 1
            fine = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, -2, 0)}[signum]
            assert code in fine, f"{signum.name} to {target}: {code}\n{run.output()}"
            assert before.keys() <= run.done().keys()
            if scheduler == "local":
                assert kept.items() <= run.inodes().items()
            lost = run.wasted() - wasted
            waste[lost] += 1
            assert lost <= 2 * FORWARDS_PER_SHARD, f"{lost} forward passes lost by one {signum.name} to {target}"
        run.finish()
        assert_same_files(run, undisturbed)
        shutil.rmtree(home)
        if sum(sent[f"SIGKILL {target}"] for target in {*targets}) >= 50:
            break
    whole = sum(n for lost, n in waste.items() if lost > FORWARDS_PER_SHARD)
    with capsys.disabled():
        average = sum(k * n for k, n in waste.items()) / sum(waste.values())
        print(f"\n{scheduler}: {dict(sent)}; {number + 1} stores; forward passes lost per stop: at most {max(waste)},")
        print(f"{average:.1f} on average, {FORWARDS_PER_SHARD} in a shard;")
        print(f"more than one shard in {whole} of {sum(waste.values())}")


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", ["local", "processes:2"])
def test_an_export_continues_after_a_full_disk_wherever_the_disk_filled_up(
    forkserver: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    run, disk = Export(forkserver, images, tmp_path, scheduler, seconds=0, out="disk/store"), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        blocks = sum(-(-len(data) // 4096) for data in undisturbed.values())
        for step in range(20):
            shutil.rmtree(run.out, ignore_errors=True)
            free, ballast = os.statvfs(disk).f_bavail, disk / "ballast"
            ballast.write_bytes(bytes((free - blocks * step // 20) * 4096))
            code = run.end(run.start())
            assert code == 2, run.output()
            errors = [line for line in run.output().splitlines() if line.startswith("error:")]
            assert len(errors) == 1 and "Traceback" not in run.output()
            assert "disk is full" in errors[0] or "No space left" in errors[0]
            ballast.unlink()
            run.finish()
            assert_same_files(run, undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
