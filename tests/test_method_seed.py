"""SEED with the teacher's projection as the target, and with small crops and their own queue."""

from collections import deque

import pytest
from papers import (
    CROPS,
    IMAGES,
    STORE,
    B,
    P,
    build_method,
    cross_entropy,
    dot,
    gradient_is_exact,
    make_batch,
    mean,
    normalize,
    softmax,
    student_outputs,
    take_step,
)  # fmt: skip

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.groups import LOCAL

FULL = ("embedding", "projection", "local_embedding", "local_projection")
TARGET = ("projection", "local_projection")


def term(t: list[float], s: list[float], anchors: list[list[float]]) -> float:
    """Fang et al. 2021: the row's own teacher vector comes first among the anchors; tau_t 0.3, tau_s 0.5."""
    p = softmax([dot(normalize(t), a) / 0.3 for a in [normalize(t), *anchors]])
    return cross_entropy(p, [dot(normalize(s), a) / 0.5 for a in [normalize(t), *anchors]])


@pytest.mark.parametrize("start", ["empty", "store"])
def test_views_and_small_crops_are_each_compared_over_their_own_queue_of_projections(start: str) -> None:
    method = build_method(f"seed:bank=6,tau_t=0.3,tau_s=0.5,start={start}", FULL)
    assert method.needs.arrays == TARGET and method.needs.outputs == ("embedding", "local_embedding")
    queues = [deque(bank["teacher"].tolist(), maxlen=6) for bank in (method.bank, method.small_bank)]
    for step in range(4):
        batch, out = make_batch(step, TARGET, w=2, crops=CROPS), student_outputs(step, w=2, crops=CROPS)
        sides = []
        for name, queue in zip(("", "local_"), queues, strict=True):
            t = batch.teacher[f"{name}projection"].flatten(0, 1).tolist()
            s = method.head(out[f"{name}embedding"].flatten(0, 1)).detach().tolist()
            sides.append(mean(term(a, b, list(queue)) for a, b in zip(t, s, strict=True)))
        assert take_step(method, batch, [out])[0] == pytest.approx(sum(sides), rel=1e-5), step
        queues[0].extend(normalize(t) for t in batch.teacher["projection"].flatten(0, 1).tolist())
        # Only the first crop of an image enters the queue.
        queues[1].extend(normalize(t) for t in batch.teacher["local_projection"][:, 0].tolist())
    assert set(method.small_bank.views.tolist()) == {LOCAL}


def test_the_weight_of_the_small_crops_loss_does_not_depend_on_their_number() -> None:
    """The mean over 6 B rows, not six means."""
    method = build_method("seed:bank=6,tau_t=0.3,tau_s=0.5", FULL)
    batch, out = make_batch(0, TARGET, w=1, crops=CROPS), student_outputs(0, w=1, crops=CROPS)
    twice = {name: value.repeat(1, 2, 1) if name.startswith("local_") else value for name, value in out.items()}
    (once,) = method(batch, [out])
    batch.teacher["local_projection"] = batch.teacher["local_projection"].repeat(1, 2, 1)
    assert float(method(batch, [twice])[0].detach()) == pytest.approx(float(once.detach()))


def test_the_gradient_is_exact() -> None:
    method = build_method("seed:bank=6,tau_t=0.3,tau_s=0.5", FULL)
    assert gradient_is_exact(method, make_batch(0, TARGET, crops=2), student_outputs(0, crops=2))


def test_the_head_is_two_layers_from_the_students_width_to_the_targets() -> None:
    first, _, last = build_method("seed:bank=6", FULL).head
    assert (first.in_features, first.out_features, last.out_features) == (5, 5, P)


@pytest.mark.parametrize(
    ("spec", "arrays", "wanted"),
    [
        ("seed", ("embedding",), ("embedding",)),
        ("seed", ("embedding", "projection"), ("projection",)),
        ("seed:target=embedding", FULL, ("embedding", "local_embedding")),
        ("seed:small=false", FULL, ("projection",)),
        ("seed", ("embedding", "local_embedding"), ("embedding", "local_embedding")),
    ],
)
def test_the_arrays_it_reads_follow_from_the_store_and_the_keys(
    spec: str, arrays: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    assert build_method(spec, arrays).needs.arrays == wanted


@pytest.mark.parametrize(
    ("spec", "flags"),
    [
        ("seed:target=projection", "needs 'projection' .* --keep embedding,projection"),
        ("seed:small=true", "needs 'local_embedding' .* export with --local-views 6"),
    ],
)
def test_a_missing_array_is_refused_with_the_flags_that_add_it(spec: str, flags: str) -> None:
    with pytest.raises(UserError, match=flags):
        build_method(spec)


def test_the_queue_of_small_crops_is_read_from_the_store() -> None:
    method = build_method("seed:bank=6", FULL)
    rows = method.small_bank.rows
    assert len(set(rows.tolist())) == 6 and int(rows.max()) < IMAGES
    for j, i in enumerate(rows.tolist()):
        assert method.small_bank["teacher"][j].tolist() == pytest.approx(
            normalize(STORE["local_projection"][i, 0].tolist()), rel=1e-5
        )
    assert not [name for name in method.state_dict() if "column" in name]
    assert method.bank.size == 6 and B == 4
