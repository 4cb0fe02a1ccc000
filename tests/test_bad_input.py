"""Errors of users on the real command line: exit status 2, one `error:` line with a remedy, and no data lost."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nasty import bad_files, encoded, noise

from compress_ssl import cli
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder

ROOT = Path(cli.__file__).parent
TEACHER = "convnet:channels=4+8,pretrained=false"
STUDENT = "convnet:channels=4"
CLASSES = "abc"
EXPORT = ("--image-size", 8, "--views", 3, "--batch-size", 4, "--shard-size", 8, "--workers", 0, "--device", "cpu")
DISTILL = ("--image-size", 8, "--batch-size", 6, "--steps", 4, "--save-every", 2, "--workers", 0, "--device", "cpu")


# ---------------------------------------------------------------------- the command line and what it said


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error line of a mistake: the last line of stderr, and the only one."""
        assert self.code == 2, f"status {self.code}\n{self.err}{self.out}"
        lines = self.err.splitlines()
        assert "Traceback" not in self.err
        assert [line for line in lines if line.startswith("error:")] == lines[-1:], self.err
        assert self.out == ""
        return lines[-1]

    def refuses(self, *words: str) -> str:
        """The error line, which holds these words."""
        lacking = [word for word in words if word not in self.error]
        assert not lacking, f"{lacking} not in {self.error!r}"
        return self.error

    def works(self) -> "Said":
        assert self.code == 0, f"status {self.code}\n{self.err}{self.out}"
        return self


