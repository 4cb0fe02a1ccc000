"""An export that is killed, stopped, or out of disk goes on where it was and ends the same to the byte."""

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
SHARDS, IMAGES, VIEWS = 6, 96, 5  # 16 rows a shard; 5 views are two blocks of views, so two done records
BATCHES = 2  # of 8 rows in a shard
BAD = 80  # row of the image that is none
PER_SHARD = BATCHES * VIEWS  # forwards
SAME = ("features.zarr", "done", "copy", "manifest.json")

SLOW = """
import os, time
import torch

class Slow(torch.nn.Module):
    '''A small network that takes its time and keeps a log, so that a kill meets it at work.'''
    preprocessing = {"size": 16, "crop_ratio": 1.0}

    def __init__(self, log, seconds):
        super().__init__()
        self.net = torch.nn.Linear(3 * 16, 8)  # a first convolution takes seconds in every new process
        self.log, self.seconds = log, seconds

    def forward(self, images):
        if len(images) == 8:  # not the probe of its width
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()}\\n")
            time.sleep(self.seconds)
        return torch.tanh(self.net(images.mean(3).flatten(1)))

def slow():
    here = os.path.dirname(__file__)
    seconds = float(open(os.path.join(here, "seconds")).read())
    return Slow(os.path.join(here, "log"), seconds)
"""


def command(words: list[str], said: str) -> None:
    """What a forked child runs: the real command line, in a process group of its own, its words in a file."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a program of its own, where nobody said forkserver
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["compress", *words]
    cli.main()


@pytest.fixture(scope="module")
def forge() -> Iterator[Any]:
    """Starts processes from one that has torch loaded already: a fraction of a second instead of several."""
    settings = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "fork",
    }
    context = multiprocessing.get_context("forkserver")
    loaded = ["torch", "torchvision.transforms.v2", "zarr", "distributed", "compress_ssl.stages.export_teacher"]
    packages = ("extraction.embed", "models", "models.python", "store.render_probe", "extraction.cluster")
    loaded += [f"compress_ssl.pipeline.{name}" for name in (*packages, "datasets.folder")]
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
    """A real `compress export-teacher`, started again and again over one store."""

    def __init__(
        self, forge: Any, data: Path, home: Path, scheduler: str = "local", seconds: float = 0.03, out: str = "store"
    ):
        self.forge, self.home, self.out = forge, home, home / out
        (home / "slow.py").write_text(SLOW)
        (home / "seconds").write_text(str(seconds))
        flags = {"data": data, "teacher": f"python:{home}/slow.py:slow", "out": self.out, "views": VIEWS,
                 "image-size": 16, "batch-size": 8, "shard-size": 16, "device": "cpu", "workers": 1,
                 "scheduler": scheduler}  # fmt: skip
        self.words = ["export-teacher", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]

    def start(self) -> ForkServerProcess:
        process = self.forge.Process(target=command, args=(self.words, str(self.home / "said")), daemon=False)
        process.start()
        return process

    def said(self) -> str:
        return (self.home / "said").read_text()

    def end(self, process: ForkServerProcess) -> int:
        """Its exit status, once nobody of its group is left."""
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        deadline = time.monotonic() + 30
        while members(process.pid):
            if time.monotonic() > deadline - 20 and process.exitcode == -signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):  # forked side by side they hold each other's pipes open
                    os.killpg(process.pid, signal.SIGKILL)  # spawned ones end: tests/test_scheduler.py
            assert time.monotonic() < deadline, f"left behind: {members(process.pid)}"
            time.sleep(0.02)
        return process.exitcode

    def finish(self) -> None:
        code = self.end(self.start())
        assert code == 0, self.said()
        assert f"{IMAGES} images" in self.said()

    def done(self) -> dict[str, int]:
        """Done records, and the forwards that each stands for."""
        names = [file.name for file in self.out.glob("done/*.json")]
        return {name: BATCHES * (int(name[-9:-5]) - int(name[-14:-10])) for name in names}

    def inodes(self) -> dict[str, int]:
        """What would show that a done record was written again."""
        return {file.name: file.stat().st_ino for file in self.out.glob("done/*.json")}

    def forwards(self) -> int:
        log = self.home / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def wasted(self) -> int:
        """Forwards whose features are not in the store."""
        return self.forwards() - sum(self.done().values())


def members(group: int | None) -> list[str]:
    """Living processes of a process group."""
    out = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                out.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return out


def strike(signum: int, whom: str, process: ForkServerProcess) -> str:
    """Send a signal to the `main` process, its whole `group`, or one `worker` of the cluster: whom it met."""
    assert process.pid is not None
    try:
        if whom == "worker":
            workers = [p for p in psutil.Process(process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
            if not workers:
                return "nobody"
            workers[-1].send_signal(signum)
        elif whom == "group" and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signum)
        else:
            os.kill(process.pid, signum)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return "nobody"
    return whom


def until(when: Callable[[], bool], process: ForkServerProcess) -> None:
    deadline = time.monotonic() + 120
    while not when() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)


def tree(store: Path) -> dict[str, bytes]:
    """All that must come out the same: everything but who made it when."""
    files = {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name.startswith(SAME)}


@pytest.fixture(scope="module")
def undisturbed(forge: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an export leaves that nobody disturbed."""
    run = Export(forge, images, tmp_path_factory.mktemp("undisturbed"), seconds=0)
    run.finish()
    assert run.forwards() == SHARDS * PER_SHARD
    return tree(run.out)


