"""The learning rate as a function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.methods.base import Recipe
from compress_ssl.pipeline.methods.compress import TwoQueues
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.training.schedule import SCHEDULES, Schedule


def published_rate(epoch: int, lr: float = 0.01) -> float:
    """CompRess' util.py: the rate times 0.2 for each milestone (90, 120) that the 1-based epoch has passed."""
    for milestone in (90, 120):
        if epoch > milestone:
            lr *= 0.2
    return lr


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 5005])
def test_the_step_schedule_equals_the_published_one_of_compress_in_every_epoch(steps_per_epoch: int) -> None:
    recipe = TwoQueues.recipe
    assert (recipe.epochs, recipe.lr, recipe.schedule) == (130, 0.01, "step")
    schedule, steps = Schedule(recipe.schedule, drops=recipe.drops), 130 * steps_per_epoch
    for epoch in range(1, 131):
        for step in {(epoch - 1) * steps_per_epoch, epoch * steps_per_epoch - 1}:  # the first and the last of the epoch
            assert recipe.lr * schedule(step / steps) == pytest.approx(published_rate(epoch)), (epoch, step)


def test_a_shorter_run_drops_at_the_same_fractions() -> None:
    schedule = Schedule("step", drops=Recipe().drops)
    rates = [schedule(step / 13) for step in range(13)]
    assert rates == pytest.approx([1.0] * 9 + [0.2] * 3 + [0.04])


def test_cosine_goes_from_one_through_a_half_to_zero() -> None:
    schedule = Schedule("cosine")
    assert [schedule(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert schedule(1 / 3) == pytest.approx(0.75)


def test_constant_is_constant() -> None:
    assert {Schedule("constant")(step / 7) for step in range(7)} == {1.0}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_warm_up_rises_linearly_from_zero_to_the_full_rate(kind: str) -> None:
    schedule = Schedule(kind, warmup=0.2)
    assert [schedule(done) for done in (0.0, 0.05, 0.1, 0.15)] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert schedule(0.2) == pytest.approx(1.0)


def test_cosine_after_a_warm_up_still_ends_at_zero() -> None:
    schedule = Schedule("cosine", warmup=0.2)
    assert [schedule(done) for done in (0.2, 0.6, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_the_factor_is_between_zero_and_one_and_never_rises_after_the_warm_up(
    kind: str, warmup: float, done: float
) -> None:
    schedule = Schedule(kind, warmup)
    assert 0.0 <= schedule(done) <= 1.0
    later = done + (1 - done) / 2
    assert done < warmup or schedule(later) <= schedule(done) + 1e-9


def test_an_unknown_schedule_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(UserError, match="unknown schedule 'cosin'. Known: cosine, step, constant"):
        Schedule("cosin")
