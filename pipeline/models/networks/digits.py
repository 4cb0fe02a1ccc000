"""The kind `digits-teacher`: the teacher of the demo, and raw pixels as a model to compare it with.

The weights are in digits.safetensors in this folder. benchmarks/train_digits_teacher.py trained them on images without
labels.
"""

from pathlib import Path

from torch import Tensor, nn

from compress_ssl.pipeline.models import weights
from compress_ssl.pipeline.models.factory import ModelOptions, model_kind
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.views.preprocessing import Preprocessing

WEIGHTS = Path(__file__).with_name("digits.safetensors")


@model_kind()
def model(options: ModelOptions, /) -> Network:
    """digits-teacher, 64 dimensions, trained without labels on the training split of digits; weights built in."""
    module = DigitsNet()
    if options.pretrained:
        weights.load(module, WEIGHTS, name="digits-teacher")
    # 16 pixels; the mean and standard deviation, for grey values in [0, 1], that were used in training
    preprocessing = Preprocessing(16, (0.3,) * 3, (0.37,) * 3, "bilinear", 1.0)
    return Network(module, "digits-teacher", preprocessing, trained=bool(options.pretrained))


class DigitsNet(nn.Module):
    """Four conv-BN-ReLU blocks down to a 4 x 4 map, then a linear layer on the flattened map, so position matters."""

    def __init__(self, width: int = 64):
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after, stride in ((1, 32, 2), (32, 64, 1), (64, 64, 2), (64, 96, 1))
        ]
        self.blocks = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4))  # images of 16 pixels give 4 x 4 without it
        self.out = nn.Linear(96 * 4 * 4, width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, S, S) -> (B, width). The digits are grey, so the channels are averaged."""
        embedding: Tensor = self.out(self.blocks(images.mean(1, keepdim=True)).flatten(1))
        return embedding


class Pixels(nn.Module):
    """A model without parameters: the embedding is the 8 x 8 grey values.

    Used as `--model python:compress_ssl.pipeline.models.networks.digits:Pixels`.
    """

    preprocessing = Preprocessing(8, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 8, 8) -> (B, 64)"""
        return images.mean(1).flatten(1)
