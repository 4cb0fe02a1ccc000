"""Each codec gives back what it promises, for any features."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pipeline.artifact import UserError
from pipeline.codecs import CODECS, codec

NORMAL = float(np.finfo(np.float32).tiny)


def features(largest: float) -> st.SearchStrategy[np.ndarray]:
    """(..., D) float32, with zero rows, denormals and rows of one value among them."""
    number = st.floats(-largest, largest, width=32)
    return arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=6), elements=number)


@given(features(float(np.finfo(np.float32).max)))
def test_float32_is_exact(x: np.ndarray) -> None:
    stored, scale = codec("float32").encode(x)
    assert scale is None and stored.dtype == np.dtype("<f4")
    assert codec("float32").decode(stored, None).tobytes() == x.tobytes()


@given(features(65504))
def test_float16_is_off_by_at_most_one_part_in_2048(x: np.ndarray) -> None:
    stored, scale = codec("float16").encode(x)
    back = codec("float16").decode(stored, None)
    assert scale is None and stored.dtype == np.dtype("<f2") and back.dtype == np.float32
    assert np.all(np.abs(back - x) <= np.maximum(np.abs(x) * 2.0**-11, 2.0**-25))  # below 2**-14: half a step of 2**-24


@given(features(2.0**126))
def test_int8_is_off_by_at_most_half_a_step_of_its_row(x: np.ndarray) -> None:
    stored, scale = codec("int8").encode(x)
    assert scale is not None
    assert stored.dtype == np.int8 and scale.dtype == np.dtype("<f4") and scale.shape == x.shape[:-1]
    back = codec("int8").decode(stored, scale)
    assert back.dtype == np.float32 and back.shape == x.shape
    largest = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    half = largest / 127 / 2 * (1 + 1e-5)
    normal = (largest / 127 >= NORMAL)[..., 0]
    assert np.all((np.abs(back.astype(np.float64) - x) <= half)[normal])
    assert np.all((np.abs(back.astype(np.float64) - x) <= NORMAL)[~normal])


@given(features(2.0**126))
@example(np.array([190, -190, 3], np.float32) * np.float32(2.0**-149))
def test_int8_keeps_every_sign_and_the_largest_of_a_row(x: np.ndarray) -> None:
    stored, scale = codec("int8").encode(x)
    assert scale is not None
    assert stored.min(initial=0) >= -127
    assert np.all((np.sign(stored) == np.sign(x)) | (stored == 0))
    full = scale >= NORMAL
    assert np.all(np.abs(stored.astype(int)).max(-1, initial=0)[full] == 127)


@pytest.mark.parametrize("name", CODECS)
@given(x=features(65504))
def test_what_was_decoded_encodes_to_itself(name: str, x: np.ndarray) -> None:
    kind = codec(name)
    x = np.where(np.abs(x).max(-1, keepdims=True, initial=0) < 1000 * NORMAL, np.float32(0), x)
    once = kind.decode(*kind.encode(x))
    twice = kind.decode(*kind.encode(once))
    assert np.allclose(twice, once, rtol=1e-6, atol=0)
    assert np.array_equal(kind.encode(once)[0], kind.encode(x)[0])
    if name != "int8":
        assert np.array_equal(twice, once)


@pytest.mark.parametrize("name", CODECS)
def test_zero_rows_stay_zero(name: str) -> None:
    x = np.zeros((3, 5), np.float32)
    x[1] = [1, -2, 3, 0, 0.5]
    back = codec(name).decode(*codec(name).encode(x))
    assert not back[[0, 2]].any() and back[1].any() and np.isfinite(back).all()


@pytest.mark.parametrize("name", CODECS)
def test_a_row_is_encoded_alone(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 4, 8)).astype(np.float32) * 10.0 ** np.arange(-3, 3)[:, None, None]
    x = x.astype(np.float32)
    stored, scale = codec(name).encode(x)
    for i, v in np.ndindex(6, 4):
        alone, its = codec(name).encode(x[i, v])
        assert np.array_equal(stored[i, v], alone)
        assert scale is None or scale[i, v] == its


@pytest.mark.parametrize("name", CODECS)
def test_directions_survive(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(200, 256)).astype(np.float32)
    back = codec(name).decode(*codec(name).encode(x))
    cosine = (x * back).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(back, axis=1)
    assert cosine.min() > 0.9998


def test_limits_are_the_largest_magnitudes_that_come_back_finite() -> None:
    for name in CODECS:
        kind = codec(name)
        largest = np.float32(min(kind.limit, 1e38))
        assert np.isfinite(kind.decode(*kind.encode(np.array([[largest, -largest, 1]], np.float32)))).all()
    assert codec("float16").limit == np.finfo(np.float16).max


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown codec 'int4'. Known: int8, float16, float32"):
        codec("int4")


def test_golden_bytes() -> None:
    x = np.array([[1, -2, 0.3, 100]], np.float32)
    stored, scale = codec("int8").encode(x)
    assert scale is not None
    assert (stored.tobytes().hex(), scale.tobytes().hex()) == ("01fd007f", "2693493f")
    assert codec("float16").encode(x)[0].tobytes().hex() == "003c00c0cd344056"
    assert codec("float32").encode(x)[0].tobytes().hex() == "0000803f000000c09a99993e0000c842"
