"""A lesson: one method and the students it teaches, one step after another, and their checkpoints."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Batch, Method, Outputs, Recipe
from compress_ssl.pipeline.models.precision import autocast
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training import checkpoint, diagnostics
from compress_ssl.pipeline.training.optimizers import make_optimizer
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.training.student import Student

ALL_RANKS = 2**32 - 1  # beside the ranks' numbers: seeds what all of them draw alike


@dataclass(frozen=True)
class TrainingSettings:
    """How an apprentice learns. lr is the base rate of the whole step's batch."""

    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    norm_decay: bool  # weight decay on norms and biases too
    schedule: Schedule
    clip: float | None  # largest gradient norm
    ema: float | None  # decay of the averaged student
    precision: str
    seed: int

    @classmethod
    def of(
        cls, recipe: Recipe, plan: StepSampler, *, lr: float | None, ema: float | None, precision: str, seed: int
    ) -> "TrainingSettings":
        """By a recipe, over a plan. Its rate is for a batch of 256 and grows with the batch; `lr` is taken as it is."""
        rate = recipe.lr * plan.batch / 256 if lr is None else lr
        epochs = plan.steps * plan.batch / len(plan.rows)
        schedule = Schedule(recipe.schedule, min(1.0, recipe.warmup_epochs / epochs), recipe.drops)
        return cls(
            recipe.optimizer, rate, recipe.momentum, recipe.weight_decay, recipe.norm_decay, schedule,
            recipe.clip, ema, precision, seed,
        )  # fmt: skip