def compress(*words: object) -> Said:
    """The program's own main, in this process; what it changes there is put back."""
    out, err = io.StringIO(), io.StringIO()
    kept = sys.argv, list(sys.path), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = ["compress", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv, sys.path[:] = kept[0], kept[1]
        os.environ.clear()
        os.environ.update(kept[2])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Said(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def export(data: object, out: object, *more: object, teacher: str = TEACHER) -> Said:
    return compress("export-teacher", "--data", data, "--teacher", teacher, "--out", out, *EXPORT, *more)


def distill(store: object, out: object, *more: object, student: str = STUDENT, method: str = "compress-2q") -> Said:
    named = ("--store", store, "--student", student, "--method", method, "--out", out)
    return compress("distill", *named, *DISTILL, *more)


def evaluate(*more: object) -> Said:
    return compress("evaluate", "--workers", 0, "--device", "cpu", *more)


def program(*words: object, **how: object) -> Said:
    """A process of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "compress_ssl.cli", *map(str, words)], capture_output=True, text=True, timeout=120, **how
    )
    return Said(done.returncode, done.stdout, done.stderr)


def content(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def features(store: Path) -> dict[str, bytes]:
    """What an export promises to the byte: the arrays and the done records."""
    return {key: data for key, data in content(store).items() if key.startswith(("features.zarr", "done"))}


# ---------------------------------------------------------------------- a good data set, store and run


def pictures(folder: Path, classes: str = CLASSES, each: int = 6, seed: int = 0) -> Path:
    """PNG files in one subfolder per class."""
    for y, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            (folder / name / f"{k:02d}.png").write_bytes(encoded(noise(1000 * seed + 100 * y + k, tint=y)))
    return folder


@dataclass(frozen=True)
class World:
    """What went well. Tests read it and change copies."""

    data: Path
    val: Path
    flat: Path  # the images of `data`, without classes
    store: Path
    run: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    top = tmp_path_factory.mktemp("world")
    made = World(pictures(top / "data"), pictures(top / "val", seed=1), top / "flat", top / "store", top / "run")
    made.flat.mkdir()
    for file in made.data.glob("*/*.png"):
        shutil.copy(file, made.flat / f"{file.parent.name}{file.name}")
    export(made.data, made.store).works()
    distill(made.store, made.run).works()
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(world: World, here: Path) -> Path:
    return Path(shutil.copytree(world.data, here / "data"))


@pytest.fixture
def store(data: Path) -> Path:
    """A store of `data`, to be damaged."""
    export(data, "store").works()
    return Path("store").absolute()


@pytest.fixture
def run(world: World, here: Path) -> Path:
    return Path(shutil.copytree(world.run, here / "run"))


@pytest.fixture
def mount(here: Path) -> Iterator[Callable[..., Path]]:
    """mount(size) or mount(size, "remount"): a small disk. Skips where mounting is not permitted."""
    disk = here / "disk"
    disk.mkdir()

    def mounted(size: str, *options: str) -> Path:
        said = ",".join([f"size={size}", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", said, "tmpfs", str(disk)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return disk

    yield mounted
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that everybody can read, unlike pytest's own; whole again at the end."""
    folder = Path(tempfile.mkdtemp(prefix="compress-test-"))
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    try:
        with without_privileges():
            os.listdir(folder)
        yield folder
    except PermissionError:
        pytest.skip(f"{folder.parent} is closed to other users")
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As nobody, where permission bits bind; for root only the effective user changes, and back."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ---------------------------------------------------------------------- data folders


@pytest.mark.parametrize(
    "spec, words",
    [
        ("folder:gone", ["gone does not exist", "give a folder of image files"]),
        ("gone", ["unknown data 'gone'", "no file or folder of that name", "Known: folder, digits, torchvision"]),
        ("./gone", ["gone does not exist"]),
        ("note.txt", ["note.txt is not a folder"]),
        ("folder:", ["needs an argument", "folder:PATH"]),
        ("empty", ["empty holds no image files", ".jpg", "subfolders"]),
        ("notes", ["notes holds no image files"]),
        ("split", ["split holds train/ and val/", "folder:split/train or folder:split/val"]),
        ("fodler:data", ["unknown data 'fodler'", "did you mean 'folder'?"]),
        ("folder:data,label=false", ["no key 'label'", "did you mean 'labels'?"]),
        ("digits:split=tset", ["split=tset", "train, test, all"]),
        ("digits:splt=test", ["no key 'splt'", "did you mean 'split'?"]),
        ("torchvision:CIFR10", ["no data set 'CIFR10'", "did you mean 'CIFAR10'?"]),
        ("torchvision:CIFAR10,root=nowhere", ["CIFAR10", "nowhere", "root=DIR", "download=true"]),
    ],
)
def test_missing_images_are_named_with_a_remedy(data: Path, spec: str, words: list[str]) -> None:
    for folder in ("empty", "notes", "split/train/a", "split/val/a"):
        Path(folder).mkdir(parents=True)
    Path("note.txt").write_text("not an image")
    Path("notes/note.txt").write_text("not an image")
    export(spec, "store").refuses(*words)
    assert not Path("store").exists()


def test_a_folder_of_unreadable_files_is_refused_until_it_is_corrected(here: Path) -> None:
    for name, damaged in bad_files().items():
        (here / "data" / "a").mkdir(parents=True, exist_ok=True)
        (here / "data" / "a" / name).write_bytes(damaged)
    count = len(bad_files())
    for _ in range(2):  # the store is whole and of no use: the same command says so again
        refused = export("data", "store")
        refused.refuses(f"none of the {count} images could be used", f"a/{min(bad_files())}", "--overwrite")
    assert len(Path("store/bad-images.tsv").read_text().splitlines()) == 1 + count
    distill("store", "run").refuses("0 usable images", "at least 2")
    (here / "data" / "a" / "empty.jpg").write_bytes(encoded(noise(), "JPEG"))
    export("data", "store", "--overwrite").works()
    assert Path("store.old-1/manifest.json").exists()


def test_bad_files_are_listed_and_do_not_affect_the_good_ones(data: Path) -> None:
    for name in bad_files():
        (data / "b" / name).write_bytes(encoded(noise(7), Path(name).suffix[1:].replace("jpg", "jpeg")))
    export(data, "before").works()
    for name, damaged in bad_files().items():
        (data / "b" / name).write_bytes(damaged)
    said = export(data, "store").works()
    assert f"{len(bad_files())} bad images" in said.out
    before, after = arrays("before"), arrays("store")
    good = after["status"] == 0
    assert [str(name) for name in after["sample_id"][~good]] == [f"b/{name}" for name in sorted(bad_files())]
    for name in ("sample_id", "label", "view_key"):
        np.testing.assert_array_equal(before[name], after[name])
    for name in ("embedding", "embedding_scale", "content"):
        np.testing.assert_array_equal(before[name][good], after[name][good])
        assert not after[name][~good].any()
    rows = [line.split("\t") for line in Path("store/bad-images.tsv").read_text().splitlines()]
    assert rows[0] == ["row", "id", "reason"]
    assert [int(row) for row, _, _ in rows[1:]] == np.flatnonzero(~good).tolist()
    assert {name: why for _, name, why in rows[1:]}.keys() == {f"b/{name}" for name in bad_files()}
    assert all(why for _, _, why in rows[1:])
    distill("store", "run").works()


def arrays(store: str) -> dict[str, np.ndarray]:
    import zarr

    group = zarr.open_group(f"{store}/features.zarr", mode="r")
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


def test_odd_files_are_bad_images_and_use_bounded_time_and_memory(data: Path) -> None:
    os.mkfifo(data / "a" / "pipe.jpg")
    (data / "a" / "gone.jpg").symlink_to("nowhere")
    with open(data / "a" / "large.png", "wb") as file:
        file.truncate(2**31 + 1)
    (data / "a" / "tab\tand\nline.png").write_bytes(b"x")
    (data / "a" / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"x")
    (data / "a" / "up").symlink_to("..")  # a folder that holds itself
    said = export(data, "store").works()
    assert "5 bad images" in said.out and "5 of 23 images" in said.err
    rows = [line.split("\t") for line in Path("store/bad-images.tsv").read_text().splitlines()[1:]]
    reasons = {name: why for _, name, why in rows}
    assert reasons["a/pipe.jpg"] == "no regular file"
    assert "2147483649 bytes" in reasons["a/large.png"]
    assert "No such file" in reasons["a/gone.jpg"]
    assert set(reasons) >= {r"a/tab\tand\nline.png", "a/%FF%FE.png"}


def test_a_subfolder_that_cannot_be_listed_is_an_error(public: Path) -> None:
    data = pictures(public / "data")
    (data / "c" / "00.png").chmod(0)
    export(data, "store").works()
    (data / "b").chmod(0)
    with without_privileges():
        said = export(data, public / "new"), export(data, public / "store"), distill("store", public / "run")
    for each in said:
        each.refuses("data/b cannot be listed", "ermission", "change its rights")
    assert sorted(os.listdir()) == ["data", "store"]


def test_a_teacher_with_features_that_are_not_finite_is_refused_at_export(data: Path) -> None:
    Path("net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, limit):\n"
        "        super().__init__()\n"
        "        self.limit = limit\n"
        "    def forward(self, x):\n"
        "        mean = x.mean((2, 3))\n"
        "        return torch.where(mean[:, :1] > self.limit, float('nan'), mean)\n"
        "def some(): return Net(0.3)\n"
        "def all(): return Net(-9)\n"
        "def words(): return 'a network'\n"
        "def broken(): raise RuntimeError('out of ideas')\n"
    )
    said = export(data, "some", teacher="python:net.py:some").works()
    assert "bad images" in said.out
    assert "not finite" in Path("some/bad-images.tsv").read_text()
    assert (arrays("some")["status"] == 0).tolist() == [False] * 6 + [True] * 12
    export(data, "all", teacher="python:net.py:all").refuses("none of the 18 images", "not finite", "--overwrite")
    export(data, "none", teacher="python:net.py:words").refuses("returned a str", "torch.nn.Module")
    export(data, "none", teacher="python:net.py:broken").refuses("RuntimeError: out of ideas", "net.py, line 12")
    Path("script.py").write_text("import sys\nsys.exit('usage: script.py FILE')\n")
    export(data, "none", teacher="python:script.py:net").refuses("could not be imported", "usage", "script.py, line 2")
    export(data, "none", teacher="python:net.py:som").refuses("no function or class 'som'", "did you mean 'some'?")
    assert not Path("none").exists()


# ---------------------------------------------------------------------- names, keys and flags


NEAR_MISSES = [
    (["distil"], ["no command 'distil'", "did you mean 'distill'?"]),
    (["export-teacher", "--vews", "3"], ["--vews", "--views", "--help"]),
    (["export-teacher"], ["--data", "--help"]),
    (["export-teacher", "--views", "many"], ["--views is many", "must be a whole number"]),
    ([], ["No command was given", "--help"]),
    (["EXPORT", "--views", "0"], ["--views is 0", "must be from 1 to"]),
    (["EXPORT", "--limit", "-1"], ["--limit is -1", "must be from 1 to"]),
    (["EXPORT", "--policy", "mocov2"], ["--policy is mocov2", "moco-v2"]),
    (["EXPORT", "--policy", "none"], ["--policy none defines only view 0", "use --views 1"]),
    (["EXPORT", "--codec", "int9"], ["'int9'", "int8"]),
    (["EXPORT", "--precision", "fp64"], ["--precision is fp64", "fp32, bf16, fp16"]),
    (["EXPORT", "--device", "cdua"], ["--device cdua", "auto, cpu, cuda"]),
    (["EXPORT", "--device", "cuda:99"], ["--device cuda:99", "CUDA devices"]),
    (["EXPORT", "--teacher", "tim:resnet18"], ["unknown model 'tim'", "did you mean 'timm'?"]),
    (["EXPORT", "--teacher", "timm:resnet81"], ["no model 'resnet81'", "did you mean 'resnet18'?"]),
    (["EXPORT", "--teacher", "torchvision:resnet81"], ["no model 'resnet81'", "did you mean 'resnet18'?"]),
    (["EXPORT", "--teacher", "cifar-resnet:9"], ["cifar-resnet:9", "nearest is 8"]),
    (["EXPORT", "--teacher", "convnet:chanels=4"], ["no key 'chanels'", "did you mean 'channels'?"]),
    (["EXPORT", "--teacher", "convnet:channels=4+x"], ["channels=4+x", "whole number"]),
    (["EXPORT", "--teacher", "convnet:pretrained=true"], ["without trained weights", "pretrained=false"]),
    (["EXPORT", "--teacher", "torchscript:gone.pt"], ["gone.pt does not exist"]),
    (["EXPORT", "--teacher", "python:nowhere:net"], ["nowhere", "could not be imported"]),
    (["DISTILL", "--method", "compres-2q"], ["unknown method 'compres-2q'", "did you mean 'compress-2q'?"]),
    (["DISTILL", "--method", "compress-2q:bnk=3"], ["no key 'bnk'", "did you mean 'bank'?"]),
    (["DISTILL", "--method", "seed:start=stor"], ["start=stor", "store, empty, random"]),
    (["DISTILL", "--method", "compress-2q:bank=19"], ["bank=19", "18 usable images", "bank=9"]),
    (["DISTILL", "--method", "python:json:JSONDecoder"], ["json:JSONDecoder", "Method"]),
    (["DISTILL", "--student", "convnt"], ["unknown model 'convnt'", "did you mean 'convnet'?"]),
    (["DISTILL", "--pairing", "sam"], ["--pairing is sam", "same, fresh, cross"]),
    (["DISTILL", "--optimizer", "adagrad"], ["--optimizer is adagrad", "sgd, adam, adamw, lars"]),
    (["DISTILL", "--epochs", "3"], ["--epochs and --steps", "keep one"]),
    (["DISTILL", "--views", "9"], ["--views 9", "has 3"]),
    (["DISTILL", "--views-per-step", "3"], ["2 views", "--views-per-step 3", "--views"]),
    (["DISTILL", "--device", "cdua"], ["--device cdua", "auto, cpu, cuda"]),
    (["DISTILL", "--val", "FLAT"], ["no labels", "leave --val out"]),
    (["DISTILL", "--student", "timm:vit_tiny_patch16_224"], ["vit_tiny", "8", "16"]),
    (["DISTILL", "--student", "torchvision:squeezenet1_1"], ["cannot take images of 8 pixels", "--image-size"]),
    (["EVALUATE", "--protocol", "clustr"], ["unknown protocol 'clustr'", "did you mean 'cluster'?"]),
    (["EVALUATE", "--protocol", "knn:kk=3"], ["no key 'kk'", "did you mean 'k'?"]),
    (["EVALUATE", "--protocol", "knn:k=0"], ["k=0", "k=1 or more"]),
    (["EVALUATE", "--protocol", "linear:epochs=many"], ["epochs=many", "whole number"]),
    (["EVALUATE", "--store", "STORE"], ["one of --run, --store and --model", "run and store"]),
    (["evaluate", "--val", "FLAT"], ["one of --run, --store and --model", "none"]),
    (["evaluate", "--val", "FLAT", "--model", "convnet"], ["--model needs --train and --out"]),
    (["evaluate", "--val", "FLAT", "--store", "STORE", "--image-size", "9"], ["--image-size", "--store"]),
]


@pytest.mark.parametrize("words, parts", NEAR_MISSES, ids=lambda part: "_".join(part[-2:]) if part else "nothing")
def test_an_unknown_name_is_reported_with_the_nearest_known_one(
    world: World, here: Path, words: list[str], parts: list[str]
) -> None:
    commands = {"EXPORT": lambda *more: export(world.data, "out", *more)}
    commands["DISTILL"] = lambda *more: distill(world.store, "out", *more)
    commands["EVALUATE"] = lambda *more: evaluate("--run", world.run, "--val", world.val, "--out", "out", *more)
    given = [{"FLAT": world.flat, "STORE": world.store}.get(word, word) for word in words]
    if "--student" in given:  # in place of the usual one, not beside it
        said = distill(world.store, "out", student=str(given[-1]))
    else:
        said = commands[words[0]](*given[1:]) if words and words[0] in commands else compress(*given)
    if words:
        said.refuses(*parts)
    else:  # the help stands above it
        assert said.code == 2 and all(part in said.err.splitlines()[-1] for part in parts)
    assert not Path("out").exists()


def test_an_unknown_flag_of_the_program_itself_is_refused_in_one_line(here: Path) -> None:
    assert program("export-teacher", "--vews", 3).refuses("--vews").count("\n") == 0


def test_a_closed_output_pipe_is_not_an_error(world: World, here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "compress_ssl.cli", "inspect", str(world.run)], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.stderr == b"" and done.returncode == 0


# ---------------------------------------------------------------------- checkpoints of other programs


def test_a_checkpoint_that_does_not_fit_is_refused_with_a_prefix_that_fits(world: World, here: Path) -> None:
    import torch

    from compress_ssl.pipeline.models import build

    state = build("convnet:channels=4+8", pretrained_default=False).backbone.state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{name}": value for name, value in state.items()}}, "moco.pt")
    torch.save({name.replace("blocks", "layers"): value for name, value in state.items()}, "other.pt")
    teacher = "convnet:channels=4+8,weights=moco.pt"
    message = export(world.data, "store", "--dry-run", teacher=teacher).refuses(
        "moco.pt does not fit", "missing", "Try "
    )
    assert "prefix=module.encoder_q." in message
    export(world.data, "store", "--dry-run", teacher=f"{teacher},prefix=module.encoder_q.").works()
    export(world.data, "store", teacher=f"{teacher},prefix=module.encoder_k.").refuses("prefix=module.encoder_q.")
    export(world.data, "store", teacher="convnet:channels=4+8,weights=other.pt").refuses(
        "other.pt does not fit", "Nothing was loaded", "another network?"
    )
    teacher = "convnet:channels=4+9,weights=moco.pt,prefix=module.encoder_q."
    export(world.data, "store", teacher=teacher).refuses("another shape", "8x4x3x3 there, 9x4x3x3 wanted")
    assert not Path("store").exists()


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


def test_a_pickle_with_code_is_refused_and_not_executed(world: World, here: Path) -> None:
    import torch

    torch.save({"state_dict": Payload()}, "evil.pt")
    Path("evil.pkl").write_bytes(pickle.dumps(Payload()))
    for file in ("evil.pt", "evil.pkl"):
        message = export(world.data, "store", teacher=f"convnet:weights={file}").refuses(file, "run", "state dict")
        assert "code" in message
    assert sorted(os.listdir()) == ["evil.pkl", "evil.pt"]


@pytest.mark.parametrize("damaged", [b"", b"not a checkpoint", b"PK\x03\x04 cut", b"\x80\x02}q\x00."])
def test_a_damaged_checkpoint_is_refused(world: World, here: Path, damaged: bytes) -> None:
    Path("weights.pt").write_bytes(damaged)
    export(world.data, "store", teacher="convnet:weights=weights.pt").refuses("weights.pt")
    export(world.data, "store", teacher="convnet:weights=gone.pt").refuses("gone.pt does not exist")
    assert not Path("store").exists()


# ---------------------------------------------------------------------- stores


def test_an_unfinished_store_is_refused_until_its_command_is_repeated(world: World, data: Path, store: Path) -> None:
    whole = features(store)
    next((store / "done").iterdir()).unlink()
    for said in (distill(store, "run"), evaluate("--store", store, "--val", world.val)):
        said.refuses("lacks 1 of 3 shards", "repeat the command that made it")
    assert not Path("run").exists() and not Path("store-evaluation").exists()
    export(data, store).works()
    assert features(store) == whole
    distill(store, "run").works()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--seed", 1], ["views.seed is 0 there, 1 asked"]),
        (["--codec", "float32"], ['codec is "int8" there, "float32" asked (--codec)']),
        (["--image-size", 9], ["preprocessing.size is 8 there, 9 asked"]),
        (["--teacher", "convnet:channels=8,pretrained=false"], ["teacher.weights"]),
        (["--limit", 5], ["other images", "are gone", "--overwrite"]),
        (["--views", 2], ["3 views", "2 were asked for", "only grows"]),
    ],
)
def test_a_store_with_other_settings_is_refused_and_unchanged(store: Path, data: Path, more: list, words: list) -> None:
    before = content(store)
    export(data, store, *more).refuses(*words, "another")
    assert content(store) == before


