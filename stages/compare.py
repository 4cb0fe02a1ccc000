"""`compress compare DIR...`: one table and page over many evaluations, the teacher first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import flag
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage


@dataclass(frozen=True)
class Config:
    """One table and page over many evaluations, the teacher as the first row."""

    folder: tuple[str, ...] = flag(help="evaluations, or runs and stores that have one; folders or URLs", place=True)
    out: Path = flag(Path("compare.html"), "the page to write")


def run(config: Config) -> dict[str, Any]:
    """Write the page. Returns {"summary": table and path, "rows": the metrics}."""
    rows = [metrics(folder) for folder in config.folder]

    from compress_ssl.pipeline.report.comparison import compare

    table, page = compare(rows)
    Folder(config.out.parent).put(config.out.name, page.encode())
    return {"summary": f"{table}\n{config.out}", "rows": rows, "page": str(config.out)}


def metrics(folder: str) -> dict[str, Any]:
    """metrics.json of an evaluation, or of the evaluation of a run or a store; any of them may be a URL."""
    name = folder.rstrip("/") or folder
    places = [name, f"{name}/evaluation", *([f"{name}-evaluation"] if is_url(name) else [])]
    places.append(str(artifact.sibling(name, "-evaluation")))
    for place in places:
        storage = open_storage(place)
        if storage.exists(artifact.MANIFEST) and storage.exists("metrics.json"):
            artifact.read(storage, "evaluation")
            return artifact.read_json(storage, "metrics.json")
    looked = ", ".join(map(str, places))
    raise UserError(f"{folder} has no evaluation; make one with compress evaluate (looked in {looked})")
