"""A flag that is not given is what a store that has begun records; a default changed later changes no such store."""

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.extraction import export_job
from compress_ssl.pipeline.extraction.export_job import DEFAULTS, StoreFlags, recorded_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import export_teacher

TEACHER = "convnet:channels=4+8,pretrained=false"
OTHER: dict[str, Any] = {
    "views": 5, "policy": "dino", "seed": 7, "image_size": 16, "local_views": 3, "local_size": 8,
    "keep": "embedding,regions", "codec": "float16", "batch_size": 5, "precision": "bf16", "shard_size": 4, "limit": 6,
}  # fmt: skip
"""Another value of every flag of the table."""

BEGUN: dict[str, Any] = {**OTHER, "views": 6, "keep": "regions", "local_size": 16}
"""Flags of a store that differ from all defaults, those of now and those of OTHER's names."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images in two classes."""
    top, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(8):
        (top / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 20, 3), np.uint8)).save(top / "ab"[i % 2] / f"{i}.png")
    return top


def export(images: Path, out: Path, **given: Any) -> dict[str, Any]:
    config = export_teacher.Config(str(images), TEACHER, str(out), **{"workers": 0, **given})
    return export_teacher.run(config)


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores with the defaults of now, of 8 and of 12 views, and one with other flags in every place, likewise."""
    top = tmp_path_factory.mktemp("begun")
    export(images, top / "defaults")
    export(images, top / "defaults-12", views=12)
    export(images, top / "given", **BEGUN)
    export(images, top / "given-12", **{**BEGUN, "views": 12})
    return {name: top / name for name in ("defaults", "defaults-12", "given", "given-12")}


def tree(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all files of a store but its history."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name != "history.jsonl"}


def test_the_other_values_cover_the_table_and_differ_from_every_default() -> None:
    assert set(OTHER) == set(BEGUN) == {f.name for f in fields(StoreFlags)}
    assert all(getattr(DEFAULTS, name) != value for name, value in (*OTHER.items(), *BEGUN.items()))


@pytest.mark.parametrize("store", ["defaults", "given"])
def test_defaults_that_change_change_no_store_that_has_begun_also_when_it_grows_or_moves_to_another_device(
    images: Path, begun: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """All defaults change at once: one that came through would be refused, or change a byte."""
    out = Path(shutil.copytree(begun[store], tmp_path / "store"))
    monkeypatch.setattr(export_job, "DEFAULTS", StoreFlags(**OTHER))
    assert "is complete already" in export(images, out)["summary"]
    assert "is complete already" in export(images, out, device="cpu")["summary"]
    assert tree(out) == tree(begun[store])
    assert export(images, out, views=12, device="cpu")["views"] == 12
    assert tree(out) == tree(begun[f"{store}-12"])
    assert "is complete already" in export(images, out)["summary"]


def test_a_new_store_takes_the_changed_defaults_and_so_does_one_that_is_started_anew(
    images: Path, begun: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(begun["given"], tmp_path / "store"))
    monkeypatch.setattr(export_job, "DEFAULTS", StoreFlags(**OTHER))
    export(images, out, overwrite=True)
    export(images, tmp_path / "new")
    for store in (out, tmp_path / "new"):
        assert recorded_flags(FeatureStore(Folder(store))) == StoreFlags(**OTHER)


def test_the_flags_of_a_store_are_those_it_was_begun_with(begun: dict[str, Path]) -> None:
    there = recorded_flags(FeatureStore(Folder(begun["given"])))
    assert there == StoreFlags(**{**BEGUN, "keep": "embedding,regions"})


def test_an_interrupted_store_is_continued_with_the_flags_it_was_begun_with(
    images: Path, begun: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(begun["given"], tmp_path / "store"))
    for record in (out / "done").glob("0000000.*"):
        record.unlink()
    assert "6 images x 6 views" in export(images, out)["summary"]
    assert tree(out) == tree(begun["given"])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("policy", 'views.policy is "dino" there, "moco-v2" asked'),
        ("seed", "views.seed is 7 there, 8 asked"),
        ("codec", 'codec is "float16" there, "float32" asked'),
        ("batch_size", "batch_size is 5 there, 3 asked"),
        ("precision", 'precision is "bf16" there, "fp32" asked'),
        ("image_size", "teacher.preprocessing.size is 16 there, 24 asked"),
        ("local_views", "local.views is 3 there, 4 asked"),
        ("local_size", "local.size is 16 there, 8 asked"),
        ("shard_size", "shard_rows is 4 there, 8 asked"),
        ("keep", "arrays.regions is"),
        ("limit", "was made from other images than --data"),
        ("views", "has 6 views, but 5 were asked for"),
    ],
)
def test_a_flag_that_is_given_and_differs_from_the_store_is_refused_even_if_it_is_the_default(
    images: Path, begun: dict[str, Path], tmp_path: Path, flag: str, words: str
) -> None:
    out = Path(shutil.copytree(begun["given"], tmp_path / "store"))
    asked = {
        "policy": "moco-v2", "seed": 8, "codec": "float32", "batch_size": 3, "precision": "fp32", "image_size": 24,
        "local_views": 4, "local_size": 8, "shard_size": 8, "keep": "embedding", "limit": 8, "views": 5,
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        export(images, out, **{flag: asked[flag]})
    assert words in str(error.value)
    assert tree(out) == tree(begun["given"])


def test_the_store_of_like_gives_views_policy_and_seed_unless_they_are_given_and_equal(
    images: Path, begun: dict[str, Path], tmp_path: Path
) -> None:
    like = {"like": str(begun["given"]), "limit": 6, "image_size": 16}
    export(images, tmp_path / "store", **like)
    flags = recorded_flags(FeatureStore(Folder(tmp_path / "store")))
    assert (flags.views, flags.policy, flags.seed, flags.codec) == (6, "dino", 7, "int8")
    with pytest.raises(UserError, match=r"--seed 0 was asked, but .* has 7; leave --seed out"):
        export(images, tmp_path / "other", seed=0, **like)
    assert "is complete already" in export(images, tmp_path / "store")["summary"]


def test_a_store_keeps_the_preprocessing_of_its_teacher_and_the_crop_of_like_when_they_are_not_given(
    images: Path, begun: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_ssl.pipeline.models.networks import convnet

    out, other = Path(shutil.copytree(begun["defaults"], tmp_path / "store")), tmp_path / "other"
    monkeypatch.setattr(convnet, "IMAGENET", replace(convnet.IMAGENET, mean=(0.1, 0.1, 0.1)))
    assert export(images, out, views=12)["views"] == 12
    assert tree(out) == tree(begun["defaults-12"])

    teacher = f"{TEACHER},crop=0.5"
    for flags in ({"like": str(out)}, {}, {"views": 16}, {"like": str(out)}):
        export_teacher.run(export_teacher.Config(str(images), teacher, str(other), workers=0, **flags))
    identity, about = FeatureStore(Folder(other)).identity, FeatureStore(Folder(other)).about
    assert identity.views.crop_ratio == 1.0 and identity.teacher.preprocessing.crop_ratio == 0.5
    assert about.views == 16, "the store of --like has 12, and this one was grown since"


@pytest.mark.parametrize("flag", ["views", "local_views", "shard_size", "batch_size", "limit", "image_size"])
def test_a_number_that_no_store_can_record_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path, flag: str
) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is {10**30}, but must be from"):
        export(images, tmp_path / "store", **{flag: 10**30})
    assert not (tmp_path / "store").exists()
