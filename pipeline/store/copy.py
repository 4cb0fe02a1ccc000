"""A store from another one: all of it or a part, to another place or as another codec, digests checked.

A copy keeps the numbers of its views and the keys they are drawn from: view v of a row is the pixels that
the teacher saw. A copy of all images as the same codec is the same store, though it may hold fewer
views; any other says in its identity which store it is part of.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Storage, absolute
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.codecs import codec
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import GROUP, VIEW_BLOCK
from compress_ssl.pipeline.store.shards import Shard, done_key

SAMPLE = 4096  # rows to train a codec on
Progress = Callable[[int], None]


def describe_copy(
    source: FeatureStore, views: range, rows: np.ndarray, form: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(identity, about, tables) of a copy of these views and rows of a store, as codec `form`."""
    identity = dict(source.identity)
    columns = {name: source.table(name)[rows] for name in ("sample_id", "label", "view_key")}
    ids = [str(name) for name in columns["sample_id"]]
    classes = source.about.get("classes", [])
    about = {key: value for key, value in source.about.items() if key not in ("small", "first_view")}
    about |= {"views": views.stop, "first_view": views.start} if views.start else {"views": views.stop}
    about["copied"] = {"from": absolute(str(source.storage)), "store": source.fingerprint}
    if len(rows) < source.images:
        names = [classes[y] if y >= 0 else None for y in columns["label"].tolist()]
        identity["data"] = {"fingerprint": artifact.fingerprint([ids, names]), "images": len(rows)}
        about["data"] = {**source.about["data"], "selected": True}
        place = {int(i): j for j, i in enumerate(rows)}
        probes = source.about.get("pixels", {})
        about["pixels"] = {str(place[int(i)]): seen for i, seen in probes.items() if int(i) in place}
    identity["codec"] = form
    if identity != source.identity:
        identity["parent"] = {"store": source.fingerprint, "images": artifact.fingerprint(ids)}
    return identity, about, {**columns, "sample_id": ids}


def small_files(source: FeatureStore, form: str) -> dict[str, bytes]:
    """The small files of a store that are no arrays: heads, and codebooks where the copy is of the same codec.

    Raises UserError if they are damaged.
    """
    same = _kind(form) == _kind(source.identity["codec"])
    mine = [key for key in source.about["small"] if not key.startswith(f"{GROUP}/")]
    return {key: source.small(key) for key in mine if same or not key.startswith("codebook/")}


