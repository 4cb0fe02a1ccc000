"""Losses between a teacher's and a student's similarity distribution over the same K anchors.

The forward pass reads the anchors in blocks and computes loss and gradient together, as an online softmax:
sums of exponentials are accumulated unnormalised and divided by the partition sums at the end; at low
temperatures running maxima keep the exponentials in range. No (B, K) matrix is kept and no bank is copied.
The arithmetic is in float32 or float64, also inside autocast.
"""

from typing import Protocol

import torch
from torch import Tensor

from compress_ssl.pipeline.models.precision import l2_normalize

BLOCK = 4096
"""Anchors per block: three float32 matrices (B, BLOCK) take 12.6 MB at B = 256."""

EXP_FLOOR = -80.0
"""Lowest logit relative to the maximum. exp(-80) = 1.8e-35 is lost when added to 1 in float32 and in float64; below
-87.3 float32 results are subnormal, which is slow."""

MIN_TEMPERATURE_WITHOUT_MAX = 1 / 40
"""From this temperature on, a cosine / tau lies within +-40, so that its exponential (at most 2.4e17) and sums of
such exponentials fit float32 without subtracting a maximum."""


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
    """KL divergence between similarity distributions: CompRess's loss, batch mean, in nats.

    Koohpayegani, Tejankar, Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations",
    NeurIPS 2020, arXiv 2010.14713. For a row with teacher vector t and student vector s, both L2-normalised,
    and anchors a_j (teacher's side) and c_j (student's side), j = 1 .. K:

        p_j = softmax_j(t · a_j / tau_t)    q_j = softmax_j(s · c_j / tau_s)    loss = Σ_j p_j log(p_j / q_j)

    The paper uses one temperature for both sides; here they may differ.

    teacher, student: (B, D) and (B, d), normalised here. teacher_anchors, student_anchors: (K, D) and (K, d), unit
    vectors; slot j of both must be of the same (i, v). own: (B, d) adds one anchor per row, the row's teacher
    vector on the teacher's side and `own` on the student's. block: anchors per block; it changes rounding only.

    Returns a scalar, 0 if there is no anchor. The gradient flows into `student` only. Raises ValueError if the
    two banks differ in length, and RuntimeError if a second derivative is asked for.

    >>> x = torch.eye(3)
    >>> relation_kl(x, x, x, x, 0.04, 0.04)
    tensor(0.)
    """
    return _loss(teacher, student, (teacher_anchors, student_anchors), (tau_t, tau_s), own, block, divergence=True)


def relation_cross_entropy(
    teacher: Tensor, student: Tensor, anchors: Tensor, tau_t: float, tau_s: float, *, block: int = BLOCK
) -> Tensor:
    """Cross-entropy between similarity distributions: SEED's loss, batch mean, in nats.

    Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021, arXiv 2101.04731. For
    a row with teacher vector t and student vector s, both L2-normalised, anchors a_1 .. a_K and a_0 = t:

        p_j = softmax_j(t · a_j / tau_t)    q_j = softmax_j(s · a_j / tau_s)    loss = -Σ_j p_j log q_j

    The row's own teacher vector is an anchor (teacher's logit 1 / tau_t). The gradient equals that of KL(p || q),
    because the entropy of p does not depend on the student.

    teacher, student: (B, D), normalised here. anchors: (K, D) unit vectors. Block, gradient and errors are as for
    `relation_kl`. Returns a scalar, 0 if there is no anchor beside the row's own.

    >>> x = torch.eye(3)
    >>> relation_cross_entropy(x, x, x[:0], 0.01, 0.2)
    tensor(0.)
    """
    return _loss(teacher, student, (anchors, anchors), (tau_t, tau_s), teacher, block, divergence=False)


def _loss(
    teacher: Tensor,
    student: Tensor,
    anchors: tuple[Tensor, Tensor],
    taus: tuple[float, float],
    own: Tensor | None,
    block: int,
    divergence: bool,
) -> Tensor:
    """Batch mean of KL(p || q) if `divergence`, else of H(p, q). Pairs are of (teacher, student)."""
    of_teacher, of_student = (each.detach() for each in anchors)
    if len(of_teacher) != len(of_student):
        raise ValueError(
            f"{len(of_teacher)} teacher anchors, but {len(of_student)} student anchors were given; slot j of both must "
            "be the same image and view"
        )
    with torch.autocast(student.device.type, enabled=False):
        s, t = l2_normalize(student), l2_normalize(teacher.detach())
        column = l2_normalize(own.detach()) if own is not None else None
        needed = s.requires_grad and torch.is_grad_enabled()
        losses: Tensor = _Relation.apply(
            s, t.to(s.dtype), column, of_teacher, of_student, taus, block, divergence, needed
        )
        return losses.mean()


