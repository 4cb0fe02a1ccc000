"""Files with anything in them: a command that reads one works, or says in one line what is wrong."""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forgery import MISSING, Place, changed, places, read_entries, write_entries
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from compress_ssl import cli
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError, describe_disk_error
from compress_ssl.stages import compare, distill, evaluate, export_teacher, inspect, label_head, store_copy, verify

TEACHER, STUDENT = "convnet:channels=4+8,pretrained=false", "convnet:channels=4"
CPU: dict[str, Any] = {"device": "cpu", "workers": 0}
VALUES: list[Any] = [
    None, [], {}, "", "x", 0, -1, True, 1.5, -0.0, 1e308, 2**63, 10**400, "\x1b[31m\x07", "\x00", "\ud800", "a\nb",
    "A" * 100_000, [[]], {"": None}, ["x"], float("nan"), float("inf"), "../x", "python:os:getcwd", "0" * 32, ",", "=",
]  # fmt: skip
RAW = [b"", b"[" * 300_000, b'{"a":' * 50_000, b"null", b"[]", b"{}", b"7", b'"x"', b"1e999", b"NaN", b"\xff", b"\x00"]


# ---------------------------------------------------------------- what went well


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a store of a trained codec, runs with two optimizers, evaluations and a head."""
    top = tmp_path_factory.mktemp("hostile") / "top"
    export(top / "store", views=6, local_views=2, local_size=8)
    export(top / "pq", views=3, codec="pq:2")
    for method in ("regression", "compress-2q", "dogo"):
        train(top, method, 4, cache_images=top / "cache")
    label_head.run(label_head.Config(str(top / "store"), top / "head.safetensors", labels="50%"))
    (top / "ids.txt").write_text("0001\n0005\n")
    score(top, run=top / "regression")
    score(top, ("nn", "cluster"), store=str(top / "store"), out=top / "store-evaluation")
    return top


def export(out: Path, **more: Any) -> None:
    export_teacher.run(
        export_teacher.Config(
            data="digits", teacher=TEACHER, out=str(out), image_size=16, limit=24, batch_size=12, shard_size=12, **more,
            **CPU,
        )
    )  # fmt: skip


def train(top: Path, method: str, steps: int, store: str = "store", **more: Any) -> None:
    students = (STUDENT, "convnet:channels=5") if method == "dogo" else (STUDENT,)
    distill.run(
        distill.Config(
            str(top / store), students, method, top / method.partition(":")[0], steps=steps, batch_size=6, **CPU, **more
        )
    )


def score(top: Path, protocol: tuple[str, ...] = ("nn", "cluster", "linear:epochs=2"), **more: Any) -> None:
    evaluate.run(evaluate.Config(val="digits:split=test", protocol=protocol, **CPU, **more))


@pytest.fixture
def top(original: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder at its place, where its manifests say that it is; afterwards it is as it was."""
    shutil.copytree(original, tmp_path / "kept")
    yield original
    shutil.rmtree(original)
    shutil.copytree(tmp_path / "kept", original)


# ---------------------------------------------------------------- forging


def replace_small_file(store: Path, key: str, data: bytes) -> None:
    """Write a small file of a store, with its digest in the manifest, in both places."""
    for place in (store, store / "copy"):
        (place / key).write_bytes(data)
    entries = read_entries(store)
    entries["about"]["small"][key] = digests.digest(data)
    write_entries(store, entries)


def mutate(value: Any, random_: random.Random) -> Any:
    """A copy of a JSON value in which one entry is replaced, removed, added, wrapped, or nested deeply."""
    value = copy.deepcopy(value)
    path = random_.choice(list(places(value)))
    place = value
    for key in path[:-1]:
        place = place[key]
    last, how = path[-1], random_.choice(["set", "set", "set", "remove", "add", "wrap", "deep"])
    if how == "remove":
        del place[last]
    elif how == "add" and isinstance(place, dict):
        place[random_.choice(["newer", "", "9" * 30, "../x", "\ud800", "knn"])] = random_.choice(VALUES)
    elif how == "wrap":
        place[last] = random_.choice([[place[last]], {"x": place[last]}, str(place[last])])
    elif how == "deep":
        for _ in range(900):
            place[last] = [place[last]]
    else:
        place[last] = random_.choice(VALUES)
    return value


# ---------------------------------------------------------------- any file, any command


def outcome(command: Callable[[], Any]) -> str:
    """What a command refused with, "" if it worked. Any other error than the command line puts into words fails."""
    try:
        command()
    except UserError as problem:
        return str(problem)
    except OSError as problem:
        assert describe_disk_error(problem)
        return describe_disk_error(problem)
    return ""


