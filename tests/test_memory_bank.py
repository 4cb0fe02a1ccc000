"""MemoryBank: a ring buffer whose slots are one (i, v) in all columns; only what the store lacks is saved."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_ssl.pipeline.methods.base import MethodContext, bank_size, initial_rows
from compress_ssl.pipeline.methods.memory_bank import MemoryBank
from compress_ssl.pipeline.models.precision import l2_normalize
from compress_ssl.pipeline.runtime.errors import UserError


def feature(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    """Features of an artificial store, a formula of (i, v): (n,) rows and views -> (n, 3)."""
    return torch.stack([torch.sin(rows + 1.0), torch.cos(views + 2.0 * rows), 1.0 + views], 1).float()


def build_bank(size: int, seed: int = 0) -> MemoryBank:
    return MemoryBank(size, {"teacher": 3, "student": 2}, reread={"teacher": "embedding"}, seed=seed)


def push(into: MemoryBank, rows: list[int], view: int) -> None:
    i, v = torch.tensor(rows), torch.full((len(rows),), view)
    student = l2_normalize(torch.stack([i + 1.0, v + 1.0], 1))
    into.push(i, v, {"teacher": l2_normalize(feature(i, v)), "student": student})


def content(of: MemoryBank) -> set[tuple[float, ...]]:
    columns = [of.rows[: of.filled, None], of.views[: of.filled, None], of["teacher"], of["student"]]
    return {tuple(row) for row in torch.cat([column.double() for column in columns], 1).tolist()}


# ---------------------------------------------------------------- the ring buffer


@given(st.integers(1, 11), st.lists(st.integers(1, 7), max_size=12))
def test_it_holds_the_latest_pushes_whether_or_not_the_batch_divides_its_size(size: int, batches: list[int]) -> None:
    ring, queue = build_bank(size), deque[tuple[int, int]](maxlen=size)
    number = 0
    for view, n in enumerate(batches):
        rows = list(range(number, number + n))
        number += n
        push(ring, rows, view)
        queue.extend((i, view) for i in rows)
        assert ring.filled == len(queue) == len(ring["teacher"]) == len(ring["student"])
        rows_held, views_held = ring.rows[: ring.filled].tolist(), ring.views[: ring.filled].tolist()
        assert sorted(zip(rows_held, views_held, strict=True)) == sorted(queue)


@given(st.integers(1, 11), st.lists(st.integers(1, 7), max_size=12))
def test_a_slot_is_the_same_image_and_view_in_every_column(size: int, batches: list[int]) -> None:
    ring = build_bank(size)
    for view, n in enumerate(batches):
        push(ring, list(range(10 * view, 10 * view + n)), view)
    rows, views = ring.rows[: ring.filled], ring.views[: ring.filled]
    assert torch.equal(ring["teacher"], l2_normalize(feature(rows, views)))
    assert torch.equal(ring["student"], l2_normalize(torch.stack([rows + 1.0, views + 1.0], 1)))


def test_a_push_overwrites_the_oldest_slots_and_nothing_else() -> None:
    ring = build_bank(5)
    push(ring, [0, 1, 2], 0)
    push(ring, [3, 4, 5], 1)
    assert ring.rows.tolist() == [5, 1, 2, 3, 4]
    assert (ring.pointer, ring.filled) == (1, 5)


def test_anchors_are_a_view_of_the_bank_not_a_copy() -> None:
    ring = build_bank(4)
    push(ring, [0, 1, 2, 3], 0)
    assert ring["teacher"].data_ptr() == ring.column_teacher.data_ptr()


# ---------------------------------------------------------------- starts


def test_a_random_start_has_expected_norm_one_and_is_a_function_of_the_seed() -> None:
    wide = MemoryBank(2000, {"teacher": 512, "student": 64}, seed=3)
    wide.start("random")
    assert (wide.filled, wide.rows.unique().tolist()) == (2000, [-1])
    for name, width in (("teacher", 512), ("student", 64)):
        norms = wide[name].norm(dim=1)
        assert float(norms.mean()) == pytest.approx(1.0, abs=0.01), "U(-s, s), s = sqrt(3 / d)"
        assert float(wide[name].abs().max()) <= (3 / width) ** 0.5
    again, other = (MemoryBank(2000, {"teacher": 512, "student": 64}, seed=seed) for seed in (3, 4))
    assert torch.equal(again.column_teacher, wide.column_teacher)
    assert not torch.equal(other.column_teacher, wide.column_teacher)


def test_an_empty_start_has_no_anchors() -> None:
    ring = build_bank(5)
    ring.start("empty")
    ring.refill(feature)
    assert (len(ring["teacher"]), len(ring["student"])) == (0, 0)


def test_a_start_from_the_store_holds_the_features_of_the_given_rows_and_view() -> None:
    ring = MemoryBank(4, {"teacher": 3}, reread={"teacher": "embedding"})
    rows = torch.tensor([9, 2, 7, 4])
    ring.start("store", rows, view=5)
    ring.refill(feature)
    assert ring.filled == 4
    assert torch.equal(ring["teacher"], l2_normalize(feature(rows, torch.full((4,), 5))))


# ---------------------------------------------------------------- saved state


@pytest.mark.parametrize("start", ["empty", "random"])
@given(st.lists(st.integers(1, 7), max_size=6))
def test_a_saved_restored_and_refilled_bank_is_equal_bit_for_bit(start: str, batches: list[int]) -> None:
    ring, again = build_bank(9), build_bank(9)
    ring.start(start)
    again.start(start)
    for view, n in enumerate(batches):
        push(ring, list(range(10 * view, 10 * view + n)), view)
    again.load_state_dict(ring.state_dict())
    again.refill(feature)
    for name, tensor in ring.named_buffers():
        assert torch.equal(tensor, dict(again.named_buffers())[name]), name
    assert (again.pointer, again.filled) == (ring.pointer, ring.filled)
    for each in (ring, again):
        push(each, [77, 78], 7)
    assert content(again) == content(ring)


@given(st.integers(1, 3), st.integers(1, 700), st.integers(0, 99))
def test_normalised_rows_are_equal_bit_for_bit_whatever_the_block_size(block: int, width: int, seed: int) -> None:
    x = torch.randn(17, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.cat([l2_normalize(part) for part in x.split(block)]), l2_normalize(x))


def test_the_state_has_the_rows_and_views_of_slots_but_no_column_of_the_store() -> None:
    ring = build_bank(4)
    push(ring, [3, 1], 2)
    state = ring.state_dict()
    assert set(state) == {"rows", "views", "column_student", "_extra_state"}
    assert state["_extra_state"] == {"pointer": 2, "filled": 2}
    assert state["rows"].tolist() == [3, 1, -1, -1]


def test_refill_reads_a_bank_in_blocks() -> None:
    ring, asked = MemoryBank(10, {"teacher": 3}, reread={"teacher": "embedding"}), []
    ring.start("store", torch.arange(10))

    def read(rows: Tensor, views: Tensor, array: str) -> Tensor:
        asked.append(len(rows))
        return feature(rows, views)

    ring.refill(read, block=4)
    assert asked == [4, 4, 2]
    assert torch.equal(ring["teacher"], l2_normalize(feature(torch.arange(10), torch.zeros(10))))


# ---------------------------------------------------------------- its size and first rows


def make_context(images: int, seed: int = 0) -> MethodContext:
    return MethodContext([], {"embedding": (3,)}, np.arange(5, 5 + images), 1, seed)


def test_its_size_is_the_published_one_if_there_are_enough_images() -> None:
    large = make_context(300)
    assert bank_size(None, 128, large) == 128
    assert not large.notes


def test_in_a_small_data_set_its_size_is_half_the_images_and_a_note_tells_so() -> None:
    small = make_context(200)
    assert bank_size(None, 128, small) == 100
    assert small.notes == ["bank of 100 anchors instead of the published 128: half of 200 images"]


def test_any_size_up_to_the_number_of_images_can_be_asked() -> None:
    small = make_context(200)
    assert [bank_size(n, 128, small) for n in (1, 150, 200)] == [1, 150, 200]
    assert not small.notes


@pytest.mark.parametrize("asked", [201, 0, -1])
def test_a_size_out_of_range_is_refused_with_one_that_fits(asked: int) -> None:
    with pytest.raises(UserError, match=f"bank={asked} .* from 1 to the 200 usable images; take bank=100"):
        bank_size(asked, 128, make_context(200))


def test_initial_rows_are_distinct_usable_ones_and_a_function_of_the_seed() -> None:
    rows = initial_rows(make_context(200, seed=1), 150)
    assert len(rows.unique()) == 150
    assert 5 <= int(rows.min()) <= int(rows.max()) < 205
    assert torch.equal(rows, initial_rows(make_context(200, seed=1), 150))
    assert not torch.equal(rows, initial_rows(make_context(200, seed=2), 150))
