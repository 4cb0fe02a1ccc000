"""Manifests of stores that no teacher has made, for benchmarks and tests of the store alone."""

from typing import Any

from compress_ssl.pipeline.store.records import (
    DataIdentity,
    StoreAbout,
    StoreIdentity,
    StoreRecord,
    TeacherIdentity,
)
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.preprocessing import IMAGENET


def plain_record(images: int, views: int, width: int, codec: str, rows: int, **more: Any) -> StoreRecord:
    """The manifest of a store of one embedding of this width. more: further fields of its identity."""
    usual: dict[str, Any] = {
        "data": DataIdentity("f" * 32, images),
        "teacher": TeacherIdentity("e" * 64, IMAGENET),
        "views": ViewSpec("crop-flip", 0, 0.875),
        "arrays": {"embedding": (width,)},
        "codec": codec,
        "batch_size": 1,
        "precision": "fp32",
        "shard_rows": rows,
    }
    return StoreRecord(StoreIdentity(**{**usual, **more}), StoreAbout(views, small={}))
