"""check_model: models that commands can use pass it, and each kind of mistake is found and named in the error."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compress_ssl import check_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Correct(nn.Module):
    """A small network that passes."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2))
        self.last = nn.Conv2d(6, width, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(images)).mean((2, 3))


class ReturnsAMap(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(images))  # (B, d, h, w), which pool= averages


def frozen(width: int = 8) -> nn.Module:
    """A teacher whose weights are not trained."""
    return Correct(width).requires_grad_(False)


def of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0)


@pytest.mark.parametrize("build", [Correct, ReturnsAMap, frozen])
def test_a_correct_model_passes(build: Callable[..., nn.Module]) -> None:
    check_model(build, width=5, size=16)


def test_a_network_of_a_library_passes() -> None:
    check_model(of_timm, "resnet10t", size=64)


# ---------------------------------------------------------------- mistakes


class IntegerOutput(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).long()


class OtherWeightsEachTime(Correct):
    def __init__(self, width: int = 8):
        super().__init__(width)
        nn.init.constant_(self.last.weight, random.random())  # not torch's generator


class ChangesItsInput(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2))


class ChangesItsInputWhileTraining(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2) if self.training and images.std() > 0 else images)


class NotFinite(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0


class AlwaysRandom(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.5, training=True)


class CountsImages(Correct):
    def __init__(self, width: int = 8):
        super().__init__(width)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().forward(images)


class Constant(Correct):
    def forward(self, images: Tensor) -> Tensor:
        return 0 * super().forward(images) + 1


class NormalisesTheBatch(Correct):
    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        return out - out.mean(0)


class ReadsMemoryInOrder(Correct):
    def forward(self, images: Tensor) -> Tensor:
        in_memory = torch.as_strided(images, (len(images), images[0].numel()), (images[0].numel(), 1))
        return super().forward(images) + in_memory[:, :8]


class HoldsALambda(Correct):
    def __init__(self, width: int = 8):
        super().__init__(width)
        self.lines = (line for line in "ab")  # a generator cannot be copied


class CountsItsCopies(Correct):
    def __deepcopy__(self, memo: object) -> nn.Module:
        return Correct(self.last.out_channels).eval()


class StateOutsideTheStateDict(Correct):
    def __init__(self, width: int = 8):
        super().__init__(width)
        self.scale = torch.rand(width) + 1  # a plain attribute

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


class IdleWeight(Correct):
    def __init__(self, width: int = 8):
        super().__init__(width)
        self.idle = nn.Linear(3, 3)


class InfiniteGradient(Correct):
    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        return out + (0 * out).sqrt() if self.training else out


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (IntegerOutput, "must return floating-point numbers"),
        (OtherWeightsEachTime, "has other weights when it is built again"),
        (ChangesItsInput, "changes its input; use no in-place"),
        (ChangesItsInputWhileTraining, "changes its input in training mode"),
        (NotFinite, "returns NaN or infinity"),
        (AlwaysRandom, "returns other embeddings for the same images a second time"),
        (CountsImages, "changes a weight or a buffer in evaluation mode"),
        (Constant, "returns the same embedding for different images"),
        (NormalisesTheBatch, "returns other embeddings for the same images in another batch"),
        (ReadsMemoryInOrder, "in the channels-last memory format"),
        (HoldsALambda, "cannot be copied by copy.deepcopy"),
        (CountsItsCopies, "returns other embeddings when it is copied"),
        (StateOutsideTheStateDict, "when its state dict is loaded into a second model"),
        (IdleWeight, "has weights without a gradient: idle.weight, idle.bias"),
        (InfiniteGradient, "has a gradient that is not finite"),
    ],
)
def test_each_mistake_is_found_and_named(build: type[nn.Module], words: str) -> None:
    with pytest.raises(AssertionError, match=words) as error:
        check_model(build, size=16)
    assert str(error.value).startswith((build.__name__, f"model-{build.__name__}"))


@pytest.mark.parametrize(("keys", "words"), [({}, "the image size of Correct is unknown"), ({"widht": 3}, "widht")])
def test_what_a_spec_would_refuse_is_refused(keys: dict[str, int], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_model(Correct, **keys)
