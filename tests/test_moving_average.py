"""Moving averages: they have exactly the bits of the formula, and change only the tensors they should."""

import copy

import pytest
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.models.moving_average import copy_buffers, move, update_ema


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network with statistics of batch norm, and with parameters that are not contiguous."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))
    net(torch.randn(6, 3, 4, 4))
    return net.to(dtype).to(memory_format=torch.channels_last)


def tensors(net: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in net.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.996, 0.9999, 1.0])
@pytest.mark.parametrize("slow", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fast", [torch.float32, torch.float16, torch.bfloat16])
def test_an_average_has_the_bits_of_lerp_in_its_own_precision(
    decay: float, slow: torch.dtype, fast: torch.dtype
) -> None:
    average, source = network(0, slow), network(1, fast)
    want, before = tensors(average), tensors(source)
    for reference, other in zip(want, before, strict=True):
        reference.lerp_(other.to(slow), 1.0 - decay)
    update_ema(average, source, decay)
    for got, expected in zip(average.parameters(), want, strict=True):
        assert got.dtype == slow and torch.equal(got, expected)
    for got, expected in zip(source.parameters(), before, strict=True):
        assert got.dtype == fast and torch.equal(got, expected)


def test_one_tensor_moves_in_place_and_without_a_graph() -> None:
    centre, source = torch.zeros(3), torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    address = centre.data_ptr()
    move(centre, source * 2, 0.75)
    assert centre.tolist() == [0.5, 1.0, 2.0] and centre.data_ptr() == address and not centre.requires_grad


def test_buffers_change_only_in_copy_buffers() -> None:
    average, source = network(0), network(1)
    before = [buffer.clone() for buffer in average.buffers()]
    update_ema(average, source, 0.5)
    assert all(map(torch.equal, average.buffers(), before))
    after = tensors(average)
    copy_buffers(average, source)
    assert all(map(torch.equal, average.buffers(), source.buffers())) and len(before) == 3
    assert all(map(torch.equal, average.parameters(), after))


def test_networks_with_different_numbers_of_tensors_are_refused() -> None:
    wider = nn.Sequential(network(0), nn.BatchNorm1d(4))
    for update in (lambda: update_ema(network(0), wider, 0.5), lambda: copy_buffers(network(0), wider)):
        with pytest.raises(ValueError, match="longer"):
            update()


def test_an_average_gets_no_gradients() -> None:
    source = network(1)
    average = copy.deepcopy(source).requires_grad_(False)
    source(torch.randn(6, 3, 4, 4)).sum().backward()
    update_ema(average, source, 0.5)
    assert all(p.grad is None and p.grad_fn is None and not p.requires_grad for p in average.parameters())
