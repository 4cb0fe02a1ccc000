"""DoGo with trained peers and with a frozen one, compared with NT-Xent and KL computed row by row."""

import math

import pytest
import torch
from papers import (
    B,
    build_method,
    dot,
    gradient_is_exact,
    kl,
    make_batch,
    mean,
    normalize,
    softmax,
    student_outputs,
    take_step,
)

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.runtime.errors import UserError

Views = tuple[list[list[float]], list[list[float]]]
"""Projections of the images' first views and of their second views, [image][dimension] each."""


def nt_xent(views: Views, tau: float) -> float:
    """Chen et al. 2020, eq. 1, over all 2 B rows."""
    z = [*views[0], *views[1]]
    total = 0.0
    for i, zi in enumerate(z):
        partner = (i + B) % (2 * B)
        below = sum(math.exp(dot(zi, zk) / tau) for k, zk in enumerate(z) if k != i)
        total -= math.log(math.exp(dot(zi, z[partner]) / tau) / below)
    return total / (2 * B)


def similarities(views: Views, tau: float) -> list[list[float]]:
    """(B, B) rows of P, from first to second views."""
    return [softmax([dot(a, b) / tau for b in views[1]]) for a in views[0]]


def mutual(mine: Views, other: Views, tau: float) -> float:
    """KL(Q || P); P is of the peer whose loss it is."""
    return mean(kl(q, p) for p, q in zip(similarities(mine, tau), similarities(other, tau), strict=True))


def project(head: torch.nn.Module, embedding: torch.Tensor) -> Views:
    z = head(embedding.flatten(0, 1)).detach().unflatten(0, (B, -1))
    one, two = ([normalize(row) for row in z[:, v].tolist()] for v in (0, 1))
    return one, two


@pytest.mark.parametrize("peers", [2, 3])
def test_each_peers_loss_is_nt_xent_plus_the_mean_kl_to_the_others(peers: int) -> None:
    method = build_method("dogo:tau=0.2,tau_ssl=0.6,weight=0.7", (), peers)
    outs = [student_outputs(0, w=2, peer=p) for p in range(peers)]
    views = [project(head, out["embedding"]) for head, out in zip(method.heads, outs, strict=True)]
    found = take_step(method, make_batch(0, (), w=2, peers=peers), outs)
    for mine in range(peers):
        others = [mutual(views[mine], views[p], 0.2) for p in range(peers) if p != mine]
        assert found[mine] == pytest.approx(nt_xent(views[mine], 0.6) + 0.7 * mean(others)), mine


def test_the_defaults_are_those_of_the_released_code_at_its_batch_size() -> None:
    method, recipe = build_method("dogo", (), 2), METHODS.resolve("dogo").recipe
    assert (method.tau, method.tau_ssl) == (0.1, 0.5)
    assert method.weight / 1 == pytest.approx(100 * 256 / 256**2), "100 on a mean over B x B is this on a mean over B"
    assert [type(layer).__name__ for layer in method.heads[0]] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert method.heads[0][0].bias is None and method.heads[0][3].out_features == 128
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.batch_size) == ("adam", 3e-4, 1e-6, 256)


def test_a_peers_loss_gives_no_gradient_to_another_peer() -> None:
    method, outs = build_method("dogo", (), 2), [student_outputs(0, w=2, peer=p) for p in (0, 1)]
    first, _ = method(make_batch(0, (), w=2, peers=2), outs)
    first.backward()
    assert bool((outs[0]["embedding"].grad != 0).any()) and outs[1]["embedding"].grad is None
    assert all(p.grad is not None for p in method.heads[0].parameters())
    assert all(p.grad is None for p in method.heads[1].parameters())


def test_the_gradients_are_exact() -> None:
    method, other = build_method("dogo:width=4", (), 2), student_outputs(0, w=2, peer=1)
    batch = make_batch(0, (), w=2, peers=2)

    def loss(embedding: torch.Tensor) -> torch.Tensor:
        return method(batch, [{"embedding": embedding}, other])[0]

    assert torch.autograd.gradcheck(loss, (student_outputs(0, w=2)["embedding"],))
    frozen = build_method("dogo-frozen:width=4")
    assert gradient_is_exact(frozen, make_batch(0, w=2), student_outputs(0, w=2))


def test_a_peers_loss_is_invariant_to_the_scale_of_another_peers_embedding() -> None:
    method = build_method("dogo", (), 2)
    found = []
    for scale in (1.0, 5.0):
        outs = [student_outputs(0, w=2), {"embedding": student_outputs(0, w=2, peer=1)["embedding"] * scale}]
        found.append(float(method(make_batch(0, (), w=2, peers=2), outs)[0].detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-3), "up to the epsilon of batch norm"


@pytest.mark.parametrize(
    ("arrays", "target"), [(("embedding",), "embedding"), (("embedding", "projection"), "projection")]
)
def test_the_loss_with_a_frozen_peer_is_over_two_stored_views(arrays: tuple[str, ...], target: str) -> None:
    method = build_method("dogo-frozen:tau=0.2,tau_ssl=0.6,weight=0.7", arrays)
    assert method.needs.arrays == (target,) and method.needs.views == 2
    assert any("no projection" in note for note in method.notes) == (target == "embedding")
    batch, out = make_batch(0, arrays, w=2), student_outputs(0, w=2)
    mine = project(method.head, out["embedding"])
    t = batch.teacher[target]
    theirs = tuple([normalize(row) for row in t[:, v].tolist()] for v in (0, 1))
    (found,) = take_step(method, batch, [out])
    assert found == pytest.approx(nt_xent(mine, 0.6) + 0.7 * mutual(mine, theirs, 0.2))  # type: ignore[arg-type]


def test_a_single_student_is_refused() -> None:
    with pytest.raises(UserError, match="needs two or more students, not 1; repeat --student"):
        build_method("dogo", (), 1)


def test_a_missing_projection_is_refused_with_the_flags_that_add_it() -> None:
    method = build_method("dogo-frozen:target=projection")
    with pytest.raises(UserError, match="needs 'projection' .* export with --keep embedding,projection .* head=fc"):
        method.check_inputs("dogo-frozen", ("embedding",), "same")
