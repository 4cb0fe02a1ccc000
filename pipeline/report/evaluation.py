"""The page of one evaluation, report.html, and its charts in figures/."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.evaluators.base import Evaluation, Figure, Score, Split
from compress_ssl.pipeline.report import figures
from compress_ssl.pipeline.report.html import EmbeddedChart, embed_chart, render_template
from compress_ssl.pipeline.report.image_grids import LoadImage
from compress_ssl.pipeline.report.sections import build_sections
from compress_ssl.pipeline.runtime.formatting import is_finite
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.storage import Folder

PANELS = {
    "loss": "loss",
    "val_nn": "NN on validation, top-1 (%)",
    "agreement": "agreement with the teacher's NN (%)",
    "spread": "feature spread (0: collapse)",
    "lr": "learning rate",
}
"""The training curves: key of metrics.jsonl -> title of its panel."""

TITLE_FIELDS = {("model", "name"), ("model", "role")}  # shown in the page's heading and so not again among the facts


def write_report(
    folder: Path,
    evaluation: Evaluation,
    figures_of_protocols: Sequence[Figure] = (),
    *,
    splits: Mapping[str, Split],
    teacher: Evaluation | None = None,
    curves: Sequence[Mapping[str, object]] | None = None,
    load_image: LoadImage | None = None,
) -> Path:
    """Write FOLDER/report.html and FOLDER/figures/*.png; returns the path of the page.

    evaluation: this model's; teacher: the teacher's on the same data; figures_of_protocols: in the order of the page;
    splits: {"train", "val"}; curves: the rows of metrics.jsonl; load_image: loads an image of a split, which the image
    grids need. What is not given is left out of the page. Each file is replaced whole, and the page is written last.
    """
    out = Folder(folder)
    scores = _build_score_rows(evaluation, teacher)
    page = render_template(
        "report.html",
        title=evaluation.model.name,
        role=evaluation.model.role,
        sizes=_read_sizes(evaluation, teacher),
        scores=scores,
        lead_score=next((score for score in scores if score.leads), None),
        with_teacher=bool(teacher and teacher.scores),
        facts=_collect_facts(evaluation),
        training=_embed_training_curves(out, curves or ()),
        sections=build_sections(out, figures_of_protocols, splits, load_image),
        raw=json.dumps(evaluation.to_json(), indent=1),
    )
    out.put("report.html", page.encode())
    return Path(folder) / "report.html"


# ---------------------------------------------------------------- scores and facts


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores."""

    score: Score
    teacher: float | None  # the teacher's score

    @property
    def difference(self) -> float | None:
        """This model's score minus the teacher's."""
        return None if self.teacher is None else self.score.value - self.teacher

    @property
    def tone(self) -> str:
        """The CSS class of the difference: "up" if it is better, "down" if it is worse, "" if it is shown as 0."""
        gain = self.difference
        if gain is None or not round(gain, 1):
            return ""
        return "up" if (gain > 0) == (self.score.best == "highest") else "down"

    @property
    def leads(self) -> bool:
        """Whether the page may say which share of the teacher's accuracy this is."""
        return self.score.unit == "%" and self.score.best == "highest" and (self.teacher or 0) > 0

    @property
    def bar(self) -> float:
        """The length of the bar in percent."""
        return 100 * self.score.fraction(self.score.value)

    @property
    def teacher_bar(self) -> float:
        """Where the teacher's mark is on the bar, in percent."""
        return 0.0 if self.teacher is None else 100 * self.score.fraction(self.teacher)


def _build_score_rows(evaluation: Evaluation, teacher: Evaluation | None) -> list[ScoreRow]:
    """The rows of the table of scores, each with the teacher's score where there is one."""
    other = teacher.by_title if teacher else {}
    return [ScoreRow(score, other[score.title].value if score.title in other else None) for score in evaluation.scores]


def _read_sizes(evaluation: Evaluation, teacher: Evaluation | None) -> list[int]:
    """[parameters of this model, parameters of the teacher]; empty unless both are known."""
    sizes = [one.model.parameters for one in (evaluation, teacher) if one]
    return sizes if len(sizes) == 2 and all(sizes) else []


def _collect_facts(evaluation: Evaluation) -> dict[str, list[tuple[str, object]]]:
    """The recorded facts of the model and of the data, as (key, value) pairs under "model" and "data"."""
    records = {"model": to_json(evaluation.model), "data": to_json(evaluation.data)}
    return {
        family: [(key, value) for key, value in record.items() if (family, key) not in TITLE_FIELDS]
        for family, record in records.items()
    }


# ---------------------------------------------------------------- curves


def _embed_training_curves(out: Folder, rows: Sequence[Mapping[str, object]]) -> EmbeddedChart | None:
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


def select_series(rows: Sequence[Mapping[str, object]], key: str) -> np.ndarray:
    """(m, 2) float64 pairs of step and value in order of step; rows without a finite step or value are skipped."""
    pairs = [(row["step"], row[key]) for row in rows if is_finite(row.get("step")) and is_finite(row.get(key))]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)