class _Context(Protocol):
    """What autograd hands from the forward to the backward pass."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Relation(torch.autograd.Function):
    """Unit rows s (B, d), t (B, D) -> losses (B,). `forward` computes the gradient in s too; `backward` scales it.

    `forward` has ten parameters, since autograd sees a tensor only if it is an argument of its own.
    """

    @staticmethod
    def forward(ctx: _Context, s: Tensor, t: Tensor, own: Tensor | None, teacher_anchors: Tensor,
                student_anchors: Tensor, taus: tuple[float, float], block: int, divergence: bool,
                needed: bool) -> Tensor:  # fmt: skip
        sums = _Sums(s, t, taus, divergence, needed)
        if own is not None:
            sums.start(s, t, own.to(s.dtype))
        n, k = len(s), len(student_anchors)
        # One buffer for all blocks: to allocate fresh pages per block takes as long as the arithmetic.
        buffer = s.new_empty(3 * n * min(block, k))
        for first in range(0, k, block):
            of_teacher = teacher_anchors[first : first + block].to(s.dtype)
            of_student = student_anchors[first : first + block].to(s.dtype)
            sums.add(of_teacher, of_student, buffer[: 3 * n * len(of_student)].view(3, n, len(of_student)))
        ctx.save_for_backward(sums.gradient())
        return sums.losses().to(s.dtype)

    @staticmethod
    def backward(ctx: _Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let a wrong result through
            raise RuntimeError("the similarity losses have no second derivative; call backward without create_graph")
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient, *[None] * 8)


class _Sums:
    """Running sums over the anchors, for each row. Index 0 is the teacher's distribution p, 1 the student's q.

    maxima (2, B): the value subtracted from the logits before exp: the largest logit so far, or 0 if both
        temperatures are at least MIN_TEMPERATURE_WITHOUT_MAX.
    partition (2, B): Σ w with w = exp(logit - maximum).
    weighted_logits (B,): Σ w_p (a - b) for a divergence, Σ -w_p b for a cross-entropy, where a and b are the
        teacher's and the student's logits less their maxima.
    weighted_anchors (2, B, d): Σ w times the student's anchor, for the gradient; None if none is needed.
    """

    def __init__(self, s: Tensor, t: Tensor, taus: tuple[float, float], divergence: bool, needed: bool):
        self.rows, self.tau, self.divergence = (t / taus[0], s / taus[1]), taus[1], divergence
        self.without_max = min(taus) >= MIN_TEMPERATURE_WITHOUT_MAX
        self.maxima = s.new_full((2, len(s)), 0.0 if self.without_max else -2.0 / min(taus))  # or below every logit
        self.partition = s.new_zeros(2, len(s), dtype=torch.float64)
        self.weighted_logits = s.new_zeros(len(s), dtype=torch.float64)
        self.weighted_anchors = s.new_zeros(2, *s.shape) if needed else None

    def start(self, s: Tensor, t: Tensor, own: Tensor) -> None:
        """Add the row's own anchor: t compared with itself, s compared with `own` (B, d)."""
        logits = torch.stack([(self.rows[0] * t).sum(1), (self.rows[1] * own).sum(1)])
        if not self.without_max:
            self.maxima = logits
        a, b = logits - self.maxima
        weights = torch.stack([a, b]).exp()
        self.partition += weights
        self.weighted_logits += weights[0] * (a - b if self.divergence else -b)
        if self.weighted_anchors is not None:
            self.weighted_anchors += weights[..., None] * own

    def add(self, teacher_anchors: Tensor, student_anchors: Tensor, buffer: Tensor) -> None:
        """Add n anchors: teacher's (n, D), student's (n, d). `buffer` (3, B, n) is overwritten."""
        a, p, b = buffer
        torch.mm(self.rows[0], teacher_anchors.T, out=a)
        torch.mm(self.rows[1], student_anchors.T, out=b)
        if self.without_max:
            torch.exp(a, out=p)
        else:
            self._raise_maxima(a, b)
            torch.clamp(a, min=EXP_FLOOR, out=p).exp_()
        difference = a.sub_(b) if self.divergence else torch.neg(b, out=a)
        self.weighted_logits += difference.mul_(p).sum(1)
        q = b.exp_() if self.without_max else b.clamp_(min=EXP_FLOOR).exp_()
        self.partition += torch.stack([p.sum(1), q.sum(1)])
        if self.weighted_anchors is not None:
            self.weighted_anchors.flatten(0, 1).addmm_(buffer[1:].flatten(0, 1), student_anchors)

    def _raise_maxima(self, a: Tensor, b: Tensor) -> None:
        """Raise the maxima to the largest logits of a and b (B, n); subtract them in place and rescale all sums."""
        maxima = torch.maximum(self.maxima, torch.stack([a.amax(1), b.amax(1)]))
        drop = (self.maxima - maxima).double()
        decay = drop.exp()
        self.maxima = maxima
        a -= maxima[0][:, None]
        b -= maxima[1][:, None]
        shift = drop[0] - drop[1] if self.divergence else -drop[1]
        self.weighted_logits = decay[0] * (self.weighted_logits + self.partition[0] * shift)
        self.partition *= decay
        if self.weighted_anchors is not None:
            self.weighted_anchors *= decay[..., None]

    def losses(self) -> Tensor:
        """(B,) KL(p || q), or H(p, q)."""
        partition = self._safe_partition()
        losses = self.weighted_logits / partition[0] + partition[1].log()
        return losses - partition[0].log() if self.divergence else losses

    def gradient(self) -> Tensor | None:
        """(B, d) gradient of `losses` in s."""
        if self.weighted_anchors is None:
            return None
        mean = self.weighted_anchors / self._safe_partition()[..., None]
        return ((mean[1] - mean[0]) / self.tau).to(self.weighted_anchors.dtype)

    def _safe_partition(self) -> Tensor:
        """(2, B) partition sums, 1 in rows without any anchor, to divide by."""
        return torch.where(self.partition > 0, self.partition, 1.0)
