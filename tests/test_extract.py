"""`extract`, the one way to run a model over views: all of its callers get the same features."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress_ssl.pipeline.datasets.decode import GOOD, NOT_FINITE
from compress_ssl.pipeline.datasets.folder import Folder as ImageFolder
from compress_ssl.pipeline.extraction import codebook, verification
from compress_ssl.pipeline.extraction.embed import _split_into_batches, store_source
from compress_ssl.pipeline.extraction.extract import FeatureBatch, FeatureSource, LoaderSettings, extract
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.features import view_features
from compress_ssl.pipeline.extraction.view_batches import REQUEST_BYTES, model_views, request_batch
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import LOCAL, group_of
from compress_ssl.pipeline.views.loader import ViewRequest
from compress_ssl.stages import export_teacher

TEACHER, SIZE, BATCH, IMAGES, BAD = "timm:resnet18,pretrained=false", 32, 8, 21, 10  # 21: the last batch has 5 images
VIEWS, CPU, SPEC = (0, 1, 2, 3, LOCAL), torch.device("cpu"), ViewSpec("crop-flip", 0, 0.875)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images, one of which cannot be read."""
    top, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (top / "0").mkdir()
    for number in range(IMAGES):
        pixels = random.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(top / "0" / f"{number:02d}.png")
    (top / "0" / f"{BAD:02d}.png").write_bytes(b"no image")
    return top


def build_teacher() -> Embedder:
    torch.manual_seed(0)
    return build(TEACHER, image_size=SIZE, pretrained_default=True)