def test_a_store_of_other_images_is_refused_and_unchanged(world: World, store: Path, data: Path) -> None:
    before = content(store)
    (data / "b" / "new.png").write_bytes(encoded(noise(5)))
    (data / "a" / "00.png").unlink()
    names = ["a/00.png", "b/new.png"]
    export(data, store).refuses("other images", *names)
    export(data, store, "--views", 9).refuses("other images", *names)
    distill(store, "run").refuses("not those of", *names, "--data")
    export(world.val, store).refuses("do not look as they did", "a/00.png", "into a new folder")
    export(world.val, store, "--views", 9).refuses("do not look as they did")
    distill(store, "run", "--data", world.val).refuses("do not look as they did", "--allow-other-pixels")
    assert content(store) == before
    assert not Path("run").exists()


def test_one_changed_image_stops_the_training_and_the_work_so_far_is_kept(store: Path, data: Path) -> None:
    file = data / "a" / "03.png"  # none of the probes
    good = file.read_bytes()
    distill(store, "run").works()
    file.write_bytes(encoded(noise(99)))
    message = distill(store, "run", "--steps", 12).refuses("a/03.png changed since the export", "put it back")
    assert "new store" in message
    export(data, store, "--views", 5).refuses("a/03.png", "put them back")
    file.write_bytes(good[:60])
    distill(store, "run", "--steps", 12).refuses("a/03.png changed", "truncated")
    file.write_bytes(good)
    said = distill(store, "run", "--steps", 12).works()
    assert "steps 0 to 12" not in said.err, "a checkpoint was there to go on from"
    export(data, store, "--views", 5).works()


