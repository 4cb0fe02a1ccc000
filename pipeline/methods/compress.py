"""CompRess: similarity distributions over memory banks. Koohpayegani, Tejankar, Pirsiavash, NeurIPS 2020."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import (
    Batch,
    Method,
    MethodContext,
    Outputs,
    Recipe,
    bank_size,
    initial_rows,
    require_fractions,
    require_positive,
)
from compress_ssl.pipeline.methods.memory_bank import MemoryBank
from compress_ssl.pipeline.methods.similarity import relation_kl
from compress_ssl.pipeline.models.moving_average import update_ema
from compress_ssl.pipeline.models.precision import l2_normalize

PUBLISHED = 128_000
RECIPE = Recipe(lr=0.01, weight_decay=1e-4, batch_size=256, epochs=130, schedule="step")


class TwoQueues(Method):
    """CompRess 2q: teacher and student each against their own bank, slot j of both being the same (i, v).

    Widths may differ, no projection is trained; the backbone's own embedding is what learns. The
    bank is scored before the batch enters it. `start=random` is the release's (meaningless anchors
    until the bank has turned over once); `empty` begins with the first batch.
    """

    recipe = RECIPE

    def __init__(
        self,
        *,
        context: MethodContext,
        bank: int | None = None,
        tau: float = 0.04,
        start: Literal["empty", "random"] = "empty",
    ):
        super().__init__()
        require_positive(tau=tau)
        self.tau = tau
        columns = {"teacher": context.teacher_width, "student": context.students[0].width}
        size = bank_size(bank, PUBLISHED, context)
        self.bank = MemoryBank(size, columns, reread={"teacher": "embedding"}, seed=context.seed)
        self.bank.start(start)
        self._seen: dict[str, Tensor] = {}

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t, s = batch.teacher["embedding"].flatten(0, 1), outputs[0]["embedding"].flatten(0, 1)  # (B * W, D), (.., d)
        self._seen = {"teacher": l2_normalize(t), "student": self.key(batch, s)}
        return [relation_kl(t, self.bank["teacher"], s, self.bank["student"], self.tau, self.tau)]

    def key(self, batch: Batch, student: Tensor) -> Tensor:
        """What enters the student's bank: (B * W, d) unit vectors."""
        return l2_normalize(student.detach())

    def after_step(self, batch: Batch) -> None:
        self.bank.push(batch.rows, batch.teacher_views, self._seen)


class TwoQueuesMomentum(TwoQueues):
    """CompRess 2q whose student bank is filled by a slow copy of the student on the same pixels.

    The copy sees the same view, its batch norm layers use the batch's statistics, all else is in
    evaluation mode; after each step its parameters move by 1 - `momentum` towards the student's.
    """

    def __init__(
        self,
        *,
        context: MethodContext,
        bank: int | None = None,
        tau: float = 0.04,
        start: Literal["empty", "random"] = "empty",
        momentum: float = 0.999,
    ):
        super().__init__(context=context, bank=bank, tau=tau, start=start)
        require_fractions(momentum=momentum)
        self.momentum = momentum
        self._student = [context.students[0]]  # in a list: it is not ours to checkpoint
        self.slow = copy.deepcopy(context.students[0]).requires_grad_(False)

    def train(self, mode: bool = True) -> "TwoQueuesMomentum":
        super().train(mode)
        self.slow.eval()
        for module in self.slow.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    @torch.no_grad()
    def key(self, batch: Batch, student: Tensor) -> Tensor:
        return l2_normalize(self.slow(batch.images[0]))

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        update_ema(self.slow, self._student[0], self.momentum)


class OneQueue(Method):
    """CompRess 1q: teacher and student both against the teacher's bank.

    The student reaches the teacher's width through one linear layer, which is dropped at the end.
    `start=store` fills the bank with stored features, so that anchors mean something from step 0.
    """

    recipe = RECIPE

    def __init__(
        self,
        *,
        context: MethodContext,
        bank: int | None = None,
        tau: float = 0.04,
        start: Literal["store", "empty", "random"] = "store",
    ):
        super().__init__()
        require_positive(tau=tau)
        self.tau = tau
        self.head = nn.Linear(context.students[0].width, context.teacher_width)
        size = bank_size(bank, PUBLISHED, context)
        columns, again = {"teacher": context.teacher_width}, {"teacher": "embedding"}
        self.bank = MemoryBank(size, columns, reread=again, seed=context.seed)
        self.bank.start(start, initial_rows(context, size), context.view)
        self._seen: dict[str, Tensor] = {}

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher["embedding"].flatten(0, 1)  # (B * W, D)
        s = self.head(outputs[0]["embedding"].flatten(0, 1))  # (B * W, D)
        self._seen = {"teacher": l2_normalize(t)}
        anchors = self.bank["teacher"]
        return [relation_kl(t, anchors, s, anchors, self.tau, self.tau)]

    def after_step(self, batch: Batch) -> None:
        self.bank.push(batch.rows, batch.teacher_views, self._seen)
