"""`compress store copy SRC DST`: copy a store, or a part of it, to another place or into another codec."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.command_result import CommandResult
from compress_ssl.pipeline.runtime.config import flag
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.progress import progress_bar
from compress_ssl.pipeline.runtime.storage import absolute, open_storage

if TYPE_CHECKING:
    from compress_ssl.pipeline.store.copy import Part
from compress_ssl.pipeline.store.codecs import KNOWN


@dataclass(frozen=True)
class Config:
    """Copy a feature store to or from a bucket, whole or in part, or convert it to another codec.

    Views keep their numbers, so that a student trains on the same pixels that the teacher embedded. The digest of
    every array that is read is checked. Running the same command again resumes it; a wider --views adds views. Where
    a copy has begun, --images and --codec are its own if they are not given.
    """

    src: str = flag(help="The feature store to copy: a folder or a URL.", metavar="SRC", place=True)
    dst: str = flag(help="Where the copy is written: a folder or a URL.", metavar="DST", place=True)
    views: str | None = flag(
        None, "The views to copy, as 0:8 or 4:8; FIRST is a multiple of four. Default: all.", metavar="FIRST:END"
    )
    images: str | None = flag(
        None, "The images to copy: START:END[:STEP], or a text file with one sample id per line. Default: all.",
        metavar="IMAGES",
    )  # fmt: skip
    codec: str | None = flag(None, f"The codec of the copy: {KNOWN}. Default: as in SRC.", metavar="CODEC")


def run(config: Config) -> CommandResult:
    """Copy the missing shards. Returns {"summary", "store", "fingerprint", "images", "views"}.

    Raises UserError if the source lacks a requested part, or if DST holds something else.
    """
    from compress_ssl.pipeline.runtime.lease import Lease
    from compress_ssl.pipeline.store import copy
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    part, storage = resolve(config), open_storage(config.dst)
    with Lease(storage) as held:
        target = FeatureStore.create(storage, part.record, part.tables, copy.small_files(part))
        copy.train_codecs(part, target)
        done = target.images - sum(shard.stop - shard.start for shard in target.pending())
        with progress_bar("copy", target.images, "images", done) as bar:
            copy.copy_shards(part, target, bar.advance, lambda: held.lost)
        held.check()
    target.require_complete()
    views = part.views
    return {
        "summary": f"{config.dst}: {target.images} images x {len(views)} views {target.identity.codec}, "
        f"{format_bytes(storage.size())}, views {views.start} to {views.stop - 1} of {config.src}",
        "store": str(storage),
        "fingerprint": target.fingerprint,
        "images": target.images,
        "views": list(views),
    }


def resolve(config: Config) -> "Part":
    """What is copied: the source, its views and rows, and the manifest of the copy. Nothing is written."""
    from compress_ssl.pipeline.runtime import artifact
    from compress_ssl.pipeline.store import copy
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    if absolute(config.src) == absolute(config.dst):
        raise UserError(f"{config.src} cannot be copied onto itself; give another DST")
    source = FeatureStore(open_storage(config.src))
    views = copy.parse_views(config.views, source)
    source.require_complete([*views, *source.other_views])
    ids = [str(name) for name in source.table("sample_id")]
    target = open_storage(config.dst)
    has_begun = artifact.claimed(target, "store") is not None  # refuses a folder that holds something else
    begun = FeatureStore(target) if has_begun else None
    rows = copy.parse_images(config.images, read_text, ids) if config.images or not begun else copy.rows_of(begun, ids)
    codec = config.codec or (begun.identity.codec if begun else None)
    return copy.describe_copy(source, views, rows, copy.codec_of(source, codec))


def read_text(path: str) -> str:
    """Text of the file given as --images. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"--images {path} is neither START:END[:STEP] nor a readable text file ({problem}); give one of them"
        ) from None
