"""`view_features`: features of one view, kept in memory and not in a store."""

from contextlib import closing

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.extract import FeatureSource, extract
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.groups import group_of


def view_features(source: FeatureSource, rows: np.ndarray, view: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The embedding of one view of some rows, for validation and augmented probes.

    Returns (features (n, d) float32, their rows (n,)). Images that cannot be used are left out, so n may be smaller
    than the number of rows. Raises UserError if no image can be used.
    """
    array = group_of(view).array("embedding")
    features, used = [], []
    with closing(extract(source, source.batches(rows, [view]))) as feature_batches:
        for batch in feature_batches:
            good = batch.status == GOOD
            features.append(batch.features[array][good, 0])
            used.append(batch.rows[good])
    if not any(map(len, used)):
        raise UserError(f"none of {len(rows)} images can be used; are they readable, and are they images?")
    return np.concatenate(features), np.concatenate(used)
