"""`compress verify`: damage is found, named, and mended to the same bytes."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import audit
from pipeline.artifact import UserError
from pipeline.storage import Folder
from pipeline.store import FeatureStore, Shard, done_key
from stages import export_teacher, verify

TEACHER = "convnet:channels=4+8,pretrained=false"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> export_teacher.Config:
    """A finished store of 24 images, 5 views, 3 row blocks."""
    top = tmp_path_factory.mktemp("verify")
    random = np.random.default_rng(0)
    for number in range(24):
        (top / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        big = Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC)
        big.save(top / "images" / str(number % 2) / f"{number:02d}.png")
    how = {"views": 5, "image_size": 16, "batch_size": 4, "shard_size": 8, "workers": 0}
    config = export_teacher.Config(data=str(top / "images"), teacher=TEACHER, out=top / "store", **how)  # type: ignore
    export_teacher.run(config)
    return config


@pytest.fixture
def damaged(export: export_teacher.Config, tmp_path: Path) -> export_teacher.Config:
    """A copy of the store, to be damaged."""
    shutil.copytree(export.out, tmp_path / "store")
    return dataclasses.replace(export, out=tmp_path / "store")


def files(store: Path) -> dict[str, bytes]:
    passing = ("history.jsonl", "bad-images.tsv")
    found = [p for p in store.rglob("*") if p.is_file() and p.name not in passing]
    return {str(p.relative_to(store)): p.read_bytes() for p in found}


def found(store: Path) -> list[str]:
    """Keys of all damage."""
    storage = Folder(store)
    small = audit.small_files(storage)
    if small:
        return [damage.key for damage in small]
    return [damage.key for damage in audit.shards(FeatureStore(storage))]


def test_a_whole_store_passes_and_its_features_are_the_live_teachers(export: export_teacher.Config) -> None:
    made = verify.run(verify.Config(store=str(export.out), sample=1.0))
    assert made["damaged"] == [] and made["pending"] == 0
    assert made["cosine"] > 0.999 and made["wrong_view"] < made["cosine"] - 0.0005
    assert made["exact"] == 24  # the same device and precision give the same bits


def test_what_a_coarse_codec_loses_is_not_taken_for_another_teacher(
    export: export_teacher.Config, tmp_path: Path
) -> None:
    coarse = dataclasses.replace(export, out=tmp_path / "store", codec="pq:2+zstd")
    export_teacher.run(coarse)
    made = verify.run(verify.Config(store=str(coarse.out), sample=1.0))
    assert made["exact"] == 24 and made["wrong_view"] < made["cosine"] < 0.9999


def test_a_bit_flipped_anywhere_is_found_and_healed_to_the_same_bytes(damaged: export_teacher.Config) -> None:
    before = files(damaged.out)
    random = np.random.default_rng(1)
    names = sorted(before)
    for name in [*random.choice(names, 12).tolist(), "manifest.json", "copy/manifest.json"]:
        data = bytearray(before[name])
        place = int(random.integers(len(data)))
        data[place] ^= 1 << int(random.integers(8))
        (damaged.out / name).write_bytes(data)
        assert found(damaged.out), f"bit {place} of {name}"
        with pytest.raises(UserError, match="is damaged in"):
            verify.run(verify.Config(store=str(damaged.out), sample=0))
        verify.run(verify.Config(store=str(damaged.out), sample=0, repair=True))
        export_teacher.run(damaged)
        assert files(damaged.out) == before, name


def test_repair_marks_exactly_the_damaged_shard(damaged: export_teacher.Config) -> None:
    shard = damaged.out / "features.zarr/embedding/c/1/0/0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    made = verify.run(verify.Config(store=str(damaged.out), sample=0, repair=True))
    assert made["mended"] == ["done/0000001.0000-0004.json"]
    (pending,) = FeatureStore(Folder(damaged.out)).pending()
    assert (pending.block, pending.views) == (1, (0, 1, 2, 3))


def test_another_teacher_behind_the_same_spec_is_noticed(damaged: export_teacher.Config) -> None:
    """Features that are another view's are told from rounding."""
    store = FeatureStore(Folder(damaged.out))
    start, stop = store.span(0)
    rows = slice(start, stop)
    stored = [store.stored("embedding", v, rows) for v in range(4)]
    swapped = [stored[1], stored[0], stored[3], stored[2]]
    features = (np.stack([s for s, _ in swapped], 1), np.stack([c for _, c in swapped if c is not None], 1))
    store.storage.delete(done_key(0, 0, 4))
    status, content = store.table("status", rows), store.table("content", rows)
    store.write(Shard(0, start, stop, (0, 1, 2, 3)), {"embedding": features}, status, content, {})
    with pytest.raises(UserError, match="is not this teacher on these pixels"):
        verify.run(verify.Config(store=str(damaged.out), sample=1.0))


def test_a_changed_image_is_told_from_changed_arithmetic(export: export_teacher.Config, tmp_path: Path) -> None:
    shutil.copytree(export.data, tmp_path / "images")
    first = sorted((tmp_path / "images").rglob("*.png"))[0]
    Image.new("RGB", (24, 20)).save(first)
    with pytest.raises(UserError, match="do not look as they did to the teacher"):
        verify.run(verify.Config(store=str(export.out), data=str(tmp_path / "images"), sample=1.0))