def anonymous(manifest: bytes) -> dict[str, Any]:
    """Each export has a teacher file of its own, and so its own spec; all else of the manifest is the same."""
    record = json.loads(manifest)
    return {**record, "about": {**record["about"], "teacher": ""}, "digest": ""}


def assert_the_same(run: Export, wanted: dict[str, bytes]) -> None:
    found = tree(run.out)
    for name in ("manifest.json", "copy/manifest.json"):
        assert anonymous(found.pop(name)) == anonymous(wanted[name])
    assert found == {name: data for name, data in wanted.items() if not name.endswith("manifest.json")}
    FeatureStore(Folder(run.out)).require_complete()
    assert (run.out / "copy/manifest.json").read_bytes() == (run.out / "manifest.json").read_bytes()
    assert [line.split("\t")[0] for line in (run.out / "bad-images.tsv").read_text().splitlines()] == ["row", str(BAD)]
    assert not [*run.out.rglob(f"*{PART}")]


def has_more_than(run: Export, before: dict[str, int]) -> Callable[[], bool]:
    return lambda: len(run.done()) > len(before)


# ---------------------------------------------------------------- a few


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["local", "processes:2"])
def test_a_killed_or_stopped_export_goes_on_and_ends_the_same_to_the_byte(
    forge: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    run = Export(forge, images, tmp_path, scheduler, seconds=0.08)
    stops = [(signal.SIGKILL, "group", -9), (signal.SIGTERM, "main", 143), (signal.SIGINT, "group", 130)]
    for signum, whom, status in stops:
        before, kept, wasted = run.done(), run.inodes(), run.wasted()
        process = run.start()
        until(has_more_than(run, before), process)
        strike(signum, whom, process)
        code, complete = run.end(process), len(run.done()) == 2 * SHARDS
        assert code == status or complete, run.said()
        assert len(before) < len(run.done())
        assert kept.items() <= run.inodes().items()  # what was done is neither lost nor done again
        assert run.wasted() - wasted <= 2 * PER_SHARD
        assert code not in (143, 130) or "shards are kept; repeat the command to continue" in run.said()
        if complete:  # two workers may have got there before the third stop
            break
    run.finish()
    assert_the_same(run, undisturbed)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_at_most_its_task(
    forge: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run = Export(forge, images, tmp_path, "processes:2")
    process = run.start()
    until(has_more_than(run, {}), process)
    assert strike(signal.SIGKILL, "worker", process) == "worker"
    assert run.end(process) == 0, run.said()
    assert run.wasted() <= PER_SHARD
    assert_the_same(run, undisturbed)


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
def test_a_signal_after_the_last_word_is_no_traceback(name: str) -> None:
    late = subprocess.run(
        [sys.executable, "-c", LATE.replace("SIGNAL", name)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert late.returncode == -getattr(signal, name)  # a shell says 143 or 130
    assert "compress-1q" in late.stdout and late.stderr == ""


def test_leftovers_of_killed_writers_are_swept_and_those_of_living_ones_are_not(
    forge: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run = Export(forge, images, tmp_path, seconds=0)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = os.uname().nodename
    (run.out / "done").mkdir(parents=True)
    mine = run.out / f"done/.0000000.json.01234567.{os.getpid()}.{host}{PART}"
    for part in (mine, run.out / f"done/.0000001.json.89abcdef.{dead.stdout.strip()}.{host}{PART}"):
        part.write_bytes(b"half")
    run.finish()
    run.finish()  # a store is swept when it is found
    assert [*run.out.rglob(f"*{PART}")] == [mine]
    mine.unlink()
    assert_the_same(run, undisturbed)


# ---------------------------------------------------------------- many, by `make soak`


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", ["local", "processes:2"])
def test_fifty_kills_at_random_moments_end_the_same_to_the_byte(
    forge: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path, scheduler: str, capsys: Any
) -> None:
    """Kill -9 fifty times, and as many other signals as chance has between them."""
    rng, met, waste = random.Random(0), Counter[str](), Counter[int]()
    whoms = ["group", "group", "main"] if scheduler == "local" else ["group", "group", "main", "worker"]
    for number in range(1000):
        home = tmp_path / str(number)
        home.mkdir()
        run = Export(forge, images, home, scheduler)
        while len(run.done()) < 2 * SHARDS and sum(met[f"SIGKILL {whom}"] for whom in {*whoms}) < 50:
            signum = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            whom = rng.choice(whoms) if signum == signal.SIGKILL else "main" if signum == signal.SIGTERM else "group"
            before, kept, wasted = run.done(), run.inodes(), run.wasted()
            process, moment = run.start(), time.monotonic() + rng.uniform(0, 2)
            early = rng.random() < 0.4  # before the first shard, maybe before there is a store
            until((lambda at=moment: time.monotonic() > at) if early else has_more_than(run, before), process)
            time.sleep(rng.uniform(0, 0.3))
            whom = strike(signum, whom, process)
            code = run.end(process)
            met[f"{signum.name} {whom}"] += 1
            fine = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, -2, 0)}[signum]
            assert code in fine, f"{signum.name} to {whom}: {code}\n{run.said()}"
            assert before.keys() <= run.done().keys()
            if scheduler == "local":
                assert kept.items() <= run.inodes().items()
            lost = run.wasted() - wasted
            waste[lost] += 1
            assert lost <= 2 * PER_SHARD, f"{lost} forwards lost by one {signum.name} to {whom}"
        run.finish()
        assert_the_same(run, undisturbed)
        shutil.rmtree(home)
        if sum(met[f"SIGKILL {whom}"] for whom in {*whoms}) >= 50:
            break
    whole = sum(n for lost, n in waste.items() if lost > PER_SHARD)
    with capsys.disabled():
        print(f"\n{scheduler}: {dict(met)}; {number + 1} stores; forwards lost per stop: at most {max(waste)} of")
        print(f"{PER_SHARD} a shard, {sum(k * n for k, n in waste.items()) / sum(waste.values()):.1f} on average,")
        print(f"more than one shard's in {whole} of {sum(waste.values())}")


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", ["local", "processes:2"])
def test_a_disk_that_fills_up_at_any_point_costs_nothing_once_there_is_room(
    forge: Any, images: Path, undisturbed: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    run, disk = Export(forge, images, tmp_path, scheduler, seconds=0, out="disk/store"), tmp_path / "disk"
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
            assert code == 2, run.said()
            errors = [line for line in run.said().splitlines() if line.startswith("error:")]
            assert len(errors) == 1 and "Traceback" not in run.said()
            assert "disk is full" in errors[0] or "No space left" in errors[0]
            ballast.unlink()
            run.finish()
            assert_the_same(run, undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
