"""CRD against noise-contrastive estimation written down one slot at a time."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from papers import (
    IMAGES,
    B,
    D,
    apply_linear,
    build_method,
    build_student,
    d,
    dot,
    gradient_is_exact,
    make_batch,
    mean,
    normalize,
    student_outputs,
    take_step,
)

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import MethodContext
from compress_ssl.pipeline.runtime.errors import UserError

K, TAU = 7, 0.07


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The drawn slots of every step: [step][row of the batch][negative]."""
    log: list[list[list[int]]] = []
    randint = torch.randint

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        numbers = randint(*args, **kwargs)
        log.append(numbers.flatten(0, -2).tolist())
        return numbers

    monkeypatch.setattr(torch, "randint", record)
    return log


@pytest.mark.parametrize("w", [1, 2])
def test_losses_of_seven_steps_equal_the_papers_formula_computed_before_the_memories_move(w: int, drawn: list) -> None:
    method = build_method(f"crd:negatives={K},width=3,momentum=0.5")
    memory = {"s": method.student_memory.tolist(), "t": method.teacher_memory.tolist()}
    z: dict[str, float] = {}  # the normalising constants, of the first batch
    for step in range(7):  # images repeat after five steps
        batch, out = make_batch(step, w=w), student_outputs(step, w=w)
        slots = [i for i in batch.rows.tolist() for _ in range(w)]
        student_vectors = out["embedding"].flatten(0, 1).tolist()
        teacher_vectors = batch.teacher["embedding"].flatten(0, 1).tolist()
        projections = {
            "s": [normalize(apply_linear(method.student_head, x)) for x in student_vectors],
            "t": [normalize(apply_linear(method.teacher_head, x)) for x in teacher_vectors],
        }
        (loss,) = take_step(method, batch, [out])

        want = 0.0
        for anchor, other in (("s", "t"), ("t", "s")):  # the student against the teacher's memory, and the reverse
            scores = [
                [math.exp(dot(v, memory[other][j]) / TAU) for j in [slot, *negatives]]
                for v, slot, negatives in zip(projections[anchor], slots, drawn[step], strict=True)
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
                    j, v = slots[b * w], projections[side][b * w + view]
                    memory[side][j] = normalize([0.5 * m + 0.5 * x for m, x in zip(memory[side][j], v, strict=True)])
        for name, side in (("student_memory", "s"), ("teacher_memory", "t")):
            torch.testing.assert_close(getattr(method, name), torch.tensor(memory[side]).double(), rtol=1e-6, atol=1e-6)


def test_the_two_memories_start_with_different_random_vectors_of_the_released_range() -> None:
    method = build_method("crd:width=48")
    reach = math.sqrt(3 / 48)
    for memory in (method.student_memory, method.teacher_memory):
        assert float(memory.abs().max()) <= reach
        assert float(memory.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(method.student_memory, method.teacher_memory)


def test_the_gradient_is_exact_and_reaches_both_projections_and_no_memory() -> None:
    method, batch = build_method(f"crd:negatives={K},width=3"), make_batch(0)
    take_step(method, batch, [student_outputs(0)])  # sets the constants
    assert gradient_is_exact(method, make_batch(1), student_outputs(1))
    assert all(bool((p.grad != 0).any()) for p in method.parameters() if p.grad is not None)
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {
        f"{side}_head.{kind}" for side in ("student", "teacher") for kind in ("weight", "bias")
    }
    assert not method.student_memory.requires_grad and not method.constants.requires_grad


def test_the_loss_is_invariant_to_the_scale_of_both_embeddings_if_biases_are_zero() -> None:
    method = build_method(f"crd:negatives={K},width=3")
    with torch.no_grad():
        method.student_head.bias.zero_()
        method.teacher_head.bias.zero_()
    found = []
    for scale in (1.0, 9.0):
        batch, out = make_batch(0), {"embedding": student_outputs(0)["embedding"].detach() * scale}
        batch.teacher["embedding"] = batch.teacher["embedding"] * scale
        torch.manual_seed(0)
        found.append(float(method(batch, [out])[0].detach()))
    assert found[0] == pytest.approx(found[1])


def test_negatives_are_drawn_uniformly_from_all_slots(drawn: list) -> None:
    method = build_method(f"crd:negatives={IMAGES},width=3")
    for step in range(60):
        method(make_batch(step), [student_outputs(step)])
    counts = np.bincount(np.array(drawn).flatten(), minlength=IMAGES)
    assert len(counts) == IMAGES
    assert counts == pytest.approx(60 * B, rel=0.35)


def test_there_is_one_slot_per_usable_image() -> None:
    rows = np.array([2, 3, 5, 8, 13])
    method = METHODS.build("crd:negatives=3", context=MethodContext([build_student()], {"embedding": (D,)}, rows, 1, 0))
    batch = make_batch(0)
    batch.rows = torch.tensor([13, 2, 8, 3])
    assert method.slots(batch).tolist() == [4, 0, 3, 1]
    assert method.student_memory.shape == (5, 128)


def test_a_restored_method_continues_with_memories_and_constants() -> None:
    one, other = build_method(f"crd:negatives={K}"), build_method(f"crd:negatives={K}")
    for step in range(3):
        take_step(one, make_batch(step), [student_outputs(step)])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    found = []
    for method in (one, other):
        torch.manual_seed(4)
        found.append(take_step(method, make_batch(3), [student_outputs(3)]))
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


@pytest.mark.parametrize("spec", ["crd:tau=0", "crd:negatives=0", "crd:width=-1", "crd:momentum=1.5"])
def test_a_hyper_parameter_out_of_range_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="was asked, but must be"):
        build_method(spec)


def test_a_note_tells_that_there_are_fewer_images_than_negatives() -> None:
    method = build_method("crd")
    assert method.negatives == IMAGES and method.student_head.in_features == d
    assert any("20 negatives instead of 16384" in note for note in method.notes)
