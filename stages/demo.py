"""`compress demo`: the three stages on the digits inside scikit-learn, and a table of what came of it.

A command made of commands, as the sweep is, so it imports other stages.
"""

import json
import shlex
import statistics
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import POSITIVE, flag, require
from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.stages import compare, distill, evaluate, export_teacher

if TYPE_CHECKING:
    from compress_ssl.pipeline.evaluators.base import Split

DATA, VAL = "digits", "digits:split=test"
TEACHER = "digits-teacher"  # 209760 parameters, 64 dimensions
STUDENTS = ("convnet:channels=20+40+32", "convnet:channels=12+24+32")  # at most a tenth of that, 32 dimensions
PIXELS = "python:compress_ssl.pipeline.models.networks.digits:Pixels"
METHOD = "compress-2q:tau=0.1"
VIEWS, SIZE, BATCH, RATE = 8, 16, 64, 0.05
STARTS = 20  # k-means runs behind each figure of cluster alignment
PROTOCOLS = ("nn", "knn:k=20", "cluster")
RESULTS = "results.json"
MEANING = f"""\
What this says. No labels were used, except to score: percent of the 359 test images. On images of 8 x 8
pixels neighbours (NN, kNN 20) tell little: raw pixels find 98 to 99 %, wide untrained networks 96 to 98 %. What
tells is cluster alignment - do ten clusters, found without labels, agree with the ten digits? - and that the
students have it in 32 numbers an image and at most a tenth of the teacher's parameters. k-means from ten
random images is a lottery, so `cluster` is the tightest of {STARTS} runs, chosen without labels; `one run` is their
mean and standard deviation. The reports show one run, as CompRess scores it."""


@dataclass(frozen=True)
class Config:
    """Export, distill and evaluate on scikit-learn's digits: minutes on two cores, nothing to download.

    A trained teacher comes with compress. Two students learn from its store; they are scored beside
    it, beside themselves untrained and beside raw pixels. The same command again continues.
    """

    out: Path = flag(Path("demo"), "folder for everything the demo makes")
    epochs: float = flag(30.0, "passes of the students over the images; fewer for a quick look")
    overwrite: bool = flag(False, "start anew; an earlier demo is set aside, not deleted")


def run(config: Config) -> dict[str, Any]:
    """Make what is missing. Returns {"summary", "demo", "rows", "page"}."""
    require(config, {"epochs": POSITIVE})
    home = Folder(config.out)
    if config.overwrite and (aside := artifact.move_aside(config.out, "demo")):
        echo(f"set the earlier {config.out} aside as {aside}")
    identity = {
        "teacher": TEACHER, "students": STUDENTS, "method": METHOD, "views": VIEWS, "image_size": SIZE,
        "batch_size": BATCH, "lr": RATE, "epochs": float(config.epochs),
    }  # fmt: skip
    artifact.claim(home, "demo", identity)
    if home.exists(RESULTS):
        rows = artifact.read_json(home, RESULTS)
        if all((config.out / row["evaluation"] / "report.html").exists() for row in rows):
            return finish(config.out, rows, "is finished already")
    began = time.monotonic()
    rows = make(config.out, config.epochs)
    home.put(RESULTS, json.dumps(rows, indent=1).encode() + b"\n")
    return finish(config.out, rows, f"made in {format_duration(time.monotonic() - began)}")


def make(out: Path, epochs: float) -> list[dict[str, Any]]:
    """The stages in turn, each as its own command would run it -> the rows of the table."""
    store, scored = out / "store", out / "store-evaluation"
    step(export_teacher, data=DATA, teacher=TEACHER, out=str(store), views=VIEWS)
    learned = step(
        distill, store=str(store), student=STUDENTS, method=METHOD, out=out / "students", epochs=epochs,
        batch_size=BATCH, lr=RATE, schedule="cosine", image_size=SIZE,
    )  # fmt: skip
    runs = dict(zip(STUDENTS, map(Path, learned["runs"]), strict=True))
    bare = {spec: out / "untrained" / run.name for spec, run in runs.items()}
    beside = {"train": DATA, "teacher": scored}
    rows = [score("teacher", scored, store=store)]
    rows += [score(spec, run / "evaluation", run=run) for spec, run in runs.items()]
    for spec, folder in bare.items():
        rows.append(score(f"{spec}, untrained", folder, model=spec, image_size=SIZE, out=folder, **beside))
    rows.append(score("raw pixels", out / "pixels", model=PIXELS, out=out / "pixels", **beside))
    step(compare, folder=tuple(row["evaluation"] for row in rows), out=out / "compare.html")
    return [{**row, "evaluation": str(Path(row["evaluation"]).relative_to(out))} for row in rows]