def test_a_flipped_byte_in_a_shard_is_an_error_when_it_is_read(data: Path, store: Path) -> None:
    for name, place in (("embedding", "1/0/0"), ("embedding_scale", "1/0"), ("status", "1"), ("content", "2")):
        shard = store / "features.zarr" / name / "c" / place
        good = shard.read_bytes()
        middle = len(good) // 3  # of the features: in view 1, which a student is trained on
        shard.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        before = content(store)
        distill(store, "run", "--overwrite").refuses(f"'{name}' is damaged", "compress verify --repair")
        assert content(store) == before
        compress("verify", store).refuses(f"'{name}' is damaged", "compress verify --repair")
        assert content(store) == before
        compress("verify", store, "--repair").works()
        export(data, store).works()
        assert shard.read_bytes() == good
    distill(store, "run", "--overwrite").works()


@pytest.mark.parametrize("name, place", [("embedding", "1/0/0"), ("embedding_scale", "1/0"), ("status", "1")])
def test_a_missing_file_of_a_shard_is_not_read_as_zeros(
    world: World, data: Path, store: Path, name: str, place: str
) -> None:
    whole = features(store)
    (store / "features.zarr" / name / "c" / place).unlink()
    for said in (distill(store, "run"), evaluate("--store", store, "--val", world.val), export(data, store)):
        said.refuses("lacks 1 of the files", f"features.zarr/{name}/c/{place}", "compress verify --repair")
    assert not Path("run").exists()
    compress("verify", store, "--repair").works()
    export(data, store).works()
    assert features(store) == whole


