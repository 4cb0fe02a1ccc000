"""The kind `convnet`: a chain of strided convolutions, the smallest student, for demonstrations and tests."""

from dataclasses import replace

from torch import Tensor, nn

from compress_ssl.pipeline.models.factory import ModelOptions, model_kind
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.preprocessing import IMAGENET


@model_kind()
def model(options: ModelOptions, /, *, channels: tuple[int, ...] = (16, 32, 64)) -> Network:
    """convnet, one 3x3 convolution of stride 2 for each of channels=16+32+64, then a global average pool."""
    if not channels or min(channels) < 1:
        raise UserError(f"convnet needs channels= of at least 1, as 16+32+64, not {'+'.join(map(str, channels))!r}")
    return Network(ConvNet(channels), "convnet", replace(IMAGENET, size=32, crop_ratio=1.0))


class ConvNet(nn.Module):
    """Blocks of convolution, batch norm and ReLU, each of which halves the side, then global average pooling."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip((3, *channels), channels, strict=False)
        ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, channels[-1])"""
        features: Tensor = self.blocks(images)
        return features.mean((2, 3))
