"""SEED: Self-supervised distillation for visual representation. Fang et al., ICLR 2021."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import (
    Batch,
    Method,
    MethodContext,
    Needs,
    Outputs,
    Recipe,
    Target,
    bank_size,
    choose_target,
    initial_rows,
    require_arrays,
    require_positive,
)  # fmt: skip
from compress_ssl.pipeline.methods.memory_bank import MemoryBank
from compress_ssl.pipeline.methods.similarity import relation_cross_entropy
from compress_ssl.pipeline.models.precision import l2_normalize
from compress_ssl.pipeline.views.numbering import LOCAL

PUBLISHED = 65_536


class Seed(Method):
    """SEED: cross-entropy over the image's own teacher vector and a queue of teacher vectors.

    The student's embedding goes through a two-layer head to the teacher's width, dropped at the end.
    `tau_t` sharpens the teacher: at 0.01 (the default) and below nearly all its weight lies on the
    image's own vector, so the loss is close to contrastive learning against fixed keys; the
    release ran at 1e-4, where nothing else is left.

    `target=projection` is what was published: the teacher's own projection (`head=` and
    `--keep embedding,projection` when it was exported); the pooled embedding takes its place where
    the store keeps none. `small=true`, the default where the store has small crops
    (`--local-views 6`), adds the published term of theirs: student and teacher embed each, it is compared
    over a queue of its own, which only the first crop of an image enters.
    """

    recipe = Recipe(lr=0.03, weight_decay=1e-4, batch_size=256, epochs=200, schedule="cosine")

    def __init__(
        self,
        *,
        context: MethodContext,
        bank: int | None = None,
        tau_t: float = 0.01,
        tau_s: float = 0.2,
        start: Literal["store", "empty", "random"] = "store",
        target: Target = "auto",
        small: bool | None = None,
    ):
        super().__init__()
        require_positive(tau_t=tau_t, tau_s=tau_s)
        self.tau_t, self.tau_s = tau_t, tau_s
        self.target = choose_target(context, target, "seed")
        self.small = f"local_{self.target}" in context.widths if small is None else small
        self.needs = Needs((self.target,))
        if self.small:
            self.needs = replace(
                self.needs, arrays=(self.target, f"local_{self.target}"), outputs=("embedding", "local_embedding")
            )
        require_arrays("seed", self.needs.arrays, context.widths)
        student, width = context.students[0].width, context.widths[self.target][-1]
        self.head = nn.Sequential(nn.Linear(student, student), nn.ReLU(), nn.Linear(student, width))
        size = bank_size(bank, PUBLISHED, context)
        self.bank = self._queue(context, size, self.target, context.view, start)
        if self.small:
            self.small_bank = self._queue(context, size, f"local_{self.target}", LOCAL, start)

    def _queue(self, context: MethodContext, size: int, array: str, view: int, start: str) -> MemoryBank:
        width = context.widths[array][-1]
        bank = MemoryBank(size, {"teacher": width}, reread={"teacher": array}, seed=context.seed)
        bank.start(start, initial_rows(context, size), view)
        return bank

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher[self.target].flatten(0, 1)  # (B * W, D)
        s = self.head(outputs[0]["embedding"].flatten(0, 1))
        loss = relation_cross_entropy(t, s, self.bank["teacher"], self.tau_t, self.tau_s)
        if self.small:
            small = batch.teacher[f"local_{self.target}"]  # (B, L, D)
            s = self.head(outputs[0]["local_embedding"].flatten(0, 1))
            anchors = self.small_bank["teacher"]
            loss = loss + relation_cross_entropy(small.flatten(0, 1), s, anchors, self.tau_t, self.tau_s)
        return [loss]

    def after_step(self, batch: Batch) -> None:
        t = batch.teacher[self.target].flatten(0, 1)
        self.bank.push(batch.rows, batch.teacher_views, {"teacher": l2_normalize(t)})
        if self.small and batch.local_views is not None:
            first = batch.teacher[f"local_{self.target}"][:, 0]
            self.small_bank.push(batch.rows, batch.local_views[:, :1], {"teacher": l2_normalize(first)})
