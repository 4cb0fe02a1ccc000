"""The page of one evaluation, report.html, and its charts in figures/."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress_ssl.pipeline.report import figures, image_grids
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, render_template, save_figure
from compress_ssl.pipeline.report.image_grids import ImageGrid, Labelled, LoadImage
from compress_ssl.pipeline.report.metrics import Metrics, explain_title, headline_scores, is_augmented, model_record
from compress_ssl.pipeline.runtime.formatting import flatten, is_finite
from compress_ssl.pipeline.runtime.storage import Folder

__all__ = ["headline_scores", "write_report"]

PANELS = {
    "loss": "loss",
    "val_nn": "NN on validation, top-1 (%)",
    "agreement": "agreement with the teacher's NN (%)",
    "spread": "feature spread (0: collapse)",
    "lr": "learning rate",
}
"""The training curves: key of metrics.jsonl -> title of its panel."""

TITLE_FIELDS = {("model", "name"), ("model", "role")}  # shown in the page's heading and so not again among the facts
MAX_CONFUSIONS = 8  # pairs of categories listed below the confusion matrix


class ProtocolResult(Protocol):
    """What the page reads of a protocol's result; `evaluators.base.Result` has it."""

    @property
    def metrics(self) -> dict[str, Any]: ...
    @property
    def arrays(self) -> dict[str, np.ndarray]: ...


def write_report(
    folder: Path,
    metrics: Metrics,
    *,
    train: Labelled,
    val: Labelled,
    results: Mapping[str, ProtocolResult],
    teacher: Metrics | None = None,
    curves: Sequence[Mapping[str, Any]] | None = None,
    load_image: LoadImage | None = None,
    seed: int = 0,
) -> Path:
    """Write FOLDER/report.html and FOLDER/figures/*.png; returns the path of the page.

    metrics: this model's metrics.json; teacher: the teacher's on the same data; results: by protocol spec ("nn",
    "knn:k=20", "cluster", ...); curves: the rows of metrics.jsonl; load_image: loads an image of a split, which the
    image grids need; seed: decides which images they show. What is not given is left out of the page. Each file is
    replaced whole, and the page is written last.
    """
    out, random = Folder(folder), np.random.default_rng(seed)
    by_name: dict[str, dict[str, np.ndarray]] = {}  # "nn" -> arrays of the first result of that protocol
    for spec, result in results.items():
        by_name.setdefault(spec.partition(":")[0], result.arrays)
    nn, cluster = by_name.get("nn"), by_name.get("cluster")
    # Clusters come before neighbours: both draw from the same generator.
    clusters = image_grids.build_cluster_grid(cluster, train, load_image, random) if load_image and cluster else None
    neighbours = image_grids.build_neighbour_grid(nn, train, val, load_image, random) if load_image and nn else None
    _save_grid(out, "clusters", clusters)
    _save_grid(out, "neighbours", neighbours)
    scores = _build_score_rows(metrics, teacher or {})
    page = render_template(
        "report.html",
        title=model_record(metrics).get("name", "Evaluation"),
        role=model_record(metrics).get("role", ""),
        sizes=_read_sizes(metrics, teacher or {}),
        scores=scores,
        lead_score=next((score for score in scores if (score.teacher or 0) > 0), None),
        with_teacher=bool(headline_scores(teacher or {})),
        facts=_collect_facts(metrics),
        training=_embed_training_curves(out, curves or ()),
        clusters=clusters,
        neighbours=neighbours,
        confusion=_embed_confusion(out, cluster["confusion"], val.classes)
        if cluster and "confusion" in cluster
        else None,
        probes=_embed_probes(out, results),
        raw=json.dumps(metrics, indent=1, default=str),
    )
    out.put("report.html", page.encode())
    return Path(folder) / "report.html"


def _save_grid(out: Folder, name: str, grid: ImageGrid | None) -> None:
    """Write an image grid to figures/NAME.png, if there is one."""
    if grid:
        save_figure(out, name, figures.render(image_grids.draw_grid(grid.rows)))


# ---------------------------------------------------------------- scores and facts


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores. Scores are in percent."""

    title: str
    meaning: str
    value: float
    teacher: float | None  # the teacher's score

    @property
    def difference(self) -> float | None:
        """This model's score minus the teacher's."""
        return None if self.teacher is None else self.value - self.teacher

    @property
    def tone(self) -> str:
        """The CSS class of the difference: "up", "down", or "" if it is shown as 0."""
        gain = self.difference
        if gain is None or not round(gain, 1):
            return ""
        return "up" if gain > 0 else "down"


def _build_score_rows(metrics: Metrics, teacher: Metrics) -> list[ScoreRow]:
    """The rows of the table of scores, each with the teacher's score where there is one."""
    own, other = headline_scores(metrics), headline_scores(teacher)
    return [ScoreRow(title, explain_title(title, metrics), value, other.get(title)) for title, value in own.items()]


