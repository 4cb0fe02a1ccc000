"""Copies of a store: a partial or recoded copy records its parent, and its rows and views mean the same pixels."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder, open_storage
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.run import TrainingRun
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest
from compress_ssl.stages import distill, evaluate, export_teacher, store_copy, verify

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "convnet:channels=4+8,pretrained=false"
IMAGES = 50


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 50 digits and 8 views with row blocks of 20."""
    out = tmp_path_factory.mktemp("copy") / "source"
    export(out)
    return out


def export(out: Path, **options: Any) -> dict[str, Any]:
    default = {"views": 8, "image_size": 8, "limit": IMAGES, "batch_size": 10, "shard_size": 20}
    settings = {**default, "workers": 0, "device": "cpu", **options}
    return export_teacher.run(export_teacher.Config("digits", TEACHER, str(out), **settings))


def copy(source: Path | str, out: Path | str, **options: Any) -> FeatureStore:
    store_copy.run(store_copy.Config(str(source), str(out), **options))
    return FeatureStore(open_storage(str(out)))


def is_intact(folder: Path) -> bool:
    return verify.run(verify.Config(str(folder), sample=0))["damaged"] == []


def files(folder: Path, *without: str) -> dict[str, bytes]:
    paths = (file for file in folder.rglob("*") if file.is_file() and file.name not in ("history.jsonl", *without))
    return {str(file.relative_to(folder)): file.read_bytes() for file in paths}


# ---------------------------------------------------------------- the same store elsewhere


def test_a_copy_of_everything_equals_its_source_to_the_byte(source: Path, tmp_path: Path) -> None:
    copied = copy(source, tmp_path / "copy")
    assert copied.fingerprint == FeatureStore(Folder(source)).fingerprint
    assert files(tmp_path / "copy", "manifest.json") == files(source, "manifest.json")
    assert copied.about.copied == {"from": str(source), "store": copied.fingerprint}
    assert "is complete already" in export(tmp_path / "copy")["summary"]


def test_a_store_copied_to_a_bucket_and_back_is_the_same(source: Path, bucket: str, tmp_path: Path) -> None:
    copy(source, f"{bucket}/copy")
    copy(f"{bucket}/copy", tmp_path / "back")
    assert files(tmp_path / "back", "manifest.json") == files(source, "manifest.json")


def test_a_copy_of_fewer_views_can_be_completed_by_the_export(source: Path, tmp_path: Path) -> None:
    copied = copy(source, tmp_path / "copy", views=":6")
    assert copied.views == 6 and copied.fingerprint == FeatureStore(Folder(source)).fingerprint
    copied.require_complete()
    assert export(tmp_path / "copy")["views"] == 8
    assert files(tmp_path / "copy", "manifest.json") == files(source, "manifest.json")