def content(top: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in top.rglob("*") if p.is_file()}


def is_manifest(file: Path) -> bool:
    return file.name == "manifest.json"


@dataclass(frozen=True)
class Target:
    """A JSON file and the commands that read it."""

    file: str
    commands: dict[str, Callable[[Path], Any]]


def look(name: str) -> Callable[[Path], Any]:
    return lambda top: inspect.run(inspect.Config(str(top / name)))


TARGETS = [
    Target("store/manifest.json", {
        "inspect": look("store"),
        "verify": lambda top: verify.run(verify.Config(str(top / "store"), sample=0)),
        "copy": lambda top: store_copy.run(store_copy.Config(str(top / "store"), str(top / "new"), views="0:4")),
        "distill": lambda top: train(top, "regression", 4),
        "evaluate": lambda top: score(top, ("nn",), store=str(top / "store"), out=top / "new"),
        "label-head": lambda top: label_head.run(label_head.Config(str(top / "store"), top / "new", labels="50%")),
    }),
    Target("regression/manifest.json", {
        "inspect": look("regression"),
        "repeat": lambda top: train(top, "regression", 4),
        "grow": lambda top: train(top, "regression", 5),
        "evaluate": lambda top: score(top, ("nn",), run=top / "regression", out=top / "new"),
    }),
    Target("dogo/convnet-channels-5/manifest.json", {
        "repeat": lambda top: train(top, "dogo", 4),
        "inspect": look("dogo/convnet-channels-5"),
    }),
    Target("store-evaluation/manifest.json", {
        "inspect": look("store-evaluation"),
        "repeat": lambda top: score(top, ("nn",), store=str(top / "store"), out=top / "store-evaluation"),
    }),
    Target("store-evaluation/metrics.json", {
        "inspect": look("store-evaluation"),
        "compare": lambda top: compare.run(
            compare.Config((str(top / "store-evaluation"), str(top / "regression")), top / "new.html")
        ),
    }),
    Target("cache/manifest.json", {
        "inspect": look("cache"),
        "distill": lambda top: train(top, "seed:bank=6", 1, cache_images=top / "cache"),
    }),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.file)
def test_a_file_with_any_entry_changed_is_refused_in_words_and_nothing_is_changed_or_it_does_no_harm(
    top: Path, target: Target
) -> None:
    file, refused = top / target.file, 0
    good = file.read_bytes()
    before = content(top)
    for seed in range(24):
        random_ = random.Random(seed)
        if seed % 4 == 3:
            file.write_bytes(random_.choice(RAW))
        elif is_manifest(file):
            with contextlib.suppress(ValueError):  # NaN has no digest, and stays as it was
                write_entries(file.parent, mutate(read_entries(file.parent), random_))
        else:
            file.write_text(json.dumps(mutate(json.loads(good), random_)))
        name = random_.choice(list(target.commands))
        forged = content(top)
        said = outcome(lambda: target.commands[name](top))  # noqa: B023 (called at once)
        assert "\n" not in said and len(said) < 1200
        if said:
            refused += 1
            assert content(top) == forged, f"{name} changed files and then said {said}"
        for path in set(content(top)) - set(before):
            Path(path).unlink()
        restore(file, good)
    assert refused > 10


def restore(file: Path, good: bytes) -> None:
    file.write_bytes(good)
    if is_manifest(file) and (file.parent / "copy").is_dir():
        (file.parent / "copy" / file.name).write_bytes(good)


# ---------------------------------------------------------------- stores


@pytest.mark.parametrize(
    ("key", "entry", "value"),
    [
        ("features.zarr/embedding/zarr.json", "chunk_grid", "x"),
        ("features.zarr/embedding/zarr.json", "codecs", False),
        ("features.zarr/status/zarr.json", "chunk_grid", None),
        ("features.zarr/sample_id/zarr.json", "data_type", {}),
        ("features.zarr/zarr.json", "attributes", "x"),
        ("features.zarr/zarr.json", "node_type", "array"),
    ],
)
def test_zarr_metadata_that_is_whole_and_no_metadata_is_named(top: Path, key: str, entry: str, value: Any) -> None:
    metadata = json.loads((top / "store" / key).read_bytes())
    replace_small_file(top / "store", key, json.dumps({**metadata, entry: value}).encode())
    for command in TARGETS[0].commands.values():
        said = outcome(lambda: command(top))  # noqa: B023 (called at once)
        assert f"store/{key} is not valid: Zarr cannot read it" in said


