"""The similarity losses, compared with loops in double precision transcribed from the papers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress_ssl.pipeline.methods.similarity import relation_cross_entropy, relation_kl
from compress_ssl.pipeline.models.precision import l2_normalize

Vector = list[float]

# ---------------------------------------------------------------- the papers' formulas in plain Python


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
    tau_t: float, tau_s: float, own: list[Vector] | None = None,
) -> float:  # fmt: skip
    """Koohpayegani et al. 2020: p = softmax(t . a / tau), q likewise, KL(p || q), mean over the batch.

    With `own`, each row has one more anchor: t itself for the teacher, own for the student.
    """
    total = 0.0
    for row, (t, s) in enumerate(zip(teacher, student, strict=True)):
        p = softmax([cosine(t, a) / tau_t for a in ([t] if own else []) + teacher_anchors])
        q = softmax([cosine(s, a) / tau_s for a in ([own[row]] if own else []) + student_anchors])
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


def central_differences(loss: Callable[[list[Vector]], float], at: list[Vector], step: float = 1e-5) -> list[Vector]:
    """The numerical gradient of a loss in every coordinate."""
    out = [[0.0] * len(row) for row in at]
    for i, row in enumerate(at):
        for j in range(len(row)):
            sides = []
            for sign in (1, -1):
                shifted = [list(r) for r in at]
                shifted[i][j] += sign * step
                sides.append(loss(shifted))
            out[i][j] = (sides[0] - sides[1]) / (2 * step)
    return out


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n, d) standard normal numbers, a function of the seed."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(
    b: int, k: int, dt: int, ds: int, start: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(teacher, teacher anchors, student, student anchors); anchors are unit vectors."""
    teacher, student = rows(b, dt, start, dtype), rows(b, ds, start + 1, dtype)
    return teacher, l2_normalize(rows(k, dt, start + 2, dtype)), student, l2_normalize(rows(k, ds, start + 3, dtype))


def gradient_of(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """Autograd's gradient of the loss in the student's embeddings (B, d)."""
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student), student)[0]


def matrix_kl(t: Tensor, ta: Tensor, s: Tensor, sa: Tensor, tau_t: float, tau_s: float) -> Tensor:
    """`compress` written with whole (B, K) matrices, for sizes at which a loop is too slow."""
    log_p, log_q = (l2_normalize(t) @ ta.T / tau_t).log_softmax(1), (l2_normalize(s) @ sa.T / tau_s).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def matrix_cross_entropy(t: Tensor, s: Tensor, queue: Tensor, tau_t: float, tau_s: float) -> Tensor:
    """`seed` written with whole (B, K) matrices."""
    own = [(l2_normalize(x) * l2_normalize(t)).sum(1, keepdim=True) for x in (t, s)]
    p = (torch.cat([own[0], l2_normalize(t) @ queue.T], 1) / tau_t).softmax(1)
    return -(p * (torch.cat([own[1], l2_normalize(s) @ queue.T], 1) / tau_s).log_softmax(1)).sum(1).mean()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
taus = st.floats(0.02, 2.0)
blocks = st.integers(1, 12)

# ---------------------------------------------------------------- CompRess


