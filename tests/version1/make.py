"""Make the fixtures of format 1 that lie beside this file. Run by hand, once, at commit 2675a43.

It drives the code as it was laid out then (cli.py, stages/ and flat pipeline/), so it does not work later and need
not: the fixtures are kept because they were written by that code. From the root of a checkout of that commit:

    rm -rf /tmp/compress-v1 && PYTHONPATH=. OMP_NUM_THREADS=1 python tests/version1/make.py

Everything is made in /tmp/compress-v1, as paths end up in manifests, and then copied here.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pipeline.interrupt import Interrupted
from pipeline.session import Session

import cli
from pipeline import embed

HERE, HOME = Path(__file__).resolve().parent, Path("/tmp/compress-v1")
sys.path.insert(0, str(HERE.parent))
from arithmetic import arithmetic  # noqa: E402

PACKAGES = ("torch", "torchvision", "pillow", "zarr", "numcodecs", "numpy", "safetensors", "scikit-learn", "scipy")
NOT_COMPARED = ("history.jsonl", "train.log", "tensorboard", "lease.json")
CPU = "--device cpu --workers 0"
CONVNET = "convnet:channels=4+8,interpolation=nearest"  # no filter: pixels are the same on every processor
RESNET = "cifar-resnet:8,width=2,drop_path=0.3,interpolation=nearest"
PIXELS = "python:pipeline.teachers.digits:Pixels,interpolation=nearest"
BLOCKS = "--limit 64 --batch-size 8 --shard-size 16"
STORE = (
    f"export-teacher --data digits --teacher python:{HOME}/teacher.py:Factory --out {HOME}/store --views 6 "
    f"--policy moco-v2 --local-views 2 --keep embedding,projection --codec int8 {BLOCKS} {CPU}"
)
HALF = (
    f"export-teacher --data digits --teacher {PIXELS} --out {HOME}/store-half --views 3 --image-size 8 "
    f"--codec float32 {BLOCKS} {CPU}"
)
LEARN = f"--store {HOME}/store --image-size 16 --batch-size 16 --steps 20 --save-every 5 {CPU}"
RUNS = (
    f"distill --student {CONVNET} --student {RESNET} --method compress-2q-momentum:bank=32,momentum=0.9 --ema 0.9 "
    f"--lr 0.1 --out {HOME}/runs {LEARN}"
)
SEED = (
    f"distill --student {CONVNET} --method seed:bank=32 --val digits:split=test --val-every 2 --out {HOME}/runs-seed "
    f"{LEARN}"
)
STUDENT_RUN = f"{HOME}/runs/convnet-channels-4-8-interpolation-nearest"
PROTOCOLS = "--protocol nn --protocol knn:k=5 --protocol cluster --protocol linear:epochs=40"
SCORE = f"--val digits:split=test {PROTOCOLS} {CPU}"
STUDENT = f"evaluate --run {STUDENT_RUN} --out {HOME}/evaluation/student {SCORE}"
TEACHER = f"evaluate --store {HOME}/store --out {HOME}/evaluation/teacher {SCORE}"


def compress(command: str) -> None:
    """A command line, in this process."""
    print(f"$ compress {command}", flush=True)
    sys.argv = ["compress", *command.split()]
    cli.app(standalone_mode=False)


def stopped(command: str, place: Any, name: str, call: int) -> None:
    """A command to which SIGINT comes in call number `call`, counted from 1, of a function."""
    act: Callable[..., Any] = getattr(place, name)
    calls = 0

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return act(*given)

    setattr(place, name, counted)
    try:
        compress(command)
    except Interrupted as stop:
        print(f"stopped: {stop}")
    else:
        raise SystemExit("it was to be stopped")
    finally:
        setattr(place, name, act)


def tensors(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested checkpoint by its path."""
    if isinstance(part, dict | list | tuple):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from tensors(value, f"{name}/{key}")
    else:
        yield name, part


def said(value: Any) -> str:
    """A leaf of a checkpoint as text: tensors by their digest."""
    if not isinstance(value, torch.Tensor):
        return json.dumps(value)
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {list(value.shape)} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def digests(folder: Path) -> dict[str, str]:
    """{relative path: digest} of the files that are the same whoever makes them, whenever."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        for name, file in files.items()
        if not name.startswith(NOT_COMPARED)
    }


def expected_run(folder: Path, out: Path) -> None:
    """What is compared of a finished run."""
    out.mkdir(parents=True)
    for name in ("manifest.json", "student.safetensors"):
        shutil.copyfile(folder / name, out / name)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")} for row in rows]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timeless))
    saved = torch.load(folder / "checkpoints/last.pt", weights_only=True)
    write(out / "checkpoint.json", {name: said(value) for name, value in tensors(saved)})


def write(file: Path, record: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def neutral(folder: Path) -> None:
    """Take out what names this machine or is not needed to go on."""
    for history in folder.rglob("history.jsonl"):
        events = [json.loads(line) | {"host": "localhost", "pid": 1} for line in history.read_text().splitlines()]
        history.write_text("".join(json.dumps(event, sort_keys=True, separators=(",", ":")) + "\n" for event in events))
    for log in folder.rglob("train.log"):
        log.unlink()
    for board in folder.rglob("tensorboard"):
        shutil.rmtree(board)
    for earlier in folder.rglob("step-00000010.pt"):
        earlier.unlink()


def keep(name: str) -> None:
    """Copy what was made, as it is now, to here."""
    shutil.copytree(HOME / name, HERE / name)
    neutral(HERE / name)


def main() -> None:
    torch.set_num_threads(1)
    for name in ("store", "store-half", "runs", "runs-seed", "evaluation", "expected"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    HOME.mkdir()
    expected = HERE / "expected"
    shutil.copyfile(HERE / "teacher.py", HOME / "teacher.py")

    compress(STORE)
    keep("store")
    write(expected / "store.json", digests(HOME / "store"))
    stopped(HALF, embed, "_write", 2)
    keep("store-half")
    compress(HALF)
    write(expected / "store-half.json", digests(HOME / "store-half"))

    for command, name in ((RUNS, "runs"), (SEED, "runs-seed")):
        stopped(command, Session, "step", 12)
        keep(name)
        compress(command)
        for manifest in sorted((HOME / name).rglob("manifest.json")):
            expected_run(manifest.parent, expected / name / manifest.parent.relative_to(HOME / name))

    compress(TEACHER)
    compress(STUDENT)
    keep("evaluation")
    for report in [*(HERE / "evaluation").rglob("report.html"), *(HERE / "evaluation").rglob("figures")]:
        shutil.rmtree(report) if report.is_dir() else report.unlink()
    compress(STORE.replace("--views 6", "--views 9"))
    write(expected / "store-grown.json", digests(HOME / "store"))
    write(expected / "arithmetic.json", {"digest": arithmetic(), "versions": {n: version(n) for n in PACKAGES}})


if __name__ == "__main__":
    main()
