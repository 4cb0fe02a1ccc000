"""Numbers that show whether a student learns: has it collapsed, does it agree with the teacher?"""

from torch import Tensor


def measure(student: Tensor, teacher: Tensor | None) -> dict[str, float]:
    z = student.detach().flatten(0, 1)
    out = {"spread": spread(z)}
    if teacher is not None and teacher.shape[:2] == student.shape[:2]:
        out["agreement"] = agreement(z, teacher.flatten(0, 1))
    return out


def spread(z: Tensor) -> float:
    """Standard deviation of unit embeddings (n, d) about their mean, 1 if they fill the sphere, 0 if collapsed."""
    u = z.float() / z.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return float((u - u.mean(0)).pow(2).sum(1).mean().sqrt())


def agreement(z: Tensor, t: Tensor) -> float:
    """Share of rows, in percent, whose nearest neighbour in the batch is the same for z (n, d) and t (n, D)."""
    nearest = []
    for x in (z.float(), t.float()):
        u = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        nearest.append((u @ u.T).fill_diagonal_(-2.0).argmax(1))
    return 100.0 * float((nearest[0] == nearest[1]).float().mean())