@pytest.fixture(scope="module")
def store(images: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """An export of all views, whose row blocks have 16 rows."""
    out = tmp_path_factory.mktemp("store") / "store"
    how = {"views": 4, "local_views": 1, "local_size": 32, "image_size": SIZE, "batch_size": BATCH, "shard_size": 16}
    export_teacher.run(
        export_teacher.Config(str(images), TEACHER, str(out), codec="float32", workers=0, device="cpu", **how)  # type: ignore[arg-type]
    )
    return FeatureStore(Folder(out))


@pytest.fixture
def source(images: Path, store: FeatureStore) -> FeatureSource:
    return store_source(
        store, ImageFolder(images), FeatureExtractor(build_teacher(), CPU, "fp32", BATCH), LoaderSettings()
    )


# ---------------------------------------------------------------- the callers of `extract`

Features = dict[int, np.ndarray]
"""{view: (n, D) of the usable images, in the order of their rows}"""


def of_the_store(store: FeatureStore, source: FeatureSource) -> Features:
    good = store.table("status") == GOOD
    return {view: store.read(group_of(view).array("embedding"), view)[good] for view in VIEWS}


def of_the_codebook(store: FeatureStore, source: FeatureSource) -> Features:
    """What the codecs of a store are trained on; the sample has all of these few images."""
    batches = codebook._embed_sample(source, VIEWS, lambda: False)
    local, usable = codebook._usable_features(batches, "local_embedding"), IMAGES - 1
    whole = codebook._usable_features(batches, "embedding").reshape(4, usable, -1)
    return {**dict(enumerate(whole)), LOCAL: local}


def of_verify(store: FeatureStore, source: FeatureSource) -> Features:
    rows = np.flatnonzero(store.table("status") == GOOD)
    live = verification.LiveTeacher(store, source, store.table("content"))
    return {view: verification.embed_again(live, rows, view) for view in VIEWS}


def of_view_features(store: FeatureStore, source: FeatureSource) -> Features:
    return {view: view_features(source, np.arange(IMAGES), view)[0] for view in VIEWS}


@pytest.mark.parametrize("caller", [of_the_codebook, of_verify, of_view_features])
def test_every_caller_gets_the_features_of_the_store_bit_for_bit(
    store: FeatureStore, source: FeatureSource, caller: Callable[[FeatureStore, FeatureSource], Features]
) -> None:
    """With a bad image, and a last batch that is smaller than the others."""
    stored, found = of_the_store(store, source), caller(store, source)
    for view in VIEWS:
        assert stored[view].shape == (IMAGES - 1, 512) and stored[view].any(1).all()
        np.testing.assert_array_equal(found[view], stored[view])


@pytest.mark.parametrize("loader", [LoaderSettings(2), LoaderSettings(2, threads=True)], ids=["processes", "threads"])
def test_loaders_change_no_bit(source: FeatureSource, loader: LoaderSettings) -> None:
    there, here = run(replace(source, loader=loader), VIEWS), run(source, VIEWS)
    assert len(there) == len(here) == 3
    for one, other in zip(there, here, strict=True):
        for name, features in other.features.items():
            np.testing.assert_array_equal(one.features[name], features)


# ---------------------------------------------------------------- batches


def run(
    source: FeatureSource, views: tuple[int, ...], proceed: Callable[[int], bool] = lambda _: True
) -> list[FeatureBatch]:
    batches = source.batches(np.arange(len(source.views.dataset)), views)
    with closing(extract(source, batches, proceed)) as feature_batches:
        return list(feature_batches)


def test_a_batch_says_of_which_rows_and_views_its_features_are_and_which_images_are_bad(source: FeatureSource) -> None:
    batches = run(source, (2, LOCAL, 0))
    assert [len(batch.rows) for batch in batches] == [8, 8, 5]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(IMAGES))
    for batch in batches:
        assert {name: (*numbers[0].tolist(),) for name, numbers in batch.views.items()} == {
            "embedding": (2, 0),
            "local_embedding": (LOCAL,),
        }
        assert {name: values.shape for name, values in batch.features.items()} == {
            "embedding": (len(batch.rows), 2, 512),
            "local_embedding": (len(batch.rows), 1, 512),
        }
        assert batch.rows[batch.status != GOOD].tolist() == list(batch.bad) == [BAD] * (BAD in batch.rows)
        assert ((batch.content == 0) == (batch.status != GOOD)).all()


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_extraction_that_may_not_proceed_yields_the_batches_that_were_started(
    source: FeatureSource, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(FeatureExtractor, "batches_ahead", ahead)
    asked: list[int] = []
    batches = run(source, (0,), lambda number: (asked.append(number), number < 2)[1])
    assert asked == [0, 1, 2] and [len(batch.rows) for batch in batches] == [8, 8]


def test_a_batch_whose_pixels_are_loaded_in_parts_has_the_same_features(
    source: FeatureSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(source, (0, 1, LOCAL))
    row_bytes = 3 * 3 * SIZE * SIZE
    monkeypatch.setattr("compress_ssl.pipeline.extraction.view_batches.REQUEST_BYTES", 3 * row_bytes)
    assert [len(r.rows) for r in request_batch(source.views, np.arange(8), (0, 1, LOCAL))] == [3, 3, 2]
    for batch, parts in zip(whole, run(source, (0, 1, LOCAL)), strict=True):
        assert batch.bad == parts.bad and np.array_equal(batch.status, parts.status)
        for name, features in batch.features.items():
            np.testing.assert_array_equal(parts.features[name], features)


def test_batches_cover_a_shard_and_never_cross_it(source: FeatureSource) -> None:
    shards = [Shard(0, 0, 10, (0, 1)), Shard(1, 10, 21, (1, LOCAL))]
    plan = _split_into_batches(source, shards)
    rows = [np.concatenate([request.rows for request in part.batch]).tolist() for part in plan]
    assert rows == [[*range(8)], [8, 9], [*range(10, 18)], [18, 19, 20]]
    assert [(part.shard.block, part.last) for part in plan] == [(0, False), (0, True), (1, False), (1, True)]


def test_a_request_has_at_most_so_many_bytes_of_pixels_or_one_row(source: FeatureSource) -> None:
    def largest(images: int, size: int) -> int:
        source.views.sizes = {"global": [(size, "bilinear")]}
        requests = request_batch(source.views, np.arange(images), range(8))
        assert np.array_equal(np.concatenate([request.rows for request in requests]), np.arange(images))
        return max(len(request.rows) for request in requests)

    assert largest(300, 224) == REQUEST_BYTES // (3 * 8 * 224 * 224) == 26
    assert largest(3, 4000) == 1


# ---------------------------------------------------------------- without padding


def test_without_padding_the_model_sees_the_usable_images_alone_and_is_left_as_it_was(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, dataset = build_teacher().train(), ImageFolder(images)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in student.state_dict().items()}
    seen: list[tuple[int, bool]] = []
    forward = student.forward_outputs
    monkeypatch.setattr(
        student, "forward_outputs", lambda x, names: (seen.append((len(x), student.training)), forward(x, names))[1]
    )
    extractor = FeatureExtractor(student, CPU, batch_size=BATCH, padded=False)
    features, rows = view_features(FeatureSource(extractor, model_views(dataset, SPEC, student)), np.arange(IMAGES))
    assert seen == [(8, False), (7, False), (5, False)]
    assert rows.tolist() == [i for i in range(IMAGES) if i != BAD] and features.shape == (IMAGES - 1, 512)
    assert student.training and all(p.requires_grad and not p.is_inference() for p in student.parameters())
    after = student.state_dict()
    assert all(torch.equal(after[name], t) and after[name].stride() == s for name, (t, s) in before.items())


def test_the_model_is_in_its_earlier_mode_again_after_an_extraction_that_failed(images: Path) -> None:
    student = build_teacher().train()
    views = model_views(ImageFolder(images), SPEC, student)
    source = FeatureSource(FeatureExtractor.unpadded(student, CPU), views)
    with (
        pytest.raises(IndexError),
        closing(extract(source, [[ViewRequest(np.array([99]), {"global": np.zeros((1, 1))})]])) as batches,
    ):
        next(batches)
    assert student.training


# ---------------------------------------------------------------- codebooks


def test_a_codebook_is_trained_on_usable_images_with_finite_features_alone(
    source: FeatureSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = FeatureExtractor.start

    def overflow(self: FeatureExtractor, *asked: object) -> dict[str, torch.Tensor]:
        out = start(self, *asked)  # type: ignore[arg-type]
        return {"embedding": out["embedding"].clone().index_fill(0, torch.tensor([2]), float("inf"))}

    monkeypatch.setattr(FeatureExtractor, "start", overflow)
    batches = codebook._embed_sample(source, (0, 1), lambda: False)
    assert [row for batch in batches for row in batch.rows[batch.status == NOT_FINITE].tolist()] == [2, 18]
    features = codebook._usable_features(batches, "embedding")
    assert features.shape == (2 * (IMAGES - 3), 512) and np.isfinite(features).all()
