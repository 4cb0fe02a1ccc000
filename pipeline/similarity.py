"""Losses between two distributions over the same anchors. Always in float32, whatever the precision."""

import torch
from torch import Tensor

from pipeline.bank import unit


def relation_kl(
    teacher: Tensor, teacher_anchors: Tensor, student: Tensor, student_anchors: Tensor, tau_t: float, tau_s: float
) -> Tensor:
    """KL(p || q) over K anchors, batch mean, in nats. Koohpayegani et al. 2020.

    teacher (B, D) against teacher_anchors (K, D) gives p = softmax(cosine / tau_t); student (B, d)
    against student_anchors (K, d) gives q with tau_s. Rows are normalised here, anchors are unit
    vectors already. The gradient flows through `student` only. K = 0 gives 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_q = _log_softmax(student, student_anchors.detach(), tau_s)
        with torch.no_grad():
            log_p = _log_softmax(teacher, teacher_anchors, tau_t)
        return (log_p.exp() * (log_p - log_q)).sum() / len(student)


def relation_cross_entropy(
    teacher: Tensor, student: Tensor, anchors: Tensor, tau_t: float, tau_s: float
) -> Tensor:
    """H(p, q) over the row's own teacher vector and K anchors, batch mean, in nats. Fang et al. 2021.

    teacher, student (B, D), anchors (K, D) unit vectors. Logit 0 is the similarity to the row's own
    teacher vector (1 for the teacher itself), 1..K those to the anchors.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = unit(student), unit(teacher).detach()
        own = (s * t).sum(-1, keepdim=True)  # (B, 1)
        log_q = (torch.cat([own, s @ anchors.detach().T], 1) / tau_s).log_softmax(1)
        with torch.no_grad():
            p = (torch.cat([(t * t).sum(-1, keepdim=True), t @ anchors.T], 1) / tau_t).softmax(1)
        return -(p * log_q).sum() / len(s)


def _log_softmax(rows: Tensor, anchors: Tensor, tau: float) -> Tensor:
    return (unit(rows) @ anchors.T / tau).log_softmax(1)
