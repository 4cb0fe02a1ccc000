"""The losses over anchors, against loops in double precision written down from the papers."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.bank import unit
from pipeline.similarity import relation_cross_entropy, relation_kl

Vector = list[float]

# ---------------------------------------------------------------- the papers, slowly


def length_one(x: Vector) -> Vector:
    length = math.sqrt(sum(value * value for value in x))
    return [value / length for value in x]


def cosine(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(length_one(x), length_one(y), strict=True))


def softmax(logits: Vector) -> Vector:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def compress(
    teacher: list[Vector], teacher_anchors: list[Vector], student: list[Vector], student_anchors: list[Vector],
    tau_t: float, tau_s: float,
) -> float:  # fmt: skip
    """Koohpayegani et al. 2020: p = softmax(t . a / tau), q likewise, KL(p || q), mean over the batch."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        p = softmax([cosine(t, a) / tau_t for a in teacher_anchors])
        q = softmax([cosine(s, a) / tau_s for a in student_anchors])
        total += sum(pj * math.log(pj / qj) for pj, qj in zip(p, q, strict=True) if pj > 0)
    return total / len(teacher)


def seed(teacher: list[Vector], student: list[Vector], queue: list[Vector], tau_t: float, tau_s: float) -> float:
    """Fang et al. 2021: D+ = [own teacher vector; queue], cross-entropy of both softmaxes over D+, batch mean."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        anchors = [t, *queue]
        p = softmax([cosine(t, a) / tau_t for a in anchors])
        q = softmax([cosine(s, a) / tau_s for a in anchors])
        total -= sum(pj * math.log(qj) for pj, qj in zip(p, q, strict=True))
    return total / len(teacher)


def slope(loss: Callable[[list[Vector]], float], at: list[Vector], step: float = 1e-5) -> list[Vector]:
    """Central differences of a loss in every coordinate."""
    out = [[0.0] * len(row) for row in at]
    for i, row in enumerate(at):
        for j in range(len(row)):
            sides = []
            for sign in (1, -1):
                moved = [list(r) for r in at]
                moved[i][j] += sign * step
                sides.append(loss(moved))
            out[i][j] = (sides[0] - sides[1]) / (2 * step)
    return out


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(
    b: int, k: int, dt: int, ds: int, start: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(teacher, teacher anchors, student, student anchors); anchors are unit vectors."""
    teacher, student = rows(b, dt, start, dtype), rows(b, ds, start + 1, dtype)
    return teacher, unit(rows(k, dt, start + 2, dtype)), student, unit(rows(k, ds, start + 3, dtype))


shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
taus = st.floats(0.02, 2.0)

# ---------------------------------------------------------------- CompRess


