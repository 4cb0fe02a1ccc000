"""`compress sweep FILE.yaml`: a grid of students, methods and stores, trained, scored and compared.

A command made of commands: it writes no file of its own but the page at the end. Commands that look at the same
images in the same order share one pass over them.
"""

import itertools
import re
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import flag
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.runtime.storage import open_storage
from compress_ssl.stages import compare, distill, evaluate

NUMBER = re.compile(r"[-+]?[0-9.]+e[-+]?[0-9]+")
"""1e-3 and the like, which YAML takes for text unless they have a dot and a sign."""

KEYS = ("out", "store", "student", "method", "at_once", "distill", "evaluate")


@dataclass(frozen=True)
class Config:
    """Run a grid from a YAML file, with as few passes over the images as it takes.

    `store`, `method` and any flag under `distill` may be a list: every combination is run. Those that
    look at the same images in the same order (methods, rates, ...) are trained in one pass, up to
    `at_once` students of them. The same command again continues, and adds what was added to the file.
    """

    file: Path = flag(help="keys: out, store, student, method, at_once; distill, evaluate hold their flags", place=True)
    dry_run: bool = flag(False, "list the passes")


@dataclass(frozen=True)
class Cell:
    """One distill command: all students of one combination."""

    name: str  # of its folder, below the sweep's
    config: distill.Config


def run(config: Config) -> dict[str, Any]:
    """Returns {"summary", "passes", "runs", "page"}. Raises UserError at the end if a combination failed."""
    plan = read(config.file)
    cells = list(cells_of(plan))
    for name, count in Counter(cell.name for cell in cells).items():
        if count > 1:
            raise UserError(f"{count} combinations would share the folder {name}; rename a store, or take one out")
    scoring = options(
        evaluate.Config,
        plan.get("evaluate") or {},
        f"evaluate of {config.file}",
        without=("run", "store", "model", "out"),
    )
    for protocol in scoring.get("protocol", ()):
        PROTOCOLS.check(protocol)
    for store in dict.fromkeys(cell.config.store for cell in cells):
        artifact.read(open_storage(store), "store")
    for cell in cells:
        distill.check(cell.config)  # all of them before the first begins
    passes = passes_of(cells, plan.get("at_once"))
    names = [" + ".join(cell.name for cell in one) for one in passes]
    if config.dry_run:
        students = sum(len(cell.config.student) for cell in cells)
        return {
            "summary": "\n".join(
                [*names, f"{len(passes)} pass{'es' * (len(passes) > 1)} over the images for {students} students"]
            ),
            "passes": names,
        }
    unfinished: dict[Path, str] = {}
    for number, one in enumerate(passes):
        echo(f"pass {number + 1} of {len(passes)}: {names[number]}")
        unfinished |= train(one)
    places = [folder for cell in cells for folder in distill.run_folders(cell.config)]
    runs = [folder for folder in places if folder not in unfinished]
    rows = score(cells, runs, scoring)
    page = Path(plan["out"]) / "compare.html"
    made = compare.run(compare.Config(tuple(map(str, rows)), page)) if rows else {"summary": "nothing to compare"}
    if failed := list(dict.fromkeys(unfinished.values())):
        rest = f"; the others are in {page}" if rows else ""
        raise UserError(f"{len(failed)} of {len(cells)} combinations failed, the first is {failed[0]}{rest}")
    return {"summary": made["summary"], "passes": names, "runs": list(map(str, runs)), "page": str(page)}


def passes_of(cells: Sequence[Cell], at_once: int | None) -> list[list[Cell]]:
    """Cells that can share a pass over the images together, up to so many students; else one by one."""
    groups: dict[Any, list[list[Cell]]] = {}
    for cell in cells:
        alike = groups.setdefault(distill.data_pass_key(cell.config), [[]])
        if at_once and sum(len(other.config.student) for other in [*alike[-1], cell]) > at_once and alike[-1]:
            alike.append([])
        alike[-1].append(cell)
        if cell.config.devices:  # ranks are started by a command of one method
            alike.append([])
    return [one for alike in groups.values() for one in alike if one]


def train(cells: Sequence[Cell]) -> dict[Path, str]:
    """One pass -> why a run is not finished, by its folder. If it cannot be shared, each cell alone."""
    finished: Sequence[Path] = ()
    try:
        if len(cells) > 1:
            distill.train_together([cell.config for cell in cells])
        else:
            distill.run(cells[0].config)
        return {}
    except distill.CannotSharePass as problem:
        echo(f"not in one pass: {problem}")
        return {folder: why for cell in cells for folder, why in train([cell]).items()}
    except distill.PartialFailure as problem:
        why, finished = str(problem), problem.finished
    except UserError as problem:
        why = str(problem)
    except SystemExit as end:  # of ranks; they have said why
        if end.code != 2:
            raise
        why = "a rank failed, see above"
    said = {
        folder: f"{cell.name}: {why}"
        for cell in cells
        for folder in distill.run_folders(cell.config)
        if folder not in finished
    }
    for failure in dict.fromkeys(said.values()):
        echo(f"failed: {failure}")
    return said


