"""Many evaluations in one table, as text and as a page."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from compress_ssl.pipeline.report import figures
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, render_template
from compress_ssl.pipeline.report.metrics import NOTES, Metrics, headline_scores, is_teacher, model
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
WORDS = 2  # the first of them are words and stand to the left
PLOTTED = ("NN", "Cluster", "Linear", "Linear (augmented)", "Classifier")  # scores against size,
MOST = 3  # the first that there are


def compare(rows: Sequence[Metrics]) -> tuple[str, str]:
    """(plain table, HTML page) of many metrics.json: teachers first, then in the order given.

    The best score of a column is marked, among the rows that are not a teacher if there are any. A
    protocol that a row lacks is a dash. Says so when the rows were not evaluated on the same data.
    """
    rows = sorted(rows, key=lambda row: not is_teacher(row))
    table, warning = tabulate(rows), unlike(rows)
    used = [key for key in NOTES if any(key in title.split() for title in table.head)]
    page = render_template(
        "comparison.html",
        title="Comparison",
        role="",
        table=table,
        words=WORDS,
        warning=warning,
        sizes=_sizes(rows),
        terms={key: NOTES[key] for key in used},
    )
    return plain(table, warning), page


@dataclass(frozen=True)
class Row:
    cells: list[str]
    best: set[int]  # the columns in which none is better
    teacher: bool


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[Row]
    legend: str  # what is marked; "" where there are no scores


def tabulate(rows: Sequence[Metrics]) -> Table:
    scores = [headline_scores(row) for row in rows]
    fullest = sorted(scores, key=lambda score: -len(score))  # so that the columns stand in the order of this row
    titles = list(dict.fromkeys(title for score in fullest for title in score))
    rivals = [n for n, row in enumerate(rows) if not is_teacher(row)] or list(range(len(rows)))
    top = {t: max((round(scores[n][t], 1) for n in rivals if t in scores[n]), default=None) for t in titles}
    made, named = [], names(rows)
    for n, row in enumerate(rows):
        own, who = scores[n], model(row)
        facts = [named[n], ", ".join(str(who[key]) for key in ("role", "method") if who.get(key)) or DASH]
        facts += [format_count(who.get("parameters")), format_number(who.get("width"))]
        cells = facts + [format_score(own.get(title)) for title in titles]
        wins = {len(FACTS) + t for t, title in enumerate(titles) if title in own and round(own[title], 1) == top[title]}
        made.append(Row(cells, wins if n in rivals else set(), is_teacher(row)))
    legend = f"best of the {'students' if len(rivals) < len(rows) else 'rows'}" if titles else ""
    return Table([*FACTS, *titles], made, legend)


def names(rows: Sequence[Metrics]) -> list[str]:
    """What each row's model is called: as it was ordered, and where its run lies if it has namesakes."""
    who = [model(row) for row in rows]
    called = [str(each.get("spec") or each.get("name", DASH)) for each in who]
    out = []
    for name, each in zip(called, who, strict=True):
        namesakes = [other for other, theirs in zip(who, called, strict=True) if theirs == name]
        runs = [str(other["run"]) for other in namesakes if "run" in other]
        if "run" in each and len(set(runs)) > 1:
            name += f" ({os.path.relpath(str(each['run']), os.path.commonpath(runs))})"
        out.append(name)
    return out


def unlike(rows: Sequence[Metrics]) -> str:
    """A warning if the rows' data records differ, with the keys that do."""
    records = [dict(flatten(row.get("data") or {})) for row in rows]
    keys = sorted({key for record in records for key in record})
    odd = [key for key in keys if len({json.dumps(r.get(key), sort_keys=True, default=str) for r in records}) > 1]
    return f"Not all rows were evaluated on the same data; they differ in: {', '.join(odd)}." if odd else ""


def plain(table: Table, warning: str) -> str:
    """Names to the left, numbers to the right, * for the best."""
    cells = [table.head]
    for made in table.rows:
        cells.append([shorten(cell, 60) + ("*" if n in made.best else "") for n, cell in enumerate(made.cells)])
    cells = [[c if c.endswith("*") or n < len(FACTS) else c + " " for n, c in enumerate(row)] for row in cells]
    width = [max(len(row[n]) for row in cells) for n in range(len(table.head))]
    lines = [
        "  ".join(c.ljust(w) if n < WORDS else c.rjust(w) for n, (c, w) in enumerate(zip(row, width, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in width))
    lines += [f"* {table.legend}"] * bool(table.legend) + [warning] * bool(warning)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _sizes(rows: Sequence[Metrics]) -> EmbeddedChart | None:
    """Parameters against some of the scores; nothing where no row has both."""
    panels: dict[str, list[figures.Dot]] = {}
    for row, name in zip(rows, names(rows), strict=True):
        who, own = model(row), headline_scores(row)
        size = who.get("parameters")
        for title in PLOTTED:
            if is_finite(size) and size > 0 and title in own:
                dot = figures.Dot(name, size, own[title], is_teacher(row))
                panels.setdefault(title, []).append(dot)
    panels = {title: panels[title] for title in [title for title in PLOTTED if title in panels][:MOST]}
    if not panels:
        return None
    note = "Star: a teacher. The axis of parameters is logarithmic."
    return embed_chart("compare", figures.scatter(panels), "accuracy against number of parameters", note)
