"""CRD against noise-contrastive estimation written down one slot at a time."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from papers import IMAGES, B, D, batch, d, dot, gradients_check, learner, looks, losses, mean, norm, student, through

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import MethodContext
from compress_ssl.pipeline.runtime.artifact import UserError

K, TAU = 7, 0.07


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The negatives of every step: [step][pair][negative]."""
    log: list[list[list[int]]] = []
    randint = torch.randint

    def noted(*said: Any, **more: Any) -> torch.Tensor:
        made = randint(*said, **more)
        log.append(made.flatten(0, -2).tolist())
        return made

    monkeypatch.setattr(torch, "randint", noted)
    return log


@pytest.mark.parametrize("w", [1, 2])
def test_a_run_of_steps_gives_the_papers_losses_scored_before_the_memory_moves(w: int, drawn: list) -> None:
    made = learner(f"crd:negatives={K},width=3,momentum=0.5")
    memory = {"s": made.student_memory.tolist(), "t": made.teacher_memory.tolist()}
    z: dict[str, float] = {}  # the normalising constants, of the first batch
    for step in range(7):  # the images come round after five
        now, out = batch(step, w=w), looks(step, w=w)
        slots = [i for i in now.rows.tolist() for _ in range(w)]
        seen = {
            "s": [norm(through(made.student_head, x)) for x in out["embedding"].flatten(0, 1).tolist()],
            "t": [norm(through(made.teacher_head, x)) for x in now.teacher["embedding"].flatten(0, 1).tolist()],
        }
        (loss,) = losses(made, now, [out])

        want = 0.0
        for anchor, other in (("s", "t"), ("t", "s")):  # the student against the teacher's memory, and the reverse
            scores = [
                [math.exp(dot(v, memory[other][j]) / TAU) for j in [slot, *negatives]]
                for v, slot, negatives in zip(seen[anchor], slots, drawn[step], strict=True)
            ]
            if other not in z:
                z[other] = mean(e for row in scores for e in row) * IMAGES
            for row in scores:
                h = [e / z[other] / (e / z[other] + K / IMAGES + 1e-7) for e in row]
                rest = [K / IMAGES / (e / z[other] + K / IMAGES + 1e-7) for e in row]
                want -= (math.log(h[0]) + sum(math.log(value) for value in rest[1:])) / len(scores)
        assert loss == pytest.approx(want, rel=1e-9), step

        for side in ("s", "t"):
            for view in range(w):
                for b in range(B):
                    j, v = slots[b * w], seen[side][b * w + view]
                    memory[side][j] = norm([0.5 * m + 0.5 * x for m, x in zip(memory[side][j], v, strict=True)])
        for name, side in (("student_memory", "s"), ("teacher_memory", "t")):
            torch.testing.assert_close(getattr(made, name), torch.tensor(memory[side]).double(), rtol=1e-6, atol=1e-6)


def test_the_memories_begin_as_the_release_has_them_and_apart() -> None:
    made = learner("crd:width=48")
    reach = math.sqrt(3 / 48)
    for memory in (made.student_memory, made.teacher_memory):
        assert float(memory.abs().max()) <= reach
        assert float(memory.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(made.student_memory, made.teacher_memory)


def test_its_gradient_is_the_losses_and_reaches_both_projections_and_no_memory() -> None:
    made, now = learner(f"crd:negatives={K},width=3"), batch(0)
    losses(made, now, [looks(0)])  # the constants are set
    assert gradients_check(made, batch(1), looks(1))
    assert all(bool((p.grad != 0).any()) for p in made.parameters() if p.grad is not None)
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {
        f"{side}_head.{kind}" for side in ("student", "teacher") for kind in ("weight", "bias")
    }
    assert not made.student_memory.requires_grad and not made.constants.requires_grad


def test_the_scale_of_either_embedding_does_not_matter_without_biases() -> None:
    made = learner(f"crd:negatives={K},width=3")
    with torch.no_grad():
        made.student_head.bias.zero_()
        made.teacher_head.bias.zero_()
    found = []
    for scale in (1.0, 9.0):
        now, out = batch(0), {"embedding": looks(0)["embedding"].detach() * scale}
        now.teacher["embedding"] = now.teacher["embedding"] * scale
        torch.manual_seed(0)
        found.append(float(made(now, [out])[0].detach()))
    assert found[0] == pytest.approx(found[1])


def test_negatives_are_drawn_from_all_slots_alike(drawn: list) -> None:
    made = learner(f"crd:negatives={IMAGES},width=3")
    for step in range(60):
        made(batch(step), [looks(step)])
    counts = np.bincount(np.array(drawn).flatten(), minlength=IMAGES)
    assert len(counts) == IMAGES
    assert counts == pytest.approx(60 * B, rel=0.35)


def test_slots_are_those_of_the_usable_images_only() -> None:
    rows = np.array([2, 3, 5, 8, 13])
    made = METHODS.build("crd:negatives=3", context=MethodContext([student()], {"embedding": (D,)}, rows, 1, 0))
    now = batch(0)
    now.rows = torch.tensor([13, 2, 8, 3])
    assert made.slots(now).tolist() == [4, 0, 3, 1]
    assert made.student_memory.shape == (5, 128)


def test_saved_and_restored_it_goes_on_with_memories_and_constants() -> None:
    one, other = learner(f"crd:negatives={K}"), learner(f"crd:negatives={K}")
    for step in range(3):
        losses(one, batch(step), [looks(step)])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    found = []
    for made in (one, other):
        torch.manual_seed(4)
        found.append(losses(made, batch(3), [looks(3)]))
    assert found[0] == found[1]
    assert one.state_dict().keys() == {
        "student_memory", "teacher_memory", "constants",
        *(f"{side}_head.{kind}" for side in ("student", "teacher") for kind in ("weight", "bias")),
    }  # fmt: skip


def test_the_recipe_is_the_published_one_at_its_batch_of_64() -> None:
    recipe = METHODS.resolve("crd").recipe
    assert recipe.lr * recipe.batch_size / 256 == pytest.approx(0.05)
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay, recipe.epochs) == ("sgd", 0.9, 5e-4, 240)
    assert [(round(at * 240), rate) for at, rate in recipe.drops] == [(150, 0.1), (180, 0.01), (210, 0.001)]


@pytest.mark.parametrize("order", ["crd:tau=0", "crd:negatives=0", "crd:width=-1", "crd:momentum=1.5"])
def test_what_cannot_be_is_refused(order: str) -> None:
    with pytest.raises(UserError, match="was asked, but must be"):
        learner(order)


def test_fewer_images_than_negatives_are_said() -> None:
    made = learner("crd")
    assert made.negatives == IMAGES and made.student_head.in_features == d
    assert any("20 negatives instead of 16384" in note for note in made.notes)
