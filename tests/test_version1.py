"""What compress 0.1.0 made (format 1): it is read, continued to the same bytes, and scored the same.

The fixtures in version1/ were made by the code of commit 2675a43; version1/README.md says how. They are copied before
anything is done with them. Stores come out the same on every processor: pixels are rendered without a filter and
the arithmetic of the teachers is exact. The bits of a training depend on the processor, so they are compared to the
bit where a small piece of arithmetic comes out as it did on the machine that made the fixtures, else with a tolerance.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zarr
from arithmetic import arithmetic
from sklearn.datasets import load_digits

from compress_ssl.pipeline.evaluators.base import Score
from compress_ssl.pipeline.evaluators.record import read_evaluation
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.stages import compare, distill, evaluate, export_teacher, inspect, verify

HERE = Path(__file__).parent / "version1"
EXPECTED = HERE / "expected"
ROWS, PER_SHARD, SAVED, STEPS = 64, 16, 12, 20
CONVNET = "convnet:channels=4+8,interpolation=nearest"
RESNET = "cifar-resnet:8,width=2,drop_path=0.3,interpolation=nearest"
FOLDERS = (
    "convnet-channels-4-8-interpolation-nearest",
    "cifar-resnet-8-width-2-drop_path-0.3-interpolation-nearest",
)
PIXELS = "python:pipeline.teachers.digits:Pixels,interpolation=nearest"  # as it was typed then, module name and all
PROTOCOLS = ("nn", "knn:k=5", "cluster", "linear:epochs=40")
CPU: dict[str, Any] = {"workers": 0, "device": "cpu"}
NOT_COMPARED = ("history.jsonl", "train.log", "tensorboard", "lease.json")
CLOSE = 1e-3  # of the length of a tensor, and of a logged number: another processor
POINTS = 1.0  # per cent of the images: another processor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of all fixtures."""
    return Path(shutil.copytree(HERE, tmp_path / "version1"))


@pytest.fixture(scope="module")
def same_arithmetic() -> bool:
    """Whether bits of float arithmetic can be compared with those of the machine that made the fixtures."""
    made = json.loads((EXPECTED / "arithmetic.json").read_text())
    return arithmetic() == made["digest"] and torch.__version__.split("+")[0] == made["versions"]["torch"]


