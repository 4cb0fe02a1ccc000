"""The demo's teacher, its weights in this folder, and raw pixels as a model to compare it with.

benchmarks/train_digits_teacher.py made digits.safetensors, from images without labels.
"""

import functools
from pathlib import Path

from torch import Tensor, nn

from pipeline import weights
from pipeline.model import Network, Options, Preprocessing, entry

WEIGHTS = Path(__file__).with_name("digits.safetensors")
AS_IS = Preprocessing(8, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)


@entry()
def model(asked: Options, /) -> Network:
    """digits-teacher, 64 dimensions, trained without labels on the training split of digits; its weights are built in."""
    module = DigitsNet()
    if asked.pretrained:
        weights.load(module, WEIGHTS, name="digits-teacher")
    seen = Preprocessing(16, (0.3,) * 3, (0.37,) * 3, "bilinear", 1.0)
    return Network(module, "digits-teacher", seen, trained=bool(asked.pretrained))


class DigitsNet(nn.Module):
    """Four conv-BN-ReLU blocks to a map of 4 x 4, then one linear layer: where a stroke is matters."""

    def __init__(self, width: int = 64):
        super().__init__()
        block = functools.partial(_block)
        self.blocks = nn.Sequential(block(1, 32, 2), block(32, 64), block(64, 64, 2), block(64, 96))
        self.out = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96 * 16, width))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, width); colours count alike."""
        return self.out(self.blocks(images.mean(1, keepdim=True)))
