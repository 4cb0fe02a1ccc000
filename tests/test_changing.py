"""Images that change are detected and named: during an export, between kill and resume, between views."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nasty import encoded, noise

from compress_ssl.pipeline.datasets.base import content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, UNREADABLE
from compress_ssl.pipeline.datasets.folder import Folder as ImageFolder
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages.export_teacher import Config, run

TEACHER = "convnet:channels=4+8,pretrained=false"
COUNT, EARLY, LATE = 48, "b/05.png", "z/44.png"  # three shards; the early image is in the first, the late in the last


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for i in range(COUNT):
        file = tmp_path / "data" / ("z" if i >= 40 else "b") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(noise(i, 18)))
    return tmp_path / "data"


def export(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"views": 2, "image_size": 16, "batch_size": 8, "shard_size": 16, "workers": 0, "device": "cpu"}
    return run(Config(data=str(data), teacher=TEACHER, out=out, **{**settings, **changes}))  # type: ignore[arg-type]


def forget(out: Path, block: int) -> None:
    """Delete the done records of a row block, as if a kill had come before it was done."""
    for record in (out / "done").glob(f"{block:07d}.*"):
        record.unlink()


def delete(data: Path, name: str) -> None:
    (data / name).unlink()


def replace(data: Path, name: str) -> None:
    (data / name).write_bytes(encoded(noise(999, 18)))


def move_over(data: Path, name: str) -> None:
    """Replace a file as `mv` or `rsync --times` does: the new file keeps its old date."""
    other = data.parent / "other.png"
    other.write_bytes(encoded(noise(999, 18)))
    os.utime(other, (0, 0))
    other.rename(data / name)


def cut(data: Path, name: str) -> None:
    (data / name).write_bytes((data / name).read_bytes()[:100])


def add(data: Path, name: str) -> None:
    shutil.copy(data / name, data / (name[:-4] + "-new.png"))


CASES: list[tuple[Callable[[Path, str], None], str]] = [
    (delete, "1 is gone, as {name}"),
    (add, "1 is new, as {stem}-new.png"),
    (replace, "1 images are not those the stored views were made from, the first is {name}; put them back"),
    (move_over, "1 images are not those the stored views were made from, the first is {name}; put them back"),
    (cut, "1 images are not those the stored views were made from, the first is {name}; put them back"),
]
EACH = pytest.mark.parametrize(("change", "words"), CASES, ids=[change.__name__ for change, _ in CASES])


def expected_error(words: str, name: str) -> str:
    return words.format(name=name, stem=name[:-4])


@EACH
def test_images_that_change_between_a_kill_and_the_next_start(
    data: Path, tmp_path: Path, change: Any, words: str
) -> None:
    out = tmp_path / "store"
    export(data, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    forget(out, 2)
    saved = shutil.copytree(data, tmp_path / "saved")
    change(data, EARLY)
    with pytest.raises(UserError, match=expected_error(words, EARLY)):
        export(data, out)
    shutil.rmtree(data)
    saved.rename(data)
    export(data, out)
    kept = {file: old for file, old in before.items() if file.name != "history.jsonl"}
    assert {file: file.read_bytes() for file in kept} == kept


@EACH
def test_images_that_change_between_the_exports_of_two_views(
    data: Path, tmp_path: Path, change: Any, words: str
) -> None:
    out = tmp_path / "store"
    export(data, out)
    change(data, LATE)
    with pytest.raises(UserError, match=expected_error(words, LATE)):
        export(data, out, views=6)
    assert sorted(FeatureStore(Folder(out)).done()[2]) == [(0, 2)]


@EACH
@pytest.mark.parametrize("name", [EARLY, LATE], ids=["embedded-already", "not-yet-embedded"])
def test_images_that_change_while_the_export_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str, name: str
) -> None:
    """The image changes while the second shard is computed: the first is written, the last not yet loaded."""
    call, calls = FeatureExtractor.start, []

    def forward(self: Any, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            change(data, name)
        return call(self, *batch)

    monkeypatch.setattr(FeatureExtractor, "start", forward)
    undetectable = name == LATE and change in (replace, move_over, cut)
    if undetectable:  # the new content was embedded: nothing is wrong, or it is a bad image like any other
        made = export(data, tmp_path / "store")
        assert made["bad_images"] == (change is cut)
    else:
        with pytest.raises(UserError, match=expected_error(words, name)):
            export(data, tmp_path / "store")
    store = FeatureStore(Folder(tmp_path / "store"))
    store.require_complete()
    status = dict(zip(store.table("sample_id").tolist(), store.table("status").tolist(), strict=True))
    wanted = {delete: UNREADABLE, cut: BROKEN}.get(change, 0) if name == LATE else 0
    assert {key: code for key, code in status.items() if code} == ({name: wanted} if wanted else {})
    if not undetectable:  # the same command fails again until the image is restored
        with pytest.raises(UserError, match=expected_error(words, name)):
            export(data, tmp_path / "store")


def test_touched_files_with_the_same_content_are_read_again_and_accepted(data: Path, tmp_path: Path) -> None:
    export(data, tmp_path / "store")
    for file in data.rglob("*.png"):
        file.write_bytes(file.read_bytes())
    assert "complete already" in export(data, tmp_path / "store")["summary"]


def test_only_files_touched_since_the_export_are_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageFolder(data)
    content = np.array([content_hash((data / name).read_bytes()) for name in dataset.ids], np.uint64)
    content[7] = 0  # a bad image has no hash to compare
    read: list[int] = []
    monkeypatch.setattr(ImageFolder, "_read_file", lambda self, i: (read.append(i), b"other")[1])
    assert dataset.changed_rows(content, time.time() + 60) == [] and read == []
    everything = [i for i in range(COUNT) if i != 7]
    assert dataset.changed_rows(content, 0) == everything and read == everything
    few = dataset.subset(5)
    assert few.changed_rows(np.array([1, 0, 1, 1, 0], np.uint64), 0) == [0, 2, 3]


def test_a_disk_that_disappears_stops_the_export_and_marks_no_row_as_bad(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = FeatureExtractor.start, []

    def forward(self: Any, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            data.rename(tmp_path / "unmounted")
        return call(self, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractor, "start", forward)
        with pytest.raises(
            UserError, match="none of the images of rows 16 to 31 can be read.*is their disk still there"
        ):
            export(data, tmp_path / "store")
    assert sorted(FeatureStore(Folder(tmp_path / "store")).done()) == [0]
    (tmp_path / "unmounted").rename(data)
    assert export(data, tmp_path / "store")["bad_images"] == 0