def _read_sizes(metrics: Metrics, teacher: Metrics) -> list[float]:
    """[parameters of this model, parameters of the teacher]; empty unless both are known."""
    both = [model_record(record).get("parameters") for record in (metrics, teacher)]
    known = [size for size in both if is_finite(size) and size > 0]
    return known if len(known) == len(both) else []


def _collect_facts(metrics: Metrics) -> dict[str, list[tuple[str, Any]]]:
    """The recorded facts of the model and of the data, as (key, value) pairs under "model" and "data"."""
    records = {family: flatten(metrics.get(family) or {}) for family in ("model", "data")}
    return {family: [(k, v) for k, v in pairs if (family, k) not in TITLE_FIELDS] for family, pairs in records.items()}


# ---------------------------------------------------------------- curves


def _embed_training_curves(out: Folder, rows: Sequence[Mapping[str, Any]]) -> EmbeddedChart | None:
    """The chart of the training curves, a panel for each key of PANELS that has two values or more."""
    lines = {}
    for key in PANELS:
        line = select_series(rows, key)
        if len(line) > 1:
            lines[key] = line
    if not lines:
        return None
    chart = figures.draw_curves({PANELS[key]: line for key, line in lines.items()})
    smoothed = any(len(line) >= figures.SMOOTHED_FROM for line in lines.values())
    note = "The faint line is every logged step, the strong one their running mean." if smoothed else ""
    return embed_chart("training", chart, "training curves: " + ", ".join(lines), note, folder=out)


def select_series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(m, 2) float64 pairs of step and value in order of step; rows without a finite step or value are skipped."""
    pairs = [(row["step"], row[key]) for row in rows if is_finite(row.get("step")) and is_finite(row.get(key))]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def _embed_probes(out: Folder, results: Mapping[str, ProtocolResult]) -> list[EmbeddedChart]:
    """The charts of the linear probes: the first result on centre crops and the first on augmented images."""
    firsts: dict[str, ProtocolResult] = {}
    for spec, result in results.items():
        if spec.partition(":")[0] == "linear" and "curve" in result.arrays:
            firsts.setdefault("linear_augmented" if is_augmented(result.metrics) else "linear", result)
    return [_embed_probe(out, name, result) for name, result in firsts.items()]


def _embed_probe(out: Folder, name: str, result: ProtocolResult) -> EmbeddedChart:
    """The chart of one linear probe; its note names how the probe was trained."""
    protocol = result.metrics.get("protocol")
    note = f"Protocol: {protocol}." if protocol else ""
    chart = figures.draw_probe(result.arrays["curve"])
    return embed_chart(name, chart, "loss and accuracy of the linear layer by epoch", note, folder=out)


# ---------------------------------------------------------------- confusion


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of the cluster protocol."""

    chart: EmbeddedChart
    unmapped: int  # images in clusters that have no category
    pairs: list[tuple[str, str, int]]  # (category, category of the cluster, images)


def _embed_confusion(out: Folder, counts: np.ndarray, classes: tuple[str, ...]) -> Confusion:
    """counts: (C, C + 1) validation images of each category by the category of their cluster; the last column: none.

    The last column is drawn only if it has images.
    """
    unmapped = int(counts[:, -1].sum())
    chart = figures.draw_confusion(counts if unmapped else counts[:, :-1], classes)
    embedded = embed_chart("confusion", chart, "confusion matrix of categories and mapped clusters", folder=out)
    return Confusion(embedded, unmapped, _largest_confusions(counts[:, :-1], classes))


def _largest_confusions(counts: np.ndarray, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """The largest cells (category, category of the cluster, images) off the diagonal of (C, C) counts.

    They are listed because a chart of a thousand categories shows little more than its diagonal.
    """
    off = counts.copy()
    np.fill_diagonal(off, 0)
    largest = np.argsort(-off, axis=None, kind="stable")[:MAX_CONFUSIONS].tolist()
    cells = [(n // len(off), n % len(off)) for n in largest]
    return [(classes[a], classes[b], int(off[a, b])) for a, b in cells if off[a, b]]
