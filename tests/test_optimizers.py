"""Which weights decay under which optimiser."""

import pytest
from torch import nn

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.training.optimizers import make_optimizer

HOW = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def modules() -> nn.ModuleList:
    return nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 3)])


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_every_weight_decays_as_published_or_only_matrices_when_asked(kind: str) -> None:
    all_of_them = modules()
    named = dict(all_of_them.named_parameters())
    (whole,) = make_optimizer(kind, all_of_them, **HOW, norm_decay=True).param_groups
    assert (whole["weight_decay"], len(whole["params"])) == (0.1, len(named))
    decayed, spared = make_optimizer(kind, all_of_them, **HOW, norm_decay=False).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in spared["params"]} == {id(p) for p in named.values() if p.ndim == 1}
    assert len(decayed["params"]) + len(spared["params"]) == len(named)


def test_lars_spares_norms_and_biases_whatever_is_asked() -> None:
    decayed, spared = make_optimizer("lars", modules(), **HOW, norm_decay=True).param_groups
    assert (len(decayed["params"]), len(spared["params"])) == (2, 4)
    assert spared["weight_decay"] == 0.0


def test_weights_that_take_no_gradient_are_left_out() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    (group,) = make_optimizer("sgd", nn.ModuleList([frozen, nn.Linear(3, 3)]), **HOW, norm_decay=True).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(3, 3), (3,)]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown optimizer 'adagrad'. Known: sgd, adam, adamw, lars"):
        make_optimizer("adagrad", modules(), **HOW, norm_decay=True)
