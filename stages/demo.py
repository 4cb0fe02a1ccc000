"""`compress demo`: the three stages on the digits inside scikit-learn, and a table of what came of it.

A command made of commands, so the one stage that imports others.
"""

import json
import shlex
import statistics
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline import artifact
from pipeline.config import POSITIVE, flag, require
from pipeline.progress import duration, say
from pipeline.storage import Folder
from pipeline.wording import amount
from stages import compare, distill, evaluate, export_teacher

if TYPE_CHECKING:
    from pipeline.evaluators.base import Split

DATA, VAL = "digits", "digits:split=test"
TEACHER = "digits-teacher"  # 209760 parameters, 64 dimensions
STUDENTS = ("convnet:channels=16+32+32", "cifar-resnet:8,width=8")  # at most a tenth of that, 32 dimensions
PIXELS = "python:pipeline.teachers.digits:Pixels"
METHOD = "compress-2q:tau=0.1"
VIEWS, SIZE, BATCH, RATE = 8, 16, 64, 0.05
STARTS = 20  # k-means runs behind each figure of cluster alignment
PROTOCOLS = ("nn", "knn:k=20", "cluster")
RESULTS = "results.json"
MEANING = f"""\
Percent of the 359 test images, right by nearest neighbour (NN, kNN 20) or by cluster. Neighbours say little
here: on 8 x 8 pixels the raw image itself finds 98 % and more, a wide untrained network 96 %. What tells is
cluster alignment - do ten clusters, found without labels, agree with the ten digits? - and that students keep
it in 32 numbers an image and a tenth of the teacher's parameters. It is the mean of {STARTS} random starts of
k-means, ± their standard deviation; reports show one start, as CompRess scores it, which may lie that far off."""


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
    """Make what is missing. Returns {"summary", "demo", "rows", "page", "seconds"}."""
    require(config, {"epochs": POSITIVE})
    home = Folder(config.out)
    if config.overwrite and (aside := artifact.set_aside(config.out, "demo")):
        say(f"set the earlier {config.out} aside as {aside}")
    identity = {
        "teacher": TEACHER, "students": STUDENTS, "method": METHOD, "views": VIEWS, "image_size": SIZE,
        "batch_size": BATCH, "lr": RATE, "epochs": config.epochs,
    }  # fmt: skip
    artifact.claim(home, "demo", identity)
    if home.exists(RESULTS):
        rows = artifact.read_json(home, RESULTS)
        if all((config.out / row["evaluation"] / "report.html").exists() for row in rows):
            return finish(config.out, rows, "is finished already")
    began = time.monotonic()
    rows = make(config.out, config.epochs)
    home.put(RESULTS, json.dumps(rows, indent=1).encode() + b"\n")
    return finish(config.out, rows, f"made in {duration(time.monotonic() - began)}")


def make(out: Path, epochs: float) -> list[dict[str, Any]]:
    """The stages in turn, each as its own command would run it -> the rows of the table."""
    store, scored = out / "store", out / "store-evaluation"
    step(export_teacher, data=DATA, teacher=TEACHER, out=store, views=VIEWS)
    learned = step(
        distill, store=store, student=STUDENTS, method=METHOD, out=out / "students", epochs=epochs,
        batch_size=BATCH, lr=RATE, schedule="cosine", image_size=SIZE,
    )  # fmt: skip
    rows = [score("teacher", TEACHER, scored, store=store)]
    beside = {"train": DATA, "teacher": scored}
    for spec, folder in zip(STUDENTS, map(Path, learned["runs"]), strict=True):
        untrained = out / "untrained" / folder.name
        rows.append(score("student", spec, folder / "evaluation", run=folder))
        rows.append(score("untrained", spec, untrained, model=spec, image_size=SIZE, out=untrained, **beside))
    rows.append(score("raw pixels", "8 x 8", out / "pixels", model=PIXELS, out=out / "pixels", **beside))
    step(compare, folder=tuple(row["evaluation"] for row in rows), out=out / "compare.html")
    return rows


def step(stage: ModuleType, **settings: Any) -> dict[str, Any]:
    """Say the command, run it, say what came of it."""
    config = stage.Config(**settings)
    say(f"\n$ {command(stage, config)}")
    made = stage.run(config)
    say(made["summary"].rstrip())
    return made


def command(stage: ModuleType, config: Any) -> str:
    """What a user would type for this Config."""
    words = ["compress", stage.__name__.rpartition(".")[2].replace("_", "-")]
    for f in fields(config):
        if (value := getattr(config, f.name)) != f.default:
            for each in value if isinstance(value, tuple) else (value,):
                words += [str(each)] if f.metadata["place"] else [f"--{f.name.replace('_', '-')}", str(each)]
    return shlex.join(words)


def score(role: str, name: str, folder: Path, **subject: Any) -> dict[str, Any]:
    """Evaluate into a folder -> a row of the table, whose cluster alignment is that of STARTS k-means runs."""
    metrics = step(evaluate, val=VAL, protocol=PROTOCOLS, workers=0, **subject)["metrics"]
    train, val = features(subject.get("store", folder / "features" / "train")), features(folder / "features" / "val")
    starts = alignment(train, val, folder)
    return {
        "role": role,
        "name": name,
        "nn": metrics["nn"]["top1"],
        "knn": metrics["knn"]["20"]["top1"],
        "cluster": statistics.mean(starts),
        "spread": statistics.stdev(starts),
        "width": metrics["model"]["width"],
        "parameters": metrics["model"]["parameters"],
        "evaluation": str(folder),
    }


def features(folder: Path) -> "Split":
    """View 0 of a store of the digits, as a protocol wants it."""
    import numpy as np

    from pipeline.datasets import DATASETS
    from pipeline.evaluators.base import Split
    from pipeline.store import FeatureStore

    store = FeatureStore(Folder(folder))
    classes = DATASETS.order(DATA).classes
    return Split(store.read("embedding", 0), store.table("label"), np.arange(store.images), classes)


def alignment(train: "Split", val: "Split", folder: Path) -> list[float]:
    """Cluster alignment from STARTS random beginnings of k-means: with ten clusters, one alone is a lottery."""
    from pipeline.evaluators import PROTOCOLS as menu

    return [menu.order(f"cluster:seed={n}")(train, val, folder).metrics["top1"] for n in range(STARTS)]


def finish(out: Path, rows: list[dict[str, Any]], how: str) -> dict[str, Any]:
    """The closing table, what it means, and where the pages are."""
    reports = [f"  {Path(row['evaluation']) / 'report.html'}" for row in rows]
    lines = [table(rows), "", MEANING, "", "Reports:", *reports, f"  {out / 'compare.html'}  (all of them)"]
    said = "\n".join([*lines, f"demo {how}: {out}"])
    return {"summary": said, "demo": str(out), "rows": rows, "page": str(out / "compare.html")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, scores in percent."""
    head = ["", "", "NN", "kNN 20", "cluster", "", "width", "parameters"]
    cells = [head] + [
        [
            row["role"], row["name"], f"{row['nn']:.1f}", f"{row['knn']:.1f}", f"{row['cluster']:.1f}",
            f"± {row['spread']:.1f}", str(row["width"]), amount(row["parameters"]),
        ]
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
