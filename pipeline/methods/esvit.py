"""EsViT: view-level and region-level losses across views. Li et al., ICLR 2022, arXiv 2106.09785."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import (
    Batch,
    Method,
    MethodContext,
    Needs,
    Outputs,
    Recipe,
    bank_size,
    initial_rows,
    require_arrays,
    require_fractions,
    require_positive,
)
from compress_ssl.pipeline.methods.memory_bank import MemoryBank
from compress_ssl.pipeline.methods.similarity import relation_cross_entropy
from compress_ssl.pipeline.models import heads
from compress_ssl.pipeline.models.moving_average import move
from compress_ssl.pipeline.models.precision import at_least_float32, l2_normalize
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, LOCAL_CROPS

OUTPUTS = tuple((group.array("embedding"), group.array("regions")) for group in (GLOBAL_VIEWS, LOCAL_CROPS))
"""Names of a student's outputs: what is compared of its global views, and of its local crops."""

BANK_SIZE = 4096
"""Default slots of each bank of a teacher without heads. The paper has no bank; the value is ours."""


class EsVit(Method):
    """EsViT: cross-entropy between views, and between each student region and its most similar teacher region.

    Li et al., "Efficient Self-supervised Vision Transformers for Representation Learning", ICLR 2022, arXiv
    2106.09785. The student's views are the step's W views and `crops` local crops; each is compared with every
    teacher view of the same image but itself. With t, s the embeddings of two such views, y_j and z_i their R' and R
    regions, all of the student's after a linear projector to the teacher's width (only where the widths differ):

        loss = 0.5 H(p(t), q(s)) + 0.5 mean_i H(p(y_j*(i)), q(z_i)),    j*(i) = argmax_j cos(y_j, z_i)

    mean over the batch and over the pairs of views, in nats. If the teacher's DINO heads were exported
    (`head=head+head_dense+dino_loss`), p and q are distributions over the heads' prototypes:

        p(x) = softmax((h(x) - c) / tau_t)    q(x) = softmax(h(x) / tau_s)

    h is the frozen head, c the centre from the teacher's file, else a moving average of h over the batches. Without
    heads, p and q are softmaxes of cosines to the teacher vector itself and to a bank of earlier teacher vectors, one
    bank for views and one for regions, as in SEED.

    Keys:
        crops: local crops per image and step, 0 or more.
        bank: slots of each bank; by default 4096, at most half the usable images. Not used with heads.
        tau_t, tau_s: temperatures of teacher and student, more than 0.
        momentum: of a centre that is a moving average, from 0 to 1.

    Raises UserError for values outside these ranges and for a store without regions.

    Differences from the paper: the teacher is frozen, not a moving average of the student; the student uses the
    teacher's frozen heads instead of training its own; regions are matched after the projector; tau_t is constant
    (the published commands raise it from 0.04 to 0.07). The bank of a teacher without heads is our addition.

    Example:
        compress distill --store teacher --student timm:swin_tiny_patch4_window7_224 --method esvit:crops=4 --out run
    """

    needs = Needs(("embedding", "regions"), ("embedding", "regions"), views=2)
    recipe = Recipe(
        optimizer="adamw", lr=5e-4, weight_decay=0.04, batch_size=512, epochs=300, schedule="cosine", warmup_epochs=10,
        norm_decay=False, clip=3.0,
    )  # fmt: skip

    def __init__(
        self,
        *,
        context: MethodContext,
        crops: int = 8,
        bank: int | None = None,
        tau_t: float = 0.04,
        tau_s: float = 0.1,
        momentum: float = 0.9,
    ):
        super().__init__()
        require_positive(tau_t=tau_t, tau_s=tau_s)
        if crops < 0:
            raise UserError(f"crops={crops} was asked, but must be 0 or more")
        require_fractions(momentum=momentum)
        require_arrays("esvit", self.needs.arrays, context.widths)
        if crops:
            self.needs = replace(type(self).needs, outputs=tuple(chain(*OUTPUTS)), crops=crops)
        student = context.students[0].enable_outputs(("regions",))
        tensors_of = _find_heads(context)
        terms: dict[str, Prototypes | Similarities] = {}
        size = 0
        for name in ("embedding", "regions"):
            tensors = tensors_of[name]
            width, target = student.shapes[name][-1], context.widths[name][-1]
            prototypes = heads.prototypes(tensors) if tensors else None
            if tensors and prototypes is not None:
                centre = _find_centre(context, "center_grid" if name == "regions" else "center")
                terms[name] = Prototypes(width, target, heads.ProjectionHead(tensors), prototypes, centre, momentum)
            else:
                size = size or bank_size(bank, BANK_SIZE, context)  # computed once: it may append a note
                terms[name] = Similarities(width, target, size, name, context)
            terms[name].tau_t, terms[name].tau_s = tau_t, tau_s
        self.view, self.region = terms["embedding"], terms["regions"]

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        out = outputs[0]
        shown = [names for names in OUTPUTS if names[0] in out]
        student_views = [(out[s][:, n], out[z][:, n]) for s, z in shown for n in range(out[s].shape[1])]
        w = batch.student_views.shape[1]  # the first w are global views
        losses = []
        with torch.autocast(batch.rows.device.type, enabled=False):
            for v, (s, z) in enumerate(student_views):  # (B, d), (B, R, c)
                s, z = self.view.projector(at_least_float32(s)), self.region.projector(at_least_float32(z))
                for u in range(batch.teacher_views.shape[1]):
                    if v < w and torch.equal(batch.student_views[:, v], batch.teacher_views[:, u]):
                        continue  # a view is not compared with itself
                    t, y = batch.teacher["embedding"][:, u], batch.teacher["regions"][:, u]  # (B, D), (B, R', C)
                    regions = self.region(match_regions(y, z).flatten(0, 1), z.flatten(0, 1))
                    losses.append(0.5 * self.view(t, s) + 0.5 * regions)
        return [torch.stack(losses).mean()]

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Update centres and banks; one region of each teacher view, drawn at random, enters the bank of regions."""
        rows, views = batch.rows, batch.teacher_views
        y = batch.teacher["regions"].flatten(0, 1)  # (B * W, R', C)
        self.view.update(rows, views, batch.teacher["embedding"].flatten(0, 1))
        # Every rank draws for the images of all ranks and keeps its own, so that the generators stay equal.
        shape = collectives.world_size() * len(rows), views.shape[1]
        drawn = torch.randint(y.shape[1], shape, device=y.device)
        chosen = drawn[collectives.rank() :: collectives.world_size()].flatten()  # (B * W,)
        self.region.update(rows, views, y if isinstance(self.region, Prototypes) else y[torch.arange(len(y)), chosen])


# ---------------------------------------------------------------- terms of the loss


class Prototypes(nn.Module):
    """DINO's loss with frozen head and prototypes; the teacher's logits are centred and sharpened by tau_t.

    width and target: d and D. prototypes: (C, width of the head's output). centre: (C,), or None for a moving average
    over the batches, whose momentum is `momentum`.
    """

    tau_t, tau_s = 0.04, 0.1  # overwritten by EsVit's keys
    prototypes: Tensor  # (C, P)
    centre: Tensor  # (C,)

    def __init__(
        self, width: int, target: int, head: nn.Module, prototypes: Tensor, centre: Tensor | None, momentum: float
    ):
        super().__init__()
        self.projector, self.head, self.momentum = build_projector(width, target), head, momentum
        self.fixed = centre is not None
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("centre", torch.zeros(len(prototypes)) if centre is None else centre.flatten())

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """teacher (n, D), student (n, D) projected: mean cross-entropy in nats."""
        with torch.no_grad():
            p = ((self.logits(teacher) - self.centre) / self.tau_t).softmax(1)
        return F.cross_entropy(self.logits(student) / self.tau_s, p)

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, C)"""
        out: Tensor = self.head(x)  # (n, P)
        return out @ self.prototypes.T

    def update(self, rows: Tensor, views: Tensor, teacher: Tensor) -> None:
        """Move the centre towards the mean teacher logits. teacher: (B * W, D), or regions (B * W, R, D)."""
        if not self.fixed:
            mean_logits = self.logits(collectives.gather(teacher.flatten(0, -2))).mean(0)
            move(self.centre, mean_logits, self.momentum)


class Similarities(nn.Module):
    """SEED's loss: similarities to the teacher vector itself and to a bank of `size` earlier teacher vectors."""

    tau_t, tau_s = 0.04, 0.1  # overwritten by EsVit's keys

    def __init__(self, width: int, target: int, size: int, name: str, context: MethodContext):
        super().__init__()
        self.projector = build_projector(width, target)
        # A slot does not record which region its vector is, so regions cannot be read again: they are saved.
        reread = {"teacher": "embedding"} if name == "embedding" else {}
        self.bank = MemoryBank(size, {"teacher": target}, reread=reread, seed=context.seed)
        self.bank.start("store" if reread else "empty", initial_rows(context, size), context.view)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """teacher (n, D), student (n, D) projected: mean cross-entropy in nats."""
        return relation_cross_entropy(teacher, student, self.bank["teacher"], self.tau_t, self.tau_s)

    def update(self, rows: Tensor, views: Tensor, teacher: Tensor) -> None:
        """Push the batch's teacher vectors (B * W, D) into the bank."""
        self.bank.push(rows, views, {"teacher": l2_normalize(teacher)})


# ---------------------------------------------------------------- parts


def build_projector(width: int, target: int) -> nn.Module:
    """A linear layer from the student's width to the teacher's, or the identity where they are equal."""
    return nn.Linear(width, target) if width != target else nn.Identity()


def match_regions(teacher: Tensor, student: Tensor) -> Tensor:
    """(B, R, C): for each student region (B, R, C) the teacher region (B, R', C) with the largest cosine."""
    with torch.no_grad():
        best = (l2_normalize(student) @ l2_normalize(teacher).transpose(1, 2)).argmax(2)  # (B, R)
    return teacher.gather(1, best[..., None].expand(-1, -1, teacher.shape[2]))


def _find_heads(context: MethodContext) -> dict[str, dict[str, Tensor] | None]:
    """Tensors of the teacher's exported heads for "embedding" and "regions"; the latter is the one named `dense`."""
    groups = heads.group_by_head(context.heads)
    dense = next((stem for stem in groups if "dense" in stem), None)
    view = next((stem for stem in groups if stem != dense), None)
    return {
        "embedding": None if view is None else groups[view],
        "regions": None if dense is None else groups[dense],
    }


def _find_centre(context: MethodContext, name: str) -> Tensor | None:
    """The centre that the teacher's file holds for its loss, None if it holds none."""
    return next((tensor for key, tensor in context.heads.items() if key.rpartition(".")[2] == name), None)
