"""Who learns in a command, and the folder of each one's run."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder


def run_folders(out: Path, students: Sequence[str], peers: Callable[[], bool]) -> list[Path]:
    """OUT itself for one student, OUT/NAME for each of several; a peer named twice is NAME and NAME-2.

    One that is left of several, or joins them alone, has its run among theirs. peers: whether the method
    teaches them together; asked only if a student is named twice.
    """
    names = ["".join(c if c.isalnum() or c in "-_." else "-" for c in student) for student in students]
    if len(students) == 1 and not _holds_runs(out):
        return [out]
    if len(set(students)) < len(students) and peers():
        again = [students[:n].count(student) for n, student in enumerate(students)]
        names = [f"{name}-{n + 1}" if n else name for name, n in zip(names, again, strict=True)]
    return [out / name for name in names]


def require_run_folders(out: Path, students: Sequence[str], places: Sequence[Path], overwrite: bool) -> None:
    """Raises UserError unless each student has a run folder of its own, new, a run's, or replaceable."""
    taken: dict[Path, str] = {}
    for student, place in zip(students, places, strict=True):
        if place in taken:
            raise UserError(f"--student {taken[place]} and {student} would share {place}; name each student once")
        taken[place] = student
        if overwrite:
            artifact.replaceable(place, "run")
        else:
            artifact.claimed(Folder(place), "run")
    if len(taken) > 1 and (out / artifact.MANIFEST).exists():
        kind = artifact.read(Folder(out))["kind"]
        raise UserError(f"{out} is itself a {kind}, so it cannot hold the runs of several; choose another --out")


def _holds_runs(out: Path) -> bool:
    """Whether a folder is none of ours itself and has runs in it."""
    if (out / artifact.MANIFEST).exists():
        return False
    return any(_is_run(manifest.parent) for manifest in out.glob(f"*/{artifact.MANIFEST}"))


def _is_run(folder: Path) -> bool:
    with suppress(UserError):  # somebody else's manifest, or a damaged one
        return artifact.read(Folder(folder))["kind"] == "run"
    return False
