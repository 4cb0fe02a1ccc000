"""Whether (i, v) still means the same pixels: for a store and its images, and for two stores by two teachers."""

from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime.artifact import MANIFEST, UserError, differences
from compress_ssl.pipeline.store.feature_store import FeatureStore

CLOCK_TOLERANCE = 2.0  # seconds by which the clocks of the images' disk and the store's may differ


def require_unchanged(store: FeatureStore, dataset: Any) -> None:
    """Raises UserError if an image is not what its stored features were made from. Reads what was touched since."""
    content = np.zeros(store.images, np.uint64)
    for block in store.done():
        rows = slice(*store.span(block))
        content[rows] = store.table("content", rows)
    if changed := dataset.changed_rows(content, store.storage.modified(MANIFEST) - CLOCK_TOLERANCE):
        raise UserError(
            f"{len(changed)} images are not those the stored views were made from, the first is "
            f"{dataset.ids[changed[0]]}; put them back, or export into a new folder"
        )


def view_settings_of(other: FeatureStore, given: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """{"views", "policy", "seed"} of another store, to export alike.

    given: {name: (value, default)} of these flags. Raises UserError if one was given and says otherwise,
    or if the other store is a selection of images.
    """
    if other.about["data"].get("selected") or other.stored_views.start:
        raise UserError(f"--like {other.storage} is cut down; name the store it was copied from, cut the new one down")
    want = {"views": other.views, "policy": other.identity["views"]["policy"], "seed": other.identity["views"]["seed"]}
    for name, (value, default) in given.items():
        if value not in (default, want[name]):
            raise UserError(f"--{name} {value} was asked, but {other.storage} has {want[name]}; leave --{name} out")
    return want


def require_same_views(identity: dict[str, Any], dataset: Any, other: FeatureStore) -> None:
    """Raises UserError unless a store to be made of a data set has the images, views and view keys of another."""
    if identity["data"]["fingerprint"] != other.identity["data"]["fingerprint"]:
        unlike = dataset.describe_difference(other.table("sample_id"))
        raise UserError(f"the images are not those of --like {other.storage}: {unlike}; give the same images")
    if unequal := differences(other.identity["views"], identity["views"]):
        raise UserError(f"the views are not those of --like {other.storage}: {'; '.join(unequal)}")
    if not np.array_equal(np.arange(len(dataset)), other.table("view_key")):
        raise UserError(f"the views of --like {other.storage} are drawn from other keys; export without --like")


def require_same_contents(store: FeatureStore, other: FeatureStore) -> None:
    """Raises UserError, with the first name, for images whose content differs between two stores."""
    mine, theirs = store.table("content"), other.table("content")
    good = (store.table("status") == GOOD) & (other.table("status") == GOOD)
    changed = np.flatnonzero(good & (mine != theirs))
    if len(changed):
        raise UserError(
            f"{len(changed)} images changed between {other.storage} and {store.storage}, the first is "
            f"{store.table('sample_id')[changed[0]]}; rows and views are not the same pixels there: put the images "
            "back and export anew with --overwrite"
        )
