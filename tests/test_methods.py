"""Methods step by step: what is scored, what enters the bank and when, what learns, what is saved."""

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
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import l2_normalize
from compress_ssl.pipeline.runtime.artifact import UserError

IMAGES, VIEWS, D, SIZE, B = 20, 3, 6, 8, 4
WIDTHS = {"embedding": (D,)}
MENU = ("compress-2q", "compress-2q-momentum", "compress-1q", "seed")

TABLE = torch.randn(IMAGES, VIEWS, D, generator=torch.Generator().manual_seed(1)) * 3  # the store: features[i, v]
PIXELS = torch.rand(IMAGES, VIEWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


pytestmark = pytest.mark.usefixtures("one_thread")


def read(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    return TABLE[rows, views]


def student(seed: int = 0, spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(seed)
    return build(spec, image_size=SIZE)


def method(order: str, of: Embedder) -> Method:
    made = METHODS.build(order, context=MethodContext([of], WIDTHS, np.arange(IMAGES), 1, 0))
    made.refill_banks(read)
    made.train()
    return made


def batch(step: int, w: int = 1) -> Batch:
    """B images that come round again, in views that change with the step."""
    rows = (torch.arange(B) + step * B) % IMAGES
    views = (torch.arange(w) + step).expand(B, w) % VIEWS
    images = PIXELS[rows[:, None], views].flatten(0, 1)
    return Batch(step, rows, views, views, {"embedding": TABLE[rows[:, None], views]}, [images])


def embed(of: Embedder, what: Batch) -> dict[str, Tensor]:
    return {"embedding": of(what.images[0]).unflatten(0, what.student_views.shape)}


# ---------------------------------------------------------------- the papers, slowly

Vector = list[float]


def norm(x: Vector) -> Vector:
    return [value / math.hypot(*x) for value in x]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def softmax(logits: Vector) -> Vector:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl(t: Vector, t_anchors: list[Vector], s: Vector, s_anchors: list[Vector], tau: float) -> float:
    """Koohpayegani et al. 2020. Anchors are what was normalised before it was enqueued, or random at first."""
    if not t_anchors:
        return 0.0
    p = softmax([dot(norm(t), a) / tau for a in t_anchors])
    q = softmax([dot(norm(s), a) / tau for a in s_anchors])
    return sum(pj * math.log(pj / qj) for pj, qj in zip(p, q, strict=True))


def cross_entropy(t: Vector, s: Vector, anchors: list[Vector], tau_t: float, tau_s: float) -> float:
    """Fang et al. 2021: the image's own teacher vector comes first among the anchors."""
    p = softmax([dot(norm(t), a) / tau_t for a in [norm(t), *anchors]])
    q = softmax([dot(norm(s), a) / tau_s for a in [norm(t), *anchors]])
    return -sum(pj * math.log(qj) for pj, qj in zip(p, q, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def anchors(of: Method, column: str) -> list[Vector]:
    return of.bank[column].tolist()


STARTS = [(name, start) for name in MENU for start in ("empty", "random")]
STARTS += [("compress-1q", "store"), ("seed", "store")]


@pytest.mark.parametrize(("k", "w"), [(12, 1), (10, 1), (7, 2), (3, 1), (20, 2)])
@pytest.mark.parametrize(("name", "start"), STARTS)
def test_a_run_of_steps_gives_the_papers_losses_score_first_then_enqueue(name: str, k: int, w: int, start: str) -> None:
    """The bank is a first-in-first-out list of K; a batch is scored against what was there before it came."""
    net = student()
    learner = method(f"{name}:bank={k},start={start}", net)
    sides = ("teacher", "student") if name.startswith("compress-2q") else ("teacher",)
    queue = {side: deque(anchors(learner, side), maxlen=k) for side in sides}
    optimizer = torch.optim.SGD([*net.parameters(), *(p for p in learner.parameters() if p.requires_grad)], 0.1)
    slow = copy.deepcopy(net).eval()  # the momentum variant's key encoder
    for module in slow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    for step in range(9):
        now = batch(step, w)
        t = now.teacher["embedding"].flatten(0, 1).tolist()
        outputs = embed(net, now)
        z = outputs["embedding"].flatten(0, 1).detach()
        s = (learner.head(z) if name in ("compress-1q", "seed") else z).tolist()
        key = slow(now.images[0]).detach().tolist() if name == "compress-2q-momentum" else s

        held = {side: list(queue[side]) for side in sides}
        other = held[sides[-1]]
        if name == "seed":
            want = mean([cross_entropy(ti, si, held["teacher"], 0.01, 0.2) for ti, si in zip(t, s, strict=True)])
        else:
            want = mean([kl(ti, held["teacher"], si, other, 0.04) for ti, si in zip(t, s, strict=True)])
        (loss,) = learner(now, [outputs])
        assert float(loss.detach()) == pytest.approx(want, rel=2e-4, abs=2e-5), step

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.after_step(now)
        queue["teacher"].extend(map(norm, t))
        if "student" in sides:
            queue["student"].extend(map(norm, key))
        with torch.no_grad():
            for a, b in zip(slow.parameters(), net.parameters(), strict=True):
                a.copy_(0.999 * a + 0.001 * b)


@pytest.mark.parametrize("name", MENU)
def test_the_batch_is_not_among_its_own_anchors_and_is_at_the_next_step(name: str) -> None:
    net = student()
    learner = method(f"{name}:bank=12,start=empty", net)
    first, second = batch(0), batch(1)
    learner(first, [embed(net, first)])
    assert len(learner.bank["teacher"]) == 0
    learner.after_step(first)
    learner(second, [embed(net, second)])
    assert torch.equal(learner.bank["teacher"], l2_normalize(TABLE[first.rows, first.teacher_views[:, 0]]))
    assert learner.bank.rows[:B].tolist() == first.rows.tolist()
    assert learner.bank.views[:B].tolist() == first.teacher_views[:, 0].tolist()


@pytest.mark.parametrize("name", MENU)
def test_the_first_step_without_anchors_gives_zero_and_no_nan(name: str) -> None:
    net = student()
    learner = method(f"{name}:bank=12,start=empty", net)
    (loss,) = learner(batch(0), [embed(net, batch(0))])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MENU)
def test_gradient_reaches_the_student_and_the_heads_and_nothing_else(name: str) -> None:
    net = student()
    learner = method(f"{name}:bank=12,start=empty", net)
    for step in range(2):
        now = batch(step)
        now.teacher["embedding"].requires_grad_()
        (loss,) = learner(now, [embed(net, now)])
        loss.backward()
        learner.after_step(now)
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())
    assert now.teacher["embedding"].grad is None
    for key, tensor in [*learner.named_parameters(), *learner.named_buffers()]:
        assert (tensor.grad is not None) == key.startswith("head."), key


@pytest.mark.parametrize("name", ["compress-1q", "seed"])
def test_a_bank_started_from_the_store_means_something_from_the_first_step(name: str) -> None:
    learner = method(f"{name}:bank=9", student())
    assert learner.bank.filled == 9
    assert learner.bank.views.tolist() == [1] * 9
    assert torch.equal(learner.bank["teacher"], l2_normalize(TABLE[learner.bank.rows, 1]))


@pytest.mark.parametrize("name", MENU)
def test_similarities_stay_in_single_precision_under_bf16(name: str) -> None:
    net = student()
    learner = method(f"{name}:bank=12,start=random", net)
    now = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = embed(net, now)
        (loss,) = learner(now, [outputs])
    learner.after_step(now)
    assert loss.dtype == torch.float32
    assert {buffer.dtype for key, buffer in learner.named_buffers() if "column" in key} == {torch.float32}
    if name.startswith("compress-2q"):
        z, t = outputs["embedding"].flatten(0, 1).tolist(), now.teacher["embedding"].flatten(0, 1).tolist()
        before = method(f"{name}:bank=12,start=random", net)
        held = [anchors(before, side) for side in ("teacher", "student")]
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
def dropping(tmp_path: Path) -> Embedder:
    file = tmp_path / "dropping.py"
    file.write_text(WITH_DROPOUT)
    return student(spec=f"python:{file}:net")


def test_the_momentum_encoder_starts_as_an_exact_copy_and_is_not_the_student(dropping: Embedder) -> None:
    learner = method("compress-2q-momentum:bank=5", dropping)
    for (name, slow), fast in zip(learner.slow.state_dict().items(), dropping.state_dict().values(), strict=True):
        assert torch.equal(slow, fast), name
        assert slow.data_ptr() != fast.data_ptr(), name
    assert not any(p.requires_grad for p in learner.slow.parameters())


def test_its_key_is_of_the_same_pixels_with_the_batch_statistics_and_without_dropout(dropping: Embedder) -> None:
    learner = method("compress-2q-momentum:bank=5", dropping)
    now = batch(0)
    reference = copy.deepcopy(dropping)
    conv, norm = reference.backbone[0], reference.backbone[1]
    norm.train()
    want = torch.relu(norm(conv(now.images[0]))).mean((2, 3))
    learner(now, [embed(dropping, now)])
    learner.after_step(now)
    torch.testing.assert_close(learner.bank["student"], l2_normalize(want.detach()))


def test_its_parameters_move_after_the_step_by_one_minus_m_towards_the_students(dropping: Embedder) -> None:
    learner = method("compress-2q-momentum:bank=5,momentum=0.75", dropping)
    now = batch(0)
    learner(now, [embed(dropping, now)])
    before = [p.clone() for p in learner.slow.parameters()]
    with torch.no_grad():
        for p in dropping.parameters():  # the optimiser's step
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.slow.parameters(), strict=True)), "too early"
    learner.after_step(now)
    for old, slow, fast in zip(before, learner.slow.parameters(), dropping.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_its_batch_norm_buffers_are_its_own_and_are_saved(dropping: Embedder) -> None:
    learner = method("compress-2q-momentum:bank=5", dropping)
    now = batch(0)
    learner(now, [embed(dropping, now)])
    learner.after_step(now)
    state = learner.state_dict()
    ours = {name: buffer for name, buffer in learner.slow.named_buffers() if "running" in name}
    assert ours
    for name, buffer in ours.items():
        assert torch.equal(state[f"slow.{name}"], buffer)
    assert int(learner.slow.backbone[1].num_batches_tracked) == 1
    assert int(dropping.backbone[1].num_batches_tracked) == 1, "the student saw one batch, not two"


def test_scoring_leaves_the_random_numbers_of_the_student_alone(dropping: Embedder) -> None:
    drawn = []
    for name in ("compress-2q", "compress-2q-momentum"):
        learner, now = method(f"{name}:bank=5", dropping), batch(0)
        torch.manual_seed(7)
        learner(now, [{"embedding": torch.ones(B, 1, 5)}])
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


# ---------------------------------------------------------------- what is saved, what is asked


@pytest.mark.parametrize("name", MENU)
def test_saved_and_restored_into_a_new_one_it_goes_on_to_the_bit(name: str) -> None:
    net = student()
    one = method(f"{name}:bank=7,start=empty", net)
    for step in range(5):
        one(batch(step), [embed(net, batch(step))])
        one.after_step(batch(step))
    saved = copy.deepcopy(one.state_dict())
    other = METHODS.build(f"{name}:bank=7,start=empty", context=MethodContext([net], WIDTHS, np.arange(IMAGES), 1, 5))
    other.load_state_dict(saved)
    other.refill_banks(read)
    other.train()
    outputs = embed(net, batch(5))
    assert torch.equal(one(batch(5), [outputs])[0], other(batch(5), [outputs])[0])
    assert not [key for key in saved if "column_teacher" in key], "it can be read from the store"


def test_the_published_recipes_are_those_of_the_papers() -> None:
    for name in MENU:
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
    assert {key: getattr(method(f"{name}:bank=5", student()), key) for key in attributes} == attributes
    asked = ",".join(f"{key}=0.5" for key in attributes)
    changed = method(f"{name}:bank=5,{asked}", student())
    assert {getattr(changed, key) for key in attributes} == {0.5}
    assert changed.bank.size == 5


@pytest.mark.parametrize("order", ["compress-2q:tau=0", "compress-1q:tau=-1", "seed:tau_t=0", "seed:tau_s=nan"])
def test_a_temperature_that_is_not_positive_is_refused(order: str) -> None:
    with pytest.raises(UserError, match="must be more than 0"):
        method(order, student())


def test_a_momentum_beyond_one_is_refused() -> None:
    with pytest.raises(UserError, match="momentum=1.5 was asked, but must be from 0 to 1"):
        method("compress-2q-momentum:momentum=1.5", student())


def test_seed_without_a_stored_projection_says_that_it_uses_the_embedding() -> None:
    context = MethodContext([student()], WIDTHS, np.arange(IMAGES), 1, 0)
    learner = METHODS.build("seed:bank=5", context=context)
    assert any("no projection" in note and "6-d embedding" in note for note in context.notes)
    assert learner.head[-1].out_features == D


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
def stranger(*, context):
    return None
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"python:{tmp_path / 'own.py'}"


def test_a_method_of_the_users_own_is_built_from_its_file_with_its_keys(own: str) -> None:
    assert method(f"{own}:Mine,strength=2.5", student()).strength == 2.5  # type: ignore[comparison-overlap]


def test_a_method_of_the_users_own_brings_its_own_recipe(own: str) -> None:
    assert METHODS.resolve("python").for_spec(f"{own.removeprefix('python:')}:Mine").recipe.lr == 0.7


def test_a_key_that_the_users_method_does_not_know_is_refused(own: str) -> None:
    with pytest.raises(UserError, match="has no key 'strenght'; did you mean 'strength'. Known: strength"):
        method(f"{own}:Mine,strenght=2", student())


def test_values_of_the_users_keys_are_what_their_annotations_say(own: str) -> None:
    strength = method(f"{own}:Mine,strength=2", student()).strength  # type: ignore[comparison-overlap]
    assert strength == 2 and isinstance(strength, float)
    assert method(f"{own}:Mine,folder=007", student()).folder == Path("007")  # type: ignore[comparison-overlap]
    with pytest.raises(UserError, match="own.py:Mine strength=much: must be a number"):
        method(f"{own}:Mine,strength=much", student())


def test_what_is_no_method_is_refused(own: str) -> None:
    with pytest.raises(UserError, match="is no subclass of"):
        method(f"{own}:stranger", student())
    with pytest.raises(UserError, match=r"Idle has no forward\(batch, outputs\)"):
        method(f"{own}:Idle", student())
    with pytest.raises(UserError, match="has no function or class 'Mime'; did you mean 'Mine'"):
        method(f"{own}:Mime", student())


def test_a_method_says_what_it_lacks(own: str) -> None:
    learner = method(f"{own}:Mine", student())
    with pytest.raises(UserError, match="needs 'logits' of the teacher, which the store lacks"):
        learner.check_inputs("mine", {"embedding": (D,)}, "cross")
    arrays = {"embedding": (D,), "logits": (10,)}
    with pytest.raises(UserError, match="mine needs --pairing cross, not same"):
        learner.check_inputs("mine", arrays, "same")
    learner.check_inputs("mine", arrays, "cross")
