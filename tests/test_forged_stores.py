"""A store whose records are whole but not valid: every command either works or says in words which entry is wrong.

Whoever forges a manifest recomputes its digest. `forge` does so, in the manifest and in its second copy.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forgery import MISSING, changed, places, read_entries, write_entries

from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, evaluate, export_teacher, inspect, label_head, store_copy, verify

VALUES: list[Any] = [None, [], {}, "x", -1, 1e30, True]
DONE = "done/0000001.0004-0006.json"  # of rows 12 to 23 and views 4 and 5
ODD = 1.25  # seconds: a number that a test of the sum recognises

Forgery = Callable[[Any], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 digits in 6 views and 2 local crops, shards of 12 rows."""
    out = tmp_path_factory.mktemp("original") / "store"
    export_teacher.run(
        export_teacher.Config(
            data="digits", teacher="convnet:channels=4+8,pretrained=false", out=str(out), views=6, local_views=2,
            image_size=16, local_size=8, limit=24, batch_size=12, shard_size=12, device="cpu", workers=0,
        )
    )  # fmt: skip
    return out


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy of the store, which a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def forge_done(store: Path, record: Any) -> None:
    """Write a done record with a right seal."""
    (store / DONE).write_bytes(digests.canonical(digests.sealed(record)) + b"\n")


