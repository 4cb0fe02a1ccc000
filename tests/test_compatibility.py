"""Stores of two teachers: with --like, row i and view v mean the same pixels in both."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest
from compress_ssl.stages import export_teacher, inspect

FIRST, SECOND = "convnet:channels=4+8,pretrained=false", "convnet:channels=4+12,pretrained=false"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        small = Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8))
        small.resize((30, 24), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def export(images: Path, out: Path, teacher: str = FIRST, **options: Any) -> dict[str, Any]:
    settings = {"image_size": 16, "batch_size": 4, "workers": 0, "device": "cpu", "codec": "float32", **options}
    return export_teacher.run(export_teacher.Config(str(images), teacher, str(out), **settings))


@pytest.fixture(scope="module")
def first(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "first"
    export(images, out, views=3, policy="moco-v2", seed=5)
    return out


def test_rows_and_views_of_a_store_exported_with_like_mean_the_same_pixels(
    images: Path, first: Path, tmp_path: Path
) -> None:
    from compress_ssl.pipeline.datasets import DATASETS

    made = export(images, tmp_path / "second", SECOND, like=str(first))
    one, two = FeatureStore(Folder(first)), FeatureStore(Folder(tmp_path / "second"))
    assert f"the same pixels as {first}" in made["summary"] and two.about.like == one.fingerprint
    assert two.views == 3 and two.identity.views == one.identity.views and two.arrays != one.arrays
    dataset = DATASETS.build(str(images))
    pixels = []
    for store in (one, two):
        view_dataset = ViewDataset(
            dataset, store.identity.views, store.table("view_key"), {"global": [(16, "bilinear")]}
        )
        request = ViewRequest(np.arange(12), {"global": np.tile(np.arange(3), (12, 1))})
        pixels.append(view_dataset.load(request).pixels["global"][0].numpy())
    np.testing.assert_array_equal(*pixels)
    np.testing.assert_array_equal(one.table("content"), two.table("content"))
    assert "is complete already" in export(images, tmp_path / "second", SECOND, like=str(first))["summary"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": 5}, "--views 5 was asked, but .* has 3"),
        ({"policy": "dino"}, "--policy dino was asked, but .* has moco-v2"),
        ({"seed": 4}, "--seed 4 was asked, but .* has 5"),
        ({"limit": 6}, "the images are not those of --like .*: 6 are gone"),
    ],
)
def test_incompatible_stores_are_refused_before_anything_is_written(
    options: dict[str, Any], words: str, images: Path, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        export(images, tmp_path / "second", SECOND, like=str(first), **options)
    assert not (tmp_path / "second").exists()


def test_an_image_that_changed_since_the_first_export_is_named(images: Path, first: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", (30, 24), (9, 9, 9)).save(tmp_path / "images/07.png")
    with pytest.raises(UserError, match=r"1 images changed between .*, the first is 07.png"):
        export(tmp_path / "images", tmp_path / "second", SECOND, like=str(first))


def test_inspect_reports_cost_and_savings_as_numbers(first: Path) -> None:
    made = inspect.run(inspect.Config(str(first), students=2, epochs=10))
    assert made["stored_forwards"] == 36 and made["live_forwards"] == 240 and made["break_even_epochs"] == 3
    assert made["device_seconds"] > 0 and made["views_per_s"] == pytest.approx(3 * made["images_per_s"])
    assert made["bytes"] == sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    assert "204 of 240 teacher forwards for 2 students x 10 epochs" in made["summary"] and made["pending"] == 0
    json.dumps(made)