def test_a_block_of_bad_images_has_no_files_and_nothing_is_missing(here: Path) -> None:
    pictures(here / "data", each=8)
    for file in (here / "data" / "b").iterdir():
        file.write_bytes(b"")
    export("data", "store").works()
    assert not Path("store/features.zarr/embedding/c/1").exists()
    export("data", "store").works()
    distill("store", "run").works()


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"[1]", b'{"name": "my app"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_refused_by_every_command(world: World, here: Path, damage: bytes) -> None:
    store, run = (Path(shutil.copytree(folder, here / folder.name)) for folder in (world.store, world.run))
    for folder in (store, run):
        (folder / "manifest.json").write_bytes(damage)
    before = content(here)
    for said in (
        compress("inspect", store),
        export(world.data, store),
        export(world.data, store, "--overwrite"),
        distill(store, "new"),
        distill(world.store, run),
        distill(world.store, run, "--overwrite"),
        evaluate("--run", run, "--val", world.val),
        evaluate("--store", store, "--val", world.val),
    ):
        said.refuses("manifest.json is damaged", "copy", "compress verify --repair")
    assert content(here) == before
    compress("verify", store, "--repair").works()
    export(world.data, store).works()
    assert content(store) == content(world.store)


# ---------------------------------------------------------------------- runs


