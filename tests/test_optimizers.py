"""Which parameters each optimizer applies weight decay to."""

import pytest
from torch import nn

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.training.optimizers import make_optimizer

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def modules() -> nn.ModuleList:
    return nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 3)])


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_norm_decay_decides_whether_all_parameters_decay_or_only_matrices(kind: str) -> None:
    network = modules()
    parameters = dict(network.named_parameters())
    (group,) = make_optimizer(kind, network, **SETTINGS, norm_decay=True).param_groups
    assert (group["weight_decay"], len(group["params"])) == (0.1, len(parameters))
    with_decay, without_decay = make_optimizer(kind, network, **SETTINGS, norm_decay=False).param_groups
    assert (with_decay["weight_decay"], without_decay["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in without_decay["params"]} == {id(p) for p in parameters.values() if p.ndim == 1}
    assert len(with_decay["params"]) + len(without_decay["params"]) == len(parameters)


def test_lars_never_decays_norms_and_biases() -> None:
    with_decay, without_decay = make_optimizer("lars", modules(), **SETTINGS, norm_decay=True).param_groups
    assert (len(with_decay["params"]), len(without_decay["params"])) == (2, 4)
    assert without_decay["weight_decay"] == 0.0


def test_parameters_without_gradients_are_left_out() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    (group,) = make_optimizer("sgd", nn.ModuleList([frozen, nn.Linear(3, 3)]), **SETTINGS, norm_decay=True).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(3, 3), (3,)]


def test_an_unknown_name_is_refused_with_the_list_of_known_names() -> None:
    with pytest.raises(UserError, match="unknown optimizer 'adagrad'. Known: sgd, adam, adamw, lars"):
        make_optimizer("adagrad", modules(), **SETTINGS, norm_decay=True)