@given(shapes, taus, taus)
def test_compress_is_the_papers_loop_for_any_sizes_and_both_temperatures(
    shape: tuple[int, int, int, int, int], tau_t: float, tau_s: float
) -> None:
    t, ta, s, sa = pair(*shape)
    slow = compress(t.tolist(), ta.tolist(), s.tolist(), sa.tolist(), tau_t, tau_s)
    assert float(relation_kl(t, ta, s, sa, tau_t, tau_s)) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    single = relation_kl(t.float(), ta.float(), s.float(), sa.float(), tau_t, tau_s)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(slow, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("tau_t, tau_s", [(0.04, 0.04), (0.1, 0.5)])
def test_the_gradient_of_compress_is_that_of_the_papers_loop(tau_t: float, tau_s: float) -> None:
    t, ta, s, sa = pair(3, 7, 5, 4, 10)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_kl(t, ta, x, sa, tau_t, tau_s), s)
    (grad,) = torch.autograd.grad(relation_kl(t, ta, s, sa, tau_t, tau_s), s)
    slow = slope(lambda x: compress(t.tolist(), ta.tolist(), x, sa.tolist(), tau_t, tau_s), s.tolist())
    torch.testing.assert_close(grad, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_compress_sends_gradient_to_the_student_only() -> None:
    parts = [part.requires_grad_() for part in pair(3, 7, 5, 4, 20)]
    relation_kl(*parts, 0.04, 0.04).backward()
    assert [part.grad is not None for part in parts] == [False, False, True, False]


def test_compress_is_zero_with_zero_slope_where_student_and_teacher_agree() -> None:
    t, ta, _, _ = pair(3, 7, 5, 5, 30)
    s = t.clone().requires_grad_()
    loss = relation_kl(t, ta, s, ta, 0.04, 0.04)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert s.grad is not None and float(s.grad.abs().max()) < 1e-12


# ---------------------------------------------------------------- SEED


@given(shapes, taus, taus)
def test_seed_is_the_papers_loop_with_the_own_teacher_vector_among_the_anchors(
    shape: tuple[int, int, int, int, int], tau_t: float, tau_s: float
) -> None:
    b, k, d, _, start = shape
    t, queue, s, _ = pair(b, k, d, d, start)
    slow = seed(t.tolist(), s.tolist(), queue.tolist(), tau_t, tau_s)
    assert float(relation_cross_entropy(t, s, queue, tau_t, tau_s)) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    single = relation_cross_entropy(t.float(), s.float(), queue.float(), tau_t, tau_s)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(slow, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("tau_t, tau_s", [(0.01, 0.2), (0.1, 0.07), (1e-4, 0.2)])
def test_the_gradient_of_seed_is_that_of_the_papers_loop(tau_t: float, tau_s: float) -> None:
    t, queue, s, _ = pair(3, 7, 5, 5, 40)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_cross_entropy(t, x, queue, tau_t, tau_s), s)
    (grad,) = torch.autograd.grad(relation_cross_entropy(t, s, queue, tau_t, tau_s), s)
    slow = slope(lambda x: seed(t.tolist(), x, queue.tolist(), tau_t, tau_s), s.tolist())
    torch.testing.assert_close(grad, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_seed_sends_gradient_to_the_student_only() -> None:
    t, queue, s, _ = (part.requires_grad_() for part in pair(3, 7, 5, 5, 50))
    relation_cross_entropy(t, s, queue, 0.01, 0.2).backward()
    assert (t.grad, queue.grad) == (None, None)
    assert s.grad is not None and float(s.grad.abs().sum()) > 0


def test_a_sharp_seed_is_contrastive_learning_against_the_teacher_as_the_fixed_key() -> None:
    t, queue, s, _ = pair(3, 7, 5, 5, 60)
    logits = torch.cat([(unit(s) * unit(t)).sum(1, keepdim=True), unit(s) @ queue.T], 1) / 0.2
    info_nce = torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    assert float(relation_cross_entropy(t, s, queue, 1e-4, 0.2)) == pytest.approx(float(info_nce), rel=1e-9)


# ---------------------------------------------------------------- both

LOSSES: dict[str, Callable[..., Tensor]] = {
    "compress": lambda t, s, a, b: relation_kl(t, a, s, b, 0.04, 0.1),
    "seed": lambda t, s, a, b: relation_cross_entropy(t, s, a, 0.05, 0.2),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
@given(st.integers(0, 999), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_length_of_embeddings_does_not_matter(
    loss: Callable[..., Tensor], start: int, longer_t: float, longer_s: float
) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, start)
    assert float(loss(t * longer_t, s * longer_s, ta, sa)) == pytest.approx(float(loss(t, s, ta, sa)), rel=1e-9)


@each_loss
@given(st.integers(0, 999), st.permutations(range(6)))
def test_the_order_of_the_bank_does_not_matter(loss: Callable[..., Tensor], start: int, order: list[int]) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, start)
    assert float(loss(t, s, ta[order], sa[order])) == pytest.approx(float(loss(t, s, ta, sa)), rel=1e-9)


@each_loss
def test_similarities_are_single_precision_inside_autocast(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = (part.float() for part in pair(4, 50, 32, 32, 70))
    s = s.bfloat16()  # what a student's forward under autocast hands over
    want = float(loss(t.double(), s.double(), ta.double(), sa.double()))
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(t, s, ta, sa)
        coarse = (unit(s) @ sa.T).dtype
    assert coarse == torch.bfloat16, "this test would prove nothing"
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(want, rel=1e-5)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_scored_in_single_precision(
    loss: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    t, ta, s, sa = (part.float() for part in pair(4, 9, 8, 8, 80))
    got = loss(t.to(dtype), s.to(dtype), ta, sa)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(loss(t.to(dtype).float(), s.to(dtype).float(), ta, sa)), rel=1e-6)


@each_loss
def test_an_empty_bank_gives_zero_and_zero_slope(loss: Callable[..., Tensor]) -> None:
    t, _, s, _ = pair(3, 1, 4, 4, 90)
    s.requires_grad_()
    got = loss(t, s, torch.empty(0, 4, dtype=torch.float64), torch.empty(0, 4, dtype=torch.float64))
    got.backward()
    assert float(got.detach()) == 0.0
    assert s.grad is not None and bool((s.grad == 0).all())


@each_loss
def test_a_zero_embedding_gives_no_nan(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = (part.float() for part in pair(3, 6, 4, 4, 100))
    t[0], s[1] = 0, 0
    s.requires_grad_()
    got = loss(t, s, ta, sa)
    got.backward()
    assert math.isfinite(float(got.detach()))
    assert s.grad is not None and bool(s.grad.isfinite().all())


def test_unit_keeps_double_precision_and_raises_half_to_single() -> None:
    x = rows(5, 7, 1)
    assert unit(x).dtype == torch.float64
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert {unit(x.to(kind)).dtype for kind in (torch.float16, torch.bfloat16, torch.float32)} == {torch.float32}
    assert bool((unit(torch.zeros(2, 3)) == 0).all())
