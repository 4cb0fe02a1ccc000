"""`compress demo`: run the three stages on the digits data set of scikit-learn and print a table of the scores.

The demo runs other commands, so this file imports other stages; so does the sweep.
"""

import json
import shlex
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from compress_ssl.pipeline.evaluators.record import read_evaluation
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import POSITIVE, CommandResult, flag, require, to_flags
from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.lease import set_aside
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.records import Count, Number, parse_json, read_record, to_json
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.stages import compare, distill, evaluate, export_teacher

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from compress_ssl.pipeline.evaluators.base import Split

DATA, VAL = "digits", "digits:split=test"  # 1438 training images, 359 test images
TEACHER = "digits-teacher"  # 209760 parameters, 64 dimensions
STUDENTS = (
    "convnet:channels=20+40+32",
    "convnet:channels=12+24+32",
)  # 32 dimensions, a tenth of the parameters
PIXELS = "python:compress_ssl.pipeline.models.networks.digits:Pixels"
METHOD = "compress-2q:tau=0.1"
VIEWS, SIZE, BATCH, RATE = 8, 16, 64, 0.05  # views per image; student's side in pixels; images; learning rate
EPOCHS = 30  # training epochs of a demo that begins now
STARTS = 20  # k-means runs behind each figure of cluster alignment
PROTOCOLS = ("nn", "knn:k=20", "cluster")
RESULTS = "results.json"
MEANING = f"""\
How to read the table. Scores are percentages of the 359 test images; labels were used only to compute them. On
images of 8 x 8 pixels the nearest-neighbour scores (NN, kNN 20) separate the models hardly at all: raw pixels reach
98 to 99 %, wide untrained networks 96 to 98 %. The informative score is cluster alignment: how well ten clusters,
found without labels, agree with the ten digits. The students reach it with 32 numbers per image and at most a tenth
of the teacher's parameters. The result of k-means depends strongly on its random start, so `cluster` is the run with
the smallest inertia of {STARTS}, chosen without labels; `one run` is their mean and standard deviation. The reports
show one run, as CompRess scores it."""


@dataclass(frozen=True)
class Config:
    """Export, distill and evaluate on scikit-learn's digits: minutes on two cores, nothing to download.

    A trained teacher is part of the package. Two students are trained from its feature store and compared with
    the teacher, with the same students untrained, and with raw pixels. Running the same command again resumes it.
    """

    out: Path = flag(Path("demo"), "The folder of all results of the demo.", metavar="FOLDER")
    epochs: float | None = flag(
        None, f"Training epochs of the students; fewer give a faster demo with lower scores. Default: {EPOCHS}."
    )
    overwrite: bool = flag(False, "Start from scratch. An existing demo is moved aside, not deleted.")


@dataclass(frozen=True)
class Row:
    """One model of the table and of results.json. Scores are in percent."""

    name: str
    nn: Number
    knn: Number
    cluster: Number  # of the run of k-means with the smallest inertia
    cluster_mean: Number  # of all runs
    cluster_spread: Number  # their standard deviation
    width: Count
    parameters: Count
    evaluation: str  # folder


def run(config: Config) -> CommandResult:
    """Run the stages that are not finished. Returns {"summary", "demo", "rows", "page"}.

    Raises UserError if the folder holds something else or a demo with other settings.
    """
    require(config, {"epochs": POSITIVE})
    home = Folder(config.out)
    if config.overwrite:
        set_aside(config.out, "demo")
    begun = artifact.claimed(home, "demo")
    recorded = begun.identity.get("epochs") if begun else EPOCHS
    chosen = recorded if config.epochs is None and isinstance(recorded, int | float) else config.epochs
    epochs = float(EPOCHS if chosen is None else chosen)
    identity = {
        "teacher": TEACHER, "students": STUDENTS, "method": METHOD, "views": VIEWS, "image_size": SIZE,
        "batch_size": BATCH, "lr": RATE, "epochs": epochs,
    }  # fmt: skip
    artifact.claim(home, "demo", identity)
    if home.exists(RESULTS):
        where = f"{home}/{RESULTS}"
        rows = read_record(tuple[Row, ...], parse_json(home.get(RESULTS), where), where)
        if all((config.out / row.evaluation / "report.html").exists() for row in rows):
            return finish(config.out, rows, "is finished already")
    began = time.monotonic()
    rows = run_stages(config.out, epochs)
    home.put(RESULTS, json.dumps(to_json(rows), indent=1).encode() + b"\n")
    return finish(config.out, rows, f"made in {format_duration(time.monotonic() - began)}")


