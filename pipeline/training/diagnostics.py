"""Numbers logged while training that show whether a student has collapsed and whether it agrees with the teacher."""

from torch import Tensor
from torch.nn import functional as F


def measure(student: Tensor, teacher: Tensor | None) -> dict[str, float]:
    """{"spread", "agreement"} of student embeddings (B, W, d) and teacher features (B, W, D).

    Agreement is left out where there are no teacher features or a student sees another number of views.
    """
    z = student.detach().flatten(0, 1)  # (B * W, d)
    out = {"spread": spread(z)}
    if teacher is not None and teacher.shape[:2] == student.shape[:2]:
        out["agreement"] = agreement(z, teacher.flatten(0, 1))
    return out


def spread(z: Tensor) -> float:
    """Standard deviation of the unit embeddings of z (n, d) about their mean.

    1 if they are spread over the whole sphere, 0 if the student has collapsed to one direction.
    """
    u = F.normalize(z.float(), dim=1)
    return float((u - u.mean(0)).pow(2).sum(1).mean().sqrt())


def agreement(z: Tensor, t: Tensor) -> float:
    """Share of rows, in percent, whose nearest other row by cosine is the same in z (n, d) and in t (n, D)."""
    nearest = []
    for x in (z.float(), t.float()):
        u = F.normalize(x, dim=1)
        nearest.append((u @ u.T).fill_diagonal_(-2.0).argmax(1))  # -2 is below every cosine: no row is its own
    return 100.0 * float((nearest[0] == nearest[1]).float().mean())
