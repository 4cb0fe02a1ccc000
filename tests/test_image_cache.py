"""The cache of decoded images returns exactly what the decoder returned."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.datasets import image_cache
from compress_ssl.pipeline.datasets.decode import BadImage
from compress_ssl.pipeline.datasets.folder import Folder as ImageFolder
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.stages import distill, export_teacher


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolder:
    monkeypatch.setattr(image_cache, "BLOCK", 4)
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(11):
        pixels = random.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02d}.jpg")
    (tmp_path / "images/05.jpg").write_bytes(b"no image")
    return ImageFolder(tmp_path / "images")


def test_cached_images_equal_decoded_ones_also_after_pickling(images: ImageFolder, tmp_path: Path) -> None:
    cached = image_cache.build_cache(images, tmp_path / "decoded")
    for one in (cached, pickle.loads(pickle.dumps(cached))):
        assert (len(one), one.ids, one.fingerprint) == (11, images.ids, images.fingerprint)
        for i in range(11):
            if i == 5:
                with pytest.raises(BadImage):
                    one.load(i)
                continue
            (pixels, content), (wanted, theirs) = one.load(i), images.load(i)
            assert np.array_equal(pixels, wanted) and content == theirs


def test_a_cache_has_everything_else_from_its_data_set(images: ImageFolder, tmp_path: Path) -> None:
    cached = image_cache.build_cache(images, tmp_path / "decoded")
    assert cached.classes == images.classes and np.array_equal(cached.label, images.label)
    assert cached.describe_difference(images.ids[1:]) == images.describe_difference(images.ids[1:])
    wrong = np.full(11, 1, np.uint64)
    assert cached.changed_rows(wrong, 0) == images.changed_rows(wrong, 0) == list(range(11))
    part = cached.subset(3)
    assert part.ids == images.subset(3).ids
    (tmp_path / "images/00.jpg").unlink()
    assert np.array_equal(part.load(0)[0], cached.load(0)[0]), "a subset reads from the cache too"


def test_only_missing_blocks_are_decoded(images: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_cache.count_pending(images, tmp_path / "decoded") == 11
    image_cache.build_cache(images, tmp_path / "decoded")
    (tmp_path / "decoded/pixels-000001.bin").unlink()
    assert image_cache.count_pending(images, tmp_path / "decoded") == 4
    decoded: list[int] = []
    load = ImageFolder.load
    monkeypatch.setattr(ImageFolder, "load", lambda self, i: (decoded.append(i), load(self, i))[1])
    image_cache.build_cache(images, tmp_path / "decoded")
    assert sorted(decoded) == [4, 5, 6, 7] and image_cache.count_pending(images, tmp_path / "decoded") == 0


def test_a_flipped_bit_is_an_error_that_names_the_image(images: ImageFolder, tmp_path: Path) -> None:
    cached, file = image_cache.build_cache(images, tmp_path / "decoded"), tmp_path / "decoded/pixels-000002.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    cached.load(8)
    with pytest.raises(UserError, match="damaged at image 10.jpg; delete the folder"):
        cached.load(10)


def test_a_cache_of_other_images_is_refused(images: ImageFolder, tmp_path: Path) -> None:
    image_cache.build_cache(images, tmp_path / "decoded")
    (tmp_path / "images/00.jpg").unlink()
    with pytest.raises(Mismatch, match="decoded holds other decoded images.* delete it, or name another folder"):
        image_cache.build_cache(ImageFolder(tmp_path / "images"), tmp_path / "decoded")


def test_a_cache_with_another_block_size_is_refused(
    images: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_cache.build_cache(images, tmp_path / "decoded")
    monkeypatch.setattr(image_cache, "BLOCK", 3)
    with pytest.raises(Mismatch, match="images_per_file is 4 there, 3 asked.* delete it"):
        image_cache.build_cache(images, tmp_path / "decoded")


def test_a_truncated_cache_file_is_reported_as_damage(images: ImageFolder, tmp_path: Path) -> None:
    cached, file = image_cache.build_cache(images, tmp_path / "decoded"), tmp_path / "decoded/pixels-000000.bin"
    for size in (file.stat().st_size - 1, 0):
        os.truncate(file, size)
        with pytest.raises(UserError, match="damaged at image 03.jpg"):
            cached.load(3)


def test_an_image_that_was_unreadable_for_a_while_is_decoded_once_it_is_readable_again(
    images: ImageFolder, tmp_path: Path
) -> None:
    file, away = tmp_path / "images/06.jpg", tmp_path / "06.jpg"
    file.rename(away)
    cached = image_cache.build_cache(images, tmp_path / "decoded")
    with pytest.raises(BadImage, match="No such file"):
        cached.load(6)
    assert image_cache.count_pending(images, tmp_path / "decoded") == 4, (
        "the images of its block; the other blocks are cached"
    )
    away.rename(file)
    assert np.array_equal(cached.load(6)[0], images.load(6)[0])
    image_cache.build_cache(images, tmp_path / "decoded")
    assert image_cache.count_pending(images, tmp_path / "decoded") == 0


def test_the_remedy_in_the_error_repairs_a_cache_of_a_changed_image(images: ImageFolder, tmp_path: Path) -> None:
    settings = {"store": export(images, tmp_path), "student": ("convnet:channels=4+6",), "method": "regression"}
    settings |= {"image_size": 16, "steps": 4, "batch_size": 4, "workers": 0, "cache_images": tmp_path / "decoded"}
    file, folder = tmp_path / "images/03.jpg", tmp_path / "decoded"  # not a probe image
    right = file.read_bytes()
    Image.new("RGB", (8, 8)).save(file)
    for _ in range(2):
        with pytest.raises(UserError, match=f"03.jpg changed .* put it back and delete {folder}, which keeps"):
            distill.run(distill.Config(out=tmp_path / "run", **settings))  # type: ignore[arg-type]
        file.write_bytes(right)
    shutil.rmtree(folder)
    distill.run(distill.Config(out=tmp_path / "run", **settings))  # type: ignore[arg-type]


def test_decoding_uses_only_the_cores_of_this_process(
    images: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_sizes, pool = [], image_cache.ThreadPoolExecutor
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    monkeypatch.setattr(image_cache, "ThreadPoolExecutor", lambda threads: pool_sizes.append(threads) or pool(threads))
    image_cache.build_cache(images, tmp_path / "decoded")
    assert pool_sizes == [3]


def export(images: ImageFolder, home: Path) -> Path:
    teacher = "convnet:channels=4+8,pretrained=false"
    settings = {"views": 3, "image_size": 16, "workers": 0}
    export_teacher.run(export_teacher.Config(data=str(images.path), teacher=teacher, out=home / "store", **settings))  # type: ignore[arg-type]
    return home / "store"


def test_a_run_with_cached_images_equals_the_run_without_to_the_bit(images: ImageFolder, tmp_path: Path) -> None:
    settings = {"store": export(images, tmp_path), "student": ("convnet:channels=4+6",), "method": "regression"}
    settings |= {"image_size": 16, "steps": 4, "batch_size": 4, "workers": 0}
    distill.run(distill.Config(out=tmp_path / "plain", **settings))  # type: ignore[arg-type]
    distill.run(distill.Config(out=tmp_path / "cached", cache_images=tmp_path / "decoded", **settings))  # type: ignore[arg-type]
    names = [tmp_path / run / "student.safetensors" for run in ("plain", "cached")]
    assert names[0].read_bytes() == names[1].read_bytes()