def run_stages(out: Path, epochs: float) -> tuple[Row, ...]:
    """Run every stage as its own command would, and return the rows of the table, the teacher first."""
    store, scored = out / "store", out / "store-evaluation"
    run_step(export_teacher, data=DATA, teacher=TEACHER, out=str(store), views=VIEWS)
    trained = run_step(
        distill, store=str(store), student=STUDENTS, method=METHOD, out=out / "students", epochs=epochs,
        batch_size=BATCH, lr=RATE, schedule="cosine", image_size=SIZE,
    )  # fmt: skip
    runs = dict(zip(STUDENTS, map(Path, cast(list[str], trained["runs"])), strict=True))
    untrained = {spec: out / "untrained" / run.name for spec, run in runs.items()}
    rows = [evaluate_model("teacher", scored, store=store)]
    rows += [evaluate_model(spec, run / "evaluation", run=run) for spec, run in runs.items()]
    others: list[tuple[str, str, int | None, Path]] = [
        *((f"{spec}, untrained", spec, SIZE, folder) for spec, folder in untrained.items()),
        ("raw pixels", PIXELS, None, out / "pixels"),
    ]
    for name, spec, size, folder in others:
        rows.append(evaluate_model(name, folder, model=spec, image_size=size, out=folder, train=DATA, teacher=scored))
    run_step(compare, folder=tuple(row.evaluation for row in rows), out=out / "compare.html")
    return tuple(replace(row, evaluation=str(Path(row.evaluation).relative_to(out))) for row in rows)


def run_step(stage: ModuleType, **settings: object) -> CommandResult:
    """Print the command that a user would type, run the stage, and print its summary."""
    config = stage.Config(**settings)
    echo(f"\n$ {command(stage, config)}")
    result: CommandResult = stage.run(config)
    text = str(result["summary"])
    echo(text.rstrip().splitlines()[-1] if stage is compare else text)  # of the comparison only the path of its page
    return result


def command(stage: ModuleType, config: "DataclassInstance") -> str:
    """The command line that gives this Config: only the flags that differ from their defaults."""
    name = stage.__name__.rpartition(".")[2].replace("_", "-")
    return shlex.join(["compress", name, *to_flags(config)])


def evaluate_model(name: str, folder: Path, store: Path | None = None, **settings: object) -> Row:
    """Evaluate one model into `folder`, with STARTS k-means runs, and return its row of the table.

    store: of the teacher, whose training features are in it. settings: further flags of `compress evaluate`.
    """
    run_step(evaluate, val=VAL, protocol=PROTOCOLS, workers=0, store=store, **settings)
    evaluation = read_evaluation(Folder(folder))
    scored = evaluation.by_title
    train, val = read_features(store or folder / "features" / "train"), read_features(folder / "features" / "val")
    runs = run_kmeans(train, val, folder)
    scores = [top1 for _, top1 in runs]
    return Row(
        name=name,
        nn=scored["NN"].value,
        knn=scored["kNN 20"].value,
        cluster=min(runs)[1],
        cluster_mean=statistics.mean(scores),
        cluster_spread=statistics.stdev(scores),
        width=evaluation.model.width,
        parameters=evaluation.model.parameters,
        evaluation=str(folder),
    )


def read_features(folder: Path) -> "Split":
    """View 0 of a feature store of the digits, as the Split that a protocol takes."""
    import numpy as np

    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.evaluators.base import Split
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    store = FeatureStore(Folder(folder))
    classes = DATASETS.build(DATA).classes
    return Split(store.read("embedding", 0), store.table("label"), np.arange(store.images), classes)


def run_kmeans(train: "Split", val: "Split", folder: Path) -> list[tuple[float, float]]:
    """[(inertia, top-1), ...] of STARTS k-means runs that differ in their seed.

    Inertia is the sum of squared distances of the l2-normalised training features to their centroids; top-1 is the
    cluster alignment of the test images in percent.
    """
    import numpy as np

    from compress_ssl.pipeline.evaluators import PROTOCOLS as registry
    from compress_ssl.pipeline.search.exact import normalize

    unit, runs = normalize(train.features), []
    for seed in range(STARTS):
        result = registry.build(f"cluster:seed={seed}")(train, val, folder)
        difference = unit - result.arrays["centroids"][result.arrays["train_assignment"]]
        runs.append((float(np.square(difference).sum()), result.scores[0].value))
    return runs


def finish(out: Path, rows: tuple[Row, ...], how: str) -> CommandResult:
    """The result of the command: the table, how to read it, and the paths of the reports."""
    pages = [out / row.evaluation / "report.html" for row in rows]
    lines = [
        format_table(rows),
        "",
        MEANING,
        "",
        *map(str, pages),
        f"{out / 'compare.html'}  (all of them on one page)",
    ]
    summary = "\n".join([*lines, "", f"demo {how}: {out}"])
    return {"summary": summary, "demo": str(out), "rows": to_json(rows), "page": str(out / "compare.html")}


def format_table(rows: tuple[Row, ...]) -> str:
    """The rows as text: the first column left-aligned, the others right-aligned."""
    cells = [["", "NN", "kNN 20", "cluster", "one run", "width", "parameters"]]
    for row in rows:
        scores = [f"{score:.1f}" for score in (row.nn, row.knn, row.cluster)]
        runs = f"{row.cluster_mean:.0f} ± {row.cluster_spread:.0f}"
        cells.append([row.name, *scores, runs, str(row.width), str(row.parameters)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)
