"""The nearest-neighbour protocol of CompRess."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import (
    FIGURE_SEED,
    AugmentedFeatures,
    Evaluator,
    ImageGrid,
    ImageRow,
    Percent,
    Result,
    Score,
    Split,
    Tile,
    per_class,
    percent,
    require_labels,
)
from compress_ssl.pipeline.runtime.records import JsonObject, read_record, to_json
from compress_ssl.pipeline.search import exact

NEIGHBOURS_KEPT = 8  # per validation image, for the report's picture rows; only the first is scored
ROWS_SHOWN = 8  # validation images in the report's figure


@dataclass(frozen=True)
class Metrics:
    """The entry `nn` of metrics.json."""

    top1: Percent | None


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
        metrics: JsonObject = to_json(Metrics(percent(prediction == val.label)))
        scores = self.scores_of(self.name, metrics, self.name)
        return Result(metrics, arrays, scores, self.figures_of(metrics, arrays, train, val))

    @classmethod
    def scores_of(cls, entry: str, metrics: JsonObject, where: str) -> list[Score]:
        """One score, which comparisons plot."""
        top1 = read_record(Metrics, metrics, where, ignore_unknown=True).top1
        note = "top-1 by the nearest training image, L2-normalised features"
        return [] if top1 is None else [Score("top1", "NN", top1, note, plotted=True)]

    @classmethod
    def figures_of(
        cls, metrics: JsonObject, arrays: dict[str, np.ndarray], train: Split, val: Split
    ) -> list[ImageGrid]:
        """Random validation images, each followed by its nearest training images."""
        neighbours = arrays["neighbors"]  # (n_val, K) indices into the training split
        random = np.random.default_rng(FIGURE_SEED)
        queries = np.sort(random.choice(len(neighbours), min(ROWS_SHOWN, len(neighbours)), replace=False))
        note = (
            "First in each row a validation image drawn at random, then its nearest training images, nearest first. "
            "Green: of the same category; red and dashed: of another. Only the first neighbour counts for the NN score."
        )
        rows = tuple(_show_neighbours(query, neighbours[query], train, val) for query in queries.tolist())
        return [ImageGrid(name="neighbours", title="Nearest neighbours", note=note, rows=rows)]


def _show_neighbours(query: int, neighbours: np.ndarray, train: Split, val: Split) -> ImageRow:
    """The row of one validation image; neighbours: (K,) indices into the training split."""
    tiles = [Tile(split="val", index=query, caption=val.category(query), tone="query")]
    same = 0
    for n in neighbours.tolist():
        agrees = bool(train.label[n] == val.label[query])
        same += agrees
        tiles.append(Tile(split="train", index=n, caption=train.category(n), tone="yes" if agrees else "no"))
    return ImageRow(title=val.category(query), lines=(f"{same} of {len(neighbours)} agree",), tiles=tuple(tiles))
