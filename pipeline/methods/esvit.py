"""EsViT: view and region terms across views. Li et al., ICLR 2022, with a frozen teacher."""

from collections.abc import Sequence
from dataclasses import replace

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
from compress_ssl.pipeline.runtime.artifact import UserError


class EsVit(Method):
    """Cross-entropy between views, and between each student region and the teacher region most like it.

    Every other view of an image is compared with each stored one: the step's views and `crops` small
    ones that the student alone sees. Linear projectors, dropped at the end, take the student to the
    teacher's widths where these differ. A student region learns from the region of the other view whose feature has the
    largest cosine to its own, projected, wherever that lies. Half the loss are views, half regions.

    What is compared: prototypes, if the teacher brought its DINO heads (`head=head+head_dense+dino_loss`
    when it was exported). The heads stay frozen on both sides, unlike in the paper, where the student
    trains its own; centres are those of the file, else running means of what the teacher says
    (`momentum`). A teacher without heads is compared by similarity: softmax over a bank of `bank`
    teacher vectors of earlier steps, one bank for views and one for regions, and the vector itself.
    Temperatures stay put (the release warms tau_t up from 0.04 to 0.07).
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
            self.needs = replace(type(self).needs, outputs=(*self.needs.outputs, *LOCAL), crops=crops)
        student = context.students[0].enable_outputs(("regions",))
        kept = heads.group_by_head(context.heads)
        dense = next((stem for stem in kept if "dense" in stem), None)
        view = next((stem for stem in kept if stem != dense), None)
        terms: dict[str, Prototypes | Similarities] = {}
        size = 0
        for name, stem in (("embedding", view), ("regions", dense)):
            tensors = kept.get(stem) if stem is not None else None
            width, target = student.shapes[name][-1], context.widths[name][-1]
            if tensors and (protos := heads.prototypes(tensors)) is not None:
                centre = _centre(context, "center_grid" if name == "regions" else "center")
                terms[name] = Prototypes(width, target, heads.ProjectionHead(tensors), protos, centre, momentum)
            else:
                size = size or bank_size(bank, 4096, context)
                terms[name] = Similarities(width, target, size, name, context)
            terms[name].tau_t, terms[name].tau_s = tau_t, tau_s
        self.view, self.region = terms["embedding"], terms["regions"]

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        out = outputs[0]
        seen = [(out["embedding"][:, v], out["regions"][:, v], v) for v in range(batch.student_views.shape[1])]
        if "local_embedding" in out:
            crops = range(out["local_embedding"].shape[1])
            seen += [(out["local_embedding"][:, c], out["local_regions"][:, c], -1) for c in crops]
        losses = []
        with torch.autocast(batch.rows.device.type, enabled=False):
            for s, z, v in seen:  # (B, d), (B, R, c)
                s, z = self.view.projector(at_least_float32(s)), self.region.projector(at_least_float32(z))
                for u in range(batch.teacher_views.shape[1]):
                    if v >= 0 and torch.equal(batch.student_views[:, v], batch.teacher_views[:, u]):
                        continue  # the same view
                    t, y = batch.teacher["embedding"][:, u], batch.teacher["regions"][:, u]  # (B, D), (B, R', C)
                    regions = self.region(matched(y, z).flatten(0, 1), z.flatten(0, 1))
                    losses.append(0.5 * self.view(t, s) + 0.5 * regions)
        return [torch.stack(losses).mean()]

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Centres follow what the teacher says; of each view one region goes to the bank."""
        rows, views = batch.rows, batch.teacher_views
        y = batch.teacher["regions"].flatten(0, 1)  # (B * W, R', C)
        self.view.after(rows, views, batch.teacher["embedding"].flatten(0, 1))
        shape = collectives.world_size() * len(batch.rows), batch.teacher_views.shape[1]
        chosen = torch.randint(y.shape[1], shape, device=y.device)[
            collectives.rank() :: collectives.world_size()
        ].flatten()
        self.region.after(rows, views, y if isinstance(self.region, Prototypes) else y[torch.arange(len(y)), chosen])


LOCAL = ("local_embedding", "local_regions")


class Prototypes(nn.Module):
    """DINO's comparison: frozen head and prototypes, the teacher's side centred and sharpened."""

    tau_t, tau_s = 0.04, 0.1
    centre: Tensor  # (C,)

    def __init__(
        self, width: int, target: int, head: nn.Module, prototypes: Tensor, centre: Tensor | None, momentum: float
    ):
        super().__init__()
        self.projector, self.head, self.momentum = projector(width, target), head, momentum
        self.fixed = centre is not None
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("centre", torch.zeros(len(prototypes)) if centre is None else centre.flatten())

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """teacher (n, D), student (n, D) projected: mean cross-entropy in nats."""
        with torch.no_grad():
            p = ((self.logits(teacher) - self.centre) / self.tau_t).softmax(1)
        return F.cross_entropy(self.logits(student) / self.tau_s, p)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x) @ self.prototypes.T  # type: ignore[operator]

    def after(self, rows: Tensor, views: Tensor, teacher: Tensor) -> None:
        """teacher: (n, D), or (n, R, D) regions, of the batch."""
        if not self.fixed:
            said = self.logits(collectives.gather(teacher.flatten(0, -2))).mean(0)
            move(self.centre, said, self.momentum)


class Similarities(nn.Module):
    """Comparison over a bank of the teacher's vectors and the vector itself."""

    tau_t, tau_s = 0.04, 0.1

    def __init__(self, width: int, target: int, size: int, name: str, context: MethodContext):
        super().__init__()
        self.projector = projector(width, target)
        again = {"teacher": "embedding"} if name == "embedding" else {}  # which region it was is not kept
        self.bank = MemoryBank(size, {"teacher": target}, reread=again, seed=context.seed)
        self.bank.start("store" if again else "empty", initial_rows(context, size), context.view)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """teacher (n, D), student (n, D) projected: mean cross-entropy in nats."""
        return relation_cross_entropy(teacher, student, self.bank["teacher"], self.tau_t, self.tau_s)

    def after(self, rows: Tensor, views: Tensor, teacher: Tensor) -> None:
        """teacher: (B * W, D) of the batch, which enter the bank."""
        self.bank.push(rows, views, {"teacher": l2_normalize(teacher)})


def projector(width: int, target: int) -> nn.Module:
    """From the student's width to the teacher's; nothing where they are the same."""
    return nn.Linear(width, target) if width != target else nn.Identity()


def matched(theirs: Tensor, mine: Tensor) -> Tensor:
    """(B, R, C): for each of my regions (B, R, C) the region of theirs (B, R', C) with the largest cosine."""
    with torch.no_grad():
        best = (l2_normalize(mine) @ l2_normalize(theirs).transpose(1, 2)).argmax(2)  # (B, R)
    return theirs.gather(1, best[..., None].expand(-1, -1, theirs.shape[2]))


def _centre(context: MethodContext, name: str) -> Tensor | None:
    """The centre that the teacher's file keeps with its loss, if it does."""
    return next((tensor for key, tensor in context.heads.items() if key.rpartition(".")[2] == name), None)
