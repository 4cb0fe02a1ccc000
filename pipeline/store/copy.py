"""Copy a store, as a whole or in part, to another place or in another codec, with all digests checked.

A copy keeps the view numbers and view keys, so view v of a row still means the pixels that the teacher saw. A copy of
all images in the same codec has the identity of its source, even with fewer views. The identity of any other copy
names its source as the parent.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import UNSET
from compress_ssl.pipeline.runtime.storage import Storage, absolute
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.codecs import build_codec
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import GROUP, VIEW_BLOCK, Column
from compress_ssl.pipeline.store.records import DataIdentity, ParentIdentity, StoreRecord, copied
from compress_ssl.pipeline.store.shards import Shard, done_key

SAMPLE = 4096  # rows that a codec is trained on
Progress = Callable[[int], None]  # called with the number of rows that are done
Span = tuple[int, int]  # of views: (first, one past the last)


@dataclass(frozen=True)
class Part:
    """What is copied: rows and views of a store, and what the copy records of itself."""

    source: FeatureStore
    views: range
    rows: np.ndarray  # ascending rows of the source, one per row of the copy
    record: StoreRecord  # the manifest of the copy
    tables: Mapping[str, Column]  # of the copy

    @property
    def keeps_codec(self) -> bool:
        """Whether the copy has the codec of its source, up to lossless compression."""
        return _without_compression(self.record.identity.codec) == _without_compression(self.source.identity.codec)


def describe_copy(source: FeatureStore, views: range, rows: np.ndarray, form: str) -> Part:
    """A copy of these views and rows of a store in the codec named `form`.

    Raises UserError for a selection of images of a store that does not say which images it holds.
    """
    columns = {name: source.table(name)[rows] for name in ("sample_id", "label", "view_key")}
    ids = [str(name) for name in columns["sample_id"]]
    identity = replace(source.identity, codec=form)
    about = replace(
        source.about,
        views=views.stop,
        small={},
        first_view=views.start or UNSET,
        copied=copied(absolute(str(source.storage)), source.fingerprint),
    )
    if len(rows) < source.images:
        classes, origin = source.class_names(), source.export
        names = [classes[y] if y >= 0 else None for y in columns["label"].tolist()]
        identity = replace(identity, data=DataIdentity(digests.fingerprint([ids, names]), len(rows)))
        new_row = {int(i): j for j, i in enumerate(rows)}
        pixels = {str(new_row[int(i)]): digest for i, digest in origin.pixels.items() if int(i) in new_row}
        about = replace(about, data=replace(origin.data, selected=True), pixels=pixels)
    if identity != source.identity:
        identity = replace(identity, parent=ParentIdentity(source.fingerprint, digests.fingerprint(ids)))
    return Part(source, views, rows, StoreRecord(identity, about), {**columns, "sample_id": ids})


def small_files(part: Part) -> dict[str, bytes]:
    """{key: bytes} of the heads, and of the codebooks if the copy keeps the codec. Raises UserError for damage."""
    keys = [key for key in part.source.about.small if not key.startswith(f"{GROUP}/")]
    kept = [key for key in keys if part.keeps_codec or not key.startswith("codebook/")]
    return {key: part.source.read_small_file(key) for key in kept}


def copy_shards(
    part: Part, target: FeatureStore, progress: Progress, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Write the shards that the target lacks, until `stopped()`.

    If rows and codec are those of the source, files are copied byte for byte. Raises UserError for damage in the
    source; damaged shards are not copied.
    """
    source, rows = part.source, part.rows
    same = len(rows) == source.images and target.identity == source.identity
    done = source.done()
    unchecked = {block: list(spans) for block, spans in done.items()}
    bad = {i: why for i, _, why in source.bad_images()}
    for shard in target.pending():
        if stopped():
            return
        spans = [span for span in done.get(shard.block, []) if same and set(range(*span)) <= set(shard.views)]
        for span in spans:
            copy_shard(source.storage, target, shard.block, span)
        remaining = tuple(v for v in shard.views if not any(v in range(*span) for span in spans))
        if remaining:
            missing = Shard(shard.block, shard.start, shard.stop, remaining)
            chosen = rows[shard.start : shard.stop]
            _require_intact(source, missing, chosen, unchecked)
            _write_rows(source, target, missing, chosen, bad)
        progress(shard.stop - shard.start)


