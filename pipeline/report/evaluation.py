"""The page of one evaluation: report.html, and its figures in figures/."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress_ssl.pipeline.report import figures, image_grids
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, render_template, save_figure
from compress_ssl.pipeline.report.image_grids import Labelled, Pictures
from compress_ssl.pipeline.report.metrics import Metrics, headline_scores, is_augmented, meaning, model
from compress_ssl.pipeline.runtime.formatting import flatten, is_finite
from compress_ssl.pipeline.runtime.storage import Folder

__all__ = ["headline_scores", "write"]

PANELS = {
    "loss": "loss",
    "val_nn": "NN on validation, top-1 (%)",
    "agreement": "agreement with the teacher's NN (%)",
    "spread": "feature spread (0: collapse)",
    "lr": "learning rate",
}
HEADED = {("model", "name"), ("model", "role")}  # they stand in the page's title


class Found(Protocol):
    """What the page reads of a protocol's result (evaluators.base.Result is one)."""

    @property
    def metrics(self) -> dict[str, Any]: ...
    @property
    def arrays(self) -> dict[str, np.ndarray]: ...


def write(
    folder: Path,
    metrics: Metrics,
    *,
    train: Labelled,
    val: Labelled,
    results: Mapping[str, Found],
    teacher: Metrics | None = None,
    curves: Sequence[Mapping[str, Any]] | None = None,
    pictures: Pictures | None = None,
    seed: int = 0,
) -> Path:
    """Write FOLDER/report.html and FOLDER/figures/*.png, return the page's path.

    `metrics` is this model's metrics.json and `teacher` the teacher's on the same data; `results` are
    by protocol ("nn", "knn:k=20", "cluster", ...); `curves` are the rows of metrics.jsonl. What is not
    given is left out of the page. Pictures are drawn by `seed`, not picked. Each file is written whole
    or not at all, the page last.
    """
    place, random = Folder(folder), np.random.default_rng(seed)
    first = {spec.partition(":")[0]: found.arrays for spec, found in reversed(list(results.items()))}
    nn, cluster = first.get("nn"), first.get("cluster")
    clusters = image_grids.clusters(cluster, train, pictures, random) if pictures and cluster else None
    neighbours = image_grids.neighbours(nn, train, val, pictures, random) if pictures and nn else None
    for name, shown in (("clusters", clusters), ("neighbours", neighbours)):
        if shown:
            save_figure(place, name, figures.render(image_grids.mosaic(shown.strips)))
    scores = _scores(metrics, teacher or {})
    page = render_template(
        "report.html",
        title=model(metrics).get("name", "Evaluation"),
        role=model(metrics).get("role", ""),
        sizes=_sizes(metrics, teacher or {}),
        scores=scores,
        kept=next((score for score in scores if (score.teacher or 0) > 0), None),
        with_teacher=bool(headline_scores(teacher or {})),
        facts=_facts(metrics),
        training=_training(place, curves or ()),
        clusters=clusters,
        neighbours=neighbours,
        confusion=_confusion(place, cluster["confusion"], val.classes) if cluster and "confusion" in cluster else None,
        probes=_probes(place, results),
        raw=json.dumps(metrics, indent=1, default=str),
    )
    place.put("report.html", page.encode())
    return Path(folder) / "report.html"


# ---------------------------------------------------------------- scores and facts


@dataclass(frozen=True)
class Score:
    title: str
    meaning: str
    value: float  # percent, like the teacher's
    teacher: float | None

    @property
    def difference(self) -> float | None:
        return None if self.teacher is None else self.value - self.teacher

    @property
    def tone(self) -> str:
        """The class of its difference: "up", "down" or nothing."""
        gain = self.difference
        return "" if gain is None or not round(gain, 1) else "up" if gain > 0 else "down"


def _scores(metrics: Metrics, teacher: Metrics) -> list[Score]:
    own, other = headline_scores(metrics), headline_scores(teacher)
    return [Score(title, meaning(title, metrics), value, other.get(title)) for title, value in own.items()]


def _sizes(metrics: Metrics, teacher: Metrics) -> list[float]:
    """Parameters of this model and of the teacher; empty unless both are known."""
    both = [model(record).get("parameters") for record in (metrics, teacher)]
    known = [size for size in both if is_finite(size) and size > 0]
    return known if len(known) == len(both) else []


def _facts(metrics: Metrics) -> dict[str, list[tuple[str, Any]]]:
    """What is recorded of model and data, by family."""
    records = {family: flatten(metrics.get(family) or {}) for family in ("model", "data")}
    return {family: [(k, v) for k, v in pairs if (family, k) not in HEADED] for family, pairs in records.items()}


# ---------------------------------------------------------------- curves


def _training(place: Folder, rows: Sequence[Mapping[str, Any]]) -> EmbeddedChart | None:
    """Loss, accuracy and health against the step, one panel each; rows that lack a value are skipped."""
    lines = {key: line for key in PANELS if len(line := series(rows, key)) > 1}
    if not lines:
        return None
    chart = figures.curves({PANELS[key]: line for key, line in lines.items()})
    smoothed = any(len(line) >= figures.MANY for line in lines.values())
    note = "The faint line is every logged step, the strong one their running mean." if smoothed else ""
    return embed_chart("training", chart, "training curves: " + ", ".join(lines), note, folder=place)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(m, 2) float64 of step and value, by step, finite ones only."""
    pairs = [(row["step"], row[key]) for row in rows if is_finite(row.get("step")) and is_finite(row.get(key))]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def _probes(place: Folder, results: Mapping[str, Found]) -> list[EmbeddedChart]:
    """The linear layer by epoch: the first on centre crops and the first on augmented images, if there are any."""
    firsts: dict[str, Found] = {}
    for spec, found in results.items():
        if spec.partition(":")[0] == "linear" and "curve" in found.arrays:
            firsts.setdefault("linear_augmented" if is_augmented(found.metrics) else "linear", found)
    return [_probe(place, name, found) for name, found in firsts.items()]


def _probe(place: Folder, name: str, found: Found) -> EmbeddedChart:
    protocol = found.metrics.get("protocol")
    note = f"Protocol: {protocol}." if protocol else ""
    chart = figures.probe(found.arrays["curve"])
    return embed_chart(name, chart, "loss and accuracy of the linear layer by epoch", note, folder=place)


# ---------------------------------------------------------------- confusion


@dataclass(frozen=True)
class Confusion:
    chart: EmbeddedChart
    lost: int  # images in clusters that have no category
    pairs: list[tuple[str, str, int]]  # category, category of the cluster, images


def _confusion(place: Folder, counts: np.ndarray, classes: tuple[str, ...]) -> Confusion:
    """(C, C + 1) validation images of each category by the category of their cluster, the last: none."""
    lost = int(counts[:, -1].sum())
    shown = figures.confusion(counts if lost else counts[:, :-1], classes)
    chart = embed_chart("confusion", shown, "confusion matrix of categories and mapped clusters", folder=place)
    return Confusion(chart, lost, _mixed_up(counts[:, :-1], classes))


def _mixed_up(counts: np.ndarray, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """The largest confusions: of a thousand categories the picture shows only the diagonal."""
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = [(n // len(off), n % len(off)) for n in np.argsort(-off, axis=None, kind="stable")[:8].tolist()]
    return [(classes[a], classes[b], int(off[a, b])) for a, b in order if off[a, b]]
