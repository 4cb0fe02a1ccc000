"""What each step looks at, and the teacher's features for it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.codecs import CODECS, build_codec
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.sampler import PAIRINGS, StepSampler
from compress_ssl.pipeline.training.teacher_features import TeacherFeatures
from compress_ssl.pipeline.views.numbering import FRESH

ROWS = np.array([0, 1, 2, 4, 5, 7, 8, 11, 12, 13])  # good ones: 3, 6, 9, 10 could not be used
VIEWS = (1, 2, 3, 4, 5)


def plan(**said: Any) -> StepSampler:
    default = {
        "seed": 3,
        "rows": ROWS,
        "views": VIEWS,
        "batch": 4,
        "views_per_step": 1,
        "pairing": "same",
        "steps": 100,
    }
    return StepSampler(**{**default, **said})


def pairs(of: StepSampler, steps: range) -> list[tuple[int, int, int]]:
    """[(i, v_student, v_teacher), ...]"""
    out = []
    for step in steps:
        rows, student, teacher = of.at(step)
        assert rows.shape == (of.batch,)
        assert student.shape == teacher.shape == (of.batch, of.views_per_step)
        assert {rows.dtype, student.dtype, teacher.dtype} == {np.dtype(np.int64)}
        for i, vs, ts in zip(rows.tolist(), student.tolist(), teacher.tolist(), strict=True):
            out += [(i, v, t) for v, t in zip(vs, ts, strict=True)]
    return out


# ---------------------------------------------------------------- images


@given(st.integers(1, 10), st.integers(0, 2**64 - 1))
def test_every_good_row_comes_once_per_epoch_whatever_the_batch(batch: int, seed: int) -> None:
    seen = [i for i, _, _ in pairs(plan(batch=batch, seed=seed), range(3 * len(ROWS)))]
    for epoch in range(len(seen) // len(ROWS)):
        assert sorted(seen[epoch * len(ROWS) : (epoch + 1) * len(ROWS)]) == ROWS.tolist()


def test_batches_never_run_short_and_go_on_into_the_next_epoch() -> None:
    rows, student, _ = plan(batch=4).at(2)  # places 8 to 11 of epochs of ten
    before = [i for step in (0, 1) for i in plan(batch=4).at(step)[0].tolist()]
    assert sorted([*before, *rows[:2].tolist()]) == ROWS.tolist()
    assert student[0] == student[1] and student[2] == student[3]
    assert student[1] != student[2], "the second half belongs to another epoch, so to another view"


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.sampled_from(PAIRINGS), st.integers(1, 3))
def test_a_step_is_a_function_of_seed_and_step_not_of_what_was_asked_before(
    steps: list[int], pairing: str, views_per_step: int
) -> None:
    kept = plan(pairing=pairing, views_per_step=views_per_step)
    for step in steps:
        fresh = plan(pairing=pairing, views_per_step=views_per_step, steps=7, first=step)
        for one, other in zip(kept.at(step), fresh.at(step), strict=True):
            assert np.array_equal(one, other)


def test_another_seed_gives_another_order_and_other_views() -> None:
    one, other = (pairs(plan(seed=seed), range(25)) for seed in (3, 4))
    assert [i for i, _, _ in one] != [i for i, _, _ in other]
    assert [v for _, v, _ in one] != [v for _, v, _ in other]
    assert one == pairs(plan(seed=3), range(25))


def test_epochs_differ_in_their_order() -> None:
    orders = {tuple(plan(batch=10).at(epoch)[0].tolist()) for epoch in range(20)}
    assert len(orders) == 20


def test_as_pieces_for_the_loader_it_runs_from_its_first_step_to_the_last() -> None:
    whole = plan(steps=9, first=6, pairing="fresh")
    assert len(whole) == 3
    for number in range(3):
        rows, student, _ = whole.at(6 + number)
        assert np.array_equal(whole[number].rows, rows)
        assert np.array_equal(whole[number].views, student)


# ---------------------------------------------------------------- views


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 999), st.integers(0, 4))
def test_over_as_many_epochs_as_there_are_views_each_is_used_equally(
    count: int, views_per_step: int, seed: int, cycle: int
) -> None:
    if views_per_step > count:
        return
    of = plan(views=tuple(range(1, count + 1)), views_per_step=views_per_step, seed=seed)
    epochs = [of.epoch_views(epoch)[0].tolist() for epoch in range(cycle * count, (cycle + 1) * count)]
    assert Counter(v for views in epochs for v in views) == dict.fromkeys(range(1, count + 1), views_per_step)
    assert all(len(set(views)) == views_per_step for views in epochs), "a view twice in one step"


@given(st.integers(1, 4), st.integers(0, 99))
def test_in_an_epoch_all_images_are_seen_in_the_same_stored_views(views_per_step: int, seed: int) -> None:
    of = plan(views_per_step=views_per_step, batch=5, seed=seed)
    for epoch in range(4):
        views = {v for step in (2 * epoch, 2 * epoch + 1) for v in of.at(step)[1].flatten().tolist()}
        assert views == set(of.epoch_views(epoch)[0].tolist())


def test_the_turns_of_views_are_shuffled() -> None:
    of = plan(views=tuple(range(1, 9)))
    cycles = {tuple(int(of.epoch_views(8 * cycle + e)[0][0]) for e in range(8)) for cycle in range(6)}
    assert len(cycles) == 6


@given(st.integers(0, 99), st.integers(1, 4))
def test_same_means_the_student_sees_the_very_view_whose_feature_it_gets(seed: int, views_per_step: int) -> None:
    assert all(v == t and v in VIEWS for _, v, t in pairs(plan(seed=seed, views_per_step=views_per_step), range(30)))


@given(st.integers(0, 99), st.integers(1, 4))
def test_fresh_means_a_new_view_each_time_beside_a_stored_feature(seed: int, views_per_step: int) -> None:
    seen = pairs(plan(seed=seed, views_per_step=views_per_step, pairing="fresh"), range(40))
    assert all(FRESH <= v < 2**32 and t in VIEWS for _, v, t in seen)
    assert len({(i, v) for i, v, _ in seen}) == len(seen), "a fresh view was shown twice"


def test_the_released_cached_setting_is_fresh_pairs_of_the_plain_view() -> None:
    seen = pairs(plan(views=(0,), pairing="fresh"), range(40))
    assert {t for _, _, t in seen} == {0}
    assert len({(i, v) for i, v, _ in seen}) == len(seen)


@given(st.integers(0, 99), st.integers(1, 4))
def test_cross_means_two_different_stored_views(seed: int, views_per_step: int) -> None:
    seen = pairs(plan(seed=seed, views_per_step=views_per_step, pairing="cross"), range(30))
    assert all(v != t and v in VIEWS and t in VIEWS for _, v, t in seen)


def test_cross_pairs_every_view_with_every_other_in_time() -> None:
    seen = {(v, t) for _, v, t in pairs(plan(pairing="cross", batch=10), range(200))}
    assert seen == {(v, t) for v in VIEWS for t in VIEWS if v != t}


@pytest.mark.parametrize(
    ("pairing", "views", "views_per_step", "need"),
    [("same", (1, 2), 3, 3), ("fresh", (0,), 2, 2), ("cross", (1,), 1, 2), ("cross", (1, 2), 3, 3)],
)
def test_too_few_views_are_refused_with_what_would_do(
    pairing: str, views: tuple[int, ...], views_per_step: int, need: int
) -> None:
    words = (
        f"{len(views)} views? .* --pairing {pairing} with --views-per-step {views_per_step} needs {need}; .* --views"
    )
    with pytest.raises(UserError, match=words):
        plan(pairing=pairing, views=views, views_per_step=views_per_step)


def test_an_unknown_pairing_is_refused() -> None:
    with pytest.raises(UserError, match="--pairing is twin, but must be one of same, fresh, cross"):
        plan(pairing="twin")


# ---------------------------------------------------------------- features

N, V, D = 23, 6, 5


def store_of(folder: Path, kind: str) -> FeatureStore:
    """N images in V views of random features, in shards of 8 rows."""
    identity = {"data": {"images": N}, "arrays": {"embedding": [D]}, "shard_rows": 8, "codec": kind}
    tables = {"sample_id": [f"{i}" for i in range(N)], "label": [0] * N, "view_key": range(N)}
    store = FeatureStore.create(Folder(folder), identity, {"views": V}, tables)
    features = np.random.default_rng(0).normal(size=(N, V, D)).astype(np.float32)
    for shard in store.pending():
        n = shard.stop - shard.start
        part = build_codec(kind).encode(features[shard.start : shard.stop])
        store.write(shard, {"embedding": part}, np.zeros(n, np.uint8), np.zeros(n, np.uint64), {})
    return FeatureStore(Folder(folder))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return store_of(tmp_path_factory.mktemp("store"), "int8")


@pytest.mark.parametrize("kind", CODECS)
def test_features_are_what_the_store_reads_for_any_mix_of_rows_and_views(kind: str, tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", kind)
    whole = np.stack([store.read("embedding", v) for v in range(V)], 1)  # (N, V, D)
    rng = np.random.default_rng(1)
    rows, views = rng.integers(0, N, 50), rng.integers(0, V, 50)
    got = TeacherFeatures(store).rows(rows, views)
    assert got.dtype == np.float32
    assert np.array_equal(got, whole[rows, views])


def test_features_of_nothing_are_none_but_have_a_width(store: FeatureStore) -> None:
    assert TeacherFeatures(store).rows(np.empty(0, int), np.empty(0, int)).shape == (0, D)


def ask(features: TeacherFeatures, *views: int) -> None:
    features.rows(np.arange(len(views)), np.array(views))


@pytest.fixture
def reads(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The views that were read from the disk, in order."""
    log: list[int] = []
    stored: Callable[..., Any] = store.stored
    monkeypatch.setattr(store, "stored", lambda name, view: (log.append(view), stored(name, view))[1])
    return log


def test_a_view_is_read_once_while_there_is_room(store: FeatureStore, reads: list[int]) -> None:
    features = TeacherFeatures(store)
    for _ in range(3):
        for view in range(V):
            ask(features, view, view)
    assert reads == [0, 1, 2, 3, 4, 5]


def test_beyond_the_limit_the_view_not_asked_for_longest_goes(store: FeatureStore, reads: list[int]) -> None:
    features = TeacherFeatures(store, limit=3 * N * (D + 4), least=1)  # int8 and its scales: three views
    for view in (0, 1, 2, 0, 3):
        ask(features, view)
    assert reads == [0, 1, 2, 3]
    ask(features, 0)
    ask(features, 1)
    assert reads == [0, 1, 2, 3, 1], "1 had to make room for 3, 0 had not"
    assert len(features._held) == 3


def test_the_views_of_one_step_stay_however_small_the_limit(store: FeatureStore, reads: list[int]) -> None:
    features = TeacherFeatures(store, limit=1, least=2)
    for _ in range(3):
        ask(features, 4, 5)
    assert reads == [4, 5]
    ask(features, 1)
    assert len(features._held) == 2
