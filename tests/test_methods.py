"""Methods with a memory bank, step by step: losses, order of scoring and pushing, gradients, state; own methods."""

import copy
import math
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext
from compress_ssl.pipeline.methods.options import find_typed
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import l2_normalize
from compress_ssl.pipeline.runtime.errors import UserError

IMAGES, VIEWS, D, SIZE, B = 20, 3, 6, 8, 4
WIDTHS = {"embedding": (D,)}
BANK_METHODS = ("compress-2q", "compress-2q-momentum", "compress-1q", "seed")

TABLE = torch.randn(IMAGES, VIEWS, D, generator=torch.Generator().manual_seed(1)) * 3  # the store: features[i, v]
PIXELS = torch.rand(IMAGES, VIEWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


pytestmark = pytest.mark.usefixtures("one_thread")


def read(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    return TABLE[rows, views]


def build_student(seed: int = 0, spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(seed)
    return build(spec, image_size=SIZE)


def build_method(spec: str, of: Embedder) -> Method:
    """A method for the student `of`, its bank read from TABLE, in training mode."""
    method = METHODS.build(spec, context=MethodContext([of], WIDTHS, np.arange(IMAGES), 1, 0))
    method.refill_banks(read)
    method.train()
    return method


def make_batch(step: int, w: int = 1) -> Batch:
    """The next B of IMAGES images in w views, which change with the step; images repeat after 5 steps."""
    rows = (torch.arange(B) + step * B) % IMAGES
    views = (torch.arange(w) + step).expand(B, w) % VIEWS
    images = PIXELS[rows[:, None], views].flatten(0, 1)
    return Batch(step, rows, views, views, {"embedding": TABLE[rows[:, None], views]}, [images])


def run_student(of: Embedder, batch: Batch) -> dict[str, Tensor]:
    return {"embedding": of(batch.images[0]).unflatten(0, batch.student_views.shape)}


# ---------------------------------------------------------------- the papers' formulas in plain Python

Vector = list[float]


def normalize(x: Vector) -> Vector:
    return [value / math.hypot(*x) for value in x]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def softmax(logits: Vector) -> Vector:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl(t: Vector, t_anchors: list[Vector], s: Vector, s_anchors: list[Vector], tau: float) -> float:
    """Koohpayegani et al. 2020. Anchors are unit vectors, or the random vectors of the start."""
    if not t_anchors:
        return 0.0
    p = softmax([dot(normalize(t), a) / tau for a in t_anchors])
    q = softmax([dot(normalize(s), a) / tau for a in s_anchors])
    return sum(pj * math.log(pj / qj) for pj, qj in zip(p, q, strict=True))


def cross_entropy(t: Vector, s: Vector, anchors: list[Vector], tau_t: float, tau_s: float) -> float:
    """Fang et al. 2021: the image's own teacher vector is the first anchor."""
    p = softmax([dot(normalize(t), a) / tau_t for a in [normalize(t), *anchors]])
    q = softmax([dot(normalize(s), a) / tau_s for a in [normalize(t), *anchors]])
    return -sum(pj * math.log(qj) for pj, qj in zip(p, q, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bank_vectors(of: Method, column: str) -> list[Vector]:
    return of.bank[column].tolist()


STARTS = [(name, start) for name in BANK_METHODS for start in ("empty", "random")]
STARTS += [("compress-1q", "store"), ("seed", "store")]


@pytest.mark.parametrize(("k", "w"), [(12, 1), (10, 1), (7, 2), (3, 1), (20, 2)])
@pytest.mark.parametrize(("name", "start"), STARTS)
def test_losses_of_nine_steps_are_the_papers_scored_before_the_push(name: str, k: int, w: int, start: str) -> None:
    """The bank is compared with a FIFO queue of K vectors, to which a batch is appended after its loss is computed."""
    net = build_student()
    method = build_method(f"{name}:bank={k},start={start}", net)
    sides = ("teacher", "student") if name.startswith("compress-2q") else ("teacher",)
    queue = {side: deque(bank_vectors(method, side), maxlen=k) for side in sides}
    optimizer = torch.optim.SGD([*net.parameters(), *(p for p in method.parameters() if p.requires_grad)], 0.1)
    slow = copy.deepcopy(net).eval()  # the momentum variant's key encoder
    for module in slow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    for step in range(9):
        batch = make_batch(step, w)
        t = batch.teacher["embedding"].flatten(0, 1).tolist()
        outputs = run_student(net, batch)
        z = outputs["embedding"].flatten(0, 1).detach()
        s = (method.head(z) if name in ("compress-1q", "seed") else z).tolist()
        key = slow(batch.images[0]).detach().tolist() if name == "compress-2q-momentum" else s

        held = {side: list(queue[side]) for side in sides}
        other = held[sides[-1]]
        if name == "seed":
            want = mean([cross_entropy(ti, si, held["teacher"], 0.01, 0.2) for ti, si in zip(t, s, strict=True)])
        else:
            want = mean([kl(ti, held["teacher"], si, other, 0.04) for ti, si in zip(t, s, strict=True)])
        (loss,) = method(batch, [outputs])
        assert float(loss.detach()) == pytest.approx(want, rel=2e-4, abs=2e-5), step

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(batch)
        queue["teacher"].extend(map(normalize, t))
        if "student" in sides:
            queue["student"].extend(map(normalize, key))
        with torch.no_grad():
            for a, b in zip(slow.parameters(), net.parameters(), strict=True):
                a.copy_(0.999 * a + 0.001 * b)


@pytest.mark.parametrize("name", BANK_METHODS)
def test_a_batch_is_not_among_its_own_anchors_but_among_those_of_the_next_step(name: str) -> None:
    net = build_student()
    method = build_method(f"{name}:bank=12,start=empty", net)
    first, second = make_batch(0), make_batch(1)
    method(first, [run_student(net, first)])
    assert len(method.bank["teacher"]) == 0
    method.after_step(first)
    method(second, [run_student(net, second)])
    assert torch.equal(method.bank["teacher"], l2_normalize(TABLE[first.rows, first.teacher_views[:, 0]]))
    assert method.bank.rows[:B].tolist() == first.rows.tolist()
    assert method.bank.views[:B].tolist() == first.teacher_views[:, 0].tolist()


@pytest.mark.parametrize("name", BANK_METHODS)
def test_a_first_step_without_anchors_has_loss_zero_and_finite_gradients(name: str) -> None:
    net = build_student()
    method = build_method(f"{name}:bank=12,start=empty", net)
    (loss,) = method(make_batch(0), [run_student(net, make_batch(0))])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", BANK_METHODS)
def test_the_gradient_reaches_only_the_student_and_the_heads(name: str) -> None:
    net = build_student()
    method = build_method(f"{name}:bank=12,start=empty", net)
    for step in range(2):
        batch = make_batch(step)
        batch.teacher["embedding"].requires_grad_()
        (loss,) = method(batch, [run_student(net, batch)])
        loss.backward()
        method.after_step(batch)
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())
    assert batch.teacher["embedding"].grad is None
    for key, tensor in [*method.named_parameters(), *method.named_buffers()]:
        assert (tensor.grad is not None) == key.startswith("head."), key


@pytest.mark.parametrize("name", ["compress-1q", "seed"])
def test_a_bank_started_from_the_store_holds_stored_features_at_the_first_step(name: str) -> None:
    method = build_method(f"{name}:bank=9", build_student())
    assert method.bank.filled == 9
    assert method.bank.views.tolist() == [1] * 9
    assert torch.equal(method.bank["teacher"], l2_normalize(TABLE[method.bank.rows, 1]))


@pytest.mark.parametrize("name", BANK_METHODS)
def test_similarities_are_computed_in_float32_inside_bfloat16_autocast(name: str) -> None:
    net = build_student()
    method = build_method(f"{name}:bank=12,start=random", net)
    batch = make_batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run_student(net, batch)
        (loss,) = method(batch, [outputs])
    method.after_step(batch)
    assert loss.dtype == torch.float32
    assert {buffer.dtype for key, buffer in method.named_buffers() if "column" in key} == {torch.float32}
    if name.startswith("compress-2q"):
        z, t = outputs["embedding"].flatten(0, 1).tolist(), batch.teacher["embedding"].flatten(0, 1).tolist()
        before = build_method(f"{name}:bank=12,start=random", net)
        held = [bank_vectors(before, side) for side in ("teacher", "student")]
        want = mean([kl(ti, held[0], si, held[1], 0.04) for ti, si in zip(t, z, strict=True)])
        assert float(loss.detach()) == pytest.approx(want, rel=1e-4)


# ---------------------------------------------------------------- the momentum encoder

WITH_DROPOUT = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def with_dropout(tmp_path: Path) -> Embedder:
    file = tmp_path / "with_dropout.py"
    file.write_text(WITH_DROPOUT)
    return build_student(spec=f"python:{file}:net")


def test_the_momentum_encoder_starts_as_an_exact_copy_and_is_not_the_student(with_dropout: Embedder) -> None:
    method = build_method("compress-2q-momentum:bank=5", with_dropout)
    for (name, slow), fast in zip(method.slow.state_dict().items(), with_dropout.state_dict().values(), strict=True):
        assert torch.equal(slow, fast), name
        assert slow.data_ptr() != fast.data_ptr(), name
    assert not any(p.requires_grad for p in method.slow.parameters())


def test_the_key_is_of_the_same_pixels_with_batch_statistics_and_without_dropout(with_dropout: Embedder) -> None:
    method = build_method("compress-2q-momentum:bank=5", with_dropout)
    batch = make_batch(0)
    reference = copy.deepcopy(with_dropout)
    conv, norm = reference.backbone[0], reference.backbone[1]
    norm.train()
    want = torch.relu(norm(conv(batch.images[0]))).mean((2, 3))
    method(batch, [run_student(with_dropout, batch)])
    method.after_step(batch)
    torch.testing.assert_close(method.bank["student"], l2_normalize(want.detach()))


def test_the_encoders_parameters_move_after_the_step_by_one_minus_m_towards_the_students(
    with_dropout: Embedder,
) -> None:
    method = build_method("compress-2q-momentum:bank=5,momentum=0.75", with_dropout)
    batch = make_batch(0)
    method(batch, [run_student(with_dropout, batch)])
    before = [p.clone() for p in method.slow.parameters()]
    with torch.no_grad():
        for p in with_dropout.parameters():  # stands for the optimizer step
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, method.slow.parameters(), strict=True)), (
        "they moved before after_step"
    )
    method.after_step(batch)
    for old, slow, fast in zip(before, method.slow.parameters(), with_dropout.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_the_encoder_has_its_own_batch_norm_buffers_and_they_are_saved(with_dropout: Embedder) -> None:
    method = build_method("compress-2q-momentum:bank=5", with_dropout)
    batch = make_batch(0)
    method(batch, [run_student(with_dropout, batch)])
    method.after_step(batch)
    state = method.state_dict()
    ours = {name: buffer for name, buffer in method.slow.named_buffers() if "running" in name}
    assert ours
    for name, buffer in ours.items():
        assert torch.equal(state[f"slow.{name}"], buffer)
    assert int(method.slow.backbone[1].num_batches_tracked) == 1
    assert int(with_dropout.backbone[1].num_batches_tracked) == 1, "the student saw one batch, not two"


def test_computing_the_loss_draws_no_random_numbers(with_dropout: Embedder) -> None:
    drawn = []
    for name in ("compress-2q", "compress-2q-momentum"):
        method, batch = build_method(f"{name}:bank=5", with_dropout), make_batch(0)
        torch.manual_seed(7)
        method(batch, [{"embedding": torch.ones(B, 1, 5)}])
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


# ---------------------------------------------------------------- saved state, recipes and keys


@pytest.mark.parametrize("name", BANK_METHODS)
def test_a_restored_method_has_the_same_next_loss_bit_for_bit(name: str) -> None:
    net = build_student()
    one = build_method(f"{name}:bank=7,start=empty", net)
    for step in range(5):
        one(make_batch(step), [run_student(net, make_batch(step))])
        one.after_step(make_batch(step))
    saved = copy.deepcopy(one.state_dict())
    other = METHODS.build(f"{name}:bank=7,start=empty", context=MethodContext([net], WIDTHS, np.arange(IMAGES), 1, 5))
    other.load_state_dict(saved)
    other.refill_banks(read)
    other.train()
    outputs = run_student(net, make_batch(5))
    assert torch.equal(one(make_batch(5), [outputs])[0], other(make_batch(5), [outputs])[0])
    assert not [key for key in saved if "column_teacher" in key], "these columns can be read from the store"


def test_the_published_recipes_are_those_of_the_papers() -> None:
    for name in BANK_METHODS:
        recipe = METHODS.resolve(name).recipe
        published = (recipe.optimizer, recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size)
        if name == "seed":
            assert (*published, recipe.epochs, recipe.schedule) == ("sgd", 0.03, 0.9, 1e-4, 256, 200, "cosine")
        else:
            assert (*published, recipe.epochs, recipe.schedule) == ("sgd", 0.01, 0.9, 1e-4, 256, 130, "step")


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("compress-2q", {"tau": 0.04}),
        ("compress-2q-momentum", {"tau": 0.04, "momentum": 0.999}),
        ("compress-1q", {"tau": 0.04}),
        ("seed", {"tau_t": 0.01, "tau_s": 0.2}),
    ],
)
def test_the_hyper_parameters_default_to_the_published_and_can_all_be_set(
    name: str, attributes: dict[str, float]
) -> None:
    assert {key: getattr(build_method(f"{name}:bank=5", build_student()), key) for key in attributes} == attributes
    asked = ",".join(f"{key}=0.5" for key in attributes)
    changed = build_method(f"{name}:bank=5,{asked}", build_student())
    assert {getattr(changed, key) for key in attributes} == {0.5}
    assert changed.bank.size == 5


@pytest.mark.parametrize("spec", ["compress-2q:tau=0", "compress-1q:tau=-1", "seed:tau_t=0", "seed:tau_s=nan"])
def test_a_temperature_that_is_not_positive_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="must be more than 0"):
        build_method(spec, build_student())


