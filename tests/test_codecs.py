"""Each codec keeps its documented error bounds for all features."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.codecs import CODECS, Codec, build_codec

NORMAL = float(np.finfo(np.float32).tiny)


def features(largest: float) -> st.SearchStrategy[np.ndarray]:
    """(..., D) float32, with zero rows, denormals and rows with one value among them."""
    number = st.floats(-largest, largest, width=32)
    return arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=6), elements=number)


@given(features(float(np.finfo(np.float32).max)))
def test_float32_is_exact(x: np.ndarray) -> None:
    stored, scale = build_codec("float32").encode(x)
    assert scale is None and stored.dtype == np.dtype("<f4")
    assert build_codec("float32").decode(stored, None).tobytes() == x.tobytes()


@given(features(65504))
def test_the_relative_error_of_float16_is_at_most_one_in_2048(x: np.ndarray) -> None:
    stored, scale = build_codec("float16").encode(x)
    back = build_codec("float16").decode(stored, None)
    assert scale is None and stored.dtype == np.dtype("<f2") and back.dtype == np.float32
    assert np.all(np.abs(back - x) <= np.maximum(np.abs(x) * 2.0**-11, 2.0**-25))  # below 2**-14: half a step of 2**-24


@given(features(2.0**126))
def test_the_error_of_int8_is_at_most_half_the_scale_of_its_row(x: np.ndarray) -> None:
    stored, scale = build_codec("int8").encode(x)
    assert scale is not None
    assert stored.dtype == np.int8 and scale.dtype == np.dtype("<f4") and scale.shape == x.shape[:-1]
    back = build_codec("int8").decode(stored, scale)
    assert back.dtype == np.float32 and back.shape == x.shape
    largest = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    half = largest / 127 / 2 * (1 + 1e-5)
    normal = (largest / 127 >= NORMAL)[..., 0]
    assert np.all((np.abs(back.astype(np.float64) - x) <= half)[normal])
    assert np.all((np.abs(back.astype(np.float64) - x) <= NORMAL)[~normal])


@given(features(2.0**126))
@example(np.array([190, -190, 3], np.float32) * np.float32(2.0**-149))
def test_int8_keeps_every_sign_and_the_largest_of_a_row(x: np.ndarray) -> None:
    stored, scale = build_codec("int8").encode(x)
    assert scale is not None
    assert stored.min(initial=0) >= -127
    assert np.all((np.sign(stored) == np.sign(x)) | (stored == 0))
    full = scale >= NORMAL
    assert np.all(np.abs(stored.astype(int)).max(-1, initial=0)[full] == 127)


@pytest.mark.parametrize("name", CODECS)
@given(x=features(65504))
def test_decoded_features_encode_to_the_same_codes(name: str, x: np.ndarray) -> None:
    kind = build_codec(name)
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
    back = build_codec(name).decode(*build_codec(name).encode(x))
    assert not back[[0, 2]].any() and back[1].any() and np.isfinite(back).all()


@pytest.mark.parametrize("name", CODECS)
def test_the_encoding_of_a_row_does_not_depend_on_other_rows(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 4, 8)).astype(np.float32) * 10.0 ** np.arange(-3, 3)[:, None, None]
    x = x.astype(np.float32)
    stored, scale = build_codec(name).encode(x)
    for i, v in np.ndindex(6, 4):
        alone, its = build_codec(name).encode(x[i, v])
        assert np.array_equal(stored[i, v], alone)
        assert scale is None or scale[i, v] == its


@pytest.mark.parametrize("name", CODECS)
def test_decoded_features_keep_their_direction(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(200, 256)).astype(np.float32)
    back = build_codec(name).decode(*build_codec(name).encode(x))
    cosine = (x * back).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(back, axis=1)
    assert cosine.min() > 0.9998


def test_the_limit_of_a_codec_is_the_largest_magnitude_that_decodes_to_a_finite_value() -> None:
    for name in CODECS:
        kind = build_codec(name)
        largest = np.float32(min(kind.limit, 1e38))
        assert np.isfinite(kind.decode(*kind.encode(np.array([[largest, -largest, 1]], np.float32)))).all()
    assert build_codec("float16").limit == np.finfo(np.float16).max


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown codec 'int4'. Known: int8, float16, float32, pq:BYTES, each also"):
        build_codec("int4")
    for wrong in ("pq", "pq:0", "pq:x", ""):
        with pytest.raises(UserError, match="unknown codec"):
            build_codec(wrong)
    with pytest.raises(UserError, match="unknown compression 'lz4' of --codec int8.lz4. Known: zstd"):
        build_codec("int8+lz4")


def test_golden_bytes() -> None:
    x = np.array([[1, -2, 0.3, 100]], np.float32)
    stored, scale = build_codec("int8").encode(x)
    assert scale is not None
    assert (stored.tobytes().hex(), scale.tobytes().hex()) == ("01fd007f", "2693493f")
    assert build_codec("float16").encode(x)[0].tobytes().hex() == "003c00c0cd344056"
    assert build_codec("float32").encode(x)[0].tobytes().hex() == "0000803f000000c09a99993e0000c842"


# ---------------------------------------------------------------- product quantisation


def clustered(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    """(n, d) float32 with lengths from 0.1 to 10: a few directions plus noise and a mean, like a teacher's features."""
    random = np.random.default_rng(seed)
    centre = np.random.default_rng(1).normal(size=(8, d))[random.integers(8, size=n)]
    x = 1 + centre + random.normal(size=(n, d)) * np.linspace(0.05, 1, d)
    return (x * 10 ** random.uniform(-1, 1, (n, 1))).astype(np.float32)