def copy_shard(source: Storage, target: FeatureStore, block: int, span: Span) -> int:
    """Copy one shard byte for byte, its done record last; return the number of bytes copied.

    An intact shard of the target is kept, and 0 is returned. Raises UserError if the shard is damaged in the source.
    """
    key, destination, copied = done_key(block, *span), target.storage, 0
    record = source.get(key)
    with suppress(FileNotFoundError):  # looked up only now, because another process may have copied it meanwhile
        if destination.get(key) == record and not integrity.find_fault(target, block, span):
            return 0
        destination.delete(key)  # first: until the copy is complete, no done record may vouch for it
    for part in target.shard_keys(block, span):
        try:
            data = source.get(part)
        except FileNotFoundError:
            destination.delete(part)  # a shard of nothing but fill value has no file, in either store
            continue
        destination.put(part, data)
        copied += len(data)
    destination.put(key, record)
    fault = integrity.find_fault(target, block, span)
    if fault:
        destination.delete(key)
        raise _damage_error(source, block, span, fault)
    return copied


def _damage_error(source: Storage, block: int, span: Span, fault: str) -> UserError:
    return UserError(
        f"{source} is damaged, {done_key(block, *span)}: {fault}; "
        "compress verify --repair marks the shards to be made again"
    )


def _require_intact(source: FeatureStore, shard: Shard, rows: np.ndarray, unchecked: Mapping[int, list[Span]]) -> None:
    """Raises UserError if a shard of the source with some of these rows and views is damaged.

    unchecked: {row block of the source: spans that were not checked yet}; checked spans are removed from it.
    """
    for block in np.unique(rows // source.rows).tolist():
        for span in [span for span in unchecked[block] if set(range(*span)) & set(shard.views)]:
            fault = integrity.find_fault(source, block, span)
            if fault:
                raise _damage_error(source.storage, block, span, fault)
            unchecked[block].remove(span)


def _write_rows(
    source: FeatureStore, target: FeatureStore, shard: Shard, rows: np.ndarray, bad: Mapping[int, str]
) -> None:
    """Write one shard of the target from rows of the source, encoded again if the codec is another.

    rows: ascending rows of the source, one per row of the shard; bad: {row of the source: reason}.
    """
    read = slice(int(rows[0]), int(rows[-1]) + 1)
    chosen = rows - rows[0]  # indices into what is read
    status, content = source.table("status", read)[chosen], source.table("content", read)[chosen]
    reasons = {shard.start + j: bad[i] for j, i in enumerate(rows.tolist()) if i in bad}
    features = {}
    for name in {name: None for view in shard.views for name in target.arrays_of(view)}:
        views = [view for view in shard.views if name in target.arrays_of(view)]
        parts = [_encode_view(source, target, name, view, read, chosen) for view in views]
        scales = [scale for _, scale in parts if scale is not None]
        features[name] = (np.stack([stored for stored, _ in parts], 1), np.stack(scales, 1) if scales else None)
    for span in target.write(shard, features, status, content, reasons):
        fault = integrity.find_fault(target, shard.block, span)
        if fault:
            target.storage.delete(done_key(shard.block, *span))
            raise UserError(f"{target.storage}: what was written reads back otherwise ({fault}); repeat the command")


def _encode_view(
    source: FeatureStore, target: FeatureStore, name: str, view: int, read: slice, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """One view of an array in the target's codec: ((n, ...) stored, (n, ...) scale or None).

    The slice `read` of the source's rows is read, and `chosen` of it are kept.
    """
    stored, scale = source.stored(name, view, read)
    stored, scale = stored[chosen], None if scale is None else scale[chosen]
    if _without_compression(target.codecs[name].name) == _without_compression(source.codecs[name].name):
        return stored, scale
    values = source.codecs[name].decode(stored, scale)
    if np.abs(values).max(initial=0) > target.codecs[name].limit:
        form = target.codecs[name].name
        raise UserError(f"{source.storage}: {name} of view {view} is too large for {form}; choose another --codec")
    return target.codecs[name].encode(values)


def _without_compression(form: str) -> str:
    """Name of a codec without its lossless compression, which changes no value."""
    return form.partition("+")[0]


def train_codecs(part: Part, target: FeatureStore) -> None:
    """Train the codecs of the copy that have no codebook, on up to SAMPLE rows spread evenly over the copy."""
    source, rows = part.source, part.rows
    for name in target.untrained():
        views = [view for view in target.all_views if name in target.arrays_of(view)][:VIEW_BLOCK]
        sample = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)]
        sample = sample[source.table("status")[sample] == GOOD]
        target.train(name, np.concatenate([source.read_rows(name, view, sample) for view in views]))