class DistillationModule(nn.Module):
    """Students and their method as one module, so that one backward pass averages all their gradients over ranks."""

    def __init__(self, students: Sequence[Student], method: Method):
        super().__init__()
        self.students, self.method = list(students), method
        self.models = nn.ModuleList([student.model for student in students])

    def forward(self, batch: Batch, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """(a loss of each student, their embeddings (B, W, d)). seed: of what the method draws, on all ranks alike."""
        outputs = [self._look(batch, number) for number in range(len(self.students))]
        torch.manual_seed(seed)  # whatever the students drew
        losses = self.method(batch, outputs)
        return losses, [out["embedding"].detach() for out in outputs]

    def _look(self, batch: Batch, number: int) -> Outputs:
        """What a student makes of its views and crops: (B, W, ...) and (B, L, ...) by name."""
        wanted, forward = self.method.needs.outputs, self.students[number].forward
        names = [name for name in wanted if not name.startswith("local_")]
        out = _unflatten(forward(batch.images[number], names), len(batch.rows))
        if local := [name for name in wanted if name.startswith("local_")]:
            plain = [name.removeprefix("local_") for name in local]
            seen = _unflatten(forward(batch.local_images[number], plain), len(batch.rows))
            out |= {f"local_{name}": value for name, value in seen.items()}
        return out


class Diverged(UserError):
    """A loss or weights that are not finite: this lesson is over, others may go on."""


class Learner:
    """One method with its student, or with all its peers, who succeed, fail and resume together.

    What comes of it does not depend on who else learns in the same run.
    """

    def __init__(
        self, students: Sequence[Student], method: Method, training: TrainingSettings, *,
        name: str = "", warmup_epochs: float = 0.0,
    ):  # fmt: skip
        """name: what the user calls the method; warmup_epochs: as asked, the schedule knows their share of the run."""
        self.students, self.method, self.training = list(students), method, training
        self.name, self.warmup_epochs = name, warmup_epochs
        named = "+".join(student.model.spec for student in students)
        self.seed = training.seed ^ (zlib.crc32(named.encode()) << 32)
        room = DistillationModule(students, method)
        self.models, self.room = room.models, collectives.wrap_ddp(room)
        self.optimizer = make_optimizer(
            training.optimizer, nn.ModuleList([*self.models, method]), lr=training.lr, momentum=training.momentum,
            weight_decay=training.weight_decay, norm_decay=training.norm_decay,
        )  # fmt: skip
        place = next(self.models.parameters()).device.type
        self.scaler = torch.amp.GradScaler(place, enabled=training.precision == "fp16")
        self.start = 0  # steps it had behind it when it was restored
        self.failure = ""  # why it ended early

    def step(self, batch: Batch, done: float, measure: bool = False) -> list[dict[str, float]]:
        """One step at `done` of the run, in [0, 1) -> {"loss"} of each student.

        `measure` adds {"lr", "spread", "agreement"}. Randomness (dropout, stochastic depth) is a
        function of (seed, step, students, rank). A loss is the mean over ranks; Diverged is raised
        on all of them if one is not finite.
        """
        self.models.train()
        self.method.train()
        torch.manual_seed(self._seed_of(batch.step, collectives.rank()))
        rate = self.training.lr * self.training.schedule(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(batch.images[0].device, self.training.precision):
            losses, embeddings = self.room(batch, self._seed_of(batch.step, ALL_RANKS))
        rows = [{"loss": loss} for loss in collectives.all_reduce_mean([float(loss.detach()) for loss in losses])]
        for row in rows:
            if not math.isfinite(row["loss"]):
                raise self._diverged(f"the loss is {row['loss']}", batch.step)
        self.scaler.scale(torch.stack(losses).sum() if len(losses) > 1 else losses[0]).backward()
        if self.training.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for student in self.students:
            student.update_average()
        self.method.after_step(batch)
        if measure:
            teacher = batch.teacher.get("embedding")
            teacher = None if teacher is None else collectives.gather(teacher)
            for row, embedding in zip(rows, embeddings, strict=True):
                row |= {"lr": rate, **diagnostics.measure(collectives.gather(embedding), teacher)}
        return rows

    def _seed_of(self, step: int, rank: int) -> int:
        return int(philox.words(self.seed, philox.PICK, step, rank, 2).view("<u8")[0] >> 1)

    def _diverged(self, what: str, step: int) -> Diverged:
        folders = " and ".join(str(student.folder) for student in self.students)
        return Diverged(
            f"{folders}: {what} at step {step} (learning rate {self.optimizer.param_groups[0]['lr']:g}, precision "
            f"{self.training.precision}); the last checkpoint before it is kept. Likely causes: a rate too high "
            "(lower --lr, add --warmup-epochs or --clip 1), fp16 overflow (--precision bf16), a temperature too low"
        )

    def parts(self, student: Student) -> dict[str, Any]:
        """Everything a checkpoint of one student holds, by name: peers' files share all but the student."""
        return {
            **student.parts(), "method": self.method, "optimizer": self.optimizer, "scaler": self.scaler
        }  # fmt: skip

    def save(self, step: int) -> None:
        """A checkpoint in each student's folder, by rank 0. Raises Diverged if anything learned is not finite."""
        tensors = [*self.models.state_dict().values(), *self.method.parameters()]
        if collectives.all_reduce_max(not all(bool(tensor.isfinite().all()) for tensor in tensors)):
            raise self._diverged("weights are not finite", step)
        for student in self.students if collectives.rank() == 0 else []:
            checkpoint.save(student.folder / "checkpoints", step, self.parts(student))

    def save_if_best(self, student: Student, score: float, step: int) -> None:
        """best.pt, if the score is better than all before."""
        if score > student.best:
            student.best = score
            data = checkpoint.to_bytes({"step": step, **self.parts(student)})
            Folder(student.folder).put("checkpoints/best.pt", data)

    def restore(self) -> None:
        """Back to the newest checkpoint that all its students have, or stay at step 0 where there is none."""
        homes = [student.folder / "checkpoints" for student in self.students]
        self.start = collectives.broadcast(_newest(homes) if collectives.rank() == 0 else 0)
        if not self.start:
            return
        for student, home in zip(self.students, homes, strict=True):
            saved = checkpoint.restore(home / f"step-{self.start:08d}.pt", self.parts(student))
            student.best = saved["best"]


def _newest(homes: Sequence[Path]) -> int:
    """The last step that has a checkpoint in each folder, 0 if none has; what a crash left behind is swept away."""
    for home in homes:
        Folder(home).sweep()
    return max(set.intersection(*(set(checkpoint.steps(home)) for home in homes)), default=0)


def _unflatten(outputs: dict[str, Tensor], images: int) -> Outputs:
    return {name: value.unflatten(0, (images, -1)) for name, value in outputs.items()}
