"""The parts that the experiments share: a store, runs by arm and seed, their scores in percent, one table.

An arm is one setting that an experiment compares with others, such as a method.

    OUT/teacher/            the store; further stores are in folders of their own names
    OUT/runs/ARM/seed-S/    a training run
    OUT/scores/ARM/seed-S/  the evaluation of that run
    OUT/results.json        the scores, and the machine that computed them

Every folder belongs to one stage, so running the same command again does only what is missing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from benchmarks.__main__ import describe_machine
from compress_ssl.pipeline.runtime import jsonl
from compress_ssl.stages import distill, evaluate, export_teacher

SEEDS = (0, 1)
STARTS = 20  # k-means runs per score: the score of a single run depends strongly on its random start
PROTOCOLS = ("nn", "knn:k=20", "linear")
CLUSTERS = tuple(f"cluster:seed={start}" for start in range(STARTS))


def parse_arguments(doc: str | None, arms: Iterable[str]) -> argparse.Namespace:
    """Parse --out, --images and --only from the command line of an experiment with these arms."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment; finished parts are kept")
    parser.add_argument(
        "--images", type=Path, default=Path("cifar10"), help="folder with train/ and test/, which hold class folders"
    )
    parser.add_argument("--only", choices=tuple(arms), help="run this arm alone; the table shows all arms with scores")
    return parser.parse_args()


@dataclass(frozen=True)
class Experiment:
    """Arms that are trained on the same images, scored by the same protocols and compared in one table."""

    out: Path
    images: Path
    protocols: tuple[str, ...] = PROTOCOLS
    workers: int = 0  # with a small student, loader processes only compete with it for the cores

    @property
    def train(self) -> str:
        return str(self.images / "train")

    def export(self, name: str = "teacher", **settings: Any) -> Path:
        """Export the store OUT/NAME and return its path."""
        out = self.out / name
        export_teacher.run(export_teacher.Config(data=self.train, out=str(out), workers=self.workers, **settings))
        return out

    def references(self, store: Path, student: str, images: int) -> None:
        """Score the teacher and the untrained student."""
        self.score("teacher", store=store)
        self.score("untrained", model=student, train=self.train, limit=images)

    def distill(self, arm: str, seed: int, **settings: Any) -> None:
        """Train and score the student of an arm; if there are several students, only the first is scored."""
        out = self.out / "runs" / arm / f"seed-{seed}"
        result = distill.run(distill.Config(out=out, seed=seed, workers=self.workers, **settings))
        self.score(arm, seed, run=Path(cast(list[str], result["runs"])[0]))

    def score(self, arm: str, seed: int = 0, **subject: Any) -> None:
        """Evaluate a `run`, `store` or `model` for the table; `subject` holds the flags of `evaluate` that name it."""
        out, val = self.out / "scores" / arm / f"seed-{seed}", str(self.images / "test")
        together = tuple(protocol for protocol in self.protocols if protocol not in CLUSTERS)
        # k-means runs have one entry of metrics.json, so each is a command; results/ keeps all of them
        alone = [(protocol,) for protocol in self.protocols if protocol in CLUSTERS]
        for protocols in [together, *alone]:
            evaluate.run(evaluate.Config(val=val, protocol=protocols, out=out, workers=self.workers, **subject))

    def finish(self, arms: Mapping[str, str], columns: Iterable[str]) -> None:
        """Print the table in Markdown and write OUT/results.json; arms without scores are left out.

        arms: {arm: name of its row}. columns: names of scores, such as "NN".
        """
        rows = {arm: self._read_scores(arm) for arm in arms}
        rows = {arm: scores for arm, scores in rows.items() if scores}
        lines = [["", *columns], ["---"] * (1 + len([*columns]))]
        lines += [[arms[arm], *(_format_cell(scores, column) for column in columns)] for arm, scores in rows.items()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        results = {"machine": describe_machine(), "when": time.strftime("%Y-%m-%d"), "rows": rows}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table)

    def _read_scores(self, arm: str) -> list[dict[str, list[float]]]:
        """The scores of an arm that are finished: one {column: scores} per seed."""
        evaluations = sorted((self.out / "scores" / arm).glob("seed-*"))
        return [_read_evaluation(folder) | _read_loss(self.out / "runs" / arm / folder.name) for folder in evaluations]


def _read_evaluation(evaluation: Path) -> dict[str, list[float]]:
    """{column: scores in percent} of an evaluation; Cluster has one score per k-means start, the others have one."""
    scores: dict[str, list[float]] = {}
    for file in sorted((evaluation / "results").glob("*.json")):
        saved = json.loads(file.read_text())
        name, metrics = saved["name"], saved["metrics"]
        title = {"nn": "NN", "knn": "kNN 20", "linear": "Linear", "cluster": "Cluster"}[name]
        selected = metrics["20"] if name == "knn" else metrics["last"] if name == "linear" else metrics
        scores.setdefault(title, []).append(selected["top1"])
    return scores


def _read_loss(run: Path) -> dict[str, list[float]]:
    """{"Loss": [the training loss in nats, as the mean of the last tenth of the logged values]}; {} without a log."""
    losses = [row["loss"] for row in jsonl.read_jsonl(run / "metrics.jsonl") if "loss" in row]
    return {"Loss": [statistics.mean(losses[-max(1, len(losses) // 10) :])]} if losses else {}


def _format_cell(of_seeds: list[dict[str, list[float]]], column: str) -> str:
    """Mean over seeds ± half of the difference between the largest and the smallest; "-" without scores.

    For Cluster: mean ± standard deviation over all k-means starts of all seeds.
    """
    values = [value for scores in of_seeds for value in scores.get(column, [])]
    if not values:
        return "-"
    digits = 3 if column == "Loss" else 1
    spread = statistics.stdev(values) if len(values) > len(of_seeds) else (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")