def commands(store: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """All commands that read a store; those that change it work on copies."""
    for name in ("repaired", "head.safetensors"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    repaired = str(shutil.copytree(store, out / "repaired"))
    cpu: dict[str, Any] = {"device": "cpu", "workers": 0}
    return {
        "inspect": lambda: inspect.run(inspect.Config(str(store))),
        "verify": lambda: verify.run(verify.Config(str(store), sample=0)),
        "verify --repair": lambda: verify.run(verify.Config(repaired, sample=0, repair=True)),
        "store copy": lambda: store_copy.run(store_copy.Config(str(store), str(out / "whole"))),
        "store copy of a part": lambda: store_copy.run(
            store_copy.Config(str(store), str(out / "part"), views="0:4", images="0:15", codec="float16")
        ),
        "distill": lambda: distill.run(
            distill.Config(str(store), ("convnet:channels=4",), "regression", out / "run", steps=1, batch_size=4, **cpu)
        ),
        "evaluate": lambda: evaluate.run(
            evaluate.Config(
                store=str(store), val="digits:split=test", protocol=("nn",), out=out / "evaluation", **cpu
            )
        ),
        "label-head": lambda: label_head.run(
            label_head.Config(str(store), out / "head.safetensors", labels="50%")
        ),
    }  # fmt: skip


def outcomes(store: Path, out: Path) -> dict[str, str]:
    """{command: what it said}, "" if it worked. Any error but a UserError fails the test."""
    said: dict[str, str] = {}
    for name, run in commands(store, out).items():
        for made in ("whole", "part", "run", "evaluation"):
            shutil.rmtree(out / made, ignore_errors=True)
        said[name] = ""
        try:
            run()
        except UserError as error:
            said[name] = str(error)
            assert "\n" not in said[name] and len(said[name]) < 1000
    return said


def test_every_command_works_on_the_store_that_is_forged_below(store: Path, tmp_path: Path) -> None:
    assert set(outcomes(store, tmp_path).values()) == {""}


def edit(path: str, by: Any) -> Forgery:
    """Replace an entry of the manifest, named by dots."""
    return lambda entries: changed(entries, tuple(path.split(".")), by)


def drop(path: str) -> Forgery:
    """Remove an entry of the manifest, named by dots."""
    return edit(path, MISSING)


def add(path: str, key: str, by: Any) -> Forgery:
    """Add an entry, whose key may contain dots, to an entry of the manifest."""

    def forged(entries: Any) -> Any:
        place = entries
        for part in path.split("."):
            place = place[part]
        place[key] = by
        return entries

    return forged


@pytest.mark.parametrize(
    ("forgery", "words"),
    [
        (drop("identity"), "lacks the entry identity"),
        (edit("identity", {}), "identity: it lacks the entry"),
        (drop("about.small"), "about: it lacks the entry small"),
        (edit("identity.arrays", {}), "identity.arrays has no array, but not embedding"),
        (add("identity.arrays", "attention", [4]), "identity.arrays"),
        (edit("identity.arrays.embedding", []), "identity.arrays"),
        (edit("identity.arrays.embedding", [4, 4]), "identity.arrays.embedding has 2 axes"),
        (edit("identity.arrays.embedding", [0]), "identity.arrays"),
        (edit("identity.arrays.embedding", [9]), "'embedding' has the shape (24, 6, 9)"),
        (add("identity.arrays", "logits", [4]), "about.small lacks features.zarr/logits/zarr.json"),
        (edit("identity.codec", 7), "identity.codec: expected str, got int"),
        (edit("identity.codec", "int9"), "identity.codec: unknown codec 'int9'"),
        (edit("identity.codec", "pq:" + "9" * 5000), "identity.codec: unknown codec"),
        (edit("identity.codec", "pq:64"), "identity.codec: --codec pq:64 keeps 64 bytes"),
        (edit("identity.codec", "float32"), "'embedding' has the shape (24, 6, 8) and the type float32"),
        (edit("identity.data.images", "x"), "identity.data.images: expected int, got str"),
        (edit("identity.data.images", 0), "identity.data.images: expected int >= 1"),
        (edit("identity.data.images", 2**70), "identity.data.images: expected int <="),
        (edit("identity.data.images", 1000), "'embedding' has the shape (1000, 6, 8)"),
        (edit("identity.data.fingerprint", "f"), "identity.data.fingerprint: expected str matching"),
        (edit("identity.shard_rows", 0), "identity.shard_rows: expected int >= 1"),
        (edit("identity.batch_size", True), "identity.batch_size: expected int, got bool"),
        (edit("identity.precision", "fp8"), "identity.precision: invalid enum value 'fp8'"),
        (edit("identity.views", "a"), "identity.views: expected object, got str"),
        (edit("identity.views.policy", "zoom"), "identity.views.policy: invalid enum value 'zoom'"),
        (edit("identity.views.seed", 2**64), "identity.views: seed: expected int < 2**64"),
        (edit("identity.views.crop_ratio", 0), "identity.views.crop_ratio"),
        (edit("identity.teacher.preprocessing", {}), "identity.teacher.preprocessing: it lacks the entry size"),
        (edit("identity.teacher.preprocessing.mean", [0, 0]), "identity.teacher.preprocessing.mean"),
        (edit("identity.teacher.preprocessing.interpolation", "best"), "identity.teacher.preprocessing.interpolation"),
        (edit("identity.local.size", 0), "identity.local.size: expected int >= 1"),
        (drop("identity.local"), "identity.local and the array local_embedding belong together"),
        (add("identity", "newer", 1), "has the entry identity.newer, which this version of compress does not know"),
        (edit("about.views", "a"), "about.views: expected int, got str"),
        (edit("about.views", 9), "'embedding' has the shape (24, 9, 8)"),
        (add("about", "first_view", 8), "about.first_view is 8, but the store has views below 6"),
        (add("about", "first_view", 3), "about.first_view"),
        (add("about.small", "/etc/passwd", "0" * 32), "about.small"),
        (add("about.small", "../payload.txt", "0" * 32), "about.small"),
        (add("about.small", "features.zarr/../../x", "0" * 32), "about.small"),
        (add("about.small", "heads.safetensors\n", "0" * 32), "about.small"),
        (add("about.small", "C:\\x", "0" * 32), "about.small"),
        (edit("about.data", {"spec": "digits", "limit": 0}), "about.data.limit: expected int >= 1"),
        (edit("about.classes", [1]), "about.classes[0]: expected str, got int"),
        (add("about.pixels", "99", "0" * 32), "about.pixels names row 99, but the store has 24 images"),
        (add("about.pixels", "-1", "0" * 32), "about.pixels"),
        (add("about", "copied", {"from": "elsewhere"}), "about.copied: it lacks the entry store"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_whole_but_not_valid_ends_every_command_in_words_that_name_the_entry(
    store: Path, tmp_path: Path, forgery: Forgery, words: str
) -> None:
    write_entries(store, forgery(read_entries(store)))
    before = sorted(path for path in tmp_path.rglob("*") if "repaired" not in path.parts)
    said = outcomes(store, tmp_path)
    assert all(words in text for text in said.values()), said
    assert all("manifest.json" in text for text in said.values())
    after = sorted(path for path in tmp_path.rglob("*") if "repaired" not in path.parts)
    assert [path for path in after if path.suffix in (".txt", ".json") and path not in before] == []


@pytest.mark.parametrize(
    ("forgery", "by_command"),
    [
        (edit("about.classes", []), {"label-head", "store copy of a part"}),  # the others need no class names
        (edit("about.teacher", "nobody"), {"evaluate"}),
        (edit("about.data.spec", "nothing"), {"distill", "evaluate"}),
        (drop("about.teacher"), {"inspect", "distill", "evaluate", "label-head", "store copy of a part"}),
    ],
)
def test_what_only_some_commands_need_ends_those_in_words(
    store: Path, tmp_path: Path, forgery: Forgery, by_command: set[str]
) -> None:
    write_entries(store, forgery(read_entries(store)))
    said = outcomes(store, tmp_path)
    assert {name for name, text in said.items() if text} == by_command


@pytest.mark.parametrize("raw", [b"[" * 500_000, b"{}", b"[]", b"null", b"\xff", b"7", b""])
def test_a_manifest_that_is_no_json_object_ends_every_command_in_words(store: Path, tmp_path: Path, raw: bytes) -> None:
    for place in (store, store / "copy"):
        (place / "manifest.json").write_bytes(raw)
    assert all("manifest" in text for text in outcomes(store, tmp_path).values())


def test_any_entry_of_a_manifest_replaced_by_a_value_of_another_type_is_named_or_does_no_harm(
    store: Path, tmp_path: Path
) -> None:
    good = read_entries(store)
    harmless = 0
    for path in places({key: good[key] for key in ("identity", "about")}):
        for value in VALUES:
            write_entries(store, changed(good, path, value))
            try:
                FeatureStore(Folder(store))
            except UserError as error:
                assert "manifest.json" in str(error) and str(path[1] if len(path) > 1 else path[0]) in str(error)
            else:
                harmless += 1
                # One entry of a list stands for all: their type is the same.
                if value in ("x", True) and path[-1] not in range(1, 99):
                    outcomes(store, tmp_path)
    assert 5 <= harmless <= 60  # free texts, and numbers in a range: most entries are refused


# ---------------------------------------------------------------- done records


def damaged(store: Path) -> list[str]:
    """What verify --repair marks."""
    found = verify.run(verify.Config(str(store), sample=0, repair=True))
    return [str(text) for text in found["damaged"]]


def forgeries_of_done_records(record: dict[str, Any]) -> Iterator[Any]:
    """Another type in every place, missing entries, other rows, views and arrays."""
    for path in places(record):
        yield from (changed(record, path, value) for value in VALUES)
    for key in record:
        yield {name: entry for name, entry in record.items() if name != key}
    yield from ({**record, "rows": rows} for rows in ([0, 12], [12, 10**30]))
    yield from ({**record, "views": views} for views in ([0, 4], [4, 5]))
    yield {**record, "digest": {}}
    yield {**record, "digest": {**record["digest"], "projection": record["digest"]["embedding"]}}
    yield {**record, "digest": {"embedding": record["digest"]["embedding"][:1]}}
    yield {**record, "newer": 1}
    yield from ([], None, "x", 7)


def test_a_done_record_that_is_not_that_of_its_shard_is_named_and_marked_by_repair(store: Path, tmp_path: Path) -> None:
    record, opened = json.loads((store / DONE).read_bytes()), FeatureStore(Folder(store))
    del record["seal"]
    for forged in forgeries_of_done_records(record):
        if isinstance(forged, dict):
            forge_done(store, forged)
        else:
            (store / DONE).write_bytes(digests.canonical(forged) + b"\n")
        if forged == record:
            continue
        with pytest.raises(UserError, match=DONE):
            opened.record(1, 4, 6)
    said = outcomes(store, tmp_path)
    assert {name for name, text in said.items() if DONE in text} >= {"verify", "store copy"}, said
    assert [text.partition(":")[0] for text in damaged(store)] == [DONE]
    assert not (store / DONE).exists()


def test_a_done_record_that_is_no_record_ends_every_command_in_words(store: Path, tmp_path: Path) -> None:
    opened = FeatureStore(Folder(store))
    for raw in (b"{}", b"\xff", b"", b'{"seal":1}', b"[" * 500_000):
        (store / DONE).write_bytes(raw)
        with pytest.raises(UserError, match=DONE):
            opened.record(1, 4, 6)
    said = outcomes(store, tmp_path)
    assert said["verify"] and said["store copy"]
    assert damaged(store)


def test_a_file_name_that_is_no_row_block_and_view_block_of_the_store_is_no_done_record(
    store: Path, tmp_path: Path
) -> None:
    for name in ("9999999.0000-0004", "0000000.0001-0003", "0000000.0004-0004", "0000000.0000-99999999999999"):
        (store / f"done/{name}.json").write_bytes(b"{}")
    assert set(outcomes(store, tmp_path).values()) == {""}


# ---------------------------------------------------------------- history


def test_a_line_of_the_history_that_is_no_event_is_left_out_with_a_warning(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = json.loads((store / "history.jsonl").read_bytes())
    event["seconds"] = ODD
    good = json.dumps(event)
    forged = [json.dumps(changed(event, path, value)) for path in places(event) for value in VALUES]
    known = [line for line in forged if line == good]
    lines = [good, *forged, "[" * 100_000, "7", "{", "\x00", json.dumps({**event, "newer": 1})]
    (store / "history.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n")
    found = inspect.run(inspect.Config(str(store)))
    assert "lines of" in capsys.readouterr().err and not known
    assert found["device_seconds"] >= ODD
    assert set(outcomes(store, tmp_path).values()) == {""}
