"""What an export is asked to do: `Job`, with every setting that its store records resolved.

A setting is what the user gave, else what a store that has begun records, else what `DEFAULTS` says. So a default that
changes in a later version changes no store that has begun. Importing this module imports neither torch nor zarr.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.models import parse_outputs
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.views.groups import LOCAL_CROPS
from compress_ssl.pipeline.views.policies import Policy

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.runtime.storage import Storage
    from compress_ssl.pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True)
class StoreFlags:
    """The flags of an export that its store records, by the names of the flags."""

    views: int = 8  # global views per image
    policy: Policy = "crop-flip"
    seed: int = 0
    image_size: int | None = None  # side of a view in pixels; None: the input size of the teacher
    local_views: int = 0  # local crops per image
    local_size: int | None = None  # side of a local crop in pixels; None: 3/7 of a view's
    keep: str = "embedding"  # outputs of the teacher to store, separated by commas
    codec: str = "int8"
    batch_size: int = 64  # images per forward pass
    precision: Precision = "fp32"
    shard_size: int | None = None  # rows per shard; None: chosen by the number of images and the size of a row
    limit: int | None = None  # number of images, spread evenly over the data set; None: all of them

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs to store, the embedding first."""
        return parse_outputs(self.keep)


DEFAULTS = StoreFlags()
"""The flags of a new store that are not given."""


# The values are Any because they are those of all flags, of several types.
def resolve_flags(
    given: Mapping[str, Any], begun: "FeatureStore | None", like: "FeatureStore | None" = None
) -> StoreFlags:
    """The flags of an export. given: the flags that the user gave, by name.

    begun: the store to continue, if there is one. like: that of --like, whose view settings hold where none is given.
    """
    flags = DEFAULTS if begun is None else recorded_flags(begun)
    if like is not None:
        views = like.identity.views
        most = max(like.views, begun.views if begun else 0)  # a store that has grown since does not shrink
        flags = replace(flags, views=most, policy=views.policy, seed=views.seed)
    return replace(flags, **given)


def recorded_flags(store: "FeatureStore") -> StoreFlags:
    """The flags that a store records. Raises UserError for the features of an evaluation, which record fewer."""
    identity = store.identity
    crops = identity.group(LOCAL_CROPS)
    return StoreFlags(
        views=store.views,
        policy=identity.views.policy,
        seed=identity.views.seed,
        image_size=identity.teacher.preprocessing.size,
        local_views=crops.views if crops else 0,
        local_size=crops.size if crops else None,
        keep=",".join(store.arrays_of(0)),
        codec=identity.codec,
        batch_size=identity.batch_size,
        precision=identity.precision,
        shard_size=identity.shard_rows,
        limit=store.export.data.limit,
    )


@dataclass(frozen=True)
class Job:
    """An export, with all specs checked, the images listed and every recorded setting resolved."""

    data: str  # spec of the data set
    teacher: str  # spec of the teacher
    out: str  # folder or URL of the store
    flags: StoreFlags
    dataset: "Dataset"
    storage: "Storage"  # at `out`
    begun: "FeatureStore | None"  # the store to continue
    like: "FeatureStore | None"  # the store of --like
    device: str  # auto, cpu, cuda or cuda:N
    scheduler: str  # local, processes:N or an address
    workers: int | None  # loader processes; None: chosen by the number of cores
    overwrite: bool  # whether an earlier store is moved aside
