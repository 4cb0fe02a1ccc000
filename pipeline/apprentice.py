"""An apprentice: student, method, optimiser, average. All that one step changes, and its checkpoint."""

import copy
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import checkpoint, philox
from pipeline.artifact import UserError
from pipeline.embed import autocast
from pipeline.method import Batch, Method
from pipeline.model import Embedder
from pipeline.schedule import Schedule
from pipeline.storage import Folder
from pipeline.validation import leave_one_out
from pipeline.views import ViewSpec

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
    """One student with its method. What it becomes does not depend on who else learns in the same run."""

    def __init__(self, folder: Path, student: Embedder, method: Method, training: Training):
        self.folder, self.student, self.method, self.training = folder, student, method, training
        self.seed = training.seed ^ (zlib.crc32(student.spec.encode()) << 32)
        self.optimizer = optimizer(training, nn.ModuleList([student, method]))
        place = next(student.parameters()).device.type
        self.scaler = torch.amp.GradScaler(place, enabled=training.precision == "fp16")
        self.average = copy.deepcopy(student).requires_grad_(False) if training.ema else None
        self.forward: Any = student  # torch.compile'd if asked
        self.best = -1.0
        self.start = 0  # steps it had behind it when it was restored

    @property
    def learned(self) -> Embedder:
        """The student that is evaluated and kept: the average where there is one."""
        return self.average or self.student

    def step(self, batch: Batch, done: float, measure: bool = False) -> dict[str, float]:
        """One step at `done` of the run, in [0, 1) -> {"loss"}; `measure` adds {"lr", "spread", "agreement"}.

        Its randomness (dropout, stochastic depth) is a function of (seed, step, student). Raises
        UserError if the loss is not finite.
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
        row = {"loss": float(loss.detach())}
        if not math.isfinite(row["loss"]):
            raise self._diverged(f"the loss is {row['loss']}", batch.step)
        self.scaler.scale(loss).backward()
        if self.training.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.training.ema:
            blend(self.average, self.student, self.training.ema)
        self.method.after_step(batch)
        if measure:
            z, teacher = z.detach(), batch.teacher["embedding"].flatten(0, 1)
            row |= {"lr": rate, "spread": spread(z), "agreement": agreement(z, teacher)}
        return row

    def _diverged(self, what: str, step: int) -> UserError:
        return UserError(
            f"{self.folder}: {what} at step {step} (learning rate {self.optimizer.param_groups[0]['lr']:g}, precision "
            f"{self.training.precision}); the last checkpoint before it is kept. Likely causes: a rate too high "
            "(lower --lr, add --warmup-epochs or --clip 1), fp16 overflow (--precision bf16), a temperature too low"
        )

    def examine(self, val: Any, spec: ViewSpec, device: torch.device, workers: int, step: int) -> float:
        """Leave-one-out nearest-neighbour accuracy on `val`, view 0, in percent; the best so far is kept as best.pt."""
        score = leave_one_out(self.learned, val, spec, device, self.training.precision, workers)
        if score > self.best:
            self.best = score
            Folder(self.folder).put("checkpoints/best.pt", checkpoint.spell({"step": step, **self.parts()}))
        return score

    def parts(self) -> dict[str, Any]:
        """Everything a checkpoint holds, by name."""
        parts = {"student": self.student, "method": self.method, "optimizer": self.optimizer, "scaler": self.scaler}
        return {**parts, "average": self.average, "best": self.best}

    def save(self, step: int) -> None:
        """Raises UserError if anything learned is not finite: the checkpoint before is worth more."""
        tensors = [*self.student.state_dict().values(), *self.method.parameters()]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise self._diverged("weights are not finite", step)
        checkpoint.save(self.folder / "checkpoints", step, self.parts())

    def restore(self) -> None:
        """Back to the newest checkpoint, or stay at step 0 where there is none."""
        home = self.folder / "checkpoints"
        Folder(home).sweep()
        if steps := checkpoint.steps(home):
            saved = checkpoint.restore(home / f"step-{steps[-1]:08d}.pt", self.parts())
            self.start, self.best = saved["step"], saved["best"]

    def deliver(self) -> Path:
        """Write student.safetensors: the bare backbone, as its own library names it, and how to feed it."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.learned.backbone.state_dict().items()}
        looks = json.dumps(self.learned.preprocessing.record())
        said = {"model": self.learned.spec, "preprocessing": looks, "digest": self.learned.digest()}
        data, home, name = spell(tensors, {"format": "pt", **said}), Folder(self.folder), "student.safetensors"
        if not (home.exists(name) and home.get(name) == data):
            home.put(name, data)
        return self.folder / name


def spell(tensors: dict[str, Tensor], said: dict[str, str]) -> bytes:
    """A safetensors file with one spelling: the library writes what is said in another order every time."""
    data = safetensors.torch.save(tensors, said)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    text = json.dumps({"__metadata__": said, **{k: v for k, v in header.items() if k != "__metadata__"}}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text + data[end:]


@torch.no_grad()
def blend(average: nn.Module, student: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * student; buffers (batch norm statistics) are copied."""
    for slow, fast in zip(average.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast.detach(), 1.0 - decay)
    for kept, new in zip(average.buffers(), student.buffers(), strict=True):
        kept.copy_(new)


def optimizer(training: Training, modules: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over two groups: with weight decay, and (norms, biases) without if so asked."""
    with_decay = [p for p in modules.parameters() if p.requires_grad and (training.norm_decay or p.ndim > 1)]
    without = [p for p in modules.parameters() if p.requires_grad and not (training.norm_decay or p.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": with_decay, "weight_decay": training.weight_decay}]
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
