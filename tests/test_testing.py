"""The contract of methods: all of the menu keep it, and what breaks it is caught and named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext, Needs
from compress_ssl.pipeline.models.linear_head import LinearHead, save
from compress_ssl.pipeline.testing import check_method

KEYS: dict[str, dict[str, Any]] = {
    "compress-2q": {"bank": 10},
    "compress-2q-momentum": {"bank": 10, "momentum": 0.5},
    "compress-1q": {"bank": 10},
    "seed": {"bank": 10},
    "regression": {"norm": "batch"},
    "crd": {"negatives": 9},
    "simclr-v2": {},
    "esvit": {"bank": 10, "crops": 2},
    "dogo": {},
    "dogo-frozen": {},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [name for name in METHODS.entries if name != "python"])
def test_every_method_of_the_menu_keeps_the_contract(name: str) -> None:
    kind = METHODS.resolve(name)
    check_method(kind, students=3 if kind.needs.peers else 1, **KEYS[name])  # type: ignore[attr-defined]


def test_a_head_in_the_place_of_logits_and_prototypes_keep_it_too(tmp_path: Path) -> None:
    save(LinearHead(torch.randn(3, 6), torch.zeros(3), "abc"), tmp_path / "head", {})
    check_method(METHODS.resolve("simclr-v2"), head=tmp_path / "head")
    dino = {"head.mlp.0.weight": torch.randn(4, 6), "head.last_layer.weight": torch.randn(5, 4)}
    check_method(METHODS.resolve("esvit"), heads=dino | {f"d_dense{k[4:]}": v for k, v in dino.items()}, crops=2)


class Fine(Method):
    """Squared distance: the least that a method can be."""

    def __init__(self, *, context: MethodContext):
        super().__init__()
        self.head = nn.Linear(context.students[0].width, context.teacher_width)

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [(self.head(out["embedding"]) - batch.teacher["embedding"]).square().mean() for out in outputs]


class Forgetful(Fine):
    steps = 0

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [loss * (1 + self.steps) for loss in super().forward(batch, outputs)]

    def after_step(self, batch: Batch) -> None:
        self.steps += 1


class Dice(Fine):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [loss * np.random.rand() for loss in super().forward(batch, outputs)]


class Detached(Fine):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return super().forward(batch, [{"embedding": out["embedding"].detach()} for out in outputs])


class Idle(Fine):
    def __init__(self, *, context: MethodContext):
        super().__init__(context=context)
        self.spare = nn.Linear(2, 2)


class Rows(Fine):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [(self.head(outputs[0]["embedding"]) - batch.teacher["embedding"]).square().mean((1, 2))]


class Twice(Fine):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return super().forward(batch, outputs) * 2


class Infinite(Fine):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [loss / 0 for loss in super().forward(batch, outputs)]


class Lenient(Fine):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False, assign=assign)


class Shelf(Fine):
    def exported_head(self) -> Any:
        return {"head": self.head.weight}


class Broad(Fine):
    def exported_head(self) -> LinearHead:
        return LinearHead(torch.ones(2, 3), torch.ones(2), None)


class Unasked(Fine):
    needs = Needs(arrays=("projection",))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Forgetful, "goes on differently when it is stopped and restored"),
        (Dice, "not the same to the bit when run again"),
        (Detached, "leaves .* tensors of the students as they were"),
        (Idle, "never trains spare.weight, spare.bias"),
        (Rows, r"gives a loss of shape \(8,\), not a scalar"),
        (Twice, "gives 2 losses for 1 students"),
        (Infinite, "the loss is inf"),
        (Shelf, "delivers a dict, not a LabelHead"),
        (Broad, "delivers a head for 3 dimensions, not 7"),
        (Lenient, "restored from a checkpoint that lacks head.weight"),
    ],
)
def test_what_breaks_it_is_caught_and_named(kind: type[Method], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_method(kind)


def test_what_is_not_asked_for_is_not_there() -> None:
    with pytest.raises(KeyError, match="embedding"):
        check_method(Unasked)


def test_the_least_that_a_method_can_be_is_enough() -> None:
    check_method(Fine)
