"""The images that a store or a run was made from: open them where they are now, and check that they are the same."""

from collections.abc import Callable, Iterable

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import DataSource
from compress_ssl.pipeline.store.render_probe import require_same_rendering


def open_recorded(
    made_of: DataSource, ids: Callable[[], Iterable[object]], *, given: str | None, flag: str, of: str
) -> Dataset:
    """Open the data set that a store or run was made of, with the same selection of images.

    made_of: what the manifest says of the data; ids: see `Dataset.restore_selection`;
    given: the user's data spec, which replaces the recorded one; flag: the option that gives it;
    of: name of the store or run in messages. Raises UserError if the data set cannot be opened.
    """
    try:
        dataset: Dataset = DATASETS.build(given or made_of.spec)
    except UserError as problem:
        if given:
            raise
        why = f"the images of {of} are not where they were: {problem}. Say where they are now with {flag}"
        raise UserError(why) from None
    return dataset.restore_selection(made_of.limit, bool(made_of.selected), ids)


def open_store_images(store: FeatureStore, given: str | None, *, allow_other_pixels: bool | None = None) -> Dataset:
    """The images of a store, opened where they are now. Pixels that differ and are allowed to are a warning.

    given: the user's data spec, which replaces the recorded one; allow_other_pixels: see `require_same_rendering`.
    Raises UserError for other images, and for other pixels unless they are allowed.
    """
    dataset = open_recorded(
        store.export.data, lambda: store.table("sample_id"), given=given, flag="--data", of=str(store.storage)
    )
    if dataset.fingerprint != store.identity.data.fingerprint:
        raise UserError(
            f"the images are not those of {store.storage}: {dataset.describe_difference(store.table('sample_id'))}; "
            "give the right ones with --data or export these"
        )
    identity = store.identity
    difference = require_same_rendering(
        store.export.pixels,
        dataset,
        identity.views,
        identity.teacher.preprocessing,
        store.table("view_key"),
        allow_other_pixels,
    )
    if difference:
        echo(f"warning: {difference}")
    return dataset
