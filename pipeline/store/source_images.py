"""The images that a store or a run was made from: where they are now, and whether they are the same here."""

from collections.abc import Callable, Mapping
from typing import Any

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.render_probe import require_same_rendering
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.preprocessing import Preprocessing

Order = Callable[[str], Any]  # data spec -> data set


def open_recorded(
    made_of: Mapping[str, Any], ids: Callable[[], Any], order: Order, *, given: str | None, flag: str, of: str
) -> Any:
    """The data set as it was when `of` was made of it, from the place given or from where it was.

    made_of: {"spec", "limit", ...} of a manifest; ids: see `Dataset.part`; flag: what gives the place.
    Raises UserError.
    """
    try:
        whole = order(given or made_of["spec"])
    except UserError as problem:
        if given:
            raise
        why = f"the images of {of} are not where they were: {problem}. Say where they are now with {flag}"
        raise UserError(why) from None
    return whole.restore_selection(made_of, ids)


def require_exported(store: FeatureStore) -> None:
    """Raises UserError for the features of an evaluation, which name neither their images nor their model."""
    if "data" not in store.about:
        raise UserError(
            f"{store.storage} holds what an evaluation saw in view 0, and is no teacher's store; name a store that "
            "compress export-teacher made (compress verify --sample 0 checks this one's digests)"
        )


def open_store_images(
    store: FeatureStore, order: Order, given: str | None, *, allow_other_pixels: bool | None = None
) -> tuple[Any, str]:
    """(the images of a store, in words how they look otherwise here, if that is allowed).

    Raises UserError for other images, and for other looks unless `allow_other_pixels`; None: no flag could allow them.
    """
    require_exported(store)
    dataset = open_recorded(
        store.about["data"], lambda: store.table("sample_id"), order, given=given, flag="--data", of=str(store.storage)
    )
    if dataset.fingerprint != store.identity["data"]["fingerprint"]:
        raise UserError(
            f"the images are not those of {store.storage}: {dataset.describe_difference(store.table('sample_id'))}; "
            "give the right ones with --data or export these"
        )
    spec, looks = ViewSpec(**store.identity["views"]), Preprocessing.of(store.identity["teacher"]["preprocessing"])
    return dataset, require_same_rendering(
        store.about["pixels"], dataset, spec, looks, store.table("view_key"), allow_other_pixels
    )