def no_floats(codebook: dict[str, Any]) -> dict[str, Any]:
    return {**codebook, "mean": codebook["mean"].astype(np.int32)}


def one_part(codebook: dict[str, Any]) -> dict[str, Any]:
    return {**codebook, "centroids": codebook["centroids"][:1].copy()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda codebook: {"mean": codebook["mean"]}, "rotation is missing"),
        (no_floats, "mean has the shape (8,) and the type int32"),
        (one_part, "centroids has the shape (1, 256, 4)"),
        (lambda codebook: {**codebook, "mean": codebook["mean"] * np.float32("nan")}, "mean has values that are not"),
    ],
)
def test_a_codebook_that_does_not_fit_its_array_is_named_before_it_is_used(
    top: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    key = "codebook/embedding.safetensors"
    save_arrays(change(load_arrays(top / "pq" / key)), tmp_path / "forged")
    replace_small_file(top / "pq", key, (tmp_path / "forged").read_bytes())
    for command in (
        lambda: train(top, "seed:bank=6", 1, store="pq"),
        lambda: score(top, ("nn",), store=str(top / "pq"), out=top / "new"),
        lambda: verify.run(verify.Config(str(top / "pq"), device="cpu")),
    ):
        said = outcome(command)
        assert f"pq/{key} is not valid: {words}" in said


def test_a_codebook_that_is_no_safetensors_file_is_named(top: Path) -> None:
    for raw in RAW:
        replace_small_file(top / "pq", "codebook/embedding.safetensors", raw)
        assert "pq/codebook/embedding.safetensors is not valid" in outcome(lambda: train(top, "seed", 1, store="pq"))


# ---------------------------------------------------------------- checkpoints


GROUP = ("optimizer", "param_groups", 0)
BANK = ("method", "bank._extra_state")


@pytest.mark.parametrize(
    ("method", "place", "entry", "words"),
    [
        ("dogo", ("optimizer", "state", 0, "exp_avg"), 1.5, "optimizer: state[0].exp_avg does not fit"),
        ("dogo", ("optimizer", "state", 1, "exp_avg"), torch.zeros(3), "state[1].exp_avg does not fit"),
        ("dogo", ("optimizer", "state", 0, "exp_avg_sq"), MISSING, "state[0] holds"),
        ("dogo", ("optimizer", "state", 0, "step"), torch.tensor(-7.0), "state[0].step does not fit"),
        ("regression", ("optimizer", "state", 0, "momentum_buffer"), torch.zeros(3), "momentum_buffer"),
        ("regression", (*GROUP, "weight_decay"), MISSING, "param_groups[0].weight_decay is None"),
        ("regression", (*GROUP, "dampening"), "x", "param_groups[0].dampening is 'x'"),
        ("regression", (*GROUP, "foreach"), torch.zeros(2), "param_groups[0].foreach is tensor"),
        ("regression", ("best",), torch.zeros(2), "best is no number"),
        ("compress-2q", BANK, {"pointer": "x", "filled": 0}, "has the pointer 'x'"),
        ("compress-2q", BANK, {"pointer": 10**9, "filled": 0}, "has the pointer 1000000000"),
        ("compress-2q", BANK, {"pointer": 0}, "method: 'filled'"),
        ("compress-2q", ("method", "bank.rows"), torch.full((12,), 10**6), "of row 1000000 in view"),
        ("compress-2q", ("method", "bank.views"), torch.full((12,), 77), "in view 77"),
    ],
)
def test_a_state_that_torch_would_take_and_fail_with_in_a_later_step_is_refused_when_it_is_loaded(
    top: Path, method: str, place: Place, entry: Any, words: str
) -> None:
    run = top / method / "convnet-channels-5" if method == "dogo" else top / method
    file = run / "checkpoints" / "step-00000004.pt"
    state = torch.load(file, weights_only=True)
    state = changed(state, place, entry)
    file.unlink()
    torch.save(state, file)
    before = content(top)
    assert words in outcome(lambda: train(top, method, 6))
    assert content(top) == before


# ---------------------------------------------------------------- evaluations


def test_a_result_whose_arrays_are_none_is_computed_again(top: Path) -> None:
    run = top / "regression"
    arrays = sorted((run / "evaluation" / "results").glob("*.npz"))
    good = (run / "evaluation" / "metrics.json").read_bytes()
    single, pickled = io.BytesIO(), io.BytesIO()
    np.save(single, np.zeros(3))
    np.savez(pickled, x=np.array([{}], object))
    for raw in (b"", single.getvalue(), pickled.getvalue(), arrays[0].read_bytes()[:-40]):
        for file in arrays:
            file.write_bytes(raw)
        score(top, run=run)
        assert (run / "evaluation" / "metrics.json").read_bytes() == good


def test_runs_named_by_an_absolute_and_a_relative_path_are_compared(top: Path) -> None:
    shutil.copytree(top / "regression", top / "other")
    file = top / "other" / "evaluation" / "metrics.json"
    metrics = json.loads(file.read_bytes())
    metrics["model"]["run"] = "runs/other"
    file.write_text(json.dumps(metrics))
    table = compare.run(compare.Config((str(top / "other"), str(top / "regression")), top / "new.html"))["summary"]
    assert f"{STUDENT} (runs/other)" in table and f"{STUDENT} (/" in table


# ---------------------------------------------------------------- heads and lists of ids


def test_a_head_in_half_precision_is_read_in_float32(top: Path) -> None:
    arrays = load_arrays(top / "head.safetensors")
    head = linear_head.load(top / "head.safetensors")
    halved = {name: array.astype(np.float16) for name, array in arrays.items()}
    metadata = {"classes": json.dumps(head.names), "unit": "true"}
    save_arrays(halved, top / "head.safetensors", metadata)
    assert linear_head.load(top / "head.safetensors").weight.dtype == torch.float32
    train(top, f"simclr-v2:head={top / 'head.safetensors'}", 1)


@pytest.mark.parametrize(
    ("raw", "words"), [(b"caf\xe9\n", "no text in UTF-8"), (b"\x1b[31m\n", "the first is"), (b"\n \n", "has a label")]
)
def test_a_list_of_ids_that_is_none_is_refused_in_words(top: Path, raw: bytes, words: str) -> None:
    (top / "ids.txt").write_bytes(raw)
    config = label_head.Config(str(top / "store"), top / "new", labels=str(top / "ids.txt"))
    assert words in outcome(lambda: label_head.run(config))
    images = store_copy.Config(str(top / "store"), str(top / "new"), images=str(top / "ids.txt"))
    assert "ids.txt" in outcome(lambda: store_copy.run(images))
    assert not (top / "new").exists()


# ---------------------------------------------------------------- what is printed


def said_by(*words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line in this process; both are strict about what UTF-8 holds."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    argv, sys.argv = sys.argv, ["compress", *map(str, words)]
    environment = dict(os.environ)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return int(ended.value.code or 0), printed[0], printed[1]


def test_half_a_surrogate_in_a_record_is_printed_escaped(top: Path) -> None:
    entries = read_entries(top / "store")
    entries["about"]["teacher"] = "convnet:\ud800"
    write_entries(top / "store", entries)
    status, out, _ = said_by("inspect", top / "store")
    assert status == 0 and "convnet:\\ud800" in out


def test_half_a_surrogate_in_a_name_of_a_record_is_refused_in_words(top: Path) -> None:
    file = top / "store-evaluation" / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "\ud800": {}}))
    status, _, err = said_by("compare", top / "store-evaluation", "--out", top / "new.html")
    assert status == 2 and "metrics.json is not valid: the text '\\ud800' has a character that is not Unicode" in err


