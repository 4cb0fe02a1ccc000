"""Check that (i, v) means the same pixels: in a store and its images now, and in two stores by two teachers."""

from collections.abc import Mapping

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime.artifact import MANIFEST, Mismatch, differences
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import StoreIdentity
from compress_ssl.pipeline.store.render_probe import require_same_rendering

CLOCK_TOLERANCE = 2.0  # seconds by which the clocks of the two file systems, of images and store, may differ


def require_unchanged(store: FeatureStore, dataset: Dataset) -> None:
    """Raises UserError if an image changed since its features were stored.

    Only files that were touched since the store was created are read.
    """
    content = np.zeros(store.images, np.uint64)
    for block in store.done():
        rows = slice(*store.span(block))
        content[rows] = store.table("content", rows)
    changed = dataset.changed_rows(content, store.storage.modified(MANIFEST) - CLOCK_TOLERANCE)
    if changed:
        raise UserError(
            f"{len(changed)} images are not those the stored views were made from, the first is "
            f"{dataset.ids[changed[0]]}; put them back, or export into a new folder"
        )


def require_its_images(store: FeatureStore, dataset: Dataset, data: str) -> None:
    """Raises Mismatch, with the difference, if a store was made from other images than those of --data."""
    if dataset.fingerprint != store.identity.data.fingerprint:
        difference = dataset.describe_difference(store.table("sample_id"))
        raise Mismatch(
            f"{store.storage} was made from other images than --data {data}: {difference}. "
            "Give the same images, choose another --out, or start from scratch with --overwrite"
        )


def require_recorded_rendering(store: FeatureStore, dataset: Dataset) -> None:
    """Raises UserError, before a store is added to, if this machine renders its probe views differently.

    store: one that was exported, not copied: its view keys are the row numbers.
    """
    identity, view_keys = store.identity, range(len(dataset))
    require_same_rendering(
        store.export.pixels, dataset, identity.views, identity.teacher.preprocessing, view_keys, allow=None
    )


def require_view_settings(other: FeatureStore, given: Mapping[str, object]) -> None:
    """Raises UserError unless the store that `--like` names is whole and has the view settings that were given.

    given: those of --views, --policy and --seed that the user gave, by name.
    """
    if other.export.data.selected or other.stored_views.start:
        raise UserError(
            f"--like {other.storage} is a copy with fewer images or views; name the store it was copied from, and "
            "reduce the new store afterwards with compress store copy"
        )
    views = other.identity.views
    there = {"views": other.views, "policy": views.policy, "seed": views.seed}
    for name, value in given.items():
        if value != there[name]:
            raise UserError(f"--{name} {value} was asked, but {other.storage} has {there[name]}; leave --{name} out")


def require_same_views(identity: StoreIdentity, dataset: Dataset, other: FeatureStore) -> None:
    """Raises UserError unless a new store has the images, views and view keys of another store.

    identity: that of the new store; dataset: its images.
    """
    if identity.data.fingerprint != other.identity.data.fingerprint:
        difference = dataset.describe_difference(other.table("sample_id"))
        raise UserError(f"the images are not those of --like {other.storage}: {difference}; give the same images")
    unequal = differences(to_json(other.identity.views), to_json(identity.views))
    if unequal:
        raise UserError(f"the views are not those of --like {other.storage}: {'; '.join(unequal)}")
    if not np.array_equal(np.arange(len(dataset)), other.table("view_key")):
        raise UserError(f"the views of --like {other.storage} are drawn from other keys; export without --like")


def require_same_contents(store: FeatureStore, other: FeatureStore) -> None:
    """Raises UserError, with the id of the first one, if images good in both stores have different content hashes."""
    differ = store.table("content") != other.table("content")
    good = (store.table("status") == GOOD) & (other.table("status") == GOOD)
    changed = np.flatnonzero(good & differ)
    if len(changed):
        raise UserError(
            f"{len(changed)} images changed between {other.storage} and {store.storage}, the first is "
            f"{store.table('sample_id')[changed[0]]}; rows and views are not the same pixels there: put the images "
            "back and export anew with --overwrite"
        )