def tree(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all files."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def digests(folder: Path) -> dict[str, str]:
    """{relative path: digest} of what is the same whoever made it, whenever."""
    files = {name: data for name, data in tree(folder).items() if not name.startswith(NOT_COMPARED)}
    return {name: hashlib.blake2b(data, digest_size=16).hexdigest() for name, data in files.items()}


def record(file: Path) -> Any:
    return json.loads(file.read_text())


# ---------------------------------------------------------------- stores


def export(home: Path, **said: Any) -> dict[str, Any]:
    """The command that made store/, with the paths of the copy."""
    usual = {
        "teacher": f"python:{home}/teacher.py:Factory", "out": str(home / "store"), "views": 6, "policy": "moco-v2",
        "local_views": 2, "keep": "embedding,projection", "codec": "int8",
    }  # fmt: skip
    shards = {"limit": ROWS, "batch_size": 8, "shard_size": PER_SHARD}
    return export_teacher.run(export_teacher.Config(data="digits", **{**usual, **shards, **CPU, **said}))


def export_half(home: Path) -> dict[str, Any]:
    """The command that made store-half/, repeated."""
    out = str(home / "store-half")
    return export(
        home, teacher=PIXELS, out=out, views=3, policy="crop-flip", image_size=8, local_views=0, keep="embedding",
        codec="float32",
    )  # fmt: skip


def verified(home: Path) -> dict[str, Any]:
    """store/ against the live teacher, every image in one view."""
    teacher = f"python:{home}/teacher.py:Factory"
    return verify.run(verify.Config(str(home / "store"), teacher=teacher, sample=1.0, device="cpu"))


def test_the_fixture_is_the_store_that_was_made_to_the_byte() -> None:
    assert digests(HERE / "store") == record(EXPECTED / "store.json")


def test_a_store_is_read_by_plain_zarr_and_holds_what_its_teacher_makes_of_the_pixels(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = zarr.open_group(home / "store/features.zarr", mode="r")
    shapes = {name: (array.shape, str(array.dtype)) for name, array in group.arrays()}
    assert shapes["embedding"] == ((ROWS, 6, 12), "int8") and shapes["embedding_scale"] == ((ROWS, 6), "float32")
    assert shapes["projection"] == ((ROWS, 6, 8), "int8") and shapes["local_projection"] == ((ROWS, 2, 8), "int8")
    assert (np.asarray(group["status"]) == 0).all()

    digits = load_digits()
    rows = [int(name.removeprefix("digits/")) for name in np.asarray(group["sample_id"][:]).tolist()]
    assert (digits.target[rows] == group["label"][:]).all()
    grey = torch.from_numpy(np.round(digits.images[rows] * (255 / 16)).astype(np.uint8))
    images = grey.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)  # view 0 at 16 pixels
    monkeypatch.syspath_prepend(str(home))
    from teacher import Factory  # type: ignore[import-not-found]

    teacher = Factory()
    wanted = {"embedding": teacher(images / 255)}
    wanted["projection"] = teacher.projector(wanted["embedding"])
    for name, features in wanted.items():
        scale = np.asarray(group[f"{name}_scale"][:, 0])[:, None]
        stored = np.asarray(group[name][:, 0]).astype(np.float32) * scale
        assert (np.abs(stored - features.numpy()) <= 0.501 * scale).all()  # int8 rounds to the nearest step


def test_inspect_tells_of_a_finished_and_of_a_half_store(home: Path) -> None:
    whole = inspect.run(inspect.Config(str(home / "store")))
    assert whole["shards"] == "4 of 4 done, 16 rows each" and whole["pending"] == 0 and whole["bad images"] == 0
    assert whole["data"] == "64 images of digits, 10 classes" and whole["local crops"] == "2 of 8 pixels"
    assert whole["fingerprint"] == record(EXPECTED / f"runs/{FOLDERS[0]}/manifest.json")["identity"]["store"]
    half = inspect.run(inspect.Config(str(home / "store-half")))
    assert half["shards"] == "2 of 4 done, 16 rows each" and half["pending"] == 2


def test_verify_agrees_with_the_live_teacher_in_every_feature_to_the_bit(home: Path) -> None:
    found = verified(home)
    assert found["exact"] == ROWS and found["damaged"] == [] and found["pending"] == 0


def test_a_finished_export_that_is_repeated_is_complete_already_and_changes_no_byte(home: Path) -> None:
    before = tree(home / "store")
    assert "is complete already: 64 images, 6 views" in export(home)["summary"]
    assert tree(home / "store") == before


def test_a_store_grows_by_views_and_its_full_blocks_stay_as_they_are(home: Path) -> None:
    before = tree(home / "store")
    features = np.asarray(zarr.open_group(home / "store/features.zarr", mode="r")["embedding"][:])
    export(home, views=9)
    after = tree(home / "store")
    full = re.compile(r"done/\d+\.(0000-0004|1073741824-1073741826)\.json|features\.zarr/\w+/c/\d/0(/0)?")
    kept = {name: data for name, data in before.items() if full.fullmatch(name)}
    assert len(kept) == 4 * (2 + 4 * 2)  # row blocks; done records, arrays and their scales
    assert kept == {name: after[name] for name in kept}
    assert digests(home / "store") == record(EXPECTED / "store-grown.json")
    grown = np.asarray(zarr.open_group(home / "store/features.zarr", mode="r")["embedding"][:])
    assert grown.shape == (ROWS, 9, 12)
    np.testing.assert_array_equal(grown[:, :6], features)
    assert verified(home)["exact"] == ROWS


def test_a_half_export_goes_on_by_the_same_command_and_ends_with_the_same_bytes(home: Path) -> None:
    store, expected = home / "store-half", record(EXPECTED / "store-half.json")
    done = {file.name: file.stat().st_ino for file in store.glob("done/*.json")}
    assert len(done) == 2
    export_half(home)
    assert digests(store) == expected
    assert done.items() <= {file.name: file.stat().st_ino for file in store.glob("done/*.json")}.items()
    assert (
        record_lines(store / "history.jsonl")[-1]["images"] == ROWS - 2 * PER_SHARD
    )  # what was done is not done again


# ---------------------------------------------------------------- runs


def record_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("images_per_s", "data_wait")
    return [{k: v for k, v in row.items() if k not in timed} for row in record_lines(folder / "metrics.jsonl")]


def learn(home: Path, **said: Any) -> dict[str, Any]:
    """A distill command of the fixtures, with the store of the copy."""
    usual = {"store": str(home / "store"), "image_size": 16, "batch_size": 16, "steps": STEPS, "save_every": 5}
    return distill.run(distill.Config(**{**usual, **CPU, **said}))


def go_on(act: Callable[[], Any], same_arithmetic: bool) -> None:
    """Repeat a command. Skips where this torch or processor draws other initial weights: a run is refused then."""
    try:
        act()
    except Exception as problem:
        if same_arithmetic or "student.initial" not in str(problem):
            raise
        pytest.skip("this processor, or this torch, draws other initial weights from a seed, so no run can go on here")


def two(home: Path) -> dict[str, Any]:
    """The command that made runs/."""
    method = "compress-2q-momentum:bank=32,momentum=0.9"
    return learn(home, student=(CONVNET, RESNET), method=method, ema=0.9, lr=0.1, out=home / "runs")


def seed(home: Path) -> dict[str, Any]:
    """The command that made runs-seed/."""
    val = {"val": "digits:split=test", "val_every": 2.0}
    return learn(home, student=(CONVNET,), method="seed:bank=32", out=home / "runs-seed", **val)


def leaves(part: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a nested checkpoint by its path, as text; tensors by their digest."""
    if isinstance(part, dict | list | tuple):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from leaves(value, f"{name}/{key}")
    elif isinstance(part, torch.Tensor):
        raw = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{part.dtype} {list(part.shape)} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"
    else:
        yield name, json.dumps(part)


def assert_ended_the_same(folder: Path, expected: Path, to_the_bit: bool) -> None:
    """The delivered student, every tensor of the last checkpoint, every logged number, the manifest."""
    assert (folder / "manifest.json").read_bytes() == (expected / "manifest.json").read_bytes()
    checkpoint = torch.load(folder / "checkpoints/last.pt", weights_only=True)
    wanted = record(expected / "checkpoint.json")
    assert dict(leaves(checkpoint)).keys() == wanted.keys() and checkpoint["step"] == STEPS
    if to_the_bit:
        assert (folder / "student.safetensors").read_bytes() == (expected / "student.safetensors").read_bytes()
        assert dict(leaves(checkpoint)) == wanted
        assert rows(folder) == record_lines(expected / "metrics.jsonl")
        return
    ours, theirs = (safetensors.torch.load_file(run / "student.safetensors") for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).float().norm() <= CLOSE * value.float().norm(), name
    for row, other in zip(rows(folder), record_lines(expected / "metrics.jsonl"), strict=True):
        for name in row.keys() | other.keys():  # `agreement` and `val_nn` count images: one more or less is no error
            few = {"agreement": 100 / 16, "val_nn": POINTS}.get(name, 0)
            assert row[name] == pytest.approx(other[name], rel=CLOSE, abs=few), name


def test_a_run_of_two_students_goes_on_from_its_saved_step_and_ends_the_same(
    home: Path, same_arithmetic: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = [record_lines(home / "runs" / name / "metrics.jsonl") for name in FOLDERS]
    assert [row["step"] for row in logged[0]] == [1, 11]
    go_on(lambda: two(home), same_arithmetic)
    assert f"steps {SAVED} to {STEPS}" in capsys.readouterr().err
    for name, before in zip(FOLDERS, logged, strict=True):
        assert record_lines(home / "runs" / name / "metrics.jsonl")[:2] == before  # with the speed of that machine
        assert_ended_the_same(home / "runs" / name, EXPECTED / "runs" / name, same_arithmetic)


def test_a_run_on_projections_and_local_crops_goes_on_from_its_saved_step_and_ends_the_same(
    home: Path, same_arithmetic: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    best = torch.load(home / "runs-seed/checkpoints/best.pt", weights_only=True)
    assert best["step"] == 8 and best["best"] > 0
    go_on(lambda: seed(home), same_arithmetic)
    assert f"steps {SAVED} to {STEPS}" in capsys.readouterr().err
    assert_ended_the_same(home / "runs-seed", EXPECTED / "runs-seed", same_arithmetic)


def test_inspect_tells_of_a_half_and_of_a_finished_run(home: Path) -> None:
    half = inspect.run(inspect.Config(str(home / "runs" / FOLDERS[1])))
    assert half["student"] == RESNET and half["checkpoints"] == str(SAVED) and not half["finished"]
    whole = inspect.run(inspect.Config(str(home / "expected/runs" / FOLDERS[1])))
    assert whole["last logged step"] == STEPS and whole["finished"]


def test_a_run_of_a_changed_setting_is_refused_as_it_was(home: Path) -> None:
    with pytest.raises(Exception, match=r"training\.lr is 0\.1 there, 0\.2 asked"):
        learn(home, student=(CONVNET,), method="compress-2q-momentum:bank=32,momentum=0.9", ema=0.9, lr=0.2,
              out=home / "runs")  # fmt: skip


# ---------------------------------------------------------------- evaluations


def score(home: Path, which: str) -> dict[str, Any]:
    """The command that made evaluation/teacher or evaluation/student, repeated."""
    what: dict[str, Any] = {"store": str(home / "store")}
    if which == "student":
        what = {"run": home / "expected/runs" / FOLDERS[0]}
    out = home / "evaluation" / which
    return evaluate.run(evaluate.Config(val="digits:split=test", protocol=PROTOCOLS, out=out, **what, **CPU))


def scores(home: Path, which: str) -> dict[str, Any]:
    """metrics.json without the place of what was scored, and without `scores`, which version 1 did not have."""
    metrics = record(home / "evaluation" / which / "metrics.json")
    metrics.pop("scores", None)
    model = {key: value for key, value in metrics["model"].items() if key not in ("run", "store", "spec")}
    return {**metrics, "model": model}


def numbers(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of metrics.json by its path."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from numbers(value, f"{name}/{key}")
    else:
        yield name, part


def listed_by_version1(which: str) -> tuple[Score, ...]:
    """The scores that are read from the entries of the metrics.json that version 1 wrote."""
    return read_evaluation(Folder(HERE / "evaluation" / which)).scores


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_an_evaluation_that_is_repeated_computes_nothing_and_says_the_same(home: Path, which: str) -> None:
    folder = home / "evaluation" / which
    files = [file for part in ("features", "results") for file in (folder / part).rglob("*") if file.is_file()]
    before, nodes = scores(home, which), {file: (file.stat().st_ino, file.read_bytes()) for file in files}
    made = score(home, which)
    assert scores(home, which) == before and (folder / "report.html").exists()
    assert made["metrics"]["nn"] == before["nn"]
    said = [replace(score, options={}) for score in read_evaluation(Folder(folder)).scores]
    assert said == list(listed_by_version1(which))  # version 1 did not write the options into metrics.json
    assert {file: (file.stat().st_ino, file.read_bytes()) for file in files} == nodes


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_what_is_scored_anew_scores_as_it_did(home: Path, which: str, same_arithmetic: bool) -> None:
    """A student from its weights; the teacher from its stored features."""
    folder, before = home / "evaluation" / which, dict(numbers(scores(home, which)))
    shutil.rmtree(folder / "results")
    for name in ("index.faiss", "metrics.json"):
        (folder / name).unlink()
    if which == "student":
        shutil.rmtree(folder / "features")
    score(home, which)
    after = dict(numbers(scores(home, which)))
    assert after.keys() == before.keys()
    for name, value in before.items():
        exact = same_arithmetic or isinstance(value, str)
        assert after[name] == (value if exact else pytest.approx(value, abs=POINTS)), name


def test_a_student_and_its_teacher_are_compared_in_one_table(home: Path) -> None:
    folders = [str(home / "evaluation" / which) for which in ("student", "teacher")]
    made = compare.run(compare.Config(tuple(folders), out=home / "compare.html"))
    table = made["summary"].splitlines()
    teacher, student = (next(n for n, line in enumerate(table) if name in line) for name in ("Factory", "convnet"))
    assert teacher < student and Path(made["page"]).stat().st_size > 1000
    assert re.split(r"\s{2,}", table[0])[4:] == [
        "NN", "kNN 5", "Cluster", "Hungarian", "NMI", "ARI", "Linear", "Linear top-5", "Linear best"
    ]  # fmt: skip
    assert table[student].split()[-9:] == "25.6* 30.9* 23.7* 24.8* 18.8* 6.9* 17.0* 64.6* 17.0*".split()
    for which in ("student", "teacher"):
        found = inspect.run(inspect.Config(str(home / "evaluation" / which)))
        assert found["kind"] == "evaluation" and json.loads(found["nn"]) == scores(home, which)["nn"]