def test_an_error_has_no_control_character_of_a_file(top: Path) -> None:
    (top / "ids.txt").write_bytes(b"\x1b]0;title\x07\n")
    status, _, err = said_by(
        "label-head", "--store", top / "store", "--out", top / "new", "--labels", top / "ids.txt"
    )  # fmt: skip
    assert status == 2 and "\\x1b]0;title\\x07" in err and "\x1b" not in err


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a\0b"])
def test_a_path_that_cannot_be_one_is_refused_in_words_wherever_it_stands(top: Path, path: str) -> None:
    entries = read_entries(top / "store")
    entries["about"]["data"]["spec"] = f"folder:{path}"
    write_entries(top / "store", entries)
    assert said_by("inspect", path)[0] == 2
    assert path.strip("~").partition("\0")[0] in outcome(lambda: train(top, "seed", 1))
    for flags in (("--teacher", f"convnet:weights={path}"), ("--teacher", f"python:{path}.py:net")):
        said = said_by("export-teacher", "--data", "digits", *flags, "--out", top / "new")
        assert said[0] == 2 and said[2].startswith("error: ")


def test_a_head_of_classes_with_equal_names_is_refused(top: Path) -> None:
    entries = read_entries(top / "store")
    entries["about"]["classes"][1] = entries["about"]["classes"][0]
    write_entries(top / "store", entries)
    config = label_head.Config(str(top / "store"), top / "new", labels="50%")
    assert "has two classes of the name 0" in outcome(lambda: label_head.run(config))
