"""SEED: Self-supervised Distillation for Visual Representation. Fang et al., ICLR 2021, arXiv 2101.04731."""

from collections.abc import Sequence
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
from compress_ssl.pipeline.views.groups import LOCAL_CROPS

PUBLISHED = 65_536
"""Slots of the published queue."""


class Seed(Method):
    """SEED: cross-entropy of similarities to the image's own teacher vector and a queue of teacher vectors.

    Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021, arXiv 2101.04731. t is
    the teacher's L2-normalised vector, s the student's embedding after a trained two-layer head
    Linear(d, d) - ReLU - Linear(d, D), L2-normalised; the head is not part of the exported student. With the
    anchors a_0 = t and a_1 .. a_K of a FIFO queue of teacher vectors:

        p_j = softmax_j(t · a_j / tau_t)    q_j = softmax_j(s · a_j / tau_s)    loss = -Σ_j p_j log q_j

    batch mean, in nats. The loss is computed before the batch enters the queue. With tau_t at 0.01 or below nearly
    all of p lies on a_0, and the loss is close to InfoNCE with the teacher's vectors as fixed keys.

    Keys:
        bank: slots K; by default 65536, at most half the usable images.
        tau_t, tau_s: temperatures of teacher and student, more than 0.
        start: anchors of the first step: `store` (stored features), `empty` or `random`.
        target: `projection` is the published target, the output of the teacher's own projection head (export with
            head= and --keep embedding,projection); `embedding` is the pooled embedding; `auto` takes the
            projection if the store has it.
        small: add the loss of the L small crops, (B * L rows, mean), compared with a queue of their own, which only
            the first crop of an image enters. By default true if the store has crops (--local-views 6).

    Raises UserError for a temperature that is not positive, for a bank of more slots than usable images, and for an
    array that the store lacks.

    Differences from the released code: its default tau_t is 1e-4; its queue starts with random vectors.

    Example:
        compress distill --store teacher --student timm:resnet18 --method seed:tau_t=0.01,bank=16384 --out run
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
        self.small_target = LOCAL_CROPS.array(self.target)
        if small is None:
            small = context.resolved["small"] = self.small_target in context.widths
        self.small = small
        self.needs = Needs((self.target,))
        if self.small:
            self.needs = Needs((self.target, self.small_target), ("embedding", LOCAL_CROPS.array("embedding")))
        require_arrays("seed", self.needs.arrays, context.widths)
        student, width = context.students[0].width, context.widths[self.target][-1]
        self.head = nn.Sequential(nn.Linear(student, student), nn.ReLU(), nn.Linear(student, width))
        size = bank_size(bank, PUBLISHED, context)
        self.bank = self._build_queue(context, size, self.target, context.view, start)
        if self.small:
            self.small_bank = self._build_queue(context, size, self.small_target, LOCAL_CROPS.first, start)

    def _build_queue(self, context: MethodContext, size: int, array: str, view: int, start: str) -> MemoryBank:
        """A bank of `size` slots for stored vectors `array`; `view` is the view of anchors from the store."""
        width = context.widths[array][-1]
        bank = MemoryBank(size, {"teacher": width}, reread={"teacher": array}, seed=context.seed)
        bank.start(start, initial_rows(context, size), view)
        return bank

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher[self.target].flatten(0, 1)  # (B * W, D)
        s = self.head(outputs[0]["embedding"].flatten(0, 1))  # (B * W, D)
        loss = relation_cross_entropy(t, s, self.bank["teacher"], self.tau_t, self.tau_s)
        if self.small:
            small = batch.teacher[self.small_target]  # (B, L, D)
            s = self.head(outputs[0][LOCAL_CROPS.array("embedding")].flatten(0, 1))  # (B * L, D)
            anchors = self.small_bank["teacher"]
            loss = loss + relation_cross_entropy(small.flatten(0, 1), s, anchors, self.tau_t, self.tau_s)
        return [loss]

    def after_step(self, batch: Batch) -> None:
        t = batch.teacher[self.target].flatten(0, 1)
        self.bank.push(batch.rows, batch.teacher_views, {"teacher": l2_normalize(t)})
        if self.small and batch.local_views is not None:
            first = batch.teacher[self.small_target][:, 0]
            self.small_bank.push(batch.rows, batch.local_views[:, :1], {"teacher": l2_normalize(first)})
