"""The features that protocols score: view 0 of the training and the validation images, and random views for probes."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.evaluators.base import AugmentedFeatures, Split
from compress_ssl.pipeline.evaluators.scored_model import ScoredModel
from compress_ssl.pipeline.extraction.embed import embed, store_source
from compress_ssl.pipeline.extraction.extract import FeatureSource, LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.features import view_features
from compress_ssl.pipeline.extraction.view_batches import model_views
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import Column
from compress_ssl.pipeline.store.records import (
    DataIdentity,
    StoreAbout,
    StoreIdentity,
    StoreRecord,
    TeacherIdentity,
)
from compress_ssl.pipeline.store.shards import shard_rows
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS


@dataclass(frozen=True)
class EmbedSettings:
    """How images are embedded, where their features are not stored yet."""

    batch_size: int  # images per forward pass
    workers: int | None  # loader processes; None: what runtime.device.loader_workers chooses for the device
    device: str  # "auto", "cpu", "cuda", "cuda:1"
    precision: Precision


# ---------------------------------------------------------------- view 0


def load_splits(
    scored: ScoredModel, settings: EmbedSettings, train: Dataset, val: Dataset, folder: Path
) -> tuple[Split, Split]:
    """(training split, validation split) of view 0.

    Features that are not stored yet are computed into the stores FOLDER/train and FOLDER/val, and a later call
    continues them.

    Both splits share one list of classes: those of the training images, then those that only the validation images
    have (possible only if the training images have no labels).
    """
    classes = (*train.classes, *(name for name in val.classes if name not in train.classes))
    first = scored.find_store(train) or embed_dataset(scored, settings, train, folder / "train")
    second = scored.find_store(val) or embed_dataset(scored, settings, val, folder / "val")
    return build_split(first, train, classes), build_split(second, val, classes)


def embed_dataset(scored: ScoredModel, settings: EmbedSettings, dataset: Dataset, folder: Path) -> FeatureStore:
    """The scored model's features of view 0, as a store with one view in float32, resumed where it stopped."""
    arrays: dict[str, tuple[int, ...]] = {"embedding": (scored.model.width,)}
    identity = StoreIdentity(
        data=DataIdentity(dataset.fingerprint, len(dataset)),
        teacher=TeacherIdentity(scored.weights, scored.preprocessing),
        views=replace(scored.views, policy="none"),
        arrays=arrays,
        codec="float32",
        batch_size=settings.batch_size,
        precision=settings.precision,
        shard_rows=shard_rows(len(dataset), settings.batch_size, arrays, 4),
    )
    tables: dict[str, Column] = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    store = FeatureStore.create(Folder(folder), StoreRecord(identity, StoreAbout(views=1, small={})), tables)
    if store.pending():
        embed_pending(scored, settings, dataset, store, folder.name)
    return store


def embed_pending(
    scored: ScoredModel, settings: EmbedSettings, dataset: Dataset, store: FeatureStore, title: str
) -> None:
    """Compute the features that a store lacks, with a progress bar. A stop signal keeps those of complete shards."""
    device = choose_device(settings.device)
    missing = sum(shard.stop - shard.start for shard in store.pending())  # images
    done = store.images - missing
    with StopRequest() as stop, progress_bar(f"features {title}", store.images, "images", done) as bar:
        forward = FeatureExtractor(scored.build_embedder(), device, settings.precision, settings.batch_size)
        source = store_source(store, dataset, forward, LoaderSettings(loader_workers(settings.workers, device)))
        embed(store, source, store.pending(), bar.advance, lambda: stop.requested)
        stop.check("the features so far are kept; repeat the command to continue")


def build_split(store: FeatureStore, dataset: Dataset, classes: tuple[str, ...]) -> Split:
    """The usable images of a store's view 0, with labels as numbers into `classes`, joined by class name.

    Raises UserError if no image is usable.
    """
    rows = np.flatnonzero(store.table("status") == GOOD)
    if not len(rows):
        _, name, why = store.bad_images()[0]
        raise UserError(
            f"none of the {len(dataset)} images of {store.storage} can be used, the first is {name}: {why}; "
            "repair the files, then repeat the command with another --out"
        )
    if len(rows) < len(dataset):
        echo(f"{len(dataset) - len(rows)} of {len(dataset)} images cannot be used and are left out")
    number = {name: y for y, name in enumerate(classes)}
    # One more entry at the end: a label of -1 (none) indexes it and stays -1.
    joined = np.array([number.get(name, -1) for name in dataset.classes] + [-1], np.int64)
    return Split(store.read("embedding", 0)[rows], joined[dataset.label[rows]], rows, classes)


def recorded_batch_size(folder: Path) -> int | None:
    """The batch size of the features in FOLDER/train and FOLDER/val; None if none were begun."""
    for part in ("train", "val"):
        if artifact.claimed(Folder(folder / part), "store"):
            return FeatureStore(Folder(folder / part)).identity.batch_size
    return None


# ---------------------------------------------------------------- random views


def make_augmenter(
    scored: ScoredModel, settings: EmbedSettings, dataset: Dataset, rows: np.ndarray
) -> AugmentedFeatures | None:
    """epoch -> (n, d) features of another random view of these rows of the data set; None if none can be had.

    With a store that holds these images, its stored random views are used in turn; a store of view 0 alone has none.
    Otherwise the images are embedded again in every epoch, in a new random crop and flip.
    """
    store = scored.find_store(dataset)
    if store is not None:
        return stored_view_reader(store, rows)
    return partial(embed_random_view, scored, settings, dataset, rows)


def stored_view_reader(store: FeatureStore, rows: np.ndarray) -> AugmentedFeatures | None:
    """epoch -> (n, d) stored features of these rows in a random view, a different one for each of V - 1 epochs."""
    random_views = [view for view in store.stored_views if view]  # view 0 is the centre crop
    if not random_views:
        return None
    return lambda epoch: store.read("embedding", random_views[epoch % len(random_views)])[rows]


def embed_random_view(
    scored: ScoredModel, settings: EmbedSettings, dataset: Dataset, rows: np.ndarray, epoch: int
) -> np.ndarray:
    """(n, d) features of these rows in random crops and flips, other ones in every epoch.

    The views are fresh ones, so none of them is a stored view. Raises UserError if an image cannot be read any more.
    """
    device = choose_device(settings.device)
    embedder = scored.build_embedder().to(device).to(memory_format=torch.channels_last)  # as FeatureExtractor sets it
    spec = ViewSpec("crop-flip", scored.views.seed, scored.views.crop_ratio)
    source = FeatureSource(
        FeatureExtractor.unpadded(embedder, device, settings.precision),
        model_views(dataset, spec, embedder),
        LoaderSettings(loader_workers(settings.workers, device)),
    )
    features, embedded_rows = view_features(source, rows, GLOBAL_VIEWS.fresh().first + epoch)
    if len(embedded_rows) != len(rows):
        raise UserError(f"{len(rows) - len(embedded_rows)} training images can no longer be read; restore them")
    return features
