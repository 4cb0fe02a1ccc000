"""The nearest neighbour of CompRess."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import Result, Split, per_class, percent, require_labels
from compress_ssl.pipeline.search import exact

DRAWN = 8  # neighbours kept for the report; the first alone is scored


@dataclass(frozen=True, kw_only=True)
class NearestNeighbor:
    """Top-1 of the class of the nearest training image (k = 1); no training, nothing to tune.

    L2-normalised features, exact L2 search (the same order as cosine). Koohpayegani et al. 2020,
    eval_knn.py; we search in float32 where they do in float16, and of two equally near images the
    earlier one wins. Writes `index.faiss`, the normalised training features.
    """

    name: ClassVar[str] = "nn"
    needs_labels: ClassVar[tuple[str, ...]] = ("training", "validation")

    def __call__(
        self, train: Split, val: Split, folder: Path, augmented: Callable[[int], np.ndarray] | None = None
    ) -> Result:
        """Arrays: `neighbors` (n_val, 8) places in `train`, nearest first; `distance` (n_val, 8) squared L2;
        `prediction` (n_val,); `per_class` (C,) in percent."""
        require_labels(self.name, training=train, validation=val)
        keys = exact.normalize(train.features)
        queries = exact.normalize(val.features)
        distance, ids = exact.search(queries, keys, min(DRAWN, len(keys)), "l2")
        exact.write_index(folder / "index.faiss", keys)
        prediction = train.label[ids[:, 0]]
        arrays = {
            "neighbors": ids,
            "distance": distance,
            "prediction": prediction,
            "per_class": per_class(prediction, val.label, len(val.classes)),
        }
        return Result({"top1": percent(prediction == val.label)}, arrays)