def test_a_momentum_beyond_one_is_refused() -> None:
    with pytest.raises(UserError, match="momentum=1.5 was asked, but must be from 0 to 1"):
        build_method("compress-2q-momentum:momentum=1.5", build_student())


def test_seed_notes_that_it_uses_the_embedding_if_no_projection_is_stored() -> None:
    context = MethodContext([build_student()], WIDTHS, np.arange(IMAGES), 1, 0)
    method = METHODS.build("seed:bank=5", context=context)
    assert any("no projection" in note and "6-d embedding" in note for note in context.notes)
    assert method.head[-1].out_features == D


OWN = """
from pathlib import Path
from compress_ssl.pipeline.methods.base import Method, Needs, Recipe
class Mine(Method):
    recipe = Recipe(lr=0.7)
    needs = Needs(arrays=("embedding", "logits"), views=2, pairings=("cross",))
    def __init__(self, *, context, strength: float = 1.0, folder: Path | None = None):
        super().__init__()
        self.strength, self.folder = strength, folder
    def forward(self, batch, outputs):
        return [out["embedding"].mean() for out in outputs]
class Idle(Method):
    pass
def no_method(*, context):
    return None
"""


# ---------------------------------------------------------------- users' own methods


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"python:{tmp_path / 'own.py'}"


