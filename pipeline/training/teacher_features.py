"""Teacher features of a store in memory, one view at a time."""

from collections import OrderedDict

import numpy as np

from compress_ssl.pipeline.store.feature_store import FeatureStore

MAX_BYTES = 4_000_000_000
"""Bytes of encoded features to keep: one view of ImageNet (1.28 million images, 2048 dims as int8) has 2.6 GB."""


class TeacherFeatures:
    """A cache of one array of a store: whole views in memory, encoded by the store's codec as on disk.

    The views used last are kept until they exceed `max_bytes`, scales included. `min_views` views are kept in any
    case: the views of one step, which would otherwise be read again in every step.
    """

    def __init__(self, store: FeatureStore, name: str = "embedding", *, max_bytes: int = MAX_BYTES, min_views: int = 2):
        self.store, self.name, self.max_bytes, self.min_views = store, name, max_bytes, min_views
        self._cached: OrderedDict[int, tuple[np.ndarray, np.ndarray | None]] = OrderedDict()  # view: (codes, scales)

    def read(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(n, ...) float32 decoded features of the pairs (rows[j], views[j])."""
        out = np.empty((len(rows), *self.store.arrays[self.name]), np.float32)
        for view in np.unique(views):
            of_view = views == view
            stored, scale = self._load_view(int(view))
            picked = rows[of_view]
            out[of_view] = self.store.codecs[self.name].decode(stored[picked], None if scale is None else scale[picked])
        return out

    def _load_view(self, view: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(codes, scales) of all images in a view. Drops the views unused for longest while there are too many."""
        if view not in self._cached:
            self._cached[view] = self.store.stored(self.name, view)
            view_bytes = sum(part.nbytes for part in self._cached[view] if part is not None)
            while len(self._cached) > self.min_views and len(self._cached) * view_bytes > self.max_bytes:
                self._cached.popitem(last=False)
        self._cached.move_to_end(view)
        return self._cached[view]
