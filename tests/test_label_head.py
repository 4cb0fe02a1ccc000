"""`compress label-head` fits a linear head to a few labels from the stored embeddings alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.weights import to_bytes
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import export_teacher, label_head

IMAGES = 30
NAMES = ["ant", "bee", "cat"]


def blobs(classes: int, n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(features (n, 6), labels (n,)) of Gaussian classes."""
    random = np.random.default_rng(seed)
    label = np.arange(n) % classes
    return (random.normal(size=(classes, 6))[label] * 2 + random.normal(size=(n, 6))).astype(np.float32), label


@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_is_logistic_regression_on_standardised_unit_features_with_the_scaling_folded_in(classes: int) -> None:
    features, label = blobs(classes)
    head = linear_head.fit(features, label, NAMES[:classes], 0.5)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=2000)).fit(normalize(features), label)
    fresh, _ = blobs(classes, seed=3)
    p = head(torch.from_numpy(fresh * 7)).softmax(1).numpy()  # times 7: the length of an embedding does not matter
    np.testing.assert_allclose(p, plain.predict_proba(normalize(fresh)), atol=2e-3)


def test_a_class_without_examples_is_never_predicted() -> None:
    features, label = blobs(2)
    head = linear_head.fit(features, label * 2, NAMES)
    assert set(head(torch.randn(500, 6)).argmax(1).tolist()) == {0, 2}


def test_a_share_takes_at_least_one_image_of_every_class_and_depends_only_on_the_seed() -> None:
    label = np.array([0] * 50 + [1] * 30 + [2] * 3 + [-1] * 9)
    rows = linear_head.choose_labelled(label, 0.1, 0)
    assert np.bincount(label[rows]).tolist() == [5, 3, 1] and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, linear_head.choose_labelled(label, 0.1, 0))
    assert not np.array_equal(rows, linear_head.choose_labelled(label, 0.1, 1))
    assert len(linear_head.choose_labelled(np.full(4, -1), 0.5, 0)) == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 30 images in three classes; each class has a file called first.png."""
    top, random = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    for i in range(IMAGES):
        file = top / "images" / NAMES[i % 3] / (f"{i:02d}.png" if i > 2 else "first.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = np.eye(3)[i % 3] * 200
        Image.fromarray((colour + random.integers(0, 55, (12, 12, 3))).astype(np.uint8)).save(file)
    teacher = "convnet:channels=4+8,pretrained=false"
    options: dict[str, Any] = {"views": 2, "image_size": 8, "workers": 0, "device": "cpu", "codec": "float32"}
    export_teacher.run(export_teacher.Config(str(top / "images"), teacher, top / "store", **options))
    return top / "store"


def fit_head(store: Path, out: Path, **options: Any) -> dict[str, Any]:
    """What the command returns."""
    return label_head.run(label_head.Config(store=store, out=out, **options))


def test_the_command_fits_the_head_on_the_selected_labels_and_scores_it_on_the_others(
    store: Path, tmp_path: Path
) -> None:
    found = fit_head(store, tmp_path / "head.safetensors", labels="20%")
    assert (found["labelled"], found["classes"]) == (6, 3)
    opened = FeatureStore(Folder(store))
    features, label = opened.read("embedding", 0), opened.table("label")
    rows = linear_head.choose_labelled(label, 0.2, 0)
    head = linear_head.load(tmp_path / "head.safetensors")
    expected = linear_head.fit(features[rows], label[rows], NAMES)
    torch.testing.assert_close(head.weight, expected.weight)
    others = np.setdiff1d(np.arange(IMAGES), rows)
    hits = (head(torch.from_numpy(features[others])).argmax(1).numpy() == label[others]).mean()
    assert found["top1"] == pytest.approx(100 * hits) and head.names == ("ant", "bee", "cat")


def test_labels_can_be_selected_by_a_file_of_ids_or_file_names(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("ant/03.png\n04.png\n\n05.png\n")
    assert fit_head(store, tmp_path / "head", labels=str(tmp_path / "ids"))["labelled"] == 3
    (tmp_path / "odd").write_text("ant/03.png\n99.png\n")
    with pytest.raises(UserError, match=r"1 of 2 ids in .*odd are not in .*, the first is 99.png; they look like ant/"):
        fit_head(store, tmp_path / "other", labels=str(tmp_path / "odd"))
    (tmp_path / "ambiguous").write_text("first.png\n03.png\n")
    with pytest.raises(UserError, match="names first.png, and several images have this file name; give ids, as ant/"):
        fit_head(store, tmp_path / "other", labels=str(tmp_path / "ambiguous"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "0%"}, "must be more than 0% and at most 100%"),
        ({"labels": "ten%"}, "must be more than 0%"),
        ({"labels": "nowhere.txt"}, "is neither a share, as 10%, nor a readable text file"),
        ({"strength": 0.0}, "--strength is 0.0, but must be more than 0"),
    ],
)
def test_an_option_out_of_range_is_refused_and_no_file_is_written(
    options: dict[str, Any], message: str, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit_head(store, tmp_path / "head", **options)
    assert not (tmp_path / "head").exists()


def test_an_existing_file_is_replaced_only_with_overwrite(store: Path, tmp_path: Path) -> None:
    fit_head(store, tmp_path / "head")
    before = (tmp_path / "head").read_bytes()
    with pytest.raises(UserError, match="is there already; name another --out, or replace it with --overwrite"):
        fit_head(store, tmp_path / "head", labels="50%")
    assert (tmp_path / "head").read_bytes() == before
    fit_head(store, tmp_path / "head", labels="50%", overwrite=True)
    assert (tmp_path / "head").read_bytes() != before
    fit_head(store, tmp_path / "again", labels="50%")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "head").read_bytes()


def test_labels_of_a_single_class_are_refused() -> None:
    with pytest.raises(UserError, match="two classes at least"):
        linear_head.fit(np.ones((4, 6), np.float32), np.zeros(4, int), NAMES)


@pytest.mark.parametrize(
    ("classes", "unit", "weight"),
    [
        ("[" * 100_000, "true", torch.zeros(2, 3)), ("5", "true", torch.zeros(2, 3)),
        ("[1, 2]", "true", torch.zeros(2, 3)),
        ('{"a": 1, "b": 2}', "true", torch.zeros(2, 3)), ('["a", "b"]', '"yes"', torch.zeros(2, 3)),
        ('["a", "b"]', "true", torch.zeros(2, 3, dtype=torch.int64)), ('["a", "b"]', "true", torch.zeros(2, 3, 1)),
        ('["a"]', "true", torch.zeros(2, 3)), ("NaN", "true", torch.zeros(2, 3)),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_file_whose_entries_are_malformed_is_no_head(
    tmp_path: Path, classes: str, unit: str, weight: torch.Tensor
) -> None:
    tensors = {"weight": weight, "bias": torch.zeros(2)}
    (tmp_path / "head.safetensors").write_bytes(to_bytes(tensors, {"classes": classes, "unit": unit}))
    with pytest.raises(UserError, match="is no linear head"):
        linear_head.load(tmp_path / "head.safetensors")


@pytest.mark.parametrize("content", [b"\xff\xfe\n", None])
def test_a_file_of_labels_that_cannot_be_read_is_refused_in_words(
    store: Path, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "ids").write_bytes(content)
    with pytest.raises(UserError, match=r"ids is neither a share, as 10%, nor a readable text file \("):
        fit_head(store, tmp_path / "head", labels=str(tmp_path / "ids"))
