"""DoGo, among peers and with a frozen one, against NT-Xent and KL written down row by row."""

import math

import pytest
import torch
from papers import B, batch, dot, gradients_check, kl, learner, looks, losses, mean, norm, softmax

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.runtime.artifact import UserError

Views = tuple[list[list[float]], list[list[float]]]  # projections of the batch's first and second views


def nt_xent(views: Views, tau: float) -> float:
    """Chen et al. 2020, eq. 1, over all 2 B rows."""
    z = [*views[0], *views[1]]
    total = 0.0
    for i, zi in enumerate(z):
        partner = (i + B) % (2 * B)
        below = sum(math.exp(dot(zi, zk) / tau) for k, zk in enumerate(z) if k != i)
        total -= math.log(math.exp(dot(zi, z[partner]) / tau) / below)
    return total / (2 * B)


def relations(views: Views, tau: float) -> list[list[float]]:
    return [softmax([dot(a, b) / tau for b in views[1]]) for a in views[0]]


def mutual(mine: Views, other: Views, tau: float) -> float:
    """KL(Q || P), P of the one that learns."""
    return mean(kl(q, p) for p, q in zip(relations(mine, tau), relations(other, tau), strict=True))


def projected(head: torch.nn.Module, embedding: torch.Tensor) -> Views:
    z = head(embedding.flatten(0, 1)).detach().unflatten(0, (B, -1))
    one, two = ([norm(row) for row in z[:, v].tolist()] for v in (0, 1))
    return one, two


@pytest.mark.parametrize("peers", [2, 3])
def test_each_peer_has_its_own_contrastive_loss_and_follows_the_mean_of_the_others(peers: int) -> None:
    made = learner("dogo:tau=0.2,tau_ssl=0.6,weight=0.7", (), peers)
    outs = [looks(0, w=2, peer=p) for p in range(peers)]
    views = [projected(head, out["embedding"]) for head, out in zip(made.heads, outs, strict=True)]
    found = losses(made, batch(0, (), w=2, peers=peers), outs)
    for mine in range(peers):
        others = [mutual(views[mine], views[p], 0.2) for p in range(peers) if p != mine]
        assert found[mine] == pytest.approx(nt_xent(views[mine], 0.6) + 0.7 * mean(others)), mine


def test_the_defaults_are_the_releases_at_its_batch() -> None:
    made, recipe = learner("dogo", (), 2), METHODS.resolve("dogo").recipe
    assert (made.tau, made.tau_ssl) == (0.1, 0.5)
    assert made.weight / 1 == pytest.approx(100 * 256 / 256**2), "100 on a mean over B x B is this on a mean over B"
    assert [type(layer).__name__ for layer in made.heads[0]] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert made.heads[0][0].bias is None and made.heads[0][3].out_features == 128
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.batch_size) == ("adam", 3e-4, 1e-6, 256)


def test_no_peer_is_moved_by_the_loss_of_another() -> None:
    made, outs = learner("dogo", (), 2), [looks(0, w=2, peer=p) for p in (0, 1)]
    first, _ = made(batch(0, (), w=2, peers=2), outs)
    first.backward()
    assert bool((outs[0]["embedding"].grad != 0).any()) and outs[1]["embedding"].grad is None
    assert all(p.grad is not None for p in made.heads[0].parameters())
    assert all(p.grad is None for p in made.heads[1].parameters())


def test_their_gradients_are_those_of_the_losses() -> None:
    made, other = learner("dogo:width=4", (), 2), looks(0, w=2, peer=1)
    now = batch(0, (), w=2, peers=2)

    def loss(embedding: torch.Tensor) -> torch.Tensor:
        return made(now, [{"embedding": embedding}, other])[0]

    assert torch.autograd.gradcheck(loss, (looks(0, w=2)["embedding"],))
    frozen = learner("dogo-frozen:width=4")
    assert gradients_check(frozen, batch(0, w=2), looks(0, w=2))


def test_the_scale_of_a_peers_embedding_does_not_matter_to_the_other() -> None:
    made = learner("dogo", (), 2)
    found = []
    for scale in (1.0, 5.0):
        outs = [looks(0, w=2), {"embedding": looks(0, w=2, peer=1)["embedding"] * scale}]
        found.append(float(made(batch(0, (), w=2, peers=2), outs)[0].detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-3), "batch norm's epsilon is all that is left of it"


@pytest.mark.parametrize(
    ("arrays", "target"), [(("embedding",), "embedding"), (("embedding", "projection"), "projection")]
)
def test_a_frozen_peer_is_followed_between_two_stored_views(arrays: tuple[str, ...], target: str) -> None:
    made = learner("dogo-frozen:tau=0.2,tau_ssl=0.6,weight=0.7", arrays)
    assert made.needs.arrays == (target,) and made.needs.views == 2
    assert any("no projection" in note for note in made.notes) == (target == "embedding")
    now, out = batch(0, arrays, w=2), looks(0, w=2)
    mine = projected(made.head, out["embedding"])
    t = now.teacher[target]
    theirs = tuple([norm(row) for row in t[:, v].tolist()] for v in (0, 1))
    (found,) = losses(made, now, [out])
    assert found == pytest.approx(nt_xent(mine, 0.6) + 0.7 * mutual(mine, theirs, 0.2))  # type: ignore[arg-type]


def test_one_student_alone_is_no_peer() -> None:
    with pytest.raises(UserError, match="needs two or more students, not 1; repeat --student"):
        learner("dogo", (), 1)


def test_a_frozen_peers_projection_that_is_not_stored_is_refused_with_the_flags() -> None:
    made = learner("dogo-frozen:target=projection")
    with pytest.raises(UserError, match="needs 'projection' .* export with --keep embedding,projection .* head=fc"):
        made.check_inputs("dogo-frozen", ("embedding",), "same")
