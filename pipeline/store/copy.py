"""Copy a store, as a whole or in part, to another place or in another codec, with all digests checked.

A copy keeps the view numbers and view keys, so view v of a row still means the pixels that the teacher saw. A copy of
all images in the same codec has the identity of its source, even with fewer views. The identity of any other copy
names its source as the parent.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import UNSET
from compress_ssl.pipeline.runtime.storage import Storage, absolute
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.codecs import Stored
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import GROUP, VIEW_BLOCK, Column
from compress_ssl.pipeline.store.records import DataIdentity, ParentIdentity, StoreRecord
from compress_ssl.pipeline.store.shards import Shard, Span, done_key

SAMPLE = 4096  # rows that a codec is trained on
Progress = Callable[[int], None]  # called with the number of rows that are done


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
        copied={"from": absolute(str(source.storage)), "store": source.fingerprint},
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
) -> Stored:
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


def rows_of(begun: FeatureStore, source: FeatureStore) -> np.ndarray:
    """The rows, in the source, of the images of a copy that has begun; all of them if it has other images.

    Raises UserError for a copy of some images that was interrupted before it had their ids.
    """
    if begun.images == source.images:
        return np.arange(source.images)
    row_of = {str(name): i for i, name in enumerate(source.table("sample_id"))}
    try:
        wanted = [str(name) for name in begun.table("sample_id")]
    except UserError as problem:
        raise UserError(f"{problem}. If the copy was interrupted, repeat the command with the --images of it") from None
    if not set(wanted) <= row_of.keys():
        return np.arange(source.images)  # it is no copy of this source, and is refused as such
    return np.array(sorted(row_of[name] for name in wanted), np.int64)
