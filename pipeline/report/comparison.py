"""Compares many evaluations: one table as plain text and as an HTML page, with accuracy plotted against size."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from compress_ssl.pipeline.report import figures
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, render_template
from compress_ssl.pipeline.report.metrics import MEANINGS, Metrics, headline_scores, is_teacher, model_record
from compress_ssl.pipeline.runtime.formatting import (
    DASH,
    flatten,
    format_count,
    format_number,
    format_score,
    is_finite,
    shorten,
)

FACTS = ["model", "role", "parameters", "width"]  # the columns before the scores
TEXT_COLUMNS = 2  # the first of FACTS are text and aligned left; all other columns are numbers and aligned right
PLOTTED = ("NN", "Cluster", "Linear", "Linear (augmented)", "Classifier")  # scores that may be plotted against size
MAX_PANELS = 3  # of the chart: as many of PLOTTED as fit side by side, the first ones that are present
MAX_CELL = 60  # characters of a cell in the plain-text table


def compare(rows: Sequence[Metrics]) -> tuple[str, str]:
    """(plain-text table, HTML page) of many metrics.json: teachers first, then in the order given.

    The best score of each column is marked; teachers do not take part unless all rows are teachers. A protocol that
    a row lacks is a dash. A warning says in what the rows differ if they were not evaluated on the same data.
    """
    rows = sorted(rows, key=lambda row: not is_teacher(row))
    table, warning = build_table(rows), describe_differences(rows)
    used = [key for key in MEANINGS if any(key in title.split() for title in table.head)]
    page = render_template(
        "comparison.html",
        title="Comparison",
        role="",
        table=table,
        text_columns=TEXT_COLUMNS,
        warning=warning,
        sizes=_plot_sizes(rows),
        terms={key: MEANINGS[key] for key in used},
    )
    return to_text(table, warning), page


# ---------------------------------------------------------------- table


@dataclass(frozen=True)
class Row:
    """One evaluation in the table."""

    cells: list[str]
    best: set[int]  # the columns in which no other row is better
    teacher: bool


@dataclass(frozen=True)
class Table:
    """The table as text cells."""

    head: list[str]
    rows: list[Row]
    legend: str  # what the mark means; "" where there are no scores


def build_table(rows: Sequence[Metrics]) -> Table:
    """The table of many metrics.json, in the order given."""
    scores = [headline_scores(row) for row in rows]
    fullest = sorted(scores, key=lambda score: -len(score))  # the row with most scores decides the order of columns
    titles = list(dict.fromkeys(title for score in fullest for title in score))
    ranked = [n for n, row in enumerate(rows) if not is_teacher(row)] or list(range(len(rows)))
    best_of = {title: _best([scores[n] for n in ranked], title) for title in titles}
    names = display_names(rows)
    table_rows = []
    for n, row in enumerate(rows):
        own = scores[n]
        cells = _fact_cells(row, names[n]) + [format_score(own.get(title)) for title in titles]
        best = {
            len(FACTS) + column
            for column, title in enumerate(titles)
            if title in own and round(own[title], 1) == best_of[title]
        }
        table_rows.append(Row(cells, best if n in ranked else set(), is_teacher(row)))
    legend = f"best of the {'students' if len(ranked) < len(rows) else 'rows'}" if titles else ""
    return Table([*FACTS, *titles], table_rows, legend)


def _best(scores: Sequence[dict[str, float]], title: str) -> float | None:
    """The best score of a column as it is shown, in tenths of a percent, so that equal cells are both marked."""
    return max((round(score[title], 1) for score in scores if title in score), default=None)


def _fact_cells(row: Metrics, name: str) -> list[str]:
    """The cells of FACTS."""
    model = model_record(row)
    role = ", ".join(str(model[key]) for key in ("role", "method") if model.get(key))
    return [name, role or DASH, format_count(model.get("parameters")), format_number(model.get("width"))]


def display_names(rows: Sequence[Metrics]) -> list[str]:
    """The name of each row's model: its spec, with its run's path where several runs have the same spec."""
    models = [model_record(row) for row in rows]
    specs = [str(model.get("spec") or model.get("name", DASH)) for model in models]
    names = []
    for spec, model in zip(specs, models, strict=True):
        same = [other for other, other_spec in zip(models, specs, strict=True) if other_spec == spec]
        runs = [str(other["run"]) for other in same if "run" in other]
        if "run" in model and len(set(runs)) > 1:
            names.append(f"{spec} ({os.path.relpath(str(model['run']), os.path.commonpath(runs))})")
        else:
            names.append(spec)
    return names


def describe_differences(rows: Sequence[Metrics]) -> str:
    """A warning that names the keys in which the rows' data records differ; "" if they are equal."""
    records = [dict(flatten(row.get("data") or {})) for row in rows]
    keys = sorted({key for record in records for key in record})
    differing = []
    for key in keys:
        values = {json.dumps(record.get(key), sort_keys=True, default=str) for record in records}
        if len(values) > 1:
            differing.append(key)
    if not differing:
        return ""
    return f"Not all rows were evaluated on the same data; they differ in: {', '.join(differing)}."


def to_text(table: Table, warning: str) -> str:
    """The table as plain text: names aligned left, numbers right, * after the best of a column."""
    cells = [table.head]
    for row in table.rows:
        cells.append([shorten(cell, MAX_CELL) + ("*" if n in row.best else "") for n, cell in enumerate(row.cells)])
    # A score without a mark gets a space in its place, so that the digits of a column stand below each other.
    cells = [[c if c.endswith("*") or n < len(FACTS) else c + " " for n, c in enumerate(line)] for line in cells]
    widths = [max(len(line[n]) for line in cells) for n in range(len(table.head))]
    lines = [_align(line, widths) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if table.legend:
        lines.append(f"* {table.legend}")
    if warning:
        lines.append(warning)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of the plain-text table."""
    padded = [
        cell.ljust(width) if n < TEXT_COLUMNS else cell.rjust(width)
        for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded)


# ---------------------------------------------------------------- chart


def _plot_sizes(rows: Sequence[Metrics]) -> EmbeddedChart | None:
    """The chart of up to three scores against the number of parameters; None if no row has both."""
    dots: dict[str, list[figures.Dot]] = {}
    for row, name in zip(rows, display_names(rows), strict=True):
        size, own = model_record(row).get("parameters"), headline_scores(row)
        if not (is_finite(size) and size > 0):
            continue
        for title in PLOTTED:
            if title in own:
                dots.setdefault(title, []).append(figures.Dot(name, size, own[title], is_teacher(row)))
    present = [title for title in PLOTTED if title in dots]
    if not present:
        return None
    chart = figures.draw_scatter({title: dots[title] for title in present[:MAX_PANELS]})
    note = "Star: a teacher. The axis of parameters is logarithmic."
    return embed_chart("compare", chart, "accuracy against number of parameters", note)