def score(cells: Sequence[Cell], runs: list[Path], scoring: dict[str, Any]) -> list[Path]:
    """Evaluations of the teachers and of the runs, for `compare`; none if the file says nothing of evaluating."""
    if not scoring:
        return []
    stores = dict.fromkeys(cell.config.store for cell in cells)
    asked = [evaluate.Config(**scoring, store=store) for store in stores]
    return [*map(evaluation, asked), *(evaluation(evaluate.Config(**scoring, run=folder)) for folder in runs)]


def evaluation(asked: evaluate.Config) -> Path:
    """Its folder. One of a run that has been trained on since is set aside."""
    try:
        return Path(evaluate.run(asked)["evaluation"])
    except artifact.Mismatch as other:
        if other.differing != ["model.weights"]:
            raise
    return Path(evaluate.run(replace(asked, overwrite=True))["evaluation"])


def read(file: Path) -> dict[str, Any]:
    """The file as a dictionary with known keys. Raises UserError."""
    import yaml

    try:
        plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give a YAML file with {', '.join(KEYS)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        raise UserError(f"{file} is no YAML: {' '.join(str(wrong).split())[:200]}") from None
    if not isinstance(plan, dict):
        raise UserError(f"{file} holds no keys; it needs {', '.join(KEYS)}")
    for key in plan:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS) or "."
            raise UserError(f"{file} has an unknown key {key!r}{hint} Known: {', '.join(KEYS)}")
    if missing := [key for key in ("out", "store", "student", "method") if not plan.get(key)]:
        raise UserError(f"{file} lacks {' and '.join(missing)}")
    limit = plan.get("at_once")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UserError(f"at_once is {limit!r}, but must be a number of students, 1 or more")
    return plan


def cells_of(plan: Mapping[str, Any]) -> Iterator[Cell]:
    """Every combination of stores, methods and lists under `distill`."""
    asked = {key.replace("-", "_"): value for key, value in (plan.get("distill") or {}).items()}
    axes = {key: value for key, value in asked.items() if isinstance(value, list)}
    fixed = {key: value for key, value in asked.items() if key not in axes}
    stores, methods = listed(plan["store"]), listed(plan["method"])
    for store, method, *values in itertools.product(stores, methods, *axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        folder = "/".join([safe(Path(store).name)] * (len(stores) > 1) + [safe(method)])
        said = options(distill.Config, fixed | chosen, "distill", without=("store", "student", "method", "out"))
        folder += "".join(f",{key}={safe(text(said[key]))}" for key in chosen)
        where = Path(plan["out"]) / folder
        given = {"store": store, "student": tuple(listed(plan["student"])), "method": method, "out": where}
        yield Cell(folder, distill.Config(**typed(distill.Config, given), **said))


def options(config: Any, asked: Mapping[str, Any], where: str, without: tuple[str, ...]) -> dict[str, Any]:
    """Flags of a command as keyword arguments of its Config. Raises UserError for unknown ones."""
    known = [f.name for f in fields(config) if f.name not in (*without, "overwrite")]
    said = {key.replace("-", "_"): value for key, value in asked.items()}
    for key in said:
        if key not in known:
            raise UserError(f"{where} has no flag {key!r}{did_you_mean(key, known) or '.'} Known: {', '.join(known)}")
    required = [f.name for f in fields(config) if f.default is MISSING and f.name in known]
    if said and (missing := [name for name in required if name not in said]):
        raise UserError(f"{where} needs {missing[0]}")
    return typed(config, said)


def typed(config: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the fields of a Config want them: paths, tuples, numbers. Raises UserError."""
    hints = typing.get_type_hints(config)
    out = {}
    for key, value in said.items():
        kinds = typing.get_args(hints[key]) or (hints[key],)
        if float in kinds and isinstance(value, str) and NUMBER.fullmatch(value):
            value = float(value)
        if typing.get_origin(hints[key]) is tuple:
            value = tuple(map(str, listed(value)))
        elif Path in kinds:
            value = Path(value).expanduser()
        elif float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif not isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type))):
            wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise UserError(f"{key} is {value!r}, but must be {wanted}")
        out[key] = value
    return out


def listed(value: Any) -> list[str]:
    """One or many, as text."""
    return [str(each) for each in (value if isinstance(value, list | tuple) else [value])]


def text(value: Any) -> str:
    """A value in a folder's name: 0.01, 1e-2 and 0.010 are one."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def safe(text: str) -> str:
    """A piece of a folder's name."""
    return re.sub(r"[^\w.=,+-]+", "-", text).strip("-")
