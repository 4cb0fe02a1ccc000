"""An apprentice: student, method, optimiser, average. All that one step changes, and its checkpoint."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import checkpoint, philox
from pipeline.artifact import UserError
from pipeline.embed import autocast
from pipeline.methods.base import Batch, Method
from pipeline.model import Embedder
from pipeline.schedule import Schedule
from pipeline.storage import Folder

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Training:
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


class Apprentice:
    """One student with its method; `number` tells apart the apprentices of a run."""

    def __init__(self, folder: Path, student: Embedder, method: Method, training: Training, number: int):
        self.folder, self.student, self.method, self.training = folder, student, method, training
        self.seed = training.seed ^ (number << 32)
        self.optimizer = optimizer(training, nn.ModuleList([student, method]))
        self.scaler = torch.amp.GradScaler(enabled=training.precision == "fp16")
        self.average = copy.deepcopy(student).requires_grad_(False) if training.ema else None
        self.forward: Any = student  # torch.compile'd if asked
        self.best = -1.0

    @property
    def learned(self) -> Embedder:
        """The student that is evaluated and kept: the average where there is one."""
        return self.average or self.student

    def step(self, batch: Batch, done: float) -> tuple[float, Tensor]:
        """One step at `done` of the run, in [0, 1) -> (loss, (B * W, d) embeddings).

        Its randomness (dropout, stochastic depth) is a function of (seed, step, student). A loss
        that is not finite changes nothing and is returned for the caller to stop on.
        """
        self.student.train()
        self.method.train()
        torch.manual_seed(int(philox.words(self.seed, philox.PICK, batch.step, 0, 2).view("<u8")[0] >> 1))
        rate = self.training.lr * self.training.schedule(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(batch.images[0].device, self.training.precision):
            z = self.forward(batch.images[0])
            outputs = {"embedding": z.unflatten(0, batch.student_views.shape)}
            loss = self.method(batch, [outputs])[0]
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            return value, z.detach()
        self.scaler.scale(loss).backward()
        if self.training.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.training.ema:
            blend(self.average, self.student, self.training.ema)
        self.method.after_step(batch)
        return value, z.detach()

    def parts(self) -> dict[str, Any]:
        """Everything a checkpoint holds, by name."""
        parts = {"student": self.student, "method": self.method, "optimizer": self.optimizer, "scaler": self.scaler}
        return {**parts, "average": self.average, "best": self.best}

    def save(self, step: int) -> None:
        checkpoint.save(self.folder / "checkpoints", step, self.parts())

    def restore(self, step: int) -> None:
        saved = checkpoint.restore(self.folder / "checkpoints" / f"step-{step:08d}.pt", self.parts())
        self.best = saved["best"]

    def deliver(self) -> Path:
        """Write student.safetensors: the bare backbone, as its own library names it, and how to feed it."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.learned.backbone.state_dict().items()}
        said = {"model": self.learned.spec, "preprocessing": json.dumps(self.learned.preprocessing.record())}
        Folder(self.folder).put("student.safetensors", safetensors.torch.save(tensors, {"format": "pt", **said}))
        return self.folder / "student.safetensors"


@torch.no_grad()
def blend(average: nn.Module, student: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * student; buffers (batch norm statistics) are copied."""
    for slow, fast in zip(average.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast.detach(), 1.0 - decay)
    for slow, fast in zip(average.buffers(), student.buffers(), strict=True):
        slow.copy_(fast)


def optimizer(training: Training, modules: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over two groups: with weight decay, and (norms, biases) without if so asked."""
    with_decay = [p for p in modules.parameters() if p.requires_grad and (training.norm_decay or p.ndim > 1)]
    without = [p for p in modules.parameters() if p.requires_grad and not (training.norm_decay or p.ndim > 1)]
    groups: list[Mapping[str, Any]] = [{"params": with_decay, "weight_decay": training.weight_decay}]
    groups += [{"params": without, "weight_decay": 0.0}] if without else []
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, betas=(training.momentum, 0.999))
    raise UserError(f"unknown optimizer {training.optimizer!r}. Known: {', '.join(OPTIMIZERS)}")


def spread(z: Tensor) -> float:
    """Standard deviation of unit embeddings (n, d) about their mean, 1 if they fill the sphere, 0 if collapsed."""
    u = z.float() / z.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return float((u - u.mean(0)).pow(2).sum(1).mean().sqrt())


def agreement(z: Tensor, t: Tensor) -> float:
    """Share of rows, in percent, whose nearest neighbour in the batch is the same for z (n, d) and t (n, D)."""
    nearest = []
    for x in (z.float(), t.float()):
        u = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        nearest.append((u @ u.T).fill_diagonal_(-2.0).argmax(1))
    return 100.0 * float((nearest[0] == nearest[1]).float().mean())


