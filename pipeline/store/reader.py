"""StoreReader: read tables, features and bad images of a store, with every damaged byte reported."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD, REASONS
from compress_ssl.pipeline.runtime import jsonl
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.layout import GROUP, UNWRITTEN, open_group
from compress_ssl.pipeline.store.shard_reader import read_view
from compress_ssl.pipeline.store.shards import ShardIndex, view_column

HISTORY = "history.jsonl"  # key of the log of exports: one JSON object per line


class StoreReader(ShardIndex):
    """A store open for reading. Raises UserError if there is none or its manifest is damaged."""

    # ---------------------------------------------------------------- arrays

    @cached_property
    def group(self) -> Any:
        """The Zarr group. Raises UserError if its metadata is not what was written.

        The check is ours because Zarr accepts any metadata that it can parse.
        """
        damaged = self._damaged_metadata()
        if damaged:
            raise UserError(f"{self.storage}/{damaged[0]} is gone or damaged; see compress verify --repair")
        return open_group(self.storage)

    def _damaged_metadata(self) -> list[str]:
        """Keys of Zarr metadata that differs from its digest in the manifest."""
        return [key for key in self.about["small"] if key.endswith("/zarr.json") and self.read_if_intact(key) is None]

    def array(self, name: str) -> Any:
        """One Zarr array. Raises UserError if the store does not keep it or its metadata is damaged."""
        if f"{GROUP}/{name}/zarr.json" in self.about["small"]:
            return self.group[name]
        kept = ", ".join(self.arrays)
        raise UserError(
            f"{self.storage} keeps {kept}, not {name!r}; export anew with --keep {','.join([*self.arrays, name])}"
        )

    def table(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """(n,) values of a per-image table: label, sample_id, view_key, content or status."""
        return self._read_array(name, rows)

    # ---------------------------------------------------------------- features

    def stored(self, name: str, view: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray | None]:
        """One view as it lies on disk: ((n, ...) in the codec's dtype, (n, ...) float32 scale or None)."""
        column = view_column(view)
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

    def _read_array(self, name: str, selection: Any) -> np.ndarray:
        array = self.array(name)
        return self._report_damage(name, lambda: np.asarray(array[selection]))

    def _report_damage(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
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
                    record = self.record(block, *span)
                    reasons |= {int(i): why for i, why in record["bad"].items()}
        return [(int(i), str(ids[i]), reasons.get(int(i), REASONS[int(status[i])])) for i in bad]

    def history(self) -> list[dict[str, Any]]:
        """The events of history.jsonl in order. A line that a crash has cut off is skipped."""
        if not self.storage.exists(HISTORY):
            return []
        return jsonl.parse_jsonl(self.storage.get(HISTORY).decode(errors="replace"))