def copy_shards(
    source: FeatureStore,
    target: FeatureStore,
    rows: np.ndarray,
    progress: Progress,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Fill what the target lacks, until it is `stopped`. Files go over as they are where rows and codec are the same.

    Raises UserError for damage in the source: it is not copied.
    """
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
        left = tuple(v for v in shard.views if not any(v in range(*span) for span in spans))
        if left:
            _rows(source, target, Shard(shard.block, shard.start, shard.stop, left), rows, unchecked, bad)
        progress(shard.stop - shard.start)


def copy_shard(source: Storage, target: FeatureStore, block: int, span: tuple[int, int]) -> int:
    """Copy one shard byte for byte, its done record last -> bytes copied; none if it is there and whole.

    Raises UserError if it is damaged in the source.
    """
    key, here, copied = done_key(block, *span), target.storage, 0
    record = source.get(key)
    with suppress(FileNotFoundError):  # looked up now: another process may have brought it meanwhile
        if here.get(key) == record and not integrity.find_fault(target, block, span):
            return 0
        here.delete(key)  # first: from here to its end the copy of this shard is not to be trusted
    for part in target.shard_keys(block, span):
        try:
            data = source.get(part)
        except FileNotFoundError:
            here.delete(part)  # all fill value is no file, here as there
            continue
        here.put(part, data)
        copied += len(data)
    here.put(key, record)
    if why := integrity.find_fault(target, block, span):
        here.delete(key)
        raise _damaged(source, block, span, why)
    return copied


def _damaged(source: Storage, block: int, span: tuple[int, int], why: str) -> UserError:
    return UserError(
        f"{source} is damaged, {done_key(block, *span)}: {why}; "
        "compress verify --repair marks the shards to be made again"
    )


def _rows(
    source: FeatureStore,
    target: FeatureStore,
    shard: Shard,
    rows: np.ndarray,
    unchecked: Mapping[int, list[tuple[int, int]]],
    bad: Mapping[int, str],
) -> None:
    """One shard put together from the source's rows, encoded anew if the codec is another.

    unchecked: spans of the source's row blocks that nobody has looked through yet; bad: {row of the source: reason}.
    """
    mine = rows[shard.start : shard.stop]
    for block in np.unique(mine // source.rows).tolist():
        for span in [span for span in unchecked[block] if set(range(*span)) & set(shard.views)]:
            if why := integrity.find_fault(source, block, span):
                raise _damaged(source.storage, block, span, why)
            unchecked[block].remove(span)
    near = slice(int(mine[0]), int(mine[-1]) + 1)  # rows ascend
    pick = mine - mine[0]
    status, content = source.table("status", near)[pick], source.table("content", near)[pick]
    reasons = {shard.start + j: bad[i] for j, i in enumerate(mine.tolist()) if i in bad}
    features = {}
    for name in {name: None for view in shard.views for name in target.arrays_of(view)}:
        views = [view for view in shard.views if name in target.arrays_of(view)]
        parts = [_encoded(source, target, name, view, near, pick) for view in views]
        scales = [scale for _, scale in parts if scale is not None]
        features[name] = (np.stack([stored for stored, _ in parts], 1), np.stack(scales, 1) if scales else None)
    for span in target.write(shard, features, status, content, reasons):
        if why := integrity.find_fault(target, shard.block, span):
            target.storage.delete(done_key(shard.block, *span))
            raise UserError(f"{target.storage}: what was written reads back otherwise ({why}); repeat the command")


def _encoded(
    source: FeatureStore, target: FeatureStore, name: str, view: int, near: slice, pick: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """One view of an array as the target keeps it."""
    stored, scale = source.stored(name, view, near)
    stored, scale = stored[pick], None if scale is None else scale[pick]
    if _kind(target.codecs[name].name) == _kind(source.codecs[name].name):
        return stored, scale
    values = source.codecs[name].decode(stored, scale)
    if np.abs(values).max(initial=0) > target.codecs[name].limit:
        small = target.codecs[name].name
        raise UserError(f"{source.storage}: {name} of view {view} is too large for {small}; choose another --codec")
    return target.codecs[name].encode(values)


def _kind(form: str) -> str:
    """A codec without its compression, which changes no value."""
    return form.partition("+")[0]


def learn_codecs(source: FeatureStore, target: FeatureStore, rows: np.ndarray) -> None:
    """Train the copy's codecs that need it, on rows spread evenly over the copy."""
    for name in target.untrained():
        views = [view for view in target.all_views if name in target.arrays_of(view)][:VIEW_BLOCK]
        some = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)]
        some = some[source.table("status")[some] == GOOD]
        target.train(name, np.concatenate([source.read_rows(name, view, some) for view in views]))


def parse_views(text: str | None, source: FeatureStore) -> range:
    """`4:8`, `:8`, `4:` -> range. A start is that of a view block. Raises UserError."""
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
        down = start - start % VIEW_BLOCK
        raise UserError(
            f"--views {text} was asked, but views are stored in blocks of {VIEW_BLOCK}; ask for {down}:{stop}"
        )
    return range(start, stop)


def parse_images(text: str | None, read: Callable[[str], str], ids: Sequence[str]) -> np.ndarray:
    """`0:1000`, `::2`, or a file of sample ids, one a line -> ascending rows. Raises UserError."""
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
        number: Mapping[str, int] = {name: i for i, name in enumerate(ids)}
        if unknown := [name for name in wanted if name not in number]:
            raise UserError(f"{len(unknown)} lines of {text} are no images of the store, the first is {unknown[0]!r}")
        rows = np.array(sorted({number[name] for name in wanted}), np.int64)
    if not len(rows):
        raise UserError(f"--images {text} names none of the {len(ids)} images")
    return rows


def codec_of(source: FeatureStore, asked: str | None) -> str:
    """The codec of the copy: the source's unless another is asked for. Raises UserError for an unknown one."""
    return codec(asked).name if asked else source.identity["codec"]
