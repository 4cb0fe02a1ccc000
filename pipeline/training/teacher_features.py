"""Teacher features of a store in memory, one view at a time."""

from collections import OrderedDict

import numpy as np

from compress_ssl.pipeline.store.feature_store import FeatureStore


class TeacherFeatures:
    """Teacher features in memory, one stored view at a time, as the codec keeps them.

    The latest views stay until they pass `limit` bytes, scales counted; at least `least` of them always stay.
    """

    def __init__(self, store: FeatureStore, name: str = "embedding", *, limit: int = 4_000_000_000, least: int = 2):
        self.store, self.name, self.limit, self.least = store, name, limit, least
        self._held: OrderedDict[int, tuple[np.ndarray, np.ndarray | None]] = OrderedDict()

    def rows(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(n, ...) float32 features of (rows[j], views[j])."""
        out = np.empty((len(rows), *self.store.arrays[self.name]), np.float32)
        for view in np.unique(views):
            mine = views == view
            stored, scale = self._view(int(view))
            picked = rows[mine]
            out[mine] = self.store.codecs[self.name].decode(stored[picked], None if scale is None else scale[picked])
        return out

    def _view(self, view: int) -> tuple[np.ndarray, np.ndarray | None]:
        if view not in self._held:
            self._held[view] = self.store.stored(self.name, view)
            each = sum(part.nbytes for part in self._held[view] if part is not None)
            while len(self._held) > self.least and len(self._held) * each > self.limit:
                self._held.popitem(last=False)
        self._held.move_to_end(view)
        return self._held[view]
