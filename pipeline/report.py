"""The page of one evaluation: report.html, and its figures in figures/."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline import figures, gallery
from pipeline.gallery import Labelled, Pictures
from pipeline.page import Page, note
from pipeline.scores import Metrics, is_augmented, meaning, model, readings
from pipeline.storage import Folder
from pipeline.wording import amount, fact, finite, flat, number, signed

__all__ = ["readings", "write"]

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
    page, random = Page(Folder(folder)), np.random.default_rng(seed)
    first = {spec.partition(":")[0]: found.arrays for spec, found in reversed(list(results.items()))}
    nn, cluster = first.get("nn"), first.get("cluster")
    page.add("", _headline(metrics, teacher or {}))
    page.add("Training", _training(page, curves or ()))
    if pictures and cluster:
        page.add("Random images of random clusters", gallery.clusters(page, cluster, train, pictures, random))
    if pictures and nn:
        page.add("Nearest neighbours", gallery.neighbours(page, nn, train, val, pictures, random))
    if cluster and "confusion" in cluster:
        page.add("Clusters against categories", _confusion(page, cluster["confusion"], val.classes))
    page.add("Linear layer", _probes(page, results))
    raw = html.escape(json.dumps(metrics, indent=1, default=str))
    page.add("", f"<details><summary>metrics.json</summary><pre>{raw}</pre></details>")
    name, role = str(model(metrics).get("name", "Evaluation")), str(model(metrics).get("role", ""))
    Folder(folder).put("report.html", page.spell(name, role))
    return Path(folder) / "report.html"


# ---------------------------------------------------------------- scores and facts


def _headline(metrics: Metrics, teacher: Metrics) -> str:
    """Each score as number, bar and distance from the teacher's; then the facts about model and data."""
    own, other = readings(metrics), readings(teacher)
    rows = "".join(_score_row(title, value, other.get(title), metrics, bool(other)) for title, value in own.items())
    if not rows:
        rows = '<tr><td colspan="3">no scores: without labels there is nothing to agree with</td></tr>'
    extra = '<th class="n">teacher</th><th class="n">difference</th>' if other else ""
    table = f'<table class="scores"><tr><th>score</th><th class="n">%</th><th></th>{extra}</tr>{rows}</table>'
    legend = note("The mark on each bar is the teacher.") if other else ""
    return _summary(metrics, teacher) + table + legend + _facts(metrics)


def _summary(metrics: Metrics, teacher: Metrics) -> str:
    """How much of the teacher is kept, at what size, in one sentence."""
    own, other = readings(metrics), readings(teacher)
    title = next((title for title in own if other.get(title, 0) > 0), None)
    if title is None:
        return ""
    text = f"<b>{100 * own[title] / other[title]:.0f} %</b> of the teacher's {title} accuracy"
    text += f" ({own[title]:.1f} of {other[title]:.1f})"
    small, large = model(metrics).get("parameters"), model(teacher).get("parameters")
    if small and large:
        text += f" with <b>{100 * small / large:.0f} %</b> of its parameters ({amount(small)} of {amount(large)})"
    return f'<p class="lead">{text}.</p>'


def _facts(metrics: Metrics) -> str:
    lists = []
    for family in ("model", "data"):
        pairs = [(k, v) for k, v in flat(metrics.get(family) or {}) if (family, k) not in HEADED]
        items = (
            f"<div><dt>{html.escape(k.replace('_', ' '))}</dt><dd>{html.escape(fact(v))}</dd></div>" for k, v in pairs
        )
        lists.append(f'<dl class="facts"><div class="family">{family}</div>{"".join(items)}</dl>' if pairs else "")
    return "".join(lists)


def _score_row(title: str, own: float, other: float | None, metrics: Metrics, beside: bool) -> str:
    mark = f'<b style="left:{min(max(other, 0), 100):.2f}%"></b>' if other is not None else ""
    bar = f'<div class="bar"><i style="width:{min(max(own, 0), 100):.2f}%"></i>{mark}</div>'
    cells = f'<td class="n big">{own:.1f}</td><td class="w">{bar}</td>'
    if beside:
        gain = None if other is None else own - other
        tone = "" if gain is None or not round(gain, 1) else " up" if gain > 0 else " down"
        cells += f'<td class="n">{number(other)}</td><td class="n{tone}">{signed(gain)}</td>'
    return f"<tr><td>{html.escape(title)}<small>{html.escape(meaning(title, metrics))}</small></td>{cells}</tr>"


# ---------------------------------------------------------------- curves


def _training(page: Page, rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss, accuracy and health against the step, one panel each; rows that lack a value are skipped."""
    lines = {key: line for key in PANELS if len(line := series(rows, key)) > 1}
    if not lines:
        return ""
    chart = figures.curves({PANELS[key]: line for key, line in lines.items()})
    many = any(len(line) >= figures.MANY for line in lines.values())
    legend = note("The faint line is every logged step, the strong one their running mean.") if many else ""
    return page.chart("training", chart, "training curves: " + ", ".join(lines)) + legend


def series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(m, 2) float64 of step and value, by step, finite ones only."""
    pairs = [(row["step"], row[key]) for row in rows if finite(row.get("step")) and finite(row.get(key))]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def _probes(page: Page, results: Mapping[str, Found]) -> str:
    """The linear layer by epoch: the first on centre crops and the first on augmented images, if there are any."""
    firsts: dict[str, Found] = {}
    for spec, found in results.items():
        if spec.partition(":")[0] == "linear" and "curve" in found.arrays:
            firsts.setdefault("linear_augmented" if is_augmented(found.metrics) else "linear", found)
    return "".join(_probe(page, name, found) for name, found in firsts.items())


def _probe(page: Page, name: str, found: Found) -> str:
    chart = figures.probe(found.arrays["curve"])
    protocol = found.metrics.get("protocol")
    legend = note(f"Protocol: {protocol}.") if protocol else ""
    return page.chart(name, chart, "loss and accuracy of the linear layer by epoch") + legend


# ---------------------------------------------------------------- confusion


def _confusion(page: Page, counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """(C, C + 1) validation images of each category by the category of their cluster, the last: none."""
    lost = int(counts[:, -1].sum())
    shown = figures.confusion(counts if lost else counts[:, :-1], classes)
    chart = page.chart("confusion", shown, "confusion matrix of categories and mapped clusters")
    text = (
        "Validation images by their category (rows) and the category their cluster is mapped to on training (columns)."
    )
    if lost:
        text += f" {lost} lie in clusters that have no category."
    return f'{note(text)}<div class="pair">{chart}{_mixed_up(counts[:, :-1], classes)}</div>'


def _mixed_up(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """The largest confusions as a table: of a thousand categories the picture shows only the diagonal."""
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = [(n // len(off), n % len(off)) for n in np.argsort(-off, axis=None, kind="stable")[:8].tolist()]
    rows = "".join(
        f'<tr><td>{html.escape(classes[a])} &rarr; {html.escape(classes[b])}</td><td class="n">{off[a, b]}</td></tr>'
        for a, b in order
        if off[a, b]
    )
    head = '<tr><th>most often mixed up</th><th class="n">images</th></tr>'
    return f"<table>{head}{rows}</table>" if rows else ""
