"""`compress store copy SRC DST`: copy a store, or a part of it, to another place or into another codec."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.config import CommandResult, flag
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import format_bytes
from compress_ssl.pipeline.runtime.progress import progress_bar
from compress_ssl.pipeline.runtime.storage import absolute, open_storage
from compress_ssl.pipeline.store.codecs import KNOWN, build_codec

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.store.copy import Part
    from compress_ssl.pipeline.store.feature_store import FeatureStore

_SLICE = re.compile(r"(-?\d{1,18})?:(-?\d{1,18})?(?::(-?\d{1,18})?)?", re.ASCII)


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
        None, "The images to copy: START:END[:STEP], or a text file with one id or file name per line. Default: all.",
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
    views = parse_views(config.views, source)
    source.require_complete([*views, *source.other_views])
    target = open_storage(config.dst)
    has_begun = artifact.claimed(target, "store") is not None  # refuses a folder that holds something else
    begun = FeatureStore(target) if has_begun else None
    rows = copy.rows_of(begun, source) if begun and config.images is None else parse_images(config.images, source)
    codec = config.codec or (begun or source).identity.codec
    return copy.describe_copy(source, views, rows, build_codec(codec).name)


def parse_views(text: str | None, source: "FeatureStore") -> range:
    """Parse `4:8`, `:8` or `4:` to a range of view numbers.

    Raises UserError for views that the source lacks, and for a start inside a view block.
    """
    from compress_ssl.pipeline.store.layout import VIEW_BLOCK

    held = source.stored_views
    first, colon, last = (text or ":").partition(":")
    try:
        if not colon:
            raise ValueError
        start, stop = int(first or held[0]), int(last or held[-1] + 1)
    except ValueError:
        raise UserError(f"--views is {text}, but must be FIRST:END, such as 0:8") from None
    if not held.start <= start < stop <= held.stop:
        raise UserError(f"--views {text} was asked, but {source.storage} holds views {held[0]} to {held[-1]}")
    if start % VIEW_BLOCK:
        aligned = start - start % VIEW_BLOCK
        raise UserError(
            f"--views {text} was asked, but views are stored in blocks of {VIEW_BLOCK}; ask for {aligned}:{stop}"
        )
    return range(start, stop)


def parse_images(text: str | None, source: "FeatureStore") -> "np.ndarray":
    """Parse `0:1000`, `::2`, or the name of a file that lists images, to ascending rows.

    Raises UserError for a file that cannot be read, for images that the source lacks and for an empty selection.
    """
    import numpy as np

    from compress_ssl.pipeline.store.listed_images import listed_rows

    rows = np.arange(source.images)
    if text is None:
        return rows
    match = _SLICE.fullmatch(text)
    if match:
        start, stop, step = (int(number) if number else None for number in match.groups())
        if step == 0:
            raise UserError(f"--images {text} has step 0; give 1 or more")
        rows = np.sort(rows[start:stop:step])
    else:
        rows = listed_rows(source, text, f"--images {text} is neither START:END[:STEP]")
    if not len(rows):
        raise UserError(f"--images {text} names none of the {source.images} images")
    return rows
