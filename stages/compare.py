"""`compress compare DIR...`: one table and one page over many evaluations, teachers first."""

from dataclasses import dataclass
from pathlib import Path

from compress_ssl.pipeline.evaluators.record import METRICS, Evaluation, read_evaluation
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import CommandResult, flag
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage


@dataclass(frozen=True)
class Config:
    """One table and one page over many evaluations, with the teacher in the first row."""

    folder: tuple[str, ...] = flag(
        help="Evaluations, or runs and stores that have one: folders or URLs.", metavar="FOLDER", place=True
    )
    out: Path = flag(Path("compare.html"), "The page to write.", metavar="FILE")


def run(config: Config) -> CommandResult:
    """Write the page. Returns {"summary": table and path, "rows": each metrics.json, "page"}.

    Raises UserError for a folder without an evaluation.
    """
    rows = [find_evaluation(folder) for folder in config.folder]

    from compress_ssl.pipeline.report.comparison import compare

    table, page = compare(rows)
    Folder(config.out.parent).put(config.out.name, page.encode())
    return {"summary": f"{table}\n{config.out}", "rows": [row.to_json() for row in rows], "page": str(config.out)}


def find_evaluation(folder: str) -> Evaluation:
    """The evaluation in a folder, or that of a run or a store; any of them may be a URL.

    Raises UserError if there is none in any of the places where compress evaluate writes it by default.
    """
    name = folder.rstrip("/") or folder
    places = [name, f"{name}/evaluation"]
    if is_url(name):
        places.append(f"{name}-evaluation")
    places.append(str(artifact.sibling(name, "-evaluation")))
    for place in places:
        storage = open_storage(place)
        if storage.exists(artifact.MANIFEST) and storage.exists(METRICS):
            artifact.read(storage, "evaluation")
            return read_evaluation(storage)
    searched = ", ".join(places)
    raise UserError(
        f"{folder} has no evaluation; make one with compress evaluate --run {folder}, or --store {folder} "
        f"for a teacher (searched {searched})"
    )
