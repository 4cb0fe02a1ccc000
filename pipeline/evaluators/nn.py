"""The nearest-neighbour protocol of CompRess."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import (
    AugmentedFeatures,
    Evaluator,
    Result,
    Split,
    per_class,
    percent,
    require_labels,
)
from compress_ssl.pipeline.search import exact

NEIGHBOURS_KEPT = 8  # per validation image, for the report's picture rows; only the first is scored


@dataclass(frozen=True, kw_only=True)
class NearestNeighbor(Evaluator):
    """Top-1 of predicting the class of the nearest training image (k = 1). It trains nothing and has no options.

    Score: top1 = 100 * share of validation images q with label[argmin_x |q/|q| - x/|x||^2] = label of q. The search
    is exact; L2 on unit vectors ranks as the cosine does.

    Source: CompRess (Koohpayegani et al. 2020, arXiv 2010.14713, "NN" in the ImageNet experiments; eval_knn.py of
    the authors). Differences: we search in float32 and they in float16, and of two equally near training images the
    one with the lower row wins.
    """

    name: ClassVar[str] = "nn"
    needs_labels: ClassVar[tuple[str, ...]] = ("training", "validation")

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        """Metric `top1`. Writes FOLDER/index.faiss, the normalised training features.

        Arrays: `neighbors` (n_val, 8) int64 indices into `train`, nearest first; `distance` (n_val, 8) squared L2;
        `prediction` (n_val,); `per_class` (C,) in percent. With fewer than 8 training images all of them are kept.
        """
        require_labels(self.name, training=train, validation=val)
        keys = exact.normalize(train.features)
        queries = exact.normalize(val.features)
        distance, neighbours = exact.search(queries, keys, min(NEIGHBOURS_KEPT, len(keys)), "l2")
        exact.write_index(folder / "index.faiss", keys)
        prediction = train.label[neighbours[:, 0]]
        arrays: dict[str, np.ndarray] = {
            "neighbors": neighbours,
            "distance": distance,
            "prediction": prediction,
            "per_class": per_class(prediction, val.label, len(val.classes)),
        }
        return Result({"top1": percent(prediction == val.label)}, arrays)