def test_a_refused_command_leaves_the_existing_run_unchanged(world: World, run: Path) -> None:
    before = content(run)
    distill(world.store, run, "--lr", 1).refuses("training.lr is", "1.0 asked", "--overwrite")
    distill(world.store, run, student="convnet:channels=5").refuses(
        "student.options.channels is [4] there, [5] asked (--student channels=)"
    )
    distill(world.store, run, "--overwrite", student="convnet:chanels=5").refuses("chanels")
    distill(world.store, run, "--overwrite", method="compress-2q:bank=99").refuses("bank=99")
    distill(world.store, run, "--overwrite", "--device", "cdua").refuses("cdua")
    assert content(run) == before
    assert os.listdir() == ["run"]


def test_a_damaged_checkpoint_is_named_and_an_earlier_one_is_used(world: World, run: Path) -> None:
    newest = run / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    distill(world.store, run, "--steps", 6).refuses("step-00000004.pt is damaged", "delete it", "earlier")
    newest.unlink()
    assert "steps 2 to 6" in distill(world.store, run, "--steps", 6).works().err
    distill(world.store, "straight", "--steps", 6).works()
    students = [Path(folder, "student.safetensors").read_bytes() for folder in (run, "straight")]
    assert students[0] == students[1]


def test_a_missing_or_damaged_student_file_is_written_again(world: World, run: Path) -> None:
    student = run / "student.safetensors"
    good = student.read_bytes()
    student.write_bytes(good[:-40])
    evaluate("--run", run, "--val", world.val).refuses("student.safetensors is damaged", "repeat the distill command")
    student.unlink()
    evaluate("--run", run, "--val", world.val).refuses("not finished", "repeat its distill command")
    distill(world.store, run).works()
    assert student.read_bytes() == good


def test_a_loss_that_is_not_finite_stops_the_run_with_a_remedy(world: World, here: Path) -> None:
    message = distill(world.store, "run", "--lr", 1e30).refuses("run", "at step", "learning rate 1e+30")
    assert "lower --lr" in message
    assert not Path("run/student.safetensors").exists()
    evaluate("--run", "run", "--val", world.val).refuses("not finished")


# ---------------------------------------------------------------------- evaluations


def test_data_of_one_class_can_train_a_student_but_not_score_it(world: World, here: Path) -> None:
    pictures(here / "one", "a")
    export("one", "store").works()
    distill("store", "run").works()
    for protocol in ("nn", "linear", "knn:k=2"):
        evaluate("--run", "run", "--val", "one", "--protocol", protocol).refuses("one class 'a'", "two classes")
    evaluate("--run", "run", "--val", "one", "--protocol", "cluster").refuses("one class", "cluster:clusters=K")
    assert not Path("run/evaluation/metrics.json").exists()


def test_a_class_in_val_that_train_lacks_is_refused_by_name(world: World, here: Path) -> None:
    pictures(here / "val", "abcz", each=1)
    message = evaluate("--run", world.run, "--val", "val", "--out", "out").refuses("1 of 4 classes", "'z'", "--train")
    assert "remove these classes from --val" in message
    assert not Path("out").exists()


