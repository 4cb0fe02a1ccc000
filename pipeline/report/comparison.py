"""Compares many evaluations: one table as plain text and as an HTML page, with accuracy plotted against size."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from compress_ssl.pipeline.evaluators.base import Evaluation, Score
from compress_ssl.pipeline.report import figures
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, render_template
from compress_ssl.pipeline.runtime.formatting import flatten, format_count, format_number, format_score, shorten
from compress_ssl.pipeline.runtime.records import to_json

FACTS = ["model", "role", "parameters", "width"]  # the columns before the scores
TEXT_COLUMNS = 2  # the first of FACTS are text and aligned left; all other columns are numbers and aligned right
MAX_PANELS = 6  # of the chart: two rows of three; of more scores that are to be plotted, the first ones
MAX_CELL = 60  # characters of a cell in the plain-text table


def compare(rows: Sequence[Evaluation]) -> tuple[str, str]:
    """(plain-text table, HTML page) of many evaluations: teachers first, then in the order given.

    The best score of each column is marked; teachers do not take part unless all rows are teachers. A protocol that
    a row lacks is a dash. A warning says in what the rows differ if they were not evaluated on the same data.
    """
    rows = sorted(rows, key=lambda row: not row.model.is_teacher)
    table, warning = build_table(rows), describe_differences(rows)
    page = render_template(
        "comparison.html",
        title="Comparison",
        role="",
        table=table,
        text_columns=TEXT_COLUMNS,
        warning=warning,
        sizes=_plot_sizes(rows),
        terms=explain_terms(list(list_columns(rows).values())),
    )
    return to_text(table, warning), page


def list_columns(rows: Sequence[Evaluation]) -> dict[str, Score]:
    """{title: its score in the first row that has it}; the row with most scores decides the order of columns."""
    columns: dict[str, Score] = {}
    for row in sorted(rows, key=lambda row: -len(row.scores)):
        for title, score in row.by_title.items():
            columns.setdefault(title, score)
    return columns


def explain_terms(columns: Sequence[Score]) -> list[tuple[str, str]]:
    """(term, what it means), each once: first the terms that begin a title, then those that only end one."""
    notes = dict.fromkeys((score.explained, score.note) for score in columns if score.note)
    begins = {score.explained for score in columns if score.title.startswith(score.explained)}
    return sorted(notes, key=lambda term: term[0] not in begins)


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


def build_table(rows: Sequence[Evaluation]) -> Table:
    """The table of many evaluations, in the order given."""
    columns = list_columns(rows)
    ranked = [row for row in rows if not row.model.is_teacher] or list(rows)
    best_of = {title: _best(ranked, score) for title, score in columns.items()}
    table_rows = []
    for row, name in zip(rows, display_names(rows), strict=True):
        own, cells, best = row.by_title, _fact_cells(row, name), set()
        for column, title in enumerate(columns, start=len(FACTS)):
            cells.append(format_score(own[title].value if title in own else None))
            if row in ranked and title in own and round(own[title].value, 1) == best_of[title]:
                best.add(column)
        table_rows.append(Row(cells, best, row.model.is_teacher))
    legend = f"best of the {'students' if len(ranked) < len(rows) else 'rows'}" if columns else ""
    heads = [f"{title} ({score.unit})" if score.suffix else title for title, score in columns.items()]
    return Table([*FACTS, *heads], table_rows, legend)


def _best(rows: Sequence[Evaluation], column: Score) -> float | None:
    """The best score of a column as it is shown, with one decimal, so that equal cells are both marked."""
    shown = [round(row.by_title[column.title].value, 1) for row in rows if column.title in row.by_title]
    return (max if column.best == "highest" else min)(shown, default=None)


def _fact_cells(row: Evaluation, name: str) -> list[str]:
    """The cells of FACTS."""
    model = row.model
    role = f"{model.role}, {model.method}" if model.method else model.role
    return [name, role, format_count(model.parameters), format_number(model.width)]


def display_names(rows: Sequence[Evaluation]) -> list[str]:
    """The name of each row's model: its spec, with its run's path where several runs have the same spec."""
    specs = [row.model.spec or row.model.name for row in rows]
    names = []
    for row, spec in zip(rows, specs, strict=True):
        runs = [other.model.run for other, same in zip(rows, specs, strict=True) if same == spec and other.model.run]
        if row.model.run and len(set(runs)) > 1:
            names.append(f"{spec} ({_shorten_path(row.model.run, runs)})")
        else:
            names.append(spec)
    return names


def _shorten_path(run: str, runs: Sequence[str]) -> str:
    """The path of one of several runs without the folder that all have in common.

    Evaluations record a run as it was named: absolute and relative paths have no folder in common.
    """
    if len({os.path.isabs(path) for path in runs}) > 1:
        return run
    return os.path.relpath(run, os.path.commonpath(runs))


def describe_differences(rows: Sequence[Evaluation]) -> str:
    """A warning that names the keys in which the rows' data records differ; "" if they are equal."""
    records = [dict(flatten(to_json(row.data))) for row in rows]
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


def _plot_sizes(rows: Sequence[Evaluation]) -> EmbeddedChart | None:
    """The chart of the scores that are to be plotted against the number of parameters; None if no row has both."""
    dots: dict[str, list[figures.Dot]] = {}
    for title, column in list_columns(rows).items():
        for row, name in zip(rows, display_names(rows), strict=True):
            if column.plotted and title in row.by_title and row.model.parameters:
                dot = figures.Dot(name, row.model.parameters, row.by_title[title].value, row.model.is_teacher)
                dots.setdefault(f"{title} ({column.unit})" if column.unit else title, []).append(dot)
    if not dots:
        return None
    chart = figures.draw_scatter(dict(list(dots.items())[:MAX_PANELS]))
    note = "Star: a teacher. The axis of parameters is logarithmic."
    return embed_chart("compare", chart, "accuracy against number of parameters", note)
