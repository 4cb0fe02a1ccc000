"""StoreReader: read tables, features and bad images of a store, with every damaged byte reported."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD, REASONS
from compress_ssl.pipeline.runtime.artifact import MANIFEST
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.codecs import Stored, Trained
from compress_ssl.pipeline.store.layout import GROUP, TABLES, UNWRITTEN, ZarrArray, ZarrGroup, array_in, open_group
from compress_ssl.pipeline.store.records import HistoryEvent, read_history
from compress_ssl.pipeline.store.shard_reader import read_view
from compress_ssl.pipeline.store.shards import ShardIndex
from compress_ssl.pipeline.views.groups import group_of, group_of_array

Result = TypeVar("Result")

HISTORY = "history.jsonl"  # key of the log of exports: one JSON object per line
_REMEDY = "restore it from a copy, or export anew"


class StoreReader(ShardIndex):
    """A store open for reading. Raises UserError if there is none or its manifest is damaged."""

    def require_complete(self, views: Sequence[int] | None = None) -> None:
        """As `ShardIndex.require_complete`, and raises UserError for a manifest or a codebook that fits no array.

        Of a store in a bucket, only what is read is compared: reading all metadata there costs a request per array.
        """
        if isinstance(self.storage, Folder):
            _ = self.group
        super().require_complete(views)
        if isinstance(self.storage, Folder):
            for name, kind in self.codecs.items():
                if isinstance(kind, Trained):
                    self._codebook(name)

    # ---------------------------------------------------------------- arrays

    @cached_property
    def group(self) -> ZarrGroup:
        """The Zarr group. Raises UserError if its metadata is not what was written, or does not fit the manifest.

        The checks are ours because Zarr accepts any metadata that it can parse.
        """
        damaged = self._damaged_metadata()
        if damaged:
            raise UserError(f"{self.storage}/{damaged[0]} is gone or damaged; see compress verify --repair")
        group = self._parse_metadata(f"{GROUP}/zarr.json", partial(open_group, self.storage))
        for name in (*self.layouts, *TABLES):
            key = _metadata_key(name)
            if key in self.about.small:
                self._require_fit(name, self._parse_metadata(key, partial(array_in, group, name)))
            elif name in self.layouts:
                raise UserError(self._lack(name))
        return group

    def _parse_metadata(self, key: str, parse: Callable[[], Result]) -> Result:
        """Call `parse`, which lets Zarr read the metadata in the file `key`. Raises UserError if Zarr cannot."""
        try:
            return parse()
        except Exception as problem:  # of any type: Zarr takes the entries of the JSON to be what it expects
            if isinstance(problem, UserError) or (isinstance(problem, OSError) and problem.errno):
                raise  # the object store or the disk failed, which says nothing about the metadata
            raise UserError(
                f"{self.storage}/{key} is not valid: Zarr cannot read it ({describe_exception(problem)}); {_REMEDY}"
            ) from None

    def _require_fit(self, name: str, array: ZarrArray) -> None:
        """Raises UserError unless the metadata of an array agrees with the manifest."""
        layout = self.layouts.get(name)
        views = group_of_array(name, self.groups).count
        shape = (self.images,) if layout is None else layout.shape(self.images, views)
        dtype = array.dtype if layout is None else np.dtype(layout.dtype)
        if (array.shape, array.dtype) != (shape, dtype):
            raise UserError(
                f"{self.storage}/{MANIFEST} is not valid: by it the array {name!r} has the shape {shape} and the type "
                f"{dtype}, but {_metadata_key(name)} has {array.shape} and {array.dtype}; {_REMEDY}"
            )

    def _damaged_metadata(self) -> list[str]:
        """Keys of Zarr metadata that differs from its digest in the manifest."""
        return [key for key in self.about.small if key.endswith("/zarr.json") and self.read_if_intact(key) is None]

    def array(self, name: str) -> ZarrArray:
        """One Zarr array. Raises UserError if the store does not keep it, or its metadata does not fit the manifest."""
        if name not in self.layouts and name not in TABLES:
            kept = ", ".join(self.arrays)
            raise UserError(
                f"{self.storage} keeps {kept}, not {name!r}; export anew with --keep {','.join([*self.arrays, name])}"
            )
        if _metadata_key(name) not in self.about.small:
            raise UserError(self._lack(name))
        return array_in(self.group, name)

    def _lack(self, name: str) -> str:
        return f"{self.storage}/{MANIFEST} is not valid: about.small lacks {_metadata_key(name)}; {_REMEDY}"

    def table(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """(n,) values of a per-image table: label, sample_id, view_key, content or status."""
        return self._read_array(name, rows)

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label. Raises UserError for a label without a name, and for unnamed images."""
        names, largest = self.export.classes, int(self.table("label").max(initial=-1))
        if largest >= len(names):
            raise UserError(
                f"{self.storage}/{MANIFEST} is not valid: about.classes has {len(names)} names, but an image has the "
                f"label {largest}; {_REMEDY}"
            )
        return names

    # ---------------------------------------------------------------- features

    def stored(self, name: str, view: int, rows: slice = slice(None)) -> Stored:
        """One view as it lies on disk: ((n, ...) in the codec's dtype, (n, ...) float32 scale or None)."""
        column = group_of(view).column(view)
        if isinstance(self.storage, Folder):
            self.array(name)  # checks the metadata of the array, which `read_view` does not look at
            start, stop, _ = rows.indices(self.images)
            path = self.storage.path / GROUP / name
            stored = self._report_damage(name, lambda: read_view(path, self.layouts[name], column, start, stop))
        else:
            stored = self._read_array(name, (rows, column))
        scale = self._read_array(f"{name}_scale", (rows, column)) if self.codecs[name].scaled else None
        return stored, scale

    def read(self, name: str, view: int, rows: slice = slice(None)) -> np.ndarray:
        """(n, ...) float32 features of one view."""
        stored, scale = self.stored(name, view, rows)
        return self.codecs[name].decode(stored, scale)

    def read_rows(self, name: str, view: int, rows: np.ndarray) -> np.ndarray:
        """(n, ...) float32 features of one view of ascending rows. One row block at a time is in memory."""
        out = []
        for block in np.unique(rows // self.rows).tolist() or [0]:
            start, stop = self.span(block)
            chosen = rows[(rows >= start) & (rows < stop)] - start
            stored, scale = self.stored(name, view, slice(start, stop))
            out.append(self.codecs[name].decode(stored[chosen], None if scale is None else scale[chosen]))
        return np.concatenate(out)

    def _read_array(self, name: str, selection: slice | tuple[slice, int]) -> np.ndarray:
        array = self.array(name)
        return self._report_damage(name, lambda: np.asarray(array[selection]))

    def _report_damage(self, name: str, read: Callable[[], Result]) -> Result:
        """Call `read`, which reads the array `name`. Raises UserError if the array is damaged."""
        try:
            return read()
        except (ValueError, RuntimeError, OSError) as problem:
            if isinstance(problem, OSError) and problem.errno:  # the operating system failed, not the data
                raise
            message = " ".join(str(problem).split())[:160]
            raise UserError(
                f"{self.storage}: array {name!r} is damaged ({message}); "
                "compress verify --repair marks the shards to be made again"
            ) from None

    # ---------------------------------------------------------------- bad images and history

    def bad_images(self) -> list[tuple[int, str, str]]:
        """[(row, sample id, reason), ...] of the images that could not be used."""
        status = self.table("status")
        bad = np.flatnonzero((status != GOOD) & (status != UNWRITTEN))
        if not len(bad):
            return []
        ids = self.table("sample_id")
        reasons: dict[int, str] = {}
        for block, spans in self.done().items():
            if np.any(bad // self.rows == block):
                for span in spans:
                    reasons |= {int(i): why for i, why in self.record(block, *span).bad.items()}
        # A record may lack the reason: another view of the image was found bad first.
        usual = {int(i): REASONS.get(int(status[i]), f"status {status[i]}") for i in bad}
        return [(int(i), str(ids[i]), reasons.get(int(i), usual[int(i)])) for i in bad]

    def history(self) -> list[HistoryEvent]:
        """The events of history.jsonl in order. Lines that a crash has cut off, or that are damaged, are left out."""
        if not self.storage.exists(HISTORY):
            return []
        where = f"{self.storage}/{HISTORY}"
        events, unreadable = read_history(self.storage.get(HISTORY), where)
        if unreadable:
            echo(f"warning: {unreadable} lines of {where} are damaged and left out")
        return events


def _metadata_key(name: str) -> str:
    """Key of the file with the metadata of an array."""
    return f"{GROUP}/{name}/zarr.json"