def test_more_clusters_or_neighbours_than_images_are_refused(world: World, here: Path) -> None:
    few = pictures(here / "few", each=1)
    flags = ("--store", world.store, "--train", few, "--val", few, "--out", "out", "--protocol")
    evaluate(*flags, "cluster:clusters=5").refuses("5 clusters", "there are 3", "fewer clusters")
    evaluate(*flags, "knn:k=5").refuses("5 neighbours", "there are 3", "knn:k=3")


def test_without_labels_no_score_that_needs_them_can_be_computed(world: World, here: Path) -> None:
    flags = ("--store", world.store, "--train", world.flat, "--val", world.flat, "--out", "out", "--protocol")
    for protocol in ("nn", "linear", "knn:k=2"):
        evaluate(*flags, protocol).refuses(f"'{protocol}' needs labels", "training images", "cluster:clusters=K")
    assert not Path("out").exists()
    evaluate(*flags, "cluster").refuses("no labels", "cluster:clusters=K")
    said = evaluate(*flags, "cluster:clusters=3").works()
    assert "no labels, so no scores" in said.out
    found = json.loads(Path("out/metrics.json").read_text())["cluster"]
    assert found["clusters"] == 3 and found["top1"] is None
    evaluate("--run", world.run, "--val", world.flat, "--protocol", "nn", "--out", "new").refuses("validation images")


def test_an_evaluation_refuses_other_images_than_it_began_with(world: World, data: Path) -> None:
    flags = ("--run", world.run, "--out", "out", "--protocol", "cluster:clusters=2")
    evaluate(*flags, "--val", data).works()
    before = content(Path("out"))
    evaluate(*flags, "--val", world.flat).refuses("val images", "--overwrite")
    evaluate(*flags, "--val", data, "--image-size", 9).refuses("size is 8 there, 9 asked", "--overwrite")
    assert content(Path("out")) == before
    Path("out/metrics.json").write_bytes(b"{")
    compress("compare", "out").refuses("metrics.json is damaged", "repeat the command")
    compress("inspect", "out").refuses("metrics.json is damaged", "repeat the command")
    for file in Path("out/results").iterdir():
        file.write_bytes(b"{")
    evaluate(*flags, "--val", data).works()
    compress("compare", "out").works()


def test_images_that_have_moved_are_reported_with_a_remedy(data: Path) -> None:
    export(data, "store").works()
    distill("store", "run").works()
    data.rename("moved")
    message = distill("store", "run", "--steps", 6).refuses(
        "not where they were", str(data), "does not exist", "--data"
    )
    assert "store" in message
    distill("store", "run", "--steps", 6, "--data", "moved").works()
    flags = ("--run", "run", "--val", "moved", "--out", "out", "--protocol", "cluster:clusters=99")
    evaluate(*flags).refuses("not where they were", str(data), "--train")
    evaluate(*flags, "--train", "moved").refuses("99 clusters")


def test_compare_and_inspect_refuse_folders_without_results(world: World, data: Path) -> None:
    compress("compare", world.run).refuses("has no evaluation", "compress evaluate")
    compress("compare", ".").refuses("has no evaluation")
    compress("compare", "gone").refuses("has no evaluation")
    compress("inspect", data).refuses("was not made by compress", "no manifest.json")
    compress("inspect", "gone").refuses("no such folder", "check the path")
    evaluate("--run", world.store, "--val", data).refuses("holds a store, not a run")
    evaluate("--store", world.run, "--val", data).refuses("holds a run, not a store")
    distill(data, "run").refuses("not a store", "no manifest.json")
    distill("gone", "run").refuses("not a store", "no such folder")


# ---------------------------------------------------------------------- output folders


def test_a_folder_that_compress_did_not_make_is_never_written_to(world: World, data: Path) -> None:
    Path("note.txt").write_text("mine")
    (here := data.parent, before := content(data.parent))
    for more, instead in (((), "name another folder"), (("--overwrite",), "choose another --out")):
        for out in (data, "note.txt"):
            export(world.data, out, *more).refuses(str(out), instead)
            distill(world.store, out, *more).refuses(str(out), instead)
            evaluate("--run", world.run, "--val", world.val, "--out", out, *more).refuses(instead)
        export(world.data, "note.txt/store", *more).refuses("a file stands where a folder is needed")
        distill(world.store, "note.txt/run", *more).refuses("a file stands where a folder is needed")
    compress("compare", world.run, "--out", data).refuses("no evaluation")
    assert content(here) == before