def step(stage: ModuleType, **settings: Any) -> dict[str, Any]:
    """Say the command, run it, say what came of it."""
    config = stage.Config(**settings)
    echo(f"\n$ {command(stage, config)}")
    made = stage.run(config)
    echo(made["summary"].rstrip().splitlines()[-1] if stage is compare else made["summary"])
    return made


def command(stage: ModuleType, config: Any) -> str:
    """What a user would type for this Config."""
    words = ["compress", stage.__name__.rpartition(".")[2].replace("_", "-")]
    for f in fields(config):
        if (value := getattr(config, f.name)) != f.default:
            for each in value if isinstance(value, tuple) else (value,):
                said = f"{each:g}" if isinstance(each, float) else str(each)
                words += [said] if f.metadata["place"] else [f"--{f.name.replace('_', '-')}", said]
    return shlex.join(words)


def score(name: str, folder: Path, **subject: Any) -> dict[str, Any]:
    """Evaluate into a folder -> a row of the table."""
    metrics = step(evaluate, val=VAL, protocol=PROTOCOLS, workers=0, **subject)["metrics"]
    train, val = features(subject.get("store", folder / "features" / "train")), features(folder / "features" / "val")
    runs = alignment(train, val, folder)
    return {
        "name": name,
        "nn": metrics["nn"]["top1"],
        "knn": metrics["knn"]["20"]["top1"],
        "cluster": min(runs)[1],
        "cluster_mean": statistics.mean(top1 for _, top1 in runs),
        "cluster_spread": statistics.stdev(top1 for _, top1 in runs),
        "width": metrics["model"]["width"],
        "parameters": metrics["model"]["parameters"],
        "evaluation": str(folder),
    }


def features(folder: Path) -> "Split":
    """View 0 of a store of the digits, as a protocol wants it."""
    import numpy as np

    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.evaluators.base import Split
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    store = FeatureStore(Folder(folder))
    classes = DATASETS.build(DATA).classes
    return Split(store.read("embedding", 0), store.table("label"), np.arange(store.images), classes)


def alignment(train: "Split", val: "Split", folder: Path) -> list[tuple[float, float]]:
    """[(squared distance of the training features to their centroids, top-1), ...] of STARTS k-means runs."""
    import numpy as np

    from compress_ssl.pipeline.evaluators import PROTOCOLS as menu
    from compress_ssl.pipeline.search.exact import normalize

    unit, runs = normalize(train.features), []
    for seed in range(STARTS):
        found = menu.build(f"cluster:seed={seed}")(train, val, folder)
        off = unit - found.arrays["centroids"][found.arrays["train_assignment"]]
        runs.append((float(np.square(off).sum()), found.metrics["top1"]))
    return runs


def finish(out: Path, rows: list[dict[str, Any]], how: str) -> dict[str, Any]:
    """The closing table, what it means, and where the pages are."""
    pages = [out / row["evaluation"] / "report.html" for row in rows]
    lines = [table(rows), "", MEANING, "", *map(str, pages), f"{out / 'compare.html'}  (all of them on one page)"]
    summary = "\n".join([*lines, "", f"demo {how}: {out}"])
    return {"summary": summary, "demo": str(out), "rows": rows, "page": str(out / "compare.html")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    cells = [["", "NN", "kNN 20", "cluster", "one run", "width", "parameters"]]
    for row in rows:
        scores = [f"{row[key]:.1f}" for key in ("nn", "knn", "cluster")]
        runs = f"{row['cluster_mean']:.0f} ± {row['cluster_spread']:.0f}"
        cells.append([row["name"], *scores, runs, str(row["width"]), str(row["parameters"])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )
