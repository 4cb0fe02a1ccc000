"""CompRess: the student reproduces the teacher's similarity distribution over a memory bank.

Koohpayegani, Tejankar, Pirsiavash, NeurIPS 2020, arXiv 2010.14713.
"""

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
"""Slots of the published memory banks, K in the paper."""

RECIPE = Recipe(lr=0.01, weight_decay=1e-4, batch_size=256, epochs=130, schedule="step")
"""The released code's settings: SGD, lr times 0.2 after epochs 90 and 120."""


class TwoQueues(Method):
    """CompRess 2q: KL between similarities to a teacher bank and to a student bank, aligned by (i, v).

    Koohpayegani, Tejankar, Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations",
    NeurIPS 2020, arXiv 2010.14713. With t, s the L2-normalised embeddings of an image by teacher and
    student, and a_j, c_j the embeddings of anchor j = 1 .. K by teacher and student:

        p_j = softmax_j(t · a_j / tau)    q_j = softmax_j(s · c_j / tau)    loss = KL(p || q), batch mean, in nats

    D and d may differ and no projection is trained: the loss acts on the backbone's embedding itself. The loss
    is computed before the batch enters the banks, so an image is never its own anchor.

    Keys:
        bank: slots K; by default 128000, at most half the usable images.
        tau: temperature of both sides, more than 0.
        start: anchors of the first step. `empty` has none, the first loss is 0 and the banks grow by one batch
            per step; `random` is that of the released code, K random vectors, which mean nothing until the
            banks have been overwritten once.

    Raises UserError for a tau that is not positive and for a bank of more slots than usable images.

    Difference from the released code: its default start is `random`.

    Example:
        compress distill --store teacher --student timm:resnet18 --method compress-2q:tau=0.04 --out run
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
        self._to_enqueue: dict[str, Tensor] = {}

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t, s = batch.teacher["embedding"].flatten(0, 1), outputs[0]["embedding"].flatten(0, 1)  # (B * W, D), (.., d)
        self._to_enqueue = {"teacher": l2_normalize(t), "student": self.key(batch, s)}
        return [relation_kl(t, self.bank["teacher"], s, self.bank["student"], self.tau, self.tau)]

    def key(self, batch: Batch, student: Tensor) -> Tensor:
        """Unit vectors (B * W, d) that enter the student's bank, from the student's embedding (B * W, d)."""
        return l2_normalize(student.detach())

    def after_step(self, batch: Batch) -> None:
        self.bank.push(batch.rows, batch.teacher_views, self._to_enqueue)


class TwoQueuesMomentum(TwoQueues):
    """CompRess 2q whose student bank is filled by a momentum encoder, a moving average of the student.

    The loss is that of compress-2q (arXiv 2010.14713); only c_j differs, which is the momentum encoder's
    embedding of the same pixels. As in the released code, the encoder's batch norm layers use the batch's
    statistics and all its other layers are in evaluation mode; after each optimizer step its parameters become
    momentum * encoder + (1 - momentum) * student. Its buffers are not averaged.

    Keys:
        bank, tau, start: as for compress-2q.
        momentum: from 0 to 1; published 0.999.

    Example:
        compress distill --store teacher --student timm:resnet18 --method compress-2q-momentum --out run
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
        self._student = [context.students[0]]  # in a list, so that it is no submodule: the run saves the student itself
        self.slow = copy.deepcopy(context.students[0]).requires_grad_(False)

    def train(self, mode: bool = True) -> "TwoQueuesMomentum":
        """As nn.Module.train; of the momentum encoder only batch norm layers change their mode."""
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
    """CompRess 1q: KL between teacher's and student's similarities to one bank of teacher embeddings.

    Koohpayegani, Tejankar, Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations",
    NeurIPS 2020, arXiv 2010.14713. The loss of compress-2q with c_j = a_j: both sides are
    compared with the teacher's anchors. A trained linear layer d -> D takes the student's embedding to the
    teacher's width; it is not part of the exported student.

    Keys:
        bank: slots K; by default 128000, at most half the usable images.
        tau: temperature of both sides, more than 0.
        start: anchors of the first step. `store` fills the bank with stored features, which are meaningful
            anchors from step 0; `empty` has none; `random` is that of the released code.

    Raises UserError for a tau that is not positive and for a bank of more slots than usable images.

    Difference from the released code: the default start, `store` instead of `random`.

    Example:
        compress distill --store teacher --student timm:resnet18 --method compress-1q:bank=65536 --out run
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
        columns, reread = {"teacher": context.teacher_width}, {"teacher": "embedding"}
        self.bank = MemoryBank(size, columns, reread=reread, seed=context.seed)
        self.bank.start(start, initial_rows(context, size), context.view)
        self._to_enqueue: dict[str, Tensor] = {}

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher["embedding"].flatten(0, 1)  # (B * W, D)
        s = self.head(outputs[0]["embedding"].flatten(0, 1))  # (B * W, D)
        self._to_enqueue = {"teacher": l2_normalize(t)}
        anchors = self.bank["teacher"]
        return [relation_kl(t, anchors, s, anchors, self.tau, self.tau)]

    def after_step(self, batch: Batch) -> None:
        self.bank.push(batch.rows, batch.teacher_views, self._to_enqueue)