def trained(parts: int, sample: np.ndarray) -> Codec:
    codebook = build_codec(f"pq:{parts}").train(sample)
    return build_codec(f"pq:{parts}", lambda: codebook)


@pytest.fixture(scope="module")
def quantiser() -> Codec:
    """A quantiser with 12 bytes for 24 numbers, in parts of 2."""
    return trained(12, clustered(3000))


def test_product_quantisation_chooses_the_nearest_centroid_of_every_part(quantiser: Codec) -> None:
    x = clustered(70, seed=2)
    codes, scale = quantiser.encode(x)
    codebook = safetensors.numpy.load(quantiser._load_codebook())  # type: ignore[attr-defined]
    assert codes.dtype == np.uint8 and codes.shape == (70, 12) and scale is not None and scale.dtype == np.dtype("<f4")
    for i in range(70):  # as in the paper: one row and one part at a time, in float64
        turned = codebook["rotation"].astype(float) @ (
            x[i].astype(float) / np.linalg.norm(x[i].astype(float)) - codebook["mean"]
        )
        chosen = []
        for part in range(12):
            distance = np.square(codebook["centroids"][part] - turned[2 * part : 2 * part + 2]).sum(1)
            assert distance[codes[i, part]] <= distance.min() + 1e-6
            chosen.append(codebook["centroids"][part][codes[i, part]])
        direction = np.concatenate(chosen) @ codebook["rotation"] + codebook["mean"]
        wanted = direction / np.linalg.norm(direction) * np.linalg.norm(x[i])
        assert np.allclose(quantiser.decode(codes[i], scale[i]), wanted, rtol=1e-4, atol=1e-5 * np.linalg.norm(x[i]))


