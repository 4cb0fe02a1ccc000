"""Shared by the experiments: a store, runs by arm and seed, their scores, one table.

    OUT/teacher/            the store, and others under their names
    OUT/runs/ARM/seed-S/    what was trained
    OUT/scores/ARM/seed-S/  its evaluation
    OUT/results.json        the table, and the machine it was made on

Every part is a stage's own folder, so the same command again does what is missing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.__main__ import describe_machine
from compress_ssl.pipeline.runtime import jsonl
from compress_ssl.stages import distill, evaluate, export_teacher

SEEDS = (0, 1)
STARTS = 20  # k-means runs per score: the score of a single run depends strongly on its random start
PROTOCOLS = ("nn", "knn:k=20", "linear")
CLUSTERS = tuple(f"cluster:seed={start}" for start in range(STARTS))


def asked(doc: str | None, arms: Iterable[str]) -> argparse.Namespace:
    """--out, --images and --only of an experiment's command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; finished parts are kept")
    parser.add_argument("--images", type=Path, default=Path("cifar10"), help="holds train/ and test/, class folders")
    parser.add_argument("--only", choices=tuple(arms), help="run this arm alone; the table shows all that is there")
    return parser.parse_args()


@dataclass(frozen=True)
class Experiment:
    """Arms that learn from the same images, are scored by the same protocols and stand in one table."""

    out: Path
    images: Path
    protocols: tuple[str, ...] = PROTOCOLS
    workers: int = 0  # with a small student, loader processes only compete with it for the cores

    @property
    def train(self) -> str:
        return str(self.images / "train")

    def export(self, name: str = "teacher", **settings: Any) -> Path:
        """The store OUT/NAME."""
        out = self.out / name
        export_teacher.run(export_teacher.Config(data=self.train, out=out, workers=self.workers, **settings))
        return out

    def references(self, store: Path, student: str, images: int) -> None:
        """Score the teacher and the untrained student."""
        self.score("teacher", store=store)
        self.score("untrained", model=student, train=self.train, limit=images)

    def distill(self, arm: str, seed: int, **settings: Any) -> None:
        """Train and score the student of an arm; of several students only the first is scored."""
        out = self.out / "runs" / arm / f"seed-{seed}"
        made = distill.run(distill.Config(out=out, seed=seed, workers=self.workers, **settings))
        self.score(arm, seed, run=Path(made["runs"][0]))

    def score(self, arm: str, seed: int = 0, **subject: Any) -> None:
        """Evaluate a `run`, `store` or `model` as a row of the table."""
        out, val = self.out / "scores" / arm / f"seed-{seed}", str(self.images / "test")
        config = evaluate.Config(val=val, protocol=self.protocols, out=out, workers=self.workers, **subject)
        evaluate.run(config)

    def finish(self, arms: Mapping[str, str], columns: Iterable[str]) -> None:
        """Print the table of {arm: what it is} as Markdown, as far as it is there, and write OUT/results.json."""
        rows = {arm: found for arm in arms if (found := self._found(arm))}
        lines = [["", *columns], ["---"] * (1 + len([*columns]))]
        lines += [[arms[arm], *(_cell(found, column) for column in columns)] for arm, found in rows.items()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        results = {"machine": describe_machine(), "when": time.strftime("%Y-%m-%d"), "rows": rows}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table)

    def _found(self, arm: str) -> list[dict[str, list[float]]]:
        """The finished scores of an arm: one {column: scores} per seed."""
        homes = sorted((self.out / "scores" / arm).glob("seed-*"))
        return [_scores(home) | _loss(self.out / "runs" / arm / home.name) for home in homes]


def _scores(evaluation: Path) -> dict[str, list[float]]:
    """{column: scores} of an evaluation; Cluster has one of each k-means start."""
    scores: dict[str, list[float]] = {}
    for file in sorted((evaluation / "results").glob("*.json")):
        saved = json.loads(file.read_text())
        name, metrics = saved["name"], saved["metrics"]
        title = {"nn": "NN", "knn": "kNN 20", "linear": "Linear", "cluster": "Cluster"}[name]
        found = metrics["20"] if name == "knn" else metrics["last"] if name == "linear" else metrics
        scores.setdefault(title, []).append(found["top1"])
    return scores


def _loss(run: Path) -> dict[str, list[float]]:
    """The training loss in nats, the mean of the last tenth of what was logged."""
    losses = [row["loss"] for row in jsonl.read_jsonl(run / "metrics.jsonl") if "loss" in row]
    return {"Loss": [statistics.mean(losses[-max(1, len(losses) // 10) :])]} if losses else {}


def _cell(found: list[dict[str, list[float]]], column: str) -> str:
    """The mean over seeds and, where there are several, half of what lies between the extremes.

    Of Cluster, the mean over all starts of all seeds and their standard deviation.
    """
    values = [value for scores in found for value in scores.get(column, [])]
    if not values:
        return "-"
    digits = 3 if column == "Loss" else 1
    spread = statistics.stdev(values) if len(values) > len(found) else (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")
