"""A digest of what this machine makes of some float arithmetic, to know whether bits of a training can be compared."""

import hashlib

import torch
from torch import nn
from torch.nn import functional as F


def arithmetic() -> str:
    """A few steps of a small network, forward and backward, on one thread; the global random state is left alone."""
    threads, draw = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = (nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 1, 1))
            net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12))
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        anchors = F.normalize(torch.randn(32, 12, generator=draw), dim=1)
        for _ in range(5):
            images = torch.rand(16, 3, 16, 16, generator=draw).contiguous(memory_format=torch.channels_last)
            scores = F.normalize(net(images), dim=1) @ anchors.T / 0.04
            loss = -(F.log_softmax(scores, dim=1) * torch.rand(16, 32, generator=draw)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    state = b"".join(value.contiguous().numpy().tobytes() for value in net.state_dict().values())
    return hashlib.blake2b(state, digest_size=16).hexdigest()