def test_product_quantisation_keeps_norms_exact_directions_close_and_zeros_zero(quantiser: Codec) -> None:
    x = clustered(500, seed=3)
    x[[0, 7]] = 0
    back = quantiser.decode(*quantiser.encode(x))
    assert np.allclose(np.linalg.norm(back, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    assert not back[[0, 7]].any() and not quantiser.encode(x)[0][[0, 7]].any()
    good = np.linalg.norm(x, axis=1) > 0
    cosine = (x * back).sum(1)[good] / np.square(x).sum(1)[good]
    assert cosine.mean() > 0.97 and cosine.min() > 0.85


def test_more_bytes_per_row_give_a_smaller_error() -> None:
    sample, x = clustered(3000), clustered(300, seed=3)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)

    def error(parts: int) -> float:
        kind = trained(parts, sample)
        return float(np.square(unit - kind.decode(*kind.encode(unit))).sum(1).mean())

    errors = [error(parts) for parts in (2, 6, 24)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] and errors[2] < 0.002


def test_the_rotation_gives_a_smaller_error_than_parts_of_neighbouring_dimensions() -> None:
    import faiss

    mixed = np.linalg.qr(np.random.default_rng(5).normal(size=(24, 24)))[0]
    x = (np.random.default_rng(6).normal(size=(3000, 24)) * 0.7 ** np.arange(24) @ mixed).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kind, plain = trained(6, x), faiss.ProductQuantizer(24, 6, 8)
    plain.train(x)
    ours = np.square(x - kind.decode(*kind.encode(x))).sum(1).mean()
    assert ours < 0.8 * np.square(x - plain.decode(plain.compute_codes(x))).sum(1).mean()


def test_product_codes_of_a_row_do_not_depend_on_other_rows(quantiser: Codec) -> None:
    x = clustered(130, seed=4).reshape(26, 5, 24)
    codes, scale = quantiser.encode(x)
    assert scale is not None and codes.shape == (26, 5, 12) and scale.shape == (26, 5)
    for i, v in np.ndindex(26, 5):
        alone, its = quantiser.encode(x[i, v])
        assert np.array_equal(codes[i, v], alone) and its == scale[i, v]
    decoded = quantiser.decode(codes, scale)
    assert decoded.shape == x.shape
    for i, v in np.ndindex(26, 5):  # a resumed run reads the rows of a bank in other blocks
        assert np.array_equal(decoded[i, v], quantiser.decode(codes[i, v], scale[i, v]))


@pytest.mark.parametrize("kernel", ["Haswell", "Sandybridge"])
def test_product_codes_of_a_row_do_not_depend_on_other_rows_with_any_kernel_of_openblas(kernel: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_codecs as here\n"
    program += "here.test_product_codes_of_a_row_do_not_depend_on_other_rows(here.trained(12, here.clustered(600)))"
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_training_again_gives_the_same_codebook() -> None:
    sample = clustered(700)
    assert build_codec("pq:6").train(sample) == build_codec("pq:6").train(sample.copy())


@pytest.mark.parametrize("n", [1, 5, 255])
def test_a_set_smaller_than_the_codebook_is_reproduced_closely(n: int) -> None:
    x = clustered(n)
    kind = trained(24, x)
    assert np.allclose(kind.decode(*kind.encode(x)), x, rtol=1e-3, atol=1e-3 * np.abs(x).max())


def test_unsuitable_features_for_product_quantisation_are_refused_with_an_explanation() -> None:
    with pytest.raises(
        UserError, match="keeps 64 bytes of a vector that has only 24 numbers; use pq:24 or less, or int8"
    ):
        build_codec("pq:64").shape((24,))
    with pytest.raises(UserError, match="cannot be trained: every sampled feature is zero"):
        build_codec("pq:2").train(np.zeros((9, 24), np.float32))
    with pytest.raises(UserError, match="has no codebook yet"):
        build_codec("pq:2").encode(np.ones((9, 24), np.float32))


@pytest.mark.parametrize(("name", "bytes_"), [("float32", 96), ("float16+zstd", 48), ("int8", 28), ("pq:12", 16)])
def test_a_codec_reports_its_bytes_per_vector(name: str, bytes_: int) -> None:
    assert build_codec(name).size((24,)) == bytes_ and build_codec(name).size((5, 24)) == 5 * bytes_
