"""`compress sweep FILE.yaml`: train, evaluate and compare a grid of students, methods and stores.

A sweep runs the commands `distill`, `evaluate` and `compare`; of its own, it writes nothing. Combinations that need
the same images in the same order share one pass over them (`distill.Job.data_pass_key`).
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import CommandResult, check_choices, flag
from compress_ssl.pipeline.runtime.config_values import as_texts, build, convert_values, parse_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.spec import did_you_mean
from compress_ssl.pipeline.runtime.storage import local_path, open_storage
from compress_ssl.pipeline.runtime.yaml_file import read_yaml
from compress_ssl.pipeline.training.export_students import PartialFailure
from compress_ssl.stages import compare, distill, evaluate

KEYS = ("out", "store", "student", "method", "at_once", "distill", "evaluate")
"""The keys of a sweep's file."""

MAX_COMBINATIONS = 10_000  # of stores, methods and flags; lists of ten values multiply quickly


@dataclass(frozen=True)
class Config:
    """Run a grid from a YAML file, with as few passes over the images as possible.

    `store`, `method` and any flag under `distill` may be a list: every combination is run. Combinations that need the
    same images in the same order (other methods, learning rates, ...) are trained in one pass, up to `at_once`
    students at a time. Running the same command again continues, and also runs what was added to the file.
    """

    file: Path = flag(
        help="A YAML file with the keys out, store, student, method and at_once; its keys distill and evaluate hold "
        "flags of these commands.",
        metavar="FILE",
        place=True,
    )
    dry_run: bool = flag(False, "List the passes without running them.")


@dataclass(frozen=True)
class Plan:
    """The content of a sweep's file."""

    out: Path
    store: tuple[str, ...]
    student: tuple[str, ...]
    method: tuple[str, ...]
    at_once: int | None
    distill: Mapping[str, object]  # flags, with underscores in their names; a list is an axis of the grid
    evaluate: Mapping[str, object]


@dataclass(frozen=True)
class Cell:
    """One combination of the grid: a distill command that trains all students of the sweep."""

    name: str  # of its folder, relative to the sweep's
    config: distill.Config

    @cached_property
    def job(self) -> distill.Job:
        """The command with its specs parsed and what its folder recorded, as it was before the sweep began."""
        return distill.resolve(self.config)


def run(config: Config) -> CommandResult:
    """Returns {"summary", "passes", "runs", "page"}; of a dry run, the first two.

    Raises UserError before anything is trained for what can be checked, and at the end if a combination failed.
    """
    plan = read_plan(config.file)
    cells = list(expand_cells(plan))
    evaluation_flags = check_plan(plan, cells, config.file)
    passes = group_into_passes(cells, plan.at_once)
    names = [" + ".join(cell.name for cell in group) for group in passes]
    if config.dry_run:
        students = sum(len(cell.config.student) for cell in cells)
        total = f"{len(passes)} pass{'es' * (len(passes) > 1)} over the images for {students} students"
        return {"summary": "\n".join([*names, total]), "passes": names}

    # ---------------------------------------------------------------- training
    unfinished: dict[Path, str] = {}
    for number, group in enumerate(passes):
        echo(f"pass {number + 1} of {len(passes)}: {names[number]}")
        unfinished |= train(group)

    # ---------------------------------------------------------------- evaluation
    folders = [folder for cell in cells for folder in cell.job.folders]
    runs = [folder for folder in folders if folder not in unfinished]
    evaluations = evaluate_all(cells, runs, evaluation_flags)
    page = plan.out / "compare.html"
    if evaluations:
        summary = compare.run(compare.Config(tuple(map(str, evaluations)), page))["summary"]
    else:
        summary = "nothing to compare"

    failed = list(dict.fromkeys(unfinished.values()))
    if failed:
        rest = f"; the others are in {page}" if evaluations else ""
        raise UserError(f"{len(failed)} of {len(cells)} combinations failed, the first is {failed[0]}{rest}")
    return {"summary": summary, "passes": names, "runs": list(map(str, runs)), "page": str(page)}


def check_plan(plan: Plan, cells: Sequence[Cell], file: Path) -> dict[str, object]:
    """Check every combination, the evaluation and the stores, before the first combination is trained.

    Returns the flags of `evaluate`, converted to the types of its Config. Raises UserError.
    """
    for name, count in Counter(cell.name for cell in cells).items():
        if count > 1:
            raise UserError(f"{count} combinations would share the folder {name}; rename a store, or take one out")
    set_by_sweep = ("run", "store", "model", "out")
    flags = parse_flags(evaluate.Config, plan.evaluate, f"evaluate of {file}", without=set_by_sweep)
    if flags:
        evaluation = build(evaluate.Config, flags)
        check_choices(evaluation)
        for protocol in evaluation.protocol:
            PROTOCOLS.check(protocol)
    for store in dict.fromkeys(cell.config.store for cell in cells):
        artifact.read(open_storage(store), "store")
    for cell in cells:
        distill.check(cell.config)
    return flags


# ---------------------------------------------------------------- training


def group_into_passes(cells: Sequence[Cell], at_once: int | None) -> list[list[Cell]]:
    """Groups of cells that can share a pass over the images, with at most `at_once` students each.

    A single cell with more students than that is a group of its own.
    """
    by_key: dict[Hashable, list[list[Cell]]] = {}
    for cell in cells:
        groups = by_key.setdefault(cell.job.data_pass_key, [[]])
        students = sum(len(other.config.student) for other in [*groups[-1], cell])
        if at_once and students > at_once and groups[-1]:
            groups.append([])
        groups[-1].append(cell)
        if cell.config.devices:  # a launcher starts ranks for one distill command, so for one cell
            groups.append([])
    return [group for groups in by_key.values() for group in groups if group]


