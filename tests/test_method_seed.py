"""SEED in full: the teacher's projection, small crops with a queue of their own."""

from collections import deque

import pytest
from papers import (
    CROPS,
    IMAGES,
    STORE,
    B,
    P,
    batch,
    cross_entropy,
    dot,
    gradients_check,
    learner,
    looks,
    losses,
    mean,
    norm,
    softmax,
)  # fmt: skip

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.views.numbering import LOCAL

FULL = ("embedding", "projection", "local_embedding", "local_projection")
TARGET = ("projection", "local_projection")


def term(t: list[float], s: list[float], anchors: list[list[float]]) -> float:
    """Fang et al. 2021: the row's own teacher vector comes first among the anchors; tau_t 0.3, tau_s 0.5."""
    p = softmax([dot(norm(t), a) / 0.3 for a in [norm(t), *anchors]])
    return cross_entropy(p, [dot(norm(s), a) / 0.5 for a in [norm(t), *anchors]])


@pytest.mark.parametrize("start", ["empty", "store"])
def test_views_and_small_crops_each_over_their_own_queue_of_projections(start: str) -> None:
    made = learner(f"seed:bank=6,tau_t=0.3,tau_s=0.5,start={start}", FULL)
    assert made.needs.arrays == TARGET and made.needs.outputs == ("embedding", "local_embedding")
    queues = [deque(bank["teacher"].tolist(), maxlen=6) for bank in (made.bank, made.small_bank)]
    for step in range(4):
        now, out = batch(step, TARGET, w=2, crops=CROPS), looks(step, w=2, crops=CROPS)
        sides = []
        for name, queue in zip(("", "local_"), queues, strict=True):
            t = now.teacher[f"{name}projection"].flatten(0, 1).tolist()
            s = made.head(out[f"{name}embedding"].flatten(0, 1)).detach().tolist()
            sides.append(mean(term(a, b, list(queue)) for a, b in zip(t, s, strict=True)))
        assert losses(made, now, [out])[0] == pytest.approx(sum(sides), rel=1e-5), step
        queues[0].extend(norm(t) for t in now.teacher["projection"].flatten(0, 1).tolist())
        queues[1].extend(norm(t) for t in now.teacher["local_projection"][:, 0].tolist())  # only the first crop enters
    assert set(made.small_bank.views.tolist()) == {LOCAL}


def test_small_crops_weigh_as_much_as_views_however_many_there_are() -> None:
    """The mean over 6 B rows, not six means."""
    made = learner("seed:bank=6,tau_t=0.3,tau_s=0.5", FULL)
    now, out = batch(0, TARGET, w=1, crops=CROPS), looks(0, w=1, crops=CROPS)
    twice = {name: value.repeat(1, 2, 1) if name.startswith("local_") else value for name, value in out.items()}
    (once,) = made(now, [out])
    now.teacher["local_projection"] = now.teacher["local_projection"].repeat(1, 2, 1)
    assert float(made(now, [twice])[0].detach()) == pytest.approx(float(once.detach()))


def test_its_gradient_is_the_losses() -> None:
    made = learner("seed:bank=6,tau_t=0.3,tau_s=0.5", FULL)
    assert gradients_check(made, batch(0, TARGET, crops=2), looks(0, crops=2))


def test_the_head_is_two_layers_from_the_students_width_to_the_targets() -> None:
    first, _, last = learner("seed:bank=6", FULL).head
    assert (first.in_features, first.out_features, last.out_features) == (5, 5, P)


@pytest.mark.parametrize(
    ("order", "arrays", "wanted"),
    [
        ("seed", ("embedding",), ("embedding",)),
        ("seed", ("embedding", "projection"), ("projection",)),
        ("seed:target=embedding", FULL, ("embedding", "local_embedding")),
        ("seed:small=false", FULL, ("projection",)),
        ("seed", ("embedding", "local_embedding"), ("embedding", "local_embedding")),
    ],
)
def test_what_it_compares_with_follows_from_the_store_and_can_be_said(
    order: str, arrays: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    assert learner(order, arrays).needs.arrays == wanted


@pytest.mark.parametrize(
    ("order", "flags"),
    [
        ("seed:target=projection", "needs 'projection' .* --keep embedding,projection"),
        ("seed:small=true", "needs 'local_embedding' .* export with --local-views 6"),
    ],
)
def test_what_the_store_lacks_is_refused_with_the_flags_that_put_it_there(order: str, flags: str) -> None:
    with pytest.raises(UserError, match=flags):
        learner(order)


def test_a_queue_of_small_crops_is_read_from_the_store_again() -> None:
    made = learner("seed:bank=6", FULL)
    rows = made.small_bank.rows
    assert len(set(rows.tolist())) == 6 and int(rows.max()) < IMAGES
    for j, i in enumerate(rows.tolist()):
        assert made.small_bank["teacher"][j].tolist() == pytest.approx(
            norm(STORE["local_projection"][i, 0].tolist()), rel=1e-5
        )
    assert not [name for name in made.state_dict() if "column" in name]
    assert made.bank.size == 6 and B == 4