@pytest.mark.parametrize("first", ["4:8", ":4"])
def test_more_views_can_be_added_to_a_copy_without_copying_anything_twice(
    source: Path, tmp_path: Path, first: str
) -> None:
    copy(source, tmp_path / "copy", views=first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy/done").iterdir()}
    copied = copy(source, tmp_path / "copy")
    assert copied.stored_views == range(8) and all(path.stat().st_mtime_ns == time for path, time in before.items())
    copied.require_complete()
    assert files(tmp_path / "copy", "manifest.json") == files(source, "manifest.json")


# ---------------------------------------------------------------- a part of it


def test_views_keep_their_numbers_and_rows_their_keys(source: Path, tmp_path: Path) -> None:
    original_store = FeatureStore(Folder(source))
    copied = copy(source, tmp_path / "copy", views="4:8", images="1::2")
    rows = np.arange(1, IMAGES, 2)
    assert copied.stored_views == range(4, 8) and copied.images == len(rows)
    assert copied.fingerprint != original_store.fingerprint
    assert copied.identity.parent.store == original_store.fingerprint
    for name in ("sample_id", "label", "view_key", "content", "status"):
        np.testing.assert_array_equal(copied.table(name), original_store.table(name)[rows])
    for view in range(4, 8):
        stored, scale = copied.stored("embedding", view)
        source_stored, source_scale = original_store.stored("embedding", view)
        np.testing.assert_array_equal(stored, source_stored[rows])
        np.testing.assert_array_equal(scale, source_scale[rows])  # type: ignore[index]
    assert is_intact(tmp_path / "copy")
    with pytest.raises(UserError, match="holds views 4 to 7, but view 3 was asked for"):
        copied.require_complete([3])


@pytest.fixture(scope="module")
def partial(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with views 4 to 7 of every second image, starting with the second."""
    out = tmp_path_factory.mktemp("partial") / "partial"
    copy(source, out, views="4:8", images="1::2")
    return out


def train(store: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"steps": 4, "batch_size": 10, "image_size": 8, "workers": 0, "device": "cpu", "lr": 0.2, **options}
    return distill.run(distill.Config(str(store), ("convnet:channels=4+8",), "compress-1q", out, **settings))


def test_a_student_of_a_partial_copy_sees_the_pixels_that_the_teacher_saw(
    source: Path, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_ssl.pipeline.datasets import DATASETS

    original_store = FeatureStore(Folder(source))
    everything = DATASETS.build("digits").subset(IMAGES)
    view_dataset = ViewDataset(
        everything, original_store.identity.views, np.arange(IMAGES), {"global": [(8, "bilinear")]}
    )
    checked, step = [], TrainingRun.step

    def check_step(self: TrainingRun, number: int, view_batch: Any, measure: bool) -> Any:
        rows, student, teacher = self.sampler.step_indices(number)
        for j, (row, view) in enumerate(zip(rows.tolist(), student[:, 0].tolist(), strict=True)):
            original = 2 * row + 1
            expected = view_dataset.load(ViewRequest(np.array([original]), {"global": np.array([[view]])}))
            assert torch.equal(view_batch.pixels["global"][0][j], expected.pixels["global"][0][0])
            stored = self.batches.read_features(torch.tensor([row]), torch.from_numpy(teacher[j, :1])).numpy()
            np.testing.assert_array_equal(stored[0], original_store.read("embedding", view)[original])
            checked.append((original, view))
        return step(self, number, view_batch, measure)

    monkeypatch.setattr(TrainingRun, "step", check_step)
    train(partial, tmp_path / "run", steps=12)
    assert {view for _, view in checked} == {4, 5, 6, 7} and {row for row, _ in checked} == set(range(1, IMAGES, 2))


def test_verify_and_evaluate_accept_a_partial_copy(partial: Path, tmp_path: Path) -> None:
    verified = verify.run(verify.Config(str(partial), sample=1.0, device="cpu"))
    assert verified["cosine"] > 0.999 > verified["wrong_view"]
    train(partial, tmp_path / "run")
    settings: dict[str, Any] = {"val": "digits:split=test", "protocol": ("nn",), "workers": 0, "device": "cpu"}
    student = evaluate.run(evaluate.Config(run=tmp_path / "run", **settings))
    assert student["metrics"]["data"]["train_images"] == IMAGES // 2
    teacher = evaluate.run(
        evaluate.Config(store=str(partial), out=tmp_path / "teacher", **settings)
    )  # the copy lacks view 0, so the teacher embeds the images
    assert teacher["metrics"]["data"]["train_images"] == IMAGES // 2


def test_images_can_be_chosen_by_a_file_of_sample_ids(source: Path, tmp_path: Path) -> None:
    original_store = FeatureStore(Folder(source))
    ids = original_store.table("sample_id")
    (tmp_path / "ids").write_text("".join(f"{ids[i]}\n" for i in (7, 3, 33)))
    copied = copy(source, tmp_path / "copy", images=str(tmp_path / "ids"))
    assert copied.table("sample_id").tolist() == [ids[3], ids[7], ids[33]]
    np.testing.assert_array_equal(copied.read("embedding", 5), original_store.read("embedding", 5)[[3, 7, 33]])
    train(tmp_path / "copy", tmp_path / "run", batch_size=3)


def test_a_copy_of_a_partial_copy_records_its_parent(partial: Path, source: Path, tmp_path: Path) -> None:
    copied = copy(partial, tmp_path / "copy", images=":5")
    assert copied.identity.parent.store == FeatureStore(Folder(partial)).fingerprint
    assert copied.table("view_key").tolist() == [1, 3, 5, 7, 9]
    other = copy(partial, tmp_path / "other", images="5:10")
    assert other.fingerprint != copied.fingerprint


def test_bad_images_are_bad_in_the_copy_with_their_reasons(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).save(tmp_path / f"images/{number:02d}.png")
    (tmp_path / "images/05.png").write_bytes(b"junk")
    settings: dict[str, Any] = {"views": 2, "image_size": 8, "batch_size": 4, "workers": 0, "device": "cpu"}
    export_teacher.run(export_teacher.Config(str(tmp_path / "images"), TEACHER, str(tmp_path / "store"), **settings))
    copied = copy(tmp_path / "store", tmp_path / "copy", images="4:8")
    ((row, name, reason),) = copied.bad_images()
    assert (row, name) == (1, "05.png") and reason == FeatureStore(Folder(tmp_path / "store")).bad_images()[0][2]


# ---------------------------------------------------------------- another codec


def test_a_copy_in_another_codec_encodes_the_decoded_features(source: Path, tmp_path: Path) -> None:
    original_store = FeatureStore(Folder(source))
    copied = copy(source, tmp_path / "copy", codec="float32", views="4:6")
    for view in (4, 5):
        np.testing.assert_array_equal(copied.read("embedding", view), original_store.read("embedding", view))
    assert copied.identity.codec == "float32" and copied.identity.parent.store == original_store.fingerprint
    assert is_intact(tmp_path / "copy")


@pytest.mark.parametrize("settings", [{"images": "::2"}, {"codec": "float32"}, {}])
def test_the_source_is_listed_once_however_many_shards_there_are(
    settings: dict[str, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings: list[str] = []
    for name in ("done", "bad_images"):
        original = getattr(FeatureStore, name)

        def counted(self: FeatureStore, name: str = name, original: Any = original) -> Any:
            if str(self.storage) == str(source):
                listings.append(name)
            return original(self)

        monkeypatch.setattr(FeatureStore, name, counted)
    monkeypatch.setattr(FeatureStore, "require_complete", lambda *_: None)
    copy(source, tmp_path / "copy", **settings)
    assert sorted(listings) == ["bad_images", "done"]


def test_only_the_row_blocks_of_the_chosen_rows_are_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = FeatureStore(Folder(source)), []
    features, stored = store.read("embedding", 3), FeatureStore.stored
    monkeypatch.setattr(FeatureStore, "stored", lambda *arguments: (read.append(arguments[3]), stored(*arguments))[1])
    for rows in ([0, 7, 41, 49], [25], []):
        np.testing.assert_array_equal(store.read_rows("embedding", 3, np.array(rows, int)), features[rows])
    assert read == [slice(0, 20), slice(40, 50), slice(20, 40), slice(0, 20)]


# ---------------------------------------------------------------- stopped, damaged, refused


@pytest.mark.parametrize("settings", [{}, {"images": "::2"}, {"codec": "float16", "views": ":6"}])
def test_an_interrupted_copy_is_continued_to_the_same_bytes(
    settings: dict[str, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(source, tmp_path / "whole", **settings)
    expected, put = files(tmp_path / "whole"), Folder.put
    for stop in (0, 3, len(expected) // 3, len(expected) // 2, len(expected) - 1):
        puts_left, out = iter(range(stop)), tmp_path / f"stop{stop}"

        def interrupted_put(self: Folder, key: str, data: bytes, puts_left: Any = puts_left) -> None:
            if next(puts_left, None) is None:
                raise KeyboardInterrupt
            put(self, key, data)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Folder, "put", interrupted_put)
            copy(source, out, **settings)
        copy(source, out, **settings)
        assert files(out) == expected


@pytest.mark.parametrize("settings", [{}, {"images": "::2"}, {"codec": "float16"}])
def test_damage_in_the_source_is_reported_and_not_copied(
    settings: dict[str, str], source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source/features.zarr/embedding_scale/c/1/1"
    data = bytearray(file.read_bytes())
    data[9] ^= 2
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"source is damaged, done/0000001.0004-0008.json: .*verify --repair"):
        copy(tmp_path / "source", tmp_path / "copy", **settings)
    shutil.copyfile(source / "features.zarr/embedding_scale/c/1/1", file)
    copy(tmp_path / "source", tmp_path / "copy", **settings).require_complete()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": "1:4"}, "views are stored in blocks of 4; ask for 0:4"),
        ({"views": "4:9"}, "holds views 0 to 7"),
        ({"views": "4"}, "must be FIRST:END"),
        ({"views": "a:b"}, "must be FIRST:END, such as 0:8"),
        ({"images": "60:70"}, "names none of the 50 images"),
        ({"images": "::0"}, "step 0"),
        ({"images": "::-0"}, "step 0"),
        ({"images": "--1:"}, "is neither START:END"),
        ({"views": "0:" + "9" * 15}, "holds views 0 to 7"),
        ({"images": "nowhere.txt"}, "neither START:END"),
        ({"codec": "int7"}, "unknown codec"),
    ],
)
def test_impossible_copies_are_refused_before_anything_is_written(
    settings: dict[str, str], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        copy(source, tmp_path / "copy", **settings)
    assert not (tmp_path / "copy").exists()


def test_a_copy_into_another_store_or_onto_itself_is_refused(source: Path, partial: Path, tmp_path: Path) -> None:
    shutil.copytree(partial, tmp_path / "partial")
    with pytest.raises(Mismatch, match="made with other settings"):
        copy(source, tmp_path / "partial", images=":10")
    with pytest.raises(UserError, match="onto itself"):
        copy(source, source)
    with pytest.raises(Mismatch):
        export(tmp_path / "partial")


def test_the_command_is_called_store_copy(source: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "compress_ssl.cli",
        "store",
        "copy",
        str(source),
        str(tmp_path / "copy"),
        "--views",
        "4:8",
        "--json",
    ]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["views"] == [4, 5, 6, 7]


@pytest.mark.parametrize("settings", [{"images": "::2"}, {"codec": "float16"}, {"images": "5:9", "codec": "pq:4"}])
def test_a_copy_that_is_repeated_without_its_flags_keeps_its_images_and_codec(
    settings: dict[str, str], source: Path, tmp_path: Path
) -> None:
    copy(source, tmp_path / "copy", views="0:4", **settings)
    copy(source, tmp_path / "grown", **settings)
    copy(source, tmp_path / "copy", views="0:4")
    copy(source, tmp_path / "copy")
    grown, repeated = files(tmp_path / "grown"), files(tmp_path / "copy")
    assert {key: data for key, data in repeated.items() if key.startswith("features")} == {
        key: data for key, data in grown.items() if key.startswith("features")
    }