def test_overwrite_replaces_only_its_own_kind_and_never_the_working_directory(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(shutil.copytree(world.store, "store"))
    before = content(run.parent)
    export(world.data, run, "--overwrite").refuses("holds a run, not a store")
    distill(store, store, "--overwrite").refuses("holds a store, not a run")
    evaluate("--run", run, "--val", world.val, "--out", run, "--overwrite").refuses("holds a run, not an evaluation")
    monkeypatch.chdir(store)
    export(world.data, ".", "--overwrite").refuses("--overwrite cannot set . aside", "another folder")
    assert content(run.parent) == before
    monkeypatch.chdir(run.parent)
    export(world.data, "store", "--overwrite", teacher="timm:resnet81").refuses("resnet81")
    export("gone", "store", "--overwrite").refuses("gone")
    assert content(run.parent) == before, "a command that is refused sets nothing aside"
    export(world.data, "store", "--overwrite", "--seed", 1).works()
    assert content(Path("store.old-1")) == content(world.store)


def test_a_folder_without_write_permission_is_refused(public: Path) -> None:
    data = pictures(public / "data")
    export(data, "store").works()
    distill("store", "run").works()
    Path("closed").mkdir()
    before = content(public)
    for path in (public, *public.rglob("*")):  # readable by all, writable by nobody but root
        path.chmod(0o555 if path.is_dir() else 0o444)
    with without_privileges():
        refusals = [
            export(data, "closed/store"),
            export(data, "store", "--views", 5),
            export(data, "store", "--overwrite"),
            distill("store", "closed/run"),
            distill("store", "run", "--steps", 6),
            evaluate("--run", "run", "--val", data, "--protocol", "nn"),
        ]
    for said in refusals:
        said.refuses("ermission", "choose another")
    assert content(public) == before


def test_a_read_only_disk_is_refused(world: World, mount: Callable[..., Path]) -> None:
    disk = mount("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    export(world.data, disk / "store").refuses("disk/store", "read-only", "choose another folder")
    distill(world.store, disk / "run").refuses("disk/run", "read-only")


# ---------------------------------------------------------------------- full disks, limits and memory


def fill(disk: Path, like: Path, share: float) -> Path:
    """A ballast file that leaves room for a share of what lies in the folder `like`."""
    space = os.statvfs(disk)
    blocks = sum(-(-len(data) // space.f_bsize) for data in content(like).values())
    ballast = disk / "ballast"
    ballast.write_bytes(bytes((space.f_bavail - int(share * blocks)) * space.f_bsize))
    return ballast


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.75, 0.9])
def test_an_export_to_a_full_disk_continues_when_there_is_room(
    world: World, mount: Callable[..., Path], share: float
) -> None:
    disk = mount("2m")
    ballast = fill(disk, world.store, share)
    export(world.data, disk / "store").refuses("disk/store", "the disk is full", "make room and repeat the command")
    ballast.unlink()
    export(world.data, disk / "store").works()
    assert features(disk / "store") == features(world.store)
    assert not list(disk.rglob("*.part"))


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.7])
def test_a_training_to_a_full_disk_continues_when_there_is_room(
    world: World, mount: Callable[..., Path], share: float
) -> None:
    disk = mount("4m")
    ballast = fill(disk, world.run, share)
    distill(world.store, disk / "run").refuses("the disk is full", "make room and repeat the command")
    ballast.unlink()
    distill(world.store, disk / "run").works()
    assert (disk / "run" / "student.safetensors").read_bytes() == (world.run / "student.safetensors").read_bytes()


def test_an_evaluation_to_a_full_disk_continues_when_there_is_room(world: World, mount: Callable[..., Path]) -> None:
    disk = mount("4m")
    flags = ("--run", world.run, "--val", world.val, "--out", disk / "scores", "--protocol", "cluster")
    for share in (0, 0.3, 0.3, 0.6):  # finished work is kept, so each attempt gets further
        ballast = fill(disk, world.store, share)
        evaluate(*flags).refuses("disk/scores", "the disk is full", "make room and repeat the command")
        ballast.unlink()
    evaluate(*flags).works()
    assert not list(disk.rglob("*.part"))


def test_a_file_size_limit_is_reported_in_one_line(world: World, here: Path) -> None:
    words = ("export-teacher", "--data", world.data, "--teacher", TEACHER, "--out", "store", *EXPORT)
    limit = 400  # bytes: less than a manifest
    said = program(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    said.refuses("store/manifest.json", "file size limit", "ulimit -f", "repeat the command")
    compress(*words).works()


def test_a_killed_loader_process_is_reported(world: World, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            "compress_ssl.pipeline.views.loader._prepare_worker", lambda _: os.kill(os.getpid(), signal.SIGKILL)
        )
        said = export(world.data, "store", "--workers", 1)
    said.refuses("a loader process died", "fewer --workers", "repeat the command")
    export(world.data, "store").works()
    assert features(Path("store")) == features(world.store)


def test_a_batch_larger_than_the_memory_is_reported(world: World, here: Path) -> None:
    said = export(world.data, "store", "--batch-size", 10**11)
    said.refuses("the memory is full", "take a smaller batch")
    export(world.data, "store", "--overwrite").works()


def test_ctrl_c_before_any_work_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress_ssl.stages.listing.run", interrupted)
    monkeypatch.setattr("sys.argv", ["compress", "methods"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped: repeat the command to continue\n"


def test_a_folder_of_runs_names_them_when_a_run_is_needed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        artifact.write(Folder(tmp_path / name), "run", {}, {})
    with pytest.raises(UserError, match="is not a run: it holds 2 folders that compress made; name one of them: .*a, "):
        artifact.read(Folder(tmp_path), "run")
