"""Losses between two distributions over the same anchors, streamed over the bank in blocks.

One pass finds loss and gradient together: the gradient is added up unnormalised and divided by the
partition sums at the end; at low temperatures running maxima keep the exponentials in range. Nothing of
size B x K is kept and no bank is copied. In float32 at least, whatever the precision around it.
"""

from typing import Any

import torch
from torch import Tensor

from compress_ssl.pipeline.models.precision import l2_normalize

BLOCK = 4096
"""Anchors at a time."""

FAINT = -80.0
"""exp of less than this is lost beside a weight of 1 in any precision, and slow: subnormal in float32."""

MILD = 1 / 40
"""From this temperature on, logits lie within +-40: their exponentials and sums of them fit float32 as they are."""


def relation_kl(
    teacher: Tensor,
    teacher_anchors: Tensor,
    student: Tensor,
    student_anchors: Tensor,
    tau_t: float,
    tau_s: float,
    *,
    own: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """KL(p || q) over K anchors, batch mean, in nats. Koohpayegani et al. 2020.

    teacher (B, D) against teacher_anchors (K, D) gives p = softmax(cosine / tau_t); student (B, d)
    against student_anchors (K, d) gives q with tau_s. Rows are normalised here, anchors are unit
    vectors already. `own` (B, d) adds one more anchor to each row: the teacher's vector itself on the
    teacher's side, own on the student's. The gradient flows through `student` only, and has none of
    its own (no double backward). Without any anchor the loss is 0.
    """
    return _loss(teacher, teacher_anchors, student, student_anchors, (tau_t, tau_s), own, block, divergence=True)


def relation_cross_entropy(
    teacher: Tensor, student: Tensor, anchors: Tensor, tau_t: float, tau_s: float, *, block: int = BLOCK
) -> Tensor:
    """H(p, q) over the row's own teacher vector and K anchors, batch mean, in nats. Fang et al. 2021.

    teacher, student (B, D), anchors (K, D) unit vectors. Logit 0 is the similarity to the row's own
    teacher vector (1 for the teacher itself), 1..K those to the anchors. Else as `relation_kl`.
    """
    return _loss(teacher, anchors, student, anchors, (tau_t, tau_s), teacher, block, divergence=False)


def _loss(
    teacher: Tensor,
    teacher_anchors: Tensor,
    student: Tensor,
    student_anchors: Tensor,
    taus: tuple[float, float],
    own: Tensor | None,
    block: int,
    divergence: bool,
) -> Tensor:
    if len(teacher_anchors) != len(student_anchors):
        raise ValueError(f"{len(teacher_anchors)} teacher anchors, but {len(student_anchors)} student anchors")
    with torch.autocast(student.device.type, enabled=False):
        s, t = l2_normalize(student), l2_normalize(teacher.detach())
        column = l2_normalize(own.detach()) if own is not None else None
        needed = s.requires_grad and torch.is_grad_enabled()
        anchors = teacher_anchors.detach(), student_anchors.detach()
        return _Relation.apply(s, t.to(s.dtype), column, *anchors, taus, block, divergence, needed).mean()


class _Relation(torch.autograd.Function):
    """Unit rows -> losses (B,); the gradient in s is found on the way and only scaled afterwards."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, own: Tensor | None, teacher_anchors: Tensor, student_anchors: Tensor,
                taus: tuple[float, float], block: int, divergence: bool, needed: bool) -> Tensor:  # fmt: skip
        sums = _Sums(s, t, taus, divergence, needed)
        if own is not None:
            sums.start(s, t, own.to(s.dtype))
        n, k = len(s), len(student_anchors)
        memory = s.new_empty(3 * n * min(block, k))  # for all blocks: fresh pages cost as much as the arithmetic
        for first in range(0, k, block):
            near, far = (bank[first : first + block].to(s.dtype) for bank in (teacher_anchors, student_anchors))
            sums.add(near, far, memory[: 3 * n * len(far)].view(3, n, len(far)))
        ctx.save_for_backward(sums.slope())
        return sums.losses().to(s.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let a wrong result through
            raise RuntimeError("the similarity losses have no second derivative")
        (slope,) = ctx.saved_tensors
        return (upstream[:, None] * slope, *[None] * 8)


class _Sums:
    """What a pass over the anchors adds up for each row. Index 0 is the teacher's distribution, 1 the student's.

    top (2, B): what logits are taken relative to: the largest so far, or 0 where temperatures are mild. mass (2, B):
    sum of w = exp(logit - top). gap (B,): sum of w_p (a - b), or of -w_p b for a cross-entropy, with logits a, b less
    their tops. pull (2, B, d): sum of w times the student's anchor.
    """

    def __init__(self, s: Tensor, t: Tensor, taus: tuple[float, float], divergence: bool, needed: bool):
        self.rows, self.tau, self.divergence = (t / taus[0], s / taus[1]), taus[1], divergence
        self.mild = min(taus) >= MILD
        self.top = s.new_full((2, len(s)), 0.0 if self.mild else -2.0 / min(taus))  # or below every logit
        self.mass = s.new_zeros(2, len(s), dtype=torch.float64)
        self.gap = s.new_zeros(len(s), dtype=torch.float64)
        self.pull = s.new_zeros(2, *s.shape) if needed else None

    def start(self, s: Tensor, t: Tensor, own: Tensor) -> None:
        """The row's own column: t against itself, s against own."""
        logits = torch.stack([(self.rows[0] * t).sum(1), (self.rows[1] * own).sum(1)])
        if not self.mild:
            self.top = logits
        a, b = logits - self.top
        weights = torch.stack([a, b]).exp()
        self.mass += weights
        self.gap += weights[0] * (a - b if self.divergence else -b)
        if self.pull is not None:
            self.pull += weights[..., None] * own

    def add(self, near: Tensor, far: Tensor, memory: Tensor) -> None:
        """n anchors of the teacher's bank (n, D) and of the student's (n, d); `memory` (3, B, n) is written over."""
        a, p, b = memory
        torch.mm(self.rows[0], near.T, out=a)
        torch.mm(self.rows[1], far.T, out=b)
        if self.mild:
            torch.exp(a, out=p)
        else:
            self._lift(a, b)
            torch.clamp(a, min=FAINT, out=p).exp_()
        gap = a.sub_(b) if self.divergence else torch.neg(b, out=a)
        self.gap += gap.mul_(p).sum(1)
        q = b.exp_() if self.mild else b.clamp_(min=FAINT).exp_()
        self.mass += torch.stack([p.sum(1), q.sum(1)])
        if self.pull is not None:
            self.pull.flatten(0, 1).addmm_(memory[1:].flatten(0, 1), far)

    def _lift(self, a: Tensor, b: Tensor) -> None:
        """Raise the tops to the largest logits of a and b (B, n), and take those and all sums relative to them."""
        top = torch.maximum(self.top, torch.stack([a.amax(1), b.amax(1)]))
        drop = (self.top - top).double()
        fade = drop.exp()
        self.top = top
        a -= top[0][:, None]
        b -= top[1][:, None]
        moved = drop[0] - drop[1] if self.divergence else -drop[1]
        self.gap = fade[0] * (self.gap + self.mass[0] * moved)
        self.mass *= fade
        if self.pull is not None:
            self.pull *= fade[..., None]

    def losses(self) -> Tensor:
        """(B,) KL(p || q), or H(p, q)."""
        mass = self._mass()
        losses = self.gap / mass[0] + mass[1].log()
        return losses - mass[0].log() if self.divergence else losses

    def slope(self) -> Tensor | None:
        """(B, d) gradient of `losses` in s."""
        if self.pull is None:
            return None
        mean = self.pull / self._mass()[..., None]
        return ((mean[1] - mean[0]) / self.tau).to(self.pull.dtype)

    def _mass(self) -> Tensor:
        """(2, B) 1 where there was no anchor at all."""
        return torch.where(self.mass > 0, self.mass, 1.0)
