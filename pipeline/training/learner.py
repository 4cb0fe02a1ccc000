"""A learner: one method, the students that it trains, their optimizer and their checkpoints."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Batch, Method
from compress_ssl.pipeline.models.precision import autocast
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.options import Options
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training import checkpoint, diagnostics
from compress_ssl.pipeline.training.distillation_module import DistillationModule
from compress_ssl.pipeline.training.optimizers import make_optimizer
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student import Student

ALL_RANKS = 2**32 - 1  # takes the place of a rank's number in the seed of what all ranks must draw alike


class Diverged(UserError):
    """A loss or weights are not finite: this learner stops, other learners of the run continue."""


class Learner:
    """One method with its student, or with all its peers, which succeed, fail and resume together.

    The result does not depend on which other learners train in the same run.
    """

    def __init__(
        self, students: Sequence[Student], method: Method, settings: TrainingSettings, resolved: Options | None = None
    ):
        """resolved: what options of the method that were left open stand for, see MethodContext."""
        self.students, self.method, self.settings = list(students), method, settings
        self.resolved = resolved or {}
        specs = "+".join(student.model.spec for student in students)
        self.seed = settings.seed ^ (zlib.crc32(specs.encode()) << 32)  # learners of one run draw independently
        module = DistillationModule(students, method)
        self.models, self.module = module.models, collectives.wrap_ddp(module)
        self.optimizer = make_optimizer(
            settings.optimizer, nn.ModuleList([*self.models, method]), lr=settings.lr, momentum=settings.momentum,
            weight_decay=settings.weight_decay, norm_decay=settings.norm_decay,
        )  # fmt: skip
        device_type = next(self.models.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=settings.precision == "fp16")
        self.start = 0  # step of the checkpoint from which it was restored
        self.failure = ""  # the error that ended it before the run's end

    # ---------------------------------------------------------------- one step

    def step(self, batch: Batch, done: float, measure: bool = False) -> list[dict[str, float]]:
        """Take one optimizer step and return a row {"loss": ...} per student.

        done: fraction of the run before this step, in [0, 1), for the schedule. measure: add "lr", "spread" and
        "agreement" to the rows. The losses are computed by `DistillationModule.forward`, which calls the method.

        Random numbers (dropout, stochastic depth) are a function of (seed, step, students, rank). A loss in a row
        is the mean over ranks. If one is not finite, every rank raises Diverged.
        """
        self.models.train()
        self.method.train()
        torch.manual_seed(self._seed_for(batch.step, collectives.rank()))
        rate = self.settings.lr * self.settings.schedule(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)

        with autocast(batch.images[0].device, self.settings.precision):
            losses, embeddings = self.module(batch, self._seed_for(batch.step, ALL_RANKS))
        means = collectives.all_reduce_mean([float(loss.detach()) for loss in losses])
        for mean in means:
            if not math.isfinite(mean):
                raise self._diverged(f"the loss is {mean}", batch.step)
        rows = [{"loss": mean} for mean in means]

        self._update_weights(losses)
        self.method.after_step(batch)
        if measure:
            self._add_diagnostics(rows, rate, batch, embeddings)
        return rows

    def _update_weights(self, losses: Sequence[Tensor]) -> None:
        """Backward pass over the sum of the losses, optimizer step, and the step of the averaged students."""
        total = torch.stack(list(losses)).sum() if len(losses) > 1 else losses[0]
        torch.autograd.backward(self.scaler.scale(total))
        if self.settings.clip:
            self.scaler.unscale_(self.optimizer)  # the limit is for true gradients, not for scaled ones
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for student in self.students:
            student.update_average()

    def _add_diagnostics(
        self, rows: list[dict[str, float]], rate: float, batch: Batch, embeddings: Sequence[Tensor]
    ) -> None:
        """Add the learning rate and the diagnostics over the batches of all ranks to each student's row."""
        teacher = batch.teacher.get("embedding")
        teacher = None if teacher is None else collectives.gather(teacher)
        for row, embedding in zip(rows, embeddings, strict=True):
            row |= {"lr": rate, **diagnostics.measure(collectives.gather(embedding), teacher)}

    def _seed_for(self, step: int, rank: int) -> int:
        """63 random bits as a function of (seed, step, rank): torch's seeds must fit a signed 64-bit integer."""
        return int(philox.words(self.seed, philox.PICK, step, rank, 2).view("<u8")[0] >> 1)

    def _diverged(self, what: str, step: int) -> Diverged:
        folders = " and ".join(str(student.folder) for student in self.students)
        return Diverged(
            f"{folders}: {what} at step {step} (learning rate {self.optimizer.param_groups[0]['lr']:g}, precision "
            f"{self.settings.precision}); the last checkpoint before it is kept. Likely causes: a learning rate that "
            "is too high (lower --lr, add --warmup-epochs or --clip 1), fp16 overflow (--precision bf16), "
            "a temperature that is too low"
        )

    # ---------------------------------------------------------------- checkpoints

    def checkpoint_parts(self, student: Student) -> dict[str, object]:
        """Name -> what the checkpoint of one student holds. The files of peers differ only in the student's parts."""
        shared = {"method": self.method, "optimizer": self.optimizer, "scaler": self.scaler}
        return {**student.checkpoint_parts(), **shared}

    def save(self, step: int) -> None:
        """Rank 0 writes a checkpoint into each student's folder.

        Every rank raises Diverged, and nothing is written, if a weight or buffer is not finite on any of them.
        """
        tensors = [*self.models.state_dict().values(), *self.method.parameters()]
        if collectives.all_reduce_max(not all(bool(tensor.isfinite().all()) for tensor in tensors)):
            raise self._diverged("weights are not finite", step)
        for student in self.students if collectives.rank() == 0 else []:
            checkpoint.save(student.folder / "checkpoints", step, self.checkpoint_parts(student))

    def save_if_best(self, student: Student, score: float, step: int) -> None:
        """Write best.pt if the validation score is higher than all before."""
        if score > student.best:
            student.best = score
            data = checkpoint.to_bytes({"step": step, **self.checkpoint_parts(student)})
            Folder(student.folder).put("checkpoints/best.pt", data)

    def restore(self) -> None:
        """Load the newest checkpoint that all its students have; without one, stay at step 0."""
        folders = [student.folder / "checkpoints" for student in self.students]
        newest = _newest_common_step(folders) if collectives.rank() == 0 else 0
        self.start = collectives.broadcast(newest)
        if not self.start:
            return
        for student, folder in zip(self.students, folders, strict=True):
            file = folder / f"step-{self.start:08d}.pt"
            best = checkpoint.restore(file, self.checkpoint_parts(student)).get("best")
            if not isinstance(best, int | float):
                raise UserError(f"checkpoint {file} does not fit this run: best is no number; delete it")
            student.best = best


def _newest_common_step(folders: Sequence[Path]) -> int:
    """The last step that has a checkpoint in each folder, 0 if none has. Deletes part files that a crash left."""
    for folder in folders:
        Folder(folder).sweep()
    return max(set.intersection(*(set(checkpoint.list_steps(folder)) for folder in folders)), default=0)
