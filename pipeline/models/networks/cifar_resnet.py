"""The kind `cifar-resnet`: the ResNets for small images of He et al. 2016, section 4.2 (arXiv 1512.03385)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.models.factory import ModelOptions, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.preprocessing import IMAGENET


@model_kind()
def model(options: ModelOptions, depth: int = 20, /, *, width: int = 16, drop_path: float = 0.0) -> Network:
    """cifar-resnet:DEPTH, depth 6n + 2 (20, 32, 44, 56, 110); width= of the first stage, drop_path= in [0, 1)."""
    if depth < 8 or depth % 6 != 2:
        near = max(8, round((depth - 2) / 6) * 6 + 2)
        raise UserError(f"cifar-resnet:{depth} does not exist: depths are 6n + 2; the nearest is {near}")
    if width < 1 or not 0 <= drop_path < 1:
        raise UserError(f"cifar-resnet needs width >= 1 and drop_path in [0, 1), not {width} and {drop_path}")
    module = CifarResNet((depth - 2) // 6, width, drop_path)
    return Network(module, safe_name("cifar-resnet", depth), replace(IMAGENET, size=32, crop_ratio=1.0))


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of n basic blocks at 1, 1/2 and 1/4 of the side, global average pooling.

    Shortcuts are the paper's option A, without parameters: where the shape changes, the input is subsampled and
    zero channels are appended. The rate of stochastic depth grows linearly with depth from 0 to `drop_path`
    (Huang et al. 2016, arXiv 1603.09382). `width`: channels of the first stage.
    """

    def __init__(self, n: int, width: int = 16, drop_path: float = 0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        rates = [drop_path * block / (3 * n - 1) for block in range(3 * n)]
        self.stage1 = _stage(width, width, 1, rates[:n])
        self.stage2 = _stage(width, 2 * width, 2, rates[n : 2 * n])
        self.stage3 = _stage(2 * width, 4 * width, 2, rates[2 * n :])
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 4 * width)"""
        features: Tensor = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return features.mean((2, 3))


class Block(nn.Module):
    """A basic block: two 3x3 convolutions and a shortcut around them.

    rate: probability that an image skips the convolutions in a training step (stochastic depth).
    """

    def __init__(self, channels: int, out: int, stride: int, rate: float):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added_channels, self.rate = stride, out - channels, rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)"""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.training and self.rate:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
            residual = residual * kept / (1 - self.rate)  # the expectation does not change
        if self.stride > 1 or self.added_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        return F.relu(x + residual)


def _stage(channels: int, out: int, stride: int, rates: Sequence[float]) -> nn.Sequential:
    """One block per rate; only the first one changes channels and side."""
    first = Block(channels, out, stride, rates[0])
    return nn.Sequential(first, *(Block(out, out, 1, rate) for rate in rates[1:]))
