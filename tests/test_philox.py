"""Philox4x32-10 gives the published bits, and values derived from them are the same on every machine."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.philox import ORDER, VIEW, permutation, uniform, words
from compress_ssl.pipeline.views import groups

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 4, figure 4, with Python's integers: each round as drawn in the figure."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


@pytest.mark.parametrize(
    ("counter", "key", "bits"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, bits: str) -> None:
    c = np.array([int(w, 16) for w in counter.split()], np.uint64)
    k0, k1 = (int(w, 16) for w in key.split())
    assert " ".join(f"{w:08x}" for w in philox.philox(c, (k0, k1)).tolist()) == bits
    assert " ".join(f"{w:08x}" for w in slow_philox(c.tolist(), [k0, k1])) == bits


@given(st.lists(st.lists(U32, min_size=4, max_size=4), min_size=1, max_size=5), U32, U32)
def test_an_array_of_counters_gives_the_words_of_each_counter(counters: list[list[int]], k0: int, k1: int) -> None:
    together = philox.philox(np.array(counters, np.uint64), (k0, k1))
    assert together.tolist() == [slow_philox(counter, [k0, k1]) for counter in counters]


@given(U64, st.integers(0, 5), U64, U32, st.integers(1, 40))
def test_words_are_philox_of_the_documented_counter(seed: int, stream: int, a: int, b: int, count: int) -> None:
    key = [seed % 2**32, seed >> 32]
    blocks = [slow_philox([a % 2**32, a >> 32, b, stream * 2**24 + n], key) for n in range(-(-count // 4))]
    assert words(seed, stream, a, b, count).tolist() == [w for block in blocks for w in block][:count]


def test_words_of_arrays_equal_the_words_of_their_members() -> None:
    keys, views = np.array([0, 7, 2**63, 2**64 - 1], np.uint64), np.array([[0, 1, 2**31], [5, 6, 2**32 - 1]])
    grid = words(3, VIEW, keys[:, None, None], views, 9)
    assert grid.shape == (4, 2, 3, 9)
    assert grid.dtype == np.uint32
    for j, key in enumerate(keys.tolist()):
        for place in np.ndindex(2, 3):
            assert np.array_equal(grid[(j, *place)], words(3, VIEW, key, int(views[place]), 9))


@given(U64, st.integers(1, 30), st.integers(1, 30))
def test_fewer_words_are_a_prefix_of_more_words(seed: int, few: int, more: int) -> None:
    few, more = sorted((few, more))
    assert np.array_equal(words(seed, VIEW, 1, 2, few), words(seed, VIEW, 1, 2, more)[:few])


def test_each_seed_stream_row_and_number_gives_other_words() -> None:
    base = (1, VIEW, 2, 3)
    others = [(2, VIEW, 2, 3), (1 + 2**32, VIEW, 2, 3), (1, ORDER, 2, 3), (1, VIEW, 3, 3), (1, VIEW, 2 + 2**32, 3),
              (1, VIEW, 2, 4), (1, VIEW, 3, 2)]  # fmt: skip
    seen = {tuple(words(*place, 4).tolist()) for place in [base, *others]}
    assert len(seen) == 1 + len(others)


def test_streams_keep_their_numbers() -> None:
    numbers = {"VIEW": 0, "ORDER": 2, "PAIRING": 3, "BANK": 4, "PICK": 5}
    assert {name: getattr(philox, name) for name in numbers} == numbers


def test_the_bit_layout_of_view_numbers_is_fixed() -> None:
    assert (groups.LOCAL, groups.FRESH) == (2**30, 2**31)


def test_uniform_variates_are_words_divided_by_two_to_the_32() -> None:
    w, u = words(5, VIEW, np.arange(1000), 1, 36), uniform(5, VIEW, np.arange(1000), 1, 36)
    assert u.dtype == np.float64
    assert np.array_equal(u * 2.0**32, w)
    assert u.min() >= 0 and u.max() < 1


def test_uniform_variates_are_even_and_uncorrelated() -> None:
    u = uniform(0, VIEW, np.arange(20_000), 1, 4)
    counts = np.array([np.histogram(column, bins=20, range=(0, 1))[0] for column in u.T])
    assert (((counts - 1000) ** 2) / 1000).sum(1).max() < 50  # chi squared, 19 degrees: beyond 50 once in 10 000
    for other in (u[1:], uniform(0, VIEW, np.arange(20_000), 2, 4), uniform(1, VIEW, np.arange(20_000), 1, 4)):
        assert abs(np.corrcoef(u[: len(other), 0], other[:, 0])[0, 1]) < 0.03


# ---------------------------------------------------------------- permutations


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 1797])
def test_a_permutation_contains_each_row_once(n: int) -> None:
    assert sorted(permutation(0, ORDER, 1, n).tolist()) == list(range(n))


def test_a_permutation_is_rows_sorted_by_their_words() -> None:
    def place(i: int) -> tuple[int, ...]:
        return (*words(9, ORDER, i, 4, 2).tolist(), i)

    assert permutation(9, ORDER, 4, 200).tolist() == sorted(range(200), key=place)


def test_another_number_or_seed_is_another_permutation() -> None:
    orders = {tuple(permutation(seed, ORDER, number, 20).tolist()) for seed in range(5) for number in range(5)}
    assert len(orders) == 25


def test_all_permutations_are_about_equally_frequent() -> None:
    seen = [tuple(permutation(0, ORDER, number, 3).tolist()) for number in range(1200)]
    counts = np.unique(np.array(seen) @ [9, 3, 1], return_counts=True)[1]
    assert len(counts) == 6
    assert (((counts - 200) ** 2) / 200).sum() < 21  # chi squared, 5 degrees: beyond 21 once in 1000


# ---------------------------------------------------------------- arithmetic


@given(st.floats(-1, 1))
def test_exp_equals_the_librarys_to_the_last_bits(x: float) -> None:
    assert philox.exp(x) == pytest.approx(math.exp(x), rel=4e-16, abs=0)


# ---------------------------------------------------------------- golden values: stores and runs depend on them


def test_golden_words() -> None:
    assert [f"{w:08x}" for w in words(0, VIEW, 0, 0, 4).tolist()] == "6627e8d5 e169c58d bc57ac4c 9b00dbd8".split()
    assert [f"{w:08x}" for w in words(2**40 + 7, ORDER, 2**33 + 5, 11, 6).tolist()] == GOLDEN_WORDS


def test_golden_permutation() -> None:
    assert permutation(42, ORDER, 3, 12).tolist() == GOLDEN_PERMUTATION


def test_golden_exponentials() -> None:
    assert [philox.exp(x).hex() for x in (-0.2876820724517809, 0.1, 1.0)] == GOLDEN_EXP


GOLDEN_WORDS = "22de8d30 687399de e760dfba 9ae5c231 1bbd561a a3ef0078".split()
GOLDEN_PERMUTATION = [9, 7, 1, 0, 2, 11, 10, 4, 8, 6, 5, 3]
GOLDEN_EXP = ["0x1.8000000000000p-1", "0x1.1aec7b35a00d4p+0", "0x1.5bf0a8b145769p+1"]
