"""check_method: every registered method passes it, and each kind of mistake is found and named in the error."""

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
def test_every_registered_method_passes(name: str) -> None:
    build = METHODS.resolve(name)
    check_method(build, students=3 if build.needs.peers else 1, **KEYS[name])  # type: ignore[attr-defined]


def test_simclr_v2_with_a_label_head_and_esvit_with_prototypes_pass(tmp_path: Path) -> None:
    save(LinearHead(torch.randn(3, 6), torch.zeros(3), "abc"), tmp_path / "head", {})
    check_method(METHODS.resolve("simclr-v2"), head=tmp_path / "head")
    dino = {"head.mlp.0.weight": torch.randn(4, 6), "head.last_layer.weight": torch.randn(5, 4)}
    check_method(METHODS.resolve("esvit"), heads=dino | {f"d_dense{k[4:]}": v for k, v in dino.items()}, crops=2)


class Correct(Method):
    """Squared distance: a smallest method that passes."""

    def __init__(self, *, context: MethodContext):
        super().__init__()
        self.head = nn.Linear(context.students[0].width, context.teacher_width)

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [(self.head(out["embedding"]) - batch.teacher["embedding"]).square().mean() for out in outputs]


class CountsStepsOutsideItsState(Correct):
    steps = 0  # a plain attribute, which no checkpoint holds

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [loss * (1 + self.steps) for loss in super().forward(batch, outputs)]

    def after_step(self, batch: Batch) -> None:
        self.steps += 1


class DrawsFromNumpy(Correct):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [loss * np.random.rand() for loss in super().forward(batch, outputs)]


class DetachesTheStudent(Correct):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return super().forward(batch, [{"embedding": out["embedding"].detach()} for out in outputs])


class HasAnUnusedLayer(Correct):
    def __init__(self, *, context: MethodContext):
        super().__init__(context=context)
        self.spare = nn.Linear(2, 2)


class ReturnsALossPerImage(Correct):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [(self.head(outputs[0]["embedding"]) - batch.teacher["embedding"]).square().mean((1, 2))]


class ReturnsTwoLosses(Correct):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return super().forward(batch, outputs) * 2


class ReturnsInfinity(Correct):
    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [loss / 0 for loss in super().forward(batch, outputs)]


class LoadsPartialStates(Correct):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False, assign=assign)


class ExportsADictionary(Correct):
    def exported_head(self) -> Any:
        return {"head": self.head.weight}


class ExportsAHeadOfAnotherWidth(Correct):
    def exported_head(self) -> LinearHead:
        return LinearHead(torch.ones(2, 3), torch.ones(2), None)


class ReadsWhatItsNeedsDoNotName(Correct):
    needs = Needs(arrays=("projection",))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CountsStepsOutsideItsState, "has different losses after it is saved and restored"),
        (DrawsFromNumpy, "has different losses when it is run again from the same seed"),
        (DetachesTheStudent, "left .* parameters of the students unchanged"),
        (HasAnUnusedLayer, "parameters without a gradient: spare.weight, spare.bias"),
        (ReturnsALossPerImage, r"returned a loss of shape \(8,\), not a scalar"),
        (ReturnsTwoLosses, "returned 2 losses for 1 students"),
        (ReturnsInfinity, "the loss is inf"),
        (ExportsADictionary, "returned a dict, not a LinearHead"),
        (ExportsAHeadOfAnotherWidth, "returned a head for 3 dimensions, but the student has 7"),
        (LoadsPartialStates, "restored from a checkpoint that lacks head.weight"),
    ],
)
def test_a_mistake_is_found_and_named(method: type[Method], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(method)


def test_an_array_that_needs_does_not_name_is_missing_from_the_batch() -> None:
    with pytest.raises(KeyError, match="embedding"):
        check_method(ReadsWhatItsNeedsDoNotName)


def test_a_smallest_method_passes() -> None:
    check_method(Correct)
