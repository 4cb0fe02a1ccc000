"""check_dataset: every kind of data set passes it, and each kind of mistake is found and named in the error."""

import threading
from collections.abc import Callable
from pathlib import Path

import broken_datasets as broken
import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.testing import check_dataset


def test_a_smallest_data_set_passes() -> None:
    check_dataset(broken.Correct, seed=3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / f"class-{number % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"class-{number % 2}" / f"{number}.png")
    (tmp_path / "class-0" / "broken.png").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize("kind", [kind for kind in DATASETS.entries if kind != "python"])
def test_every_registered_kind_passes(kind: str, images: Path) -> None:
    argument: dict[str, tuple[object, ...]] = {"folder": (images,), "torchvision": ("ImageFolder",)}
    options = {"root": images} if kind == "torchvision" else {}
    check_dataset(DATASETS.resolve(kind), *argument.get(kind, ()), **options)


def test_a_map_style_data_set_passes() -> None:
    check_dataset(broken.Greys)


def test_a_data_set_of_bad_images_and_good_ones_passes() -> None:
    check_dataset(broken.SomeBad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (broken.changed(ids=[]), "build has no images"),
        (broken.changed(ids=[*"abbcd"]), "its `ids` must differ, but 'b' is there twice"),
        (broken.changed(ids=[*range(5)]), "its `ids` must be texts, but one is 0"),
        (broken.changed(ids=tuple("abcde")), "its `ids` are a tuple, not a list"),
        (broken.AnotherLength, "has 5 `ids` for 6 images"),
        (broken.changed(label=np.full(5, 2)), "the label 2 is none of its 2 `classes`"),
        (broken.changed(label=np.zeros(6, np.int64)), r"an array \(5,\) of int64, but it is int64 \(6,\)"),
        (broken.changed(label=[0] * 5), "its `label` is not an array of int64"),
        (broken.changed(classes=("x", "x")), r"its `classes` must be texts that differ, but they are \('x', 'x'\)"),
        (broken.changed(classes=["x", "y"]), "its `classes` are not a tuple"),
        (broken.FingerprintOfItsOwn, "replaces fingerprint of Dataset"),
        (broken.ShuffledIds, "has other ids, or another order, when it is built again"),
        (broken.ShuffledLabels, "has other labels or classes when it is built again"),
        (broken.RaisesKeyError, r"load\(0\) raised KeyError: 'pixels'; .* raise BadImage"),
        (broken.RaisesGood, "raised BadImage with status 0"),
        (broken.FloatPixels, r"load\(0\) returned float64 \(6, 4, 3\) as pixels, not an array \(H, W, 3\) of uint8"),
        (broken.ChannelsFirst, r"load\(0\) returned uint8 \(3, 6, 4\) as pixels"),
        (broken.EmptyPixels, r"load\(0\) returned an image of 0 x 4 pixels"),
        (broken.NegativeHash, r"load\(0\) returned -1 as content hash"),
        (broken.AllBad, "none of the 5 images that were tried can be used; the first: the disk is away"),
        (broken.RandomPixels, "returns another image . the second time; take random transforms out"),
        (broken.SharesARow, "returns other images when 4 threads load at once"),
        (broken.OneHash, "one content hash for the different images 0 and 1"),
        (broken.changed(lock=threading.Lock()), "cannot be pickled"),
        (broken.LosesItsPixels, "returns another image 0 in a fresh process"),
        (broken.DiesInAnotherProcess, "cannot be used in a fresh process .*no such server"),
        (broken.AllRowsChanged, r"changed_rows names \[0, 1, 2, 3, 4\], whose images have not changed"),
        (broken.AnyChangeIsOfTheLastRow, r"changed_rows names \[4\], but only the hash of image 0 differs"),
        (broken.Items, r"Items: an item of a data set must be .* it is a ndarray of float32 \(3, 4, 4\)"),
        (broken.Iterable, "returned a Iterable without __len__ and __getitem__"),
    ],
)
def test_a_mistake_is_found_and_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_dataset(build)