@given(shapes, taus, taus, blocks, st.booleans())
def test_compress_equals_the_papers_loop_for_any_sizes_and_temperatures(
    shape: tuple[int, int, int, int, int], tau_t: float, tau_s: float, block: int, with_own: bool
) -> None:
    t, ta, s, sa = pair(*shape)
    own = rows(len(s), s.shape[1], 7) if with_own else None
    slow = compress(
        t.tolist(), ta.tolist(), s.tolist(), sa.tolist(), tau_t, tau_s, own.tolist() if own is not None else None
    )
    loss = relation_kl(t, ta, s, sa, tau_t, tau_s, own=own, block=block)
    assert float(loss) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    single = relation_kl(t.float(), ta.float(), s.float(), sa.float(), tau_t, tau_s, own=own, block=block)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(slow, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("tau_t, tau_s", [(0.04, 0.04), (0.1, 0.5), (0.01, 0.2)])
def test_the_gradient_of_compress_equals_that_of_the_papers_loop(tau_t: float, tau_s: float) -> None:
    t, ta, s, sa = pair(3, 7, 5, 4, 10)
    s.requires_grad_()
    for own in (None, rows(3, 4, 11)):
        assert torch.autograd.gradcheck(lambda x, own=own: relation_kl(t, ta, x, sa, tau_t, tau_s, own=own, block=3), s)
    (grad,) = torch.autograd.grad(relation_kl(t, ta, s, sa, tau_t, tau_s), s)
    slow = central_differences(lambda x: compress(t.tolist(), ta.tolist(), x, sa.tolist(), tau_t, tau_s), s.tolist())
    torch.testing.assert_close(grad, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_the_gradient_of_compress_reaches_only_the_student() -> None:
    parts = [part.requires_grad_() for part in pair(3, 7, 5, 4, 20)]
    relation_kl(*parts, 0.04, 0.04).backward()
    assert [part.grad is not None for part in parts] == [False, False, True, False]


def test_compress_and_its_gradient_are_zero_if_student_and_teacher_are_equal() -> None:
    t, ta, _, _ = pair(3, 7, 5, 5, 30)
    s = t.clone().requires_grad_()
    loss = relation_kl(t, ta, s, ta, 0.04, 0.04)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert s.grad is not None and float(s.grad.abs().max()) < 1e-12


# ---------------------------------------------------------------- SEED


@given(shapes, taus, taus, blocks)
def test_seed_equals_the_papers_loop_with_the_own_teacher_vector_as_an_anchor(
    shape: tuple[int, int, int, int, int], tau_t: float, tau_s: float, block: int
) -> None:
    b, k, d, _, start = shape
    t, queue, s, _ = pair(b, k, d, d, start)
    slow = seed(t.tolist(), s.tolist(), queue.tolist(), tau_t, tau_s)
    assert float(relation_cross_entropy(t, s, queue, tau_t, tau_s, block=block)) == pytest.approx(slow, rel=1e-9)
    single = relation_cross_entropy(t.float(), s.float(), queue.float(), tau_t, tau_s, block=block)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(slow, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("tau_t, tau_s", [(0.01, 0.2), (0.1, 0.07), (1e-4, 0.2)])
def test_the_gradient_of_seed_equals_that_of_the_papers_loop(tau_t: float, tau_s: float) -> None:
    t, queue, s, _ = pair(3, 7, 5, 5, 40)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_cross_entropy(t, x, queue, tau_t, tau_s, block=3), s)
    (grad,) = torch.autograd.grad(relation_cross_entropy(t, s, queue, tau_t, tau_s), s)
    slow = central_differences(lambda x: seed(t.tolist(), x, queue.tolist(), tau_t, tau_s), s.tolist())
    torch.testing.assert_close(grad, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_the_gradient_of_seed_reaches_only_the_student() -> None:
    t, queue, s, _ = (part.requires_grad_() for part in pair(3, 7, 5, 5, 50))
    relation_cross_entropy(t, s, queue, 0.01, 0.2).backward()
    assert (t.grad, queue.grad) == (None, None)
    assert s.grad is not None and float(s.grad.abs().sum()) > 0


def test_seed_at_a_low_teacher_temperature_is_info_nce_with_the_teacher_as_key() -> None:
    t, queue, s, _ = pair(3, 7, 5, 5, 60)
    logits = torch.cat([(l2_normalize(s) * l2_normalize(t)).sum(1, keepdim=True), l2_normalize(s) @ queue.T], 1) / 0.2
    info_nce = torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    assert float(relation_cross_entropy(t, s, queue, 1e-4, 0.2)) == pytest.approx(float(info_nce), rel=1e-9)


# ---------------------------------------------------------------- both losses

LOSSES: dict[str, Callable[..., Tensor]] = {
    "compress": lambda t, s, a, b, **how: relation_kl(t, a, s, b, 0.04, 0.1, **how),
    "seed": lambda t, s, a, b, **how: relation_cross_entropy(t, s, a, 0.05, 0.2, **how),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
@given(st.integers(0, 999), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_loss_is_invariant_to_the_scale_of_embeddings(
    loss: Callable[..., Tensor], start: int, longer_t: float, longer_s: float
) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, start)
    assert float(loss(t * longer_t, s * longer_s, ta, sa)) == pytest.approx(float(loss(t, s, ta, sa)), rel=1e-9)


@each_loss
@given(st.integers(0, 999), st.permutations(range(6)))
def test_the_loss_is_invariant_to_the_order_of_the_bank(
    loss: Callable[..., Tensor], start: int, order: list[int]
) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, start)
    assert float(loss(t, s, ta[order], sa[order])) == pytest.approx(float(loss(t, s, ta, sa)), rel=1e-9)


@each_loss
@given(st.integers(0, 999))
def test_the_gradient_is_orthogonal_to_the_embedding(loss: Callable[..., Tensor], start: int) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, start)
    grad = gradient_of(lambda x: loss(t, x, ta, sa), s)
    assert float((grad * s).sum(1).abs().max()) < 1e-12 * max(1.0, float(grad.norm() * s.norm()))


@given(shapes, taus, taus)
def test_the_kl_divergence_is_never_negative(shape: tuple[int, int, int, int, int], tau_t: float, tau_s: float) -> None:
    t, ta, s, sa = pair(*shape)
    assert float(relation_kl(t, ta, s, sa, tau_t, tau_s)) > -1e-14


@each_loss
@pytest.mark.parametrize("kind", ["double", "float"])
def test_the_block_size_changes_rounding_only(loss: Callable[..., Tensor], kind: str) -> None:
    t, ta, s, sa = (getattr(part, kind)() for part in pair(8, 300, 24, 24, 110))
    near = dict(rtol=1e-12, atol=1e-15) if kind == "double" else dict(rtol=1e-5, atol=1e-7)
    whole = loss(t, s, ta, sa, block=300), gradient_of(lambda x: loss(t, x, ta, sa, block=300), s)
    for block in (1, 7, 100, 299, 301, 10_000):
        again = loss(t, s, ta, sa, block=block), gradient_of(lambda x, n=block: loss(t, x, ta, sa, block=n), s)
        torch.testing.assert_close(again, whole, **near)


@pytest.mark.parametrize("tau_t, tau_s", [(0.04, 0.04), (0.01, 0.2), (1e-3, 1e-3), (1e-4, 0.2), (0.2, 1e-4)])
@pytest.mark.parametrize("spread", [1.0, 0.1], ids=["anywhere", "all in one direction"])
def test_no_temperature_overflows_or_deviates_from_the_plain_formula(tau_t: float, tau_s: float, spread: float) -> None:
    """In double precision, whose rounding error of a cosine (1e-16) is negligible even after division by 1e-4."""
    t, ta, s, sa = (l2_normalize(part) * spread + torch.eye(part.shape[1])[0] for part in pair(6, 200, 16, 16, 120))
    ta, sa = l2_normalize(ta), l2_normalize(sa)
    for ours, slow in (
        (lambda x: relation_kl(t, ta, x, sa, tau_t, tau_s, block=64), lambda x: matrix_kl(t, ta, x, sa, tau_t, tau_s)),
        (
            lambda x: relation_cross_entropy(t, x, ta, tau_t, tau_s, block=64),
            lambda x: matrix_cross_entropy(t, x, ta, tau_t, tau_s),
        ),
    ):
        torch.testing.assert_close(ours(s), slow(s), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient_of(ours, s), gradient_of(slow, s), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tau", [0.02, 0.04, 0.2])
def test_the_relative_error_of_float32_is_below_1e_5(tau: float) -> None:
    t, ta, s, sa = (part.relu() for part in pair(32, 5000, 96, 64, 130, torch.float32))
    ta, sa = l2_normalize(ta), l2_normalize(sa)
    double = [part.double() for part in (t, ta, s, sa)]
    want = matrix_kl(*double, tau, tau)
    gradient = gradient_of(lambda x: matrix_kl(double[0], double[1], x, double[3], tau, tau), double[2])
    assert float(relation_kl(t, ta, s, sa, tau, tau)) == pytest.approx(float(want), rel=1e-5)
    got = gradient_of(lambda x: relation_kl(t, ta, x, sa, tau, tau), s)
    assert float((got - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("tau_t", [0.01, 1e-4])
def test_the_relative_error_of_float32_is_below_1e_5_for_seed_at_low_temperatures(tau_t: float) -> None:
    t, queue, s, _ = pair(32, 5000, 96, 96, 140, torch.float32)
    want = matrix_cross_entropy(t.double(), s.double(), queue.double(), tau_t, 0.2)
    gradient = gradient_of(lambda x: matrix_cross_entropy(t.double(), x, queue.double(), tau_t, 0.2), s.double())
    assert float(relation_cross_entropy(t, s, queue, tau_t, 0.2)) == pytest.approx(float(want), rel=1e-5)
    got = gradient_of(lambda x: relation_cross_entropy(t, x, queue, tau_t, 0.2), s)
    assert float((got - gradient).norm() / gradient.norm()) < 1e-5


class AllocationCounter(TorchDispatchMode):
    """Counts matrix products, and the elements of the largest tensor that is created and no view of `known`."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in known}
        self.products = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += "mm" in func.name()
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return out


@each_loss
def test_no_tensor_is_larger_than_three_blocks_and_no_bank_is_copied(loss: Callable[..., Tensor]) -> None:
    b, block = 4, 50
    t, ta, s, sa = (part.float() for part in pair(b, 500, 8, 8, 150))
    s.requires_grad_()
    with AllocationCounter(ta, sa) as counter:
        loss(t, s, ta, sa, block=block).backward()
    assert counter.elements == 3 * b * block


@each_loss
def test_without_gradient_the_only_matrix_products_are_the_similarities(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, 170)
    s.requires_grad_()
    with AllocationCounter() as training:
        value = loss(t, s, ta, sa)
        value.backward()
    with torch.no_grad(), AllocationCounter() as scoring:
        assert torch.equal(loss(t, s, ta, sa), value)
    assert (training.products, scoring.products) == (3, 2)  # both sums of weighted anchors are one product


@each_loss
def test_a_bank_may_be_overwritten_before_the_backward_pass(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, 160)
    want = gradient_of(lambda x: loss(t, x, ta, sa), s)
    s.requires_grad_()
    value = loss(t, s, ta, sa)
    ta.zero_(), sa.zero_()
    value.backward()
    assert s.grad is not None and torch.equal(s.grad, want)


@each_loss
def test_a_second_derivative_is_refused(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, 180)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(t, s.requires_grad_(), ta, sa), s, create_graph=True)


@each_loss
def test_the_gradient_of_a_compiled_student_is_the_same(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, 190)
    student = torch.nn.Linear(4, 4).double()

    def whole(x: Tensor) -> Tensor:
        return loss(t, student(x), ta, sa)

    compiled = torch.compile(whole, backend="eager")
    gradients = [torch.autograd.grad(act(s), list(student.parameters())) for act in (whole, compiled)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_banks_of_different_length_are_refused() -> None:
    t, ta, s, sa = pair(3, 6, 4, 4, 200)
    with pytest.raises(ValueError, match="6 teacher anchors, but 5 student anchors"):
        relation_kl(t, ta, s, sa[:5], 0.04, 0.04)


@each_loss
def test_similarities_are_computed_in_float32_inside_autocast(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = (part.float() for part in pair(4, 50, 32, 32, 70))
    s = s.bfloat16()  # the dtype of a student's output under autocast
    want = float(loss(t.double(), s.double(), ta.double(), sa.double()))
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(t, s, ta, sa)
        coarse = (l2_normalize(s) @ sa.T).dtype
    assert coarse == torch.bfloat16, "autocast was not active, so that the test proves nothing"
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(want, rel=1e-5)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_compared_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    t, ta, s, sa = (part.float() for part in pair(4, 9, 8, 8, 80))
    got = loss(t.to(dtype), s.to(dtype), ta, sa)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(loss(t.to(dtype).float(), s.to(dtype).float(), ta, sa)), rel=1e-6)


@each_loss
def test_an_empty_bank_has_loss_and_gradient_zero(loss: Callable[..., Tensor]) -> None:
    t, _, s, _ = pair(3, 1, 4, 4, 90)
    s.requires_grad_()
    got = loss(t, s, torch.empty(0, 4, dtype=torch.float64), torch.empty(0, 4, dtype=torch.float64))
    got.backward()
    assert float(got.detach()) == pytest.approx(0.0, abs=1e-15)
    assert s.grad is not None and float(s.grad.abs().max()) < 1e-15


@each_loss
def test_a_zero_embedding_has_finite_loss_and_gradient(loss: Callable[..., Tensor]) -> None:
    t, ta, s, sa = (part.float() for part in pair(3, 6, 4, 4, 100))
    t[0], s[1] = 0, 0
    s.requires_grad_()
    got = loss(t, s, ta, sa)
    got.backward()
    assert math.isfinite(float(got.detach()))
    assert s.grad is not None and bool(s.grad.isfinite().all())


def test_l2_normalize_keeps_float64_and_converts_half_precision_to_float32() -> None:
    x = rows(5, 7, 1)
    assert l2_normalize(x).dtype == torch.float64
    torch.testing.assert_close(l2_normalize(x).norm(dim=1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert {l2_normalize(x.to(kind)).dtype for kind in (torch.float16, torch.bfloat16, torch.float32)} == {
        torch.float32
    }
    assert bool((l2_normalize(torch.zeros(2, 3)) == 0).all())