def train(cells: Sequence[Cell]) -> dict[Path, str]:
    """Train cells in one pass, or one by one if they cannot share it.

    Returns the folders of the runs that are not finished, each with the error that ended it.
    """
    finished: Sequence[Path] = ()
    try:
        if len(cells) > 1:
            distill.train_together([cell.job for cell in cells])
        else:
            distill.run(cells[0].config)
        return {}
    except distill.CannotSharePass as problem:
        echo(f"not in one pass: {problem}")
        return {folder: why for cell in cells for folder, why in train([cell]).items()}
    except PartialFailure as problem:
        why, finished = str(problem), problem.finished
    except UserError as problem:
        why = str(problem)
    except SystemExit as end:  # raised by the launcher of ranks, which have printed their error
        if end.code != 2:  # 2: a UserError; everything else ends the sweep too
            raise
        why = "a rank failed, see above"
    unfinished = {
        folder: f"{cell.name}: {why}" for cell in cells for folder in cell.job.folders if folder not in finished
    }
    for failure in dict.fromkeys(unfinished.values()):
        echo(f"failed: {failure}")
    return unfinished


# ---------------------------------------------------------------- evaluation


def evaluate_all(cells: Sequence[Cell], runs: list[Path], flags: dict[str, object]) -> list[Path]:
    """Evaluate the teacher of each store and each run, for `compare`; returns the evaluations' folders.

    flags: of `evaluate`; nothing is evaluated without any.
    """
    if not flags:
        return []
    stores = dict.fromkeys(cell.config.store for cell in cells)
    teachers = [build(evaluate.Config, {**flags, "store": store}) for store in stores]
    students = [build(evaluate.Config, {**flags, "run": folder}) for folder in runs]
    return [run_evaluation(config) for config in [*teachers, *students]]


def run_evaluation(config: evaluate.Config) -> Path:
    """Evaluate and return the evaluation's folder.

    If the folder holds an evaluation of the same run with earlier weights, that one is moved aside.
    """
    try:
        return Path(str(evaluate.run(config)["evaluation"]))
    except artifact.Mismatch as mismatch:
        if mismatch.differing != ["model.weights"]:
            raise
    return Path(str(evaluate.run(replace(config, overwrite=True))["evaluation"]))


# ---------------------------------------------------------------- the file


def read_plan(file: Path) -> Plan:
    """The content of a sweep's file. Raises UserError if it is not YAML, or has unknown, missing or malformed keys."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no keys; it needs {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            hint = did_you_mean(key, KEYS) or "."
            raise UserError(f"{file} has an unknown key {key!r}{hint} Known: {', '.join(KEYS)}")
    missing = [key for key in ("out", "store", "student", "method") if not content.get(key)]
    if missing:
        raise UserError(f"{file} lacks {' and '.join(missing)}")
    limit = content.get("at_once")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UserError(f"at_once is {limit!r}, but must be a number of students, 1 or more")
    if not isinstance(content["out"], str):
        raise UserError(f"out is {shorten(repr(content['out']), 80)}, but must be a folder")
    return Plan(
        out=local_path(content["out"]),
        store=as_texts(content["store"], "store"),
        student=as_texts(content["student"], "student"),
        method=as_texts(content["method"], "method"),
        at_once=limit,
        distill=_section(content.get("distill"), "distill"),
        evaluate=_section(content.get("evaluate"), "evaluate"),
    )


def _section(value: object, key: str) -> dict[str, object]:
    """The flags of a command, with underscores in their names. Raises UserError if `value` holds no flags."""
    if not isinstance(value, dict | None):
        raise UserError(f"{key} is {shorten(repr(value), 80)}, but must hold flags of compress {key}, as in epochs: 20")
    return {name.replace("-", "_"): entry for name, entry in (value or {}).items()}


def expand_cells(plan: Plan) -> Iterator[Cell]:
    """Every combination of the stores, the methods and the lists under `distill`. Raises UserError for bad flags."""
    axes = {key: value for key, value in plan.distill.items() if isinstance(value, list)}
    fixed = {key: value for key, value in plan.distill.items() if key not in axes}
    count = math.prod(map(len, (plan.store, plan.method, *axes.values())))
    if count > MAX_COMBINATIONS:
        raise UserError(f"the file means {count} combinations, and a sweep runs at most {MAX_COMBINATIONS}; split it")
    if not count:
        raise UserError(f"distill: {next(key for key in axes if not axes[key])} is an empty list; give a value")
    set_by_sweep = ("store", "student", "method", "out")
    for store, method, *values in itertools.product(plan.store, plan.method, *axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        parsed = parse_flags(distill.Config, fixed | chosen, "distill", without=set_by_sweep)
        folder = "/".join([folder_part(Path(store).name)] * (len(plan.store) > 1) + [folder_part(method)])
        folder += "".join(f",{key}={folder_part(format_value(parsed[key]))}" for key in chosen)
        given = {"store": store, "student": plan.student, "method": method, "out": str(plan.out / folder)}
        yield Cell(folder, build(distill.Config, {**convert_values(distill.Config, given), **parsed}))


def format_value(value: object) -> str:
    """A flag's value for a folder's name; equal numbers have one text, so that 0.01 and 1e-2 are one folder."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def folder_part(text: str) -> str:
    """The text with characters that do not belong in a folder's name replaced by hyphens."""
    return re.sub(r"[^\w.=,+-]+", "-", text).strip("-")