def parse_views(text: str | None, source: FeatureStore) -> range:
    """Parse `4:8`, `:8` or `4:` to a range of view numbers.

    Raises UserError for views that the source lacks, and for a start inside a view block.
    """
    held = source.stored_views
    first, colon, last = (text or ":").partition(":")
    try:
        if not colon:
            raise ValueError
        start, stop = int(first or held[0]), int(last or held[-1] + 1)
    except ValueError:
        raise UserError(f"--views is {text}, but must be FIRST:END, such as 0:8") from None
    if not set(range(start, stop)) <= set(held) or start >= stop:
        raise UserError(f"--views {text} was asked, but {source.storage} holds views {held[0]} to {held[-1]}")
    if start % VIEW_BLOCK:
        aligned = start - start % VIEW_BLOCK
        raise UserError(
            f"--views {text} was asked, but views are stored in blocks of {VIEW_BLOCK}; ask for {aligned}:{stop}"
        )
    return range(start, stop)


def parse_images(text: str | None, read: Callable[[str], str], ids: Sequence[str]) -> np.ndarray:
    """Parse `0:1000`, `::2`, or the name of a file of sample ids, one per line, to ascending rows.

    read: returns the text of a file. Raises UserError for unknown ids and for an empty selection.
    """
    if text is None:
        return np.arange(len(ids))
    parts = text.split(":")
    if 2 <= len(parts) <= 3 and all(part.lstrip("-").isdecimal() or not part for part in parts):
        if parts[2:] == ["0"]:
            raise UserError(f"--images {text} has step 0; give 1 or more")
        rows = np.arange(len(ids))[slice(*(int(part) if part else None for part in parts))]
        rows = np.sort(rows)
    else:
        wanted = [line for line in read(text).split("\n") if line]
        row_of = {name: i for i, name in enumerate(ids)}
        unknown = [name for name in wanted if name not in row_of]
        if unknown:
            raise UserError(f"{len(unknown)} lines of {text} are no images of the store, the first is {unknown[0]!r}")
        rows = np.array(sorted({row_of[name] for name in wanted}), np.int64)
    if not len(rows):
        raise UserError(f"--images {text} names none of the {len(ids)} images")
    return rows


def rows_of(begun: FeatureStore, ids: Sequence[str]) -> np.ndarray:
    """The rows, among these ids of the source, of the images of a copy that has begun; all if it has others."""
    if begun.images == len(ids):
        return np.arange(len(ids))
    try:
        wanted = [str(name) for name in begun.table("sample_id")]
    except UserError:  # stopped before it was written: the copy does not say which images it was to hold
        return np.arange(len(ids))
    row_of = {name: i for i, name in enumerate(ids)}
    if not set(wanted) <= row_of.keys():
        return np.arange(len(ids))  # it is no copy of this source, and is refused as such
    return np.array(sorted(row_of[name] for name in wanted), np.int64)


def codec_of(source: FeatureStore, given: str | None) -> str:
    """Name of the copy's codec: the one given, or else the source's. Raises UserError for an unknown codec."""
    return build_codec(given).name if given else source.identity.codec
