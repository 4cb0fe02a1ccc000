"""The end of a run: the weights of the finished students are written, and failed students are reported.

Importing this module does not import torch, so that a stage can catch PartialFailure before it trains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo

if TYPE_CHECKING:
    from compress_ssl.pipeline.training.learner import Learner
    from compress_ssl.pipeline.training.run import TrainingRun
    from compress_ssl.pipeline.training.student import Student


class PartialFailure(UserError):
    """Some of several students diverged. `finished`: the run folders of the others."""

    def __init__(self, message: str, finished: Sequence[Path]):
        super().__init__(message)
        self.finished = finished


def export_students(training_run: "TrainingRun") -> dict[Path, str]:
    """Rank 0 writes the weights of each finished student. Returns {run folder: a line about its student}.

    Other ranks write nothing, wait until rank 0 has written, and return {}.

    Raises PartialFailure if one of several students diverged, after the finished ones were written and their lines
    printed.
    """
    from compress_ssl.pipeline.distributed import collectives

    finished = [
        (learner, student) for learner in training_run.learners if not learner.failure for student in learner.students
    ]
    exported = {}
    for learner, student in finished if collectives.rank() == 0 else []:
        exported[student.folder] = _export_student(learner, student, training_run.sampler.steps)
    collectives.barrier()  # no rank may end before rank 0 has written
    failures = [learner.failure for learner in training_run.learners if learner.failure]
    if failures:
        for line in exported.values():
            echo(line)
        others = [student.folder for _, student in finished]
        raise PartialFailure(f"{' '.join(failures)}. The other {len(others)} students are finished", others)
    return exported


def _export_student(learner: "Learner", student: "Student", steps: int) -> str:
    """Write the weights of one student and return a line about it, with its best validation score if there is one."""
    progress = f"is finished already, {learner.start} steps" if learner.start >= steps else f"{steps} steps"
    file = student.export(learner.method.exported_head())
    best = f", best val nearest neighbour {student.best:.2f} %" if student.best >= 0 else ""
    return f"{student.folder}: {progress}, {file.name}{best}"
