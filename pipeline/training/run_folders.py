"""The folder of each student's run: which it is, whether it may become a run, what an earlier run recorded in it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder


def list_run_folders(out: Path, students: Sequence[str], peers: Callable[[], bool]) -> list[Path]:
    """OUT itself for a single student, OUT/NAME for each of several students.

    A single student gets OUT/NAME too where OUT holds runs already: it is one of several students trained before,
    or is added to them. A spec that is given twice stands for two peers, in OUT/NAME and OUT/NAME-2.
    peers: returns whether the method trains its students together; called only if a spec is given twice, because
    it imports the method.
    """
    names = ["".join(c if c.isalnum() or c in "-_." else "-" for c in student) for student in students]
    if len(students) == 1 and not _holds_runs(out):
        return [out]
    if len(set(students)) < len(students) and peers():
        earlier = [students[:n].count(student) for n, student in enumerate(students)]
        names = [f"{name}-{n + 1}" if n else name for name, n in zip(names, earlier, strict=True)]
    return [out / name for name in names]


def require_run_folders(out: Path, students: Sequence[str], folders: Sequence[Path], overwrite: bool) -> None:
    """Raises UserError unless each student has a folder of its own that may become or is its run.

    Such a folder is missing, empty, or holds a run; with `overwrite`, it holds something that may be set aside.
    """
    taken: dict[Path, str] = {}
    for student, folder in zip(students, folders, strict=True):
        if folder in taken:
            raise UserError(f"--student {taken[folder]} and {student} would share {folder}; name each student once")
        taken[folder] = student
        if overwrite:
            artifact.replaceable(folder, "run")
        else:
            artifact.claimed(Folder(folder), "run")
    if len(taken) > 1 and (out / artifact.MANIFEST).exists():
        kind = artifact.read(Folder(out)).kind
        raise UserError(f"{out} is itself a {kind}, so it cannot hold the runs of several; choose another --out")


def _holds_runs(out: Path) -> bool:
    """Whether a folder contains runs, and is not itself a run, store or evaluation."""
    if (out / artifact.MANIFEST).exists():
        return False
    return any(_is_run(manifest.parent) for manifest in out.glob(f"*/{artifact.MANIFEST}"))


def _is_run(folder: Path) -> bool:
    with suppress(UserError):  # a manifest.json of another program, or a damaged one
        return artifact.read(Folder(folder)).kind == "run"
    return False
