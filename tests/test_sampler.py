"""The images and views of each step, and the teacher features that it reads."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.benchmarks.store_records import plain_record
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.codecs import CODECS, build_codec
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.sampler import PAIRINGS, StepSampler
from compress_ssl.pipeline.training.teacher_features import TeacherFeatures
from compress_ssl.pipeline.views.groups import FRESH

ROWS = np.array([0, 1, 2, 4, 5, 7, 8, 11, 12, 13])  # usable images; 3, 6, 9 and 10 are bad
VIEWS = (1, 2, 3, 4, 5)


def make_sampler(**changes: Any) -> StepSampler:
    default = {
        "seed": 3, "rows": ROWS, "views": VIEWS, "batch": 4, "views_per_step": 1, "pairing": "same", "steps": 100
    }  # fmt: skip
    return StepSampler(**{**default, **changes})


def triples(sampler: StepSampler, steps: range) -> list[tuple[int, int, int]]:
    """[(i, v_student, v_teacher), ...] of some steps."""
    out = []
    for step in steps:
        rows, student, teacher = sampler.step_indices(step)
        assert rows.shape == (sampler.batch,)
        assert student.shape == teacher.shape == (sampler.batch, sampler.views_per_step)
        assert {rows.dtype, student.dtype, teacher.dtype} == {np.dtype(np.int64)}
        for i, vs, ts in zip(rows.tolist(), student.tolist(), teacher.tolist(), strict=True):
            out += [(i, v, t) for v, t in zip(vs, ts, strict=True)]
    return out


# ---------------------------------------------------------------- images


@given(st.integers(1, 10), st.integers(0, 2**64 - 1))
def test_every_usable_image_comes_once_per_epoch_for_any_batch_size(batch: int, seed: int) -> None:
    seen = [i for i, _, _ in triples(make_sampler(batch=batch, seed=seed), range(3 * len(ROWS)))]
    for epoch in range(len(seen) // len(ROWS)):
        assert sorted(seen[epoch * len(ROWS) : (epoch + 1) * len(ROWS)]) == ROWS.tolist()


def test_every_batch_is_full_and_continues_into_the_next_epoch() -> None:
    rows, student, _ = make_sampler(batch=4).step_indices(2)  # positions 8 to 11 of epochs of ten images
    before = [i for step in (0, 1) for i in make_sampler(batch=4).step_indices(step)[0].tolist()]
    assert sorted([*before, *rows[:2].tolist()]) == ROWS.tolist()
    assert student[0] == student[1] and student[2] == student[3]
    assert student[1] != student[2], "the second half belongs to another epoch, so to another view"


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.sampled_from(PAIRINGS), st.integers(1, 3))
def test_a_step_is_a_function_of_seed_and_step_only(steps: list[int], pairing: str, per_step: int) -> None:
    used = make_sampler(pairing=pairing, views_per_step=per_step)
    for step in steps:
        fresh = make_sampler(pairing=pairing, views_per_step=per_step, steps=7, first=step)
        for one, other in zip(used.step_indices(step), fresh.step_indices(step), strict=True):
            assert np.array_equal(one, other)


def test_another_seed_gives_another_order_and_other_views() -> None:
    one, other = (triples(make_sampler(seed=seed), range(25)) for seed in (3, 4))
    assert [i for i, _, _ in one] != [i for i, _, _ in other]
    assert [v for _, v, _ in one] != [v for _, v, _ in other]
    assert one == triples(make_sampler(seed=3), range(25))


def test_epochs_differ_in_their_order() -> None:
    orders = {tuple(make_sampler(batch=10).step_indices(epoch)[0].tolist()) for epoch in range(20)}
    assert len(orders) == 20


def test_as_a_sequence_of_requests_it_runs_from_its_first_step_to_the_last() -> None:
    whole = make_sampler(steps=9, first=6, pairing="fresh")
    assert len(whole) == 3
    for number in range(3):
        rows, student, _ = whole.step_indices(6 + number)
        assert np.array_equal(whole[number].rows, rows)
        assert np.array_equal(whole[number].views["global"], student)


# ---------------------------------------------------------------- views


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 999), st.integers(0, 4))
def test_over_as_many_epochs_as_there_are_views_every_view_is_used_equally(
    count: int, per_step: int, seed: int, cycle: int
) -> None:
    if per_step > count:
        return
    sampler = make_sampler(views=tuple(range(1, count + 1)), views_per_step=per_step, seed=seed)
    epochs = [sampler.epoch_views(epoch)[0].tolist() for epoch in range(cycle * count, (cycle + 1) * count)]
    assert Counter(v for views in epochs for v in views) == dict.fromkeys(range(1, count + 1), per_step)
    assert all(len(set(views)) == per_step for views in epochs), "a view was used twice in one step"


@given(st.integers(1, 4), st.integers(0, 99))
def test_within_an_epoch_all_images_use_the_same_stored_views(per_step: int, seed: int) -> None:
    sampler = make_sampler(views_per_step=per_step, batch=5, seed=seed)
    for epoch in range(4):
        views = {v for step in (2 * epoch, 2 * epoch + 1) for v in sampler.step_indices(step)[1].flatten().tolist()}
        assert views == set(sampler.epoch_views(epoch)[0].tolist())


def test_the_order_of_views_differs_between_cycles() -> None:
    sampler = make_sampler(views=tuple(range(1, 9)))
    cycles = {tuple(int(sampler.epoch_views(8 * cycle + e)[0][0]) for e in range(8)) for cycle in range(6)}
    assert len(cycles) == 6


@given(st.integers(0, 99), st.integers(1, 4))
def test_same_pairs_the_student_with_the_teachers_feature_of_the_same_view(seed: int, per_step: int) -> None:
    assert all(
        v == t and v in VIEWS for _, v, t in triples(make_sampler(seed=seed, views_per_step=per_step), range(30))
    )


@given(st.integers(0, 99), st.integers(1, 4))
def test_fresh_shows_the_student_a_new_view_each_time_and_reads_a_stored_feature(seed: int, per_step: int) -> None:
    seen = triples(make_sampler(seed=seed, views_per_step=per_step, pairing="fresh"), range(40))
    assert all(FRESH <= v < 2**32 and t in VIEWS for _, v, t in seen)
    assert len({(i, v) for i, v, _ in seen}) == len(seen), "a fresh view was shown twice"


def test_fresh_with_view_0_alone_is_the_cached_teacher_setting_of_the_published_code() -> None:
    seen = triples(make_sampler(views=(0,), pairing="fresh"), range(40))
    assert {t for _, _, t in seen} == {0}
    assert len({(i, v) for i, v, _ in seen}) == len(seen)


@given(st.integers(0, 99), st.integers(1, 4))
def test_cross_pairs_two_different_stored_views(seed: int, per_step: int) -> None:
    seen = triples(make_sampler(seed=seed, views_per_step=per_step, pairing="cross"), range(30))
    assert all(v != t and v in VIEWS and t in VIEWS for _, v, t in seen)


def test_cross_eventually_pairs_every_view_with_every_other() -> None:
    seen = {(v, t) for _, v, t in triples(make_sampler(pairing="cross", batch=10), range(200))}
    assert seen == {(v, t) for v in VIEWS for t in VIEWS if v != t}


@pytest.mark.parametrize(
    ("pairing", "views", "per_step", "need"),
    [("same", (1, 2), 3, 3), ("fresh", (0,), 2, 2), ("cross", (1,), 1, 2), ("cross", (1, 2), 3, 3)],
)
def test_too_few_views_are_refused_with_the_number_that_is_needed(
    pairing: str, views: tuple[int, ...], per_step: int, need: int
) -> None:
    words = f"{len(views)} views? .* --pairing {pairing} with --views-per-step {per_step} needs {need}; .* --views"
    with pytest.raises(UserError, match=words):
        make_sampler(pairing=pairing, views=views, views_per_step=per_step)


def test_an_unknown_pairing_is_refused() -> None:
    with pytest.raises(UserError, match="--pairing is twin, but must be one of same, fresh, cross"):
        make_sampler(pairing="twin")


# ---------------------------------------------------------------- features

N, V, D = 23, 6, 5


def write_store(folder: Path, kind: str) -> FeatureStore:
    """A store of random features of N images in V views, in shards of 8 rows."""
    tables = {"sample_id": [f"{i}" for i in range(N)], "label": [0] * N, "view_key": range(N)}
    store = FeatureStore.create(Folder(folder), plain_record(N, V, D, kind, rows=8), tables)
    features = np.random.default_rng(0).normal(size=(N, V, D)).astype(np.float32)
    for shard in store.pending():
        n = shard.stop - shard.start
        part = build_codec(kind).encode(features[shard.start : shard.stop])
        store.write(shard, {"embedding": part}, np.zeros(n, np.uint8), np.zeros(n, np.uint64), {})
    return FeatureStore(Folder(folder))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store"), "int8")


@pytest.mark.parametrize("kind", CODECS)
def test_cached_features_equal_those_of_the_store_for_any_mix_of_images_and_views(kind: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", kind)
    whole = np.stack([store.read("embedding", v) for v in range(V)], 1)  # (N, V, D)
    rng = np.random.default_rng(1)
    rows, views = rng.integers(0, N, 50), rng.integers(0, V, 50)
    features = TeacherFeatures(store).read(rows, views)
    assert features.dtype == np.float32
    assert np.array_equal(features, whole[rows, views])


def test_reading_no_rows_returns_an_empty_array_of_the_right_width(store: FeatureStore) -> None:
    assert TeacherFeatures(store).read(np.empty(0, int), np.empty(0, int)).shape == (0, D)


def read_views(features: TeacherFeatures, *views: int) -> None:
    features.read(np.arange(len(views)), np.array(views))


@pytest.fixture
def reads(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The views that are read from the disk, in order."""
    log: list[int] = []
    stored: Callable[..., Any] = store.stored
    monkeypatch.setattr(store, "stored", lambda name, view: (log.append(view), stored(name, view))[1])
    return log


def test_a_view_is_read_once_while_the_cache_is_below_its_limit(store: FeatureStore, reads: list[int]) -> None:
    features = TeacherFeatures(store)
    for _ in range(3):
        for view in range(V):
            read_views(features, view, view)
    assert reads == [0, 1, 2, 3, 4, 5]


def test_above_the_limit_the_least_recently_used_view_is_dropped(store: FeatureStore, reads: list[int]) -> None:
    features = TeacherFeatures(store, max_bytes=3 * N * (D + 4), min_views=1)  # three views: int8 codes and scales
    for view in (0, 1, 2, 0, 3):
        read_views(features, view)
    assert reads == [0, 1, 2, 3]
    read_views(features, 0)
    read_views(features, 1)
    assert reads == [0, 1, 2, 3, 1], "view 1 was dropped for view 3, view 0 was not"
    assert len(features._cached) == 3


def test_the_views_of_one_step_are_kept_even_above_the_limit(store: FeatureStore, reads: list[int]) -> None:
    features = TeacherFeatures(store, max_bytes=1, min_views=2)
    for _ in range(3):
        read_views(features, 4, 5)
    assert reads == [4, 5]
    read_views(features, 1)
    assert len(features._cached) == 2
