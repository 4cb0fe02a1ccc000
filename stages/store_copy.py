"""`compress store copy SRC DST`: a store, or a part of it, in another place or as another codec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import flag
from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.progress import progress_bar
from compress_ssl.pipeline.runtime.storage import absolute, open_storage


@dataclass(frozen=True)
class Config:
    """Copy a store: push it to a bucket or pull it from there, cut it down, or store it as another codec.

    Views keep their numbers, so a student sees the pixels the teacher saw. Digests are checked on the way.
    The same command again continues; more --views is growth.
    """

    src: str = flag(help="a feature store: a folder or a URL", place=True)
    dst: str = flag(help="where the copy goes: a folder or a URL", place=True)
    views: str | None = flag(None, "FIRST:END, such as 0:8 or 4:8; FIRST is a multiple of four (default: all)")
    images: str | None = flag(None, "START:END[:STEP], or a file with a sample id a line (default: all)")
    codec: str | None = flag(None, "int8, float16, float32, pq:M, +zstd behind any (default: as it is)")


def run(config: Config) -> dict[str, Any]:
    """Copy what is missing. Returns {"summary", "store", "fingerprint", "images", "views"}."""
    from compress_ssl.pipeline.runtime import artifact
    from compress_ssl.pipeline.runtime.lease import Lease
    from compress_ssl.pipeline.store import copy
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    if absolute(config.src) == absolute(config.dst):
        raise UserError(f"{config.src} cannot be copied onto itself; name another place")
    source = FeatureStore(open_storage(config.src))
    views = copy.parse_views(config.views, source)
    source.require_complete([*views, *source.local])
    ids = [str(name) for name in source.table("sample_id")]
    rows = copy.parse_images(config.images, read_text, ids)
    identity, about, tables = copy.describe_copy(source, views, rows, copy.codec_of(source, config.codec))
    storage = open_storage(config.dst)
    artifact.claimed(storage, "store")  # before anything is written there
    with Lease(storage) as held:
        target = FeatureStore.create(storage, identity, about, tables, copy.small_files(source, identity["codec"]))
        copy.train_codecs(source, target, rows)
        done = target.images - sum(shard.stop - shard.start for shard in target.pending())
        with progress_bar("copy", target.images, "images", done) as bar:
            copy.copy_shards(source, target, rows, bar.advance, lambda: held.lost)
        held.check()
    target.require_complete()
    return {
        "summary": f"{config.dst}: {target.images} images x {len(views)} views {target.identity['codec']}, "
        f"{format_bytes(storage.size())}, views {views.start} to {views.stop - 1} of {config.src}",
        "store": str(storage),
        "fingerprint": target.fingerprint,
        "images": target.images,
        "views": list(views),
    }


def read_text(path: str) -> str:
    """A file of the user's. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"--images {path} is neither START:END[:STEP] nor a file that can be read ({problem}); give one of them"
        ) from None