def test_a_users_method_is_built_from_its_file_with_its_keys(own: str) -> None:
    assert build_method(f"{own}:Mine,strength=2.5", build_student()).strength == 2.5  # type: ignore[comparison-overlap]


def test_the_recipe_of_a_users_method_applies(own: str) -> None:
    assert find_typed(f"{own}:Mine").method.recipe.lr == 0.7


def test_an_unknown_key_of_a_users_method_is_refused(own: str) -> None:
    with pytest.raises(UserError, match="has no key 'strenght'; did you mean 'strength'. Known: strength"):
        build_method(f"{own}:Mine,strenght=2", build_student())


def test_values_of_a_users_keys_are_converted_to_the_annotated_types(own: str) -> None:
    strength = build_method(f"{own}:Mine,strength=2", build_student()).strength  # type: ignore[comparison-overlap]
    assert strength == 2 and isinstance(strength, float)
    assert build_method(f"{own}:Mine,folder=007", build_student()).folder == Path("007")  # type: ignore[comparison-overlap]
    with pytest.raises(UserError, match="own.py:Mine strength=much: must be a number"):
        build_method(f"{own}:Mine,strength=much", build_student())


def test_a_place_without_a_concrete_method_is_refused(own: str) -> None:
    with pytest.raises(UserError, match="is no subclass of"):
        build_method(f"{own}:no_method", build_student())
    with pytest.raises(UserError, match=r"Idle has no forward\(batch, outputs\)"):
        build_method(f"{own}:Idle", build_student())
    with pytest.raises(UserError, match="has no function or class 'Mime'; did you mean 'Mine'"):
        build_method(f"{own}:Mime", build_student())


def test_check_inputs_refuses_a_missing_array_and_a_wrong_pairing(own: str) -> None:
    method = build_method(f"{own}:Mine", build_student())
    with pytest.raises(UserError, match="needs 'logits' of the teacher, which the store lacks"):
        method.check_inputs("mine", {"embedding": (D,)}, "cross")
    arrays = {"embedding": (D,), "logits": (10,)}
    with pytest.raises(UserError, match="mine needs --pairing cross, not same"):
        method.check_inputs("mine", arrays, "same")
    method.check_inputs("mine", arrays, "cross")
