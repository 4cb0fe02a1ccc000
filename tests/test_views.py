"""A view is a pure function of (seed, key, v), follows its augmentation, and shows the same at every size."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.augment import ResolvedView, ViewSpec, crop_box, draw_variates, resolve_view
from compress_ssl.pipeline.views.groups import FRESH
from compress_ssl.pipeline.views.policies import POLICIES
from compress_ssl.pipeline.views.render import BLUR_REFERENCE, render_view, render_views

COUNT = 36
SHAPES = [(1, 1), (1, 900), (900, 1), (2, 3), (333, 500), (500, 333), (64, 64), (37, 1000)]


def spec(policy: str = "crop-flip", seed: int = 0, crop_ratio: float = 0.875) -> ViewSpec:
    return ViewSpec(policy, seed, crop_ratio)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plane(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def many(policy: str, v: int, count: int, height: int = 120, width: int = 160) -> list[ResolvedView]:
    variates = draw_variates(3, np.arange(count), v)
    return [resolve_view(spec(policy), u, v, height, width) for u in variates]


# ---------------------------------------------------------------- drawing


def test_golden_variates() -> None:
    assert [u.hex() for u in draw_variates(0, 0, 1)[[0, 1, 2, 35]].tolist()] == [
        "0x1.088a2bc200000p-1", "0x1.e11add5400000p-1", "0x1.e3380a6000000p-5", "0x1.6a813efe00000p-1",
    ]  # fmt: skip
    assert draw_variates(2**40 + 3, [5, 2**63], [1, FRESH])[:, [0, 20, 23, 35]].tolist() == [
        [0.7971675442531705, 0.3311921425629407, 0.05145073891617358, 0.4107949996832758],
        [0.37671960168518126, 0.6945768950972706, 0.013571292161941528, 0.35067553888075054],
    ]


GOLDEN = {
    ("crop-flip", 1): ResolvedView(top=17, left=111, height=312, width=256),
    ("crop-flip", 2): ResolvedView(top=55, left=235, height=217, width=217, flip=True),
    ("crop-flip", 3): ResolvedView(top=14, left=230, height=131, width=171),
    ("moco-v2", 1): ResolvedView(
        top=0, left=103, height=333, width=274, grey=True, sigma=0.5552108507603407,
        jitter=((0, 0.9494006460532545), (1, 1.1076489258557558), (2, 0.9788981888443231), (3, 0.08002841393463314)),
    ),
    ("moco-v2", 2): ResolvedView(
        top=40, left=207, height=250, width=251, flip=True, sigma=1.7043656625552104,
        jitter=((3, 0.07064911359921097), (2, 0.7549458805471658), (0, 0.9989423640072346), (1, 1.2495417157188058)),
    ),
    ("dino", 1): ResolvedView(
        top=24, left=90, height=304, width=301, grey=True, sigma=0.5552108507603407,
        jitter=((0, 0.9494006460532545), (1, 1.1076489258557558), (2, 0.9894490944221616), (3, 0.08002841393463314)),
    ),
    ("dino", 2): ResolvedView(
        top=17, left=168, height=297, width=298, flip=True,
        jitter=((3, 0.07064911359921097), (2, 0.877472940273583), (0, 0.9989423640072346), (1, 1.2495417157188058)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "v"), GOLDEN)
def test_golden_views_of_every_policy(policy: str, v: int) -> None:
    assert resolve_view(spec(policy, 7), draw_variates(7, 11, v), v, 333, 500) == GOLDEN[policy, v]


def test_a_view_does_not_depend_on_how_many_are_drawn_with_it() -> None:
    keys, views = np.array([4, 2**64 - 1, 9], np.uint64), np.array([0, 1, 5, FRESH + 3])
    together = draw_variates(1, keys[:, None], views)
    assert together.shape == (3, 4, COUNT)
    for j, k in itertools.product(range(3), range(4)):
        assert np.array_equal(together[j, k], draw_variates(1, int(keys[j]), int(views[k])))


def test_another_seed_key_or_view_number_gives_another_view() -> None:
    places = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2), (0, 0, FRESH + 1)]
    assert len({resolve_view(spec(), draw_variates(*place), place[2], 333, 500) for place in places}) == len(places)


@pytest.mark.parametrize("policy", POLICIES)
def test_view_0_is_the_plain_view_in_every_policy(policy: str) -> None:
    assert resolve_view(spec(policy, crop_ratio=0.9), draw_variates(0, 5, 0), 0, 40, 50) == ResolvedView(plain=0.9)


def test_policy_none_has_plain_views_only() -> None:
    assert {resolve_view(spec("none"), draw_variates(0, 5, v), v, 40, 50) for v in range(5)} == {
        ResolvedView(plain=0.875)
    }


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown policy 'mocov2'. Known: crop-flip, moco-v2, dino, none"):
        spec("mocov2")


# ---------------------------------------------------------------- crops


def torchvisions_box(scale: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    return RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), [3 / 4, 4 / 3])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.4, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(333, 500), (61, 97), (400, 60)])
def test_crops_have_the_distribution_of_torchvisions_random_resized_crop(
    scale: tuple[float, float], height: int, width: int
) -> None:
    torch.manual_seed(0)
    count = 2000
    theirs = np.array([torchvisions_box(scale, height, width) for _ in range(count)], float)
    ours = np.array([crop_box(scale, u, height, width) for u in draw_variates(1, np.arange(count), 1).tolist()], float)
    for what in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 3] / b[:, 2],  # shape
        lambda b: b[:, 0] / np.maximum(1, height - b[:, 2]),  # place
        lambda b: b[:, 1] / np.maximum(1, width - b[:, 3]),
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        assert ks_2samp(what(ours), what(theirs), method="asymp").statistic < 0.062  # beyond once in 1000


ANY = st.lists(st.floats(0, 1 - 2**-32), min_size=COUNT, max_size=COUNT)
SIDE = st.one_of(st.integers(1, 5), st.integers(1, 6000))


@given(SIDE, SIDE, ANY, st.sampled_from([(0.08, 1.0), (0.2, 1.0), (0.4, 1.0), (0.05, 0.4)]))
@example(1, 100_000, [0.5] * COUNT, (0.08, 1.0))
@example(100_000, 1, [0.0] * COUNT, (0.08, 1.0))
@example(1, 1, [1 - 2**-32] * COUNT, (0.4, 1.0))
def test_crops_stay_inside_the_image(height: int, width: int, u: list[float], scale: tuple[float, float]) -> None:
    top, left, h, w = crop_box(scale, u, height, width)
    assert top >= 0 and top + h <= height and h >= 1
    assert left >= 0 and left + w <= width and w >= 1


def test_crops_reach_every_border() -> None:
    boxes = np.array([crop_box((0.08, 1.0), u, 20, 30) for u in draw_variates(0, np.arange(2000), 1).tolist()])
    assert boxes[:, 0].min() == 0 and (boxes[:, 0] + boxes[:, 2]).max() == 20
    assert boxes[:, 1].min() == 0 and (boxes[:, 1] + boxes[:, 3]).max() == 30


@pytest.mark.parametrize(("height", "width", "box"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))])
def test_the_fallback_is_the_largest_centred_crop(height: int, width: int, box: tuple[int, ...]) -> None:
    assert crop_box((1.0, 1.0), [0.5] * COUNT, height, width) == box


# ---------------------------------------------------------------- rates and ranges


@pytest.mark.parametrize(
    ("policy", "v", "flip", "jitter", "grey", "blur", "solarize"),
    [
        ("crop-flip", 1, 0.5, 0, 0, 0, 0),  # Koohpayegani et al. 2020
        ("moco-v2", 1, 0.5, 0.8, 0.2, 0.5, 0),  # Chen et al. 2020
        ("moco-v2", 2, 0.5, 0.8, 0.2, 0.5, 0),
        ("dino", 1, 0.5, 0.8, 0.2, 1.0, 0),  # Caron et al. 2021
        ("dino", 2, 0.5, 0.8, 0.2, 0.1, 0.2),
        ("dino", 3, 0.5, 0.8, 0.2, 1.0, 0),
        ("dino", 4, 0.5, 0.8, 0.2, 0.1, 0.2),
    ],
)
def test_each_colour_change_has_its_published_probability(
    policy: str, v: int, flip: float, jitter: float, grey: float, blur: float, solarize: float
) -> None:
    views = many(policy, v, 4000)
    seen = np.mean([[w.flip, bool(w.jitter), w.grey, w.sigma > 0, w.solarize] for w in views], axis=0)
    for rate, wanted in zip(seen, (flip, jitter, grey, blur, solarize), strict=True):
        if wanted in (0, 1):
            assert rate == wanted
        else:
            assert rate == pytest.approx(wanted, abs=0.03)  # 0.03 is 3.8 standard deviations of a fair coin


def test_flip_crop_and_colours_are_independent() -> None:
    views = many("moco-v2", 1, 4000)
    table = np.array([(w.flip, bool(w.jitter), w.grey, w.sigma > 0, w.top, w.width) for w in views], float)
    assert np.abs(np.corrcoef(table.T)[:4, :4] - np.eye(4)).max() < 0.06
    assert np.abs(np.corrcoef(table.T)[:4, 4:]).max() < 0.06


@pytest.mark.parametrize(("policy", "reach"), [("moco-v2", (0.4, 0.4, 0.4, 0.1)), ("dino", (0.4, 0.4, 0.2, 0.1))])
def test_jitter_factors_fill_their_ranges(policy: str, reach: tuple[float, ...]) -> None:
    factors: list[list[float]] = [[], [], [], []]
    for which, factor in itertools.chain.from_iterable(w.jitter for w in many(policy, 1, 3000)):
        factors[which].append(factor)
    for which, centre in enumerate((1, 1, 1, 0)):
        seen = np.array(factors[which])
        assert centre - reach[which] <= seen.min() < centre - 0.99 * reach[which]
        assert centre + 0.99 * reach[which] < seen.max() <= centre + reach[which]
        assert seen.mean() == pytest.approx(centre, abs=0.05 * reach[which])


def test_all_24_orders_of_the_jitters_are_equally_frequent() -> None:
    orders = [tuple(which for which, _ in w.jitter) for w in many("moco-v2", 1, 6000) if w.jitter]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    expected = len(orders) / 24
    assert sum(counts) == len(orders)
    assert sum((n - expected) ** 2 / expected for n in counts) < 50  # chi squared, 23 degrees: beyond 50 once in 1000


def test_blur_sigmas_fill_their_range() -> None:
    seen = np.array([w.sigma for w in many("dino", 1, 3000)])
    assert 0.1 <= seen.min() < 0.12 and 1.98 < seen.max() <= 2.0
    assert seen.mean() == pytest.approx(1.05, abs=0.05)


# ---------------------------------------------------------------- the plain view


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875, 224 / 256, 0.9, 0.95, 224 / 232])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (333, 500), (500, 333), (37, 71), (20, 300), (8, 8)])
def test_view_0_equals_resize_and_centre_crop_of_torchvision(crop_ratio: float, height: int, width: int) -> None:
    image = plane(noise(height, width))
    for size, how in ((32, "bilinear"), (33, "bicubic")):
        resize = math.floor(size / crop_ratio + 1e-6)
        theirs = v2.Compose([v2.Resize(resize, InterpolationMode(how), antialias=True), v2.CenterCrop(size)])
        assert torch.equal(render_view(image, ResolvedView(plain=crop_ratio), size, how), theirs(image))


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 0.9), (224, 0.95), (260, 0.89), (384, 1.0)])
def test_view_0_has_the_geometry_of_timms_evaluation_transform(size: int, crop_pct: float) -> None:
    import timm.data

    theirs = timm.data.create_transform((3, size, size), crop_pct=crop_pct, interpolation="bilinear").transforms
    side = theirs[0].size if isinstance(theirs[0].size, int) else theirs[0].size[0]
    ramp = torch.arange(400.0).expand(3, 300, 400) * 0.6
    seen = render_view(ramp.to(torch.uint8), ResolvedView(plain=crop_pct), size, "bilinear")
    wanted = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(size)])(ramp.to(torch.uint8))
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize(("height", "width"), [(1, 20_000), (20_000, 1), (3, 9_000)])
def test_view_0_of_a_long_strip_shows_its_middle_and_needs_little_memory(height: int, width: int) -> None:
    ramp = np.linspace(0, 255, max(height, width)).astype(np.uint8).reshape(height if width == 1 else 1, -1, 1)
    image = plane(np.broadcast_to(ramp, (height, width, 3)).copy())
    seen = render_view(image, ResolvedView(plain=0.875), 64, "bilinear")
    assert seen.shape == (3, 64, 64)
    assert seen.float().sub(127).abs().max() <= 2


# ---------------------------------------------------------------- random views as pixels


@pytest.mark.parametrize("size", [1, 2, 16, 33])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_image_renders_at_any_size(policy: str, size: int) -> None:
    for height, width in SHAPES:
        (seen,) = render_views(
            noise(height, width), spec(policy), draw_variates(0, 1, range(4)), range(4), [(size, "bilinear")]
        )
        assert seen.shape == (4, 3, size, size)
        assert seen.dtype == torch.uint8 and seen.is_contiguous()


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red channel is the column and whose green channel is the row, at most 256 of each; blue is 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


@pytest.mark.parametrize("v", range(8))
def test_renderings_at_two_sizes_show_the_same_region(v: int) -> None:
    height, width = 180, 250
    image, variates = coordinates(height, width), draw_variates(5, 3, [v])
    view = resolve_view(spec(seed=5), variates[0], v, height, width)
    top, left, h, w = (0, 35, 180, 180) if v == 0 else view[1:5]
    seen = render_views(image, spec(seed=5, crop_ratio=1.0), variates, [v], [(64, "bilinear"), (24, "bilinear")])
    for pixels, size in zip(seen, (64, 24), strict=True):
        centre = (np.arange(size) + 0.5) / size
        columns, rows = left + centre * w - 0.5, top + centre * h - 0.5
        columns = columns[::-1] if view.flip else columns
        inner = slice(1, -1)  # an antialiased resize shifts the border pixels inwards
        near = h / size if v == 0 else 2  # a centre crop starts at a whole pixel of the resized image
        assert np.abs(pixels[0, 0, inner, inner].numpy() - columns[None, inner]).max() < near
        assert np.abs(pixels[0, 1, inner, inner].numpy() - rows[inner, None]).max() < near


def test_renderings_at_two_sizes_have_the_same_colours() -> None:
    image = np.full((50, 60, 3), (200, 100, 30), np.uint8)
    for policy in ("moco-v2", "dino"):
        large, small = render_views(
            image, spec(policy), draw_variates(0, 4, range(8)), range(8), [(48, "bilinear"), (16, "bilinear")]
        )
        assert (large[:, :, 8, 8].int() - small[:, :, 8, 8].int()).abs().max() <= 1
        assert len(np.unique(large[:, :, 8, 8].numpy(), axis=0)) > 4  # the views do differ


@pytest.mark.parametrize("policy", ["crop-flip", "moco-v2", "dino"])
def test_a_view_does_not_depend_on_which_other_views_are_rendered(policy: str) -> None:
    image, sizes = noise(70, 45), [(24, "bilinear"), (16, "bicubic")]
    every = render_views(image, spec(policy, 2), draw_variates(2, 9, range(6)), range(6), sizes)
    some = [5, 0, 3]
    for whole, part in zip(
        every, render_views(image, spec(policy, 2), draw_variates(2, 9, some), some, sizes), strict=True
    ):
        assert torch.equal(whole[some], part)
    alone = render_views(image, spec(policy, 2), draw_variates(2, 9, [4]), [4], sizes[1:])[0]
    assert torch.equal(alone[0], every[1][4])


def test_rendering_does_not_change_the_image() -> None:
    image = noise(40, 40)
    before = image.copy()
    render_views(image, spec("dino"), draw_variates(0, 0, range(6)), range(6), [(40, "bilinear")])
    assert np.array_equal(image, before)


WHOLE = ResolvedView(top=0, left=0, height=32, width=32)


def test_a_crop_equals_its_box_resized() -> None:
    image = plane(noise(50, 60))
    view = ResolvedView(top=7, left=11, height=20, width=30)
    wanted = tv.resize(image[:, 7:27, 11:41], [16, 16], InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(render_view(image, view, 16, "bicubic"), wanted)


def test_flip_mirrors_left_and_right() -> None:
    image = plane(noise(32, 32))
    assert torch.equal(render_view(image, WHOLE._replace(flip=True), 32, "bilinear"), image.flip(-1))


def test_a_grey_view_has_the_luma_in_all_three_channels() -> None:
    image = plane(noise(32, 32))
    seen = render_view(image, WHOLE._replace(grey=True), 32, "bilinear").float()
    luma = (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert (seen[0] - luma).abs().max() < 1.5  # torchvision has 0.2989, 0.587, 0.114 and rounds down


def test_solarize_inverts_values_of_128_and_more() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    seen = render_view(ramp, ResolvedView(height=16, width=16, solarize=True), 16, "bilinear")
    assert torch.equal(seen, torch.where(ramp >= 128, 255 - ramp, ramp))


@pytest.mark.parametrize(
    ("which", "factor", "wanted"),
    [
        (0, 1.4, lambda x: x * 1.4),  # brightness: towards black
        (1, 0.6, lambda x: 0.6 * x + 0.4 * (x * LUMA).sum(0).mean()),  # contrast: towards the mean of the luma
        (2, 0.6, lambda x: 0.6 * x + 0.4 * (x * LUMA).sum(0)),  # saturation: towards the luma
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_each_jitter_blends_with_the_image_that_torchvision_documents(which: int, factor: float, wanted) -> None:  # type: ignore[no-untyped-def]
    image = plane(noise(32, 32))
    seen = render_view(image, WHOLE._replace(jitter=((which, factor),)), 32, "bilinear").float()
    assert (seen - wanted(image.float()).clamp(0, 255)).abs().max() <= 1.5


LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def test_hue_turns_red_into_green_in_a_third_of_a_circle() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    seen = render_view(red, WHOLE._replace(jitter=((3, 1 / 3),)), 32, "bilinear")[:, 0, 0]
    assert (seen.int() - torch.tensor([0, 255, 0])).abs().max() <= 2


def test_the_jitters_are_applied_in_the_drawn_order_then_grey_then_blur_then_solarize() -> None:
    image = plane(noise(32, 32))
    first, second = (0, 1.4), (1, 0.6)
    wanted = tv.adjust_contrast(tv.adjust_brightness(image, 1.4), 0.6)
    assert torch.equal(render_view(image, WHOLE._replace(jitter=(first, second)), 32, "bilinear"), wanted)
    assert not torch.equal(render_view(image, WHOLE._replace(jitter=(second, first)), 32, "bilinear"), wanted)
    view = WHOLE._replace(jitter=(first, second), grey=True, sigma=10.0, solarize=True)
    sigma = 10.0 * 32 / BLUR_REFERENCE
    wanted = tv.gaussian_blur(tv.rgb_to_grayscale(wanted, 3), [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
    assert torch.equal(render_view(image, view, 32, "bilinear"), tv.solarize(wanted, 128))


def edge_width(size: int, sigma: float) -> float:
    """Standard deviation, in pixels, of the slope of a blurred step from black to white."""
    step = torch.zeros(3, size, size, dtype=torch.uint8)
    step[:, :, size // 2 :] = 255
    row = render_view(step, ResolvedView(height=size, width=size, sigma=sigma), size, "bilinear")[0, size // 2].double()
    slope = row.diff() / row.diff().sum()
    place = torch.arange(size - 1, dtype=torch.float64)
    return float(((place - (slope * place).sum()) ** 2 * slope).sum().sqrt())


@pytest.mark.parametrize("sigma", [0.9, 2.0])
def test_the_sigma_of_a_blur_scales_with_the_size_of_the_rendering(sigma: float) -> None:
    assert edge_width(224, sigma) == pytest.approx(sigma, rel=0.1)
    assert edge_width(448, sigma) == pytest.approx(2 * sigma, rel=0.1)
    assert edge_width(112, 2 * sigma) == pytest.approx(sigma, rel=0.1)


def test_the_kernel_of_a_blur_is_limited_to_the_size_of_the_crop() -> None:
    seen = render_view(plane(noise(8, 8)), ResolvedView(height=8, width=8, sigma=500.0), 8, "bilinear")
    assert seen.float().std((1, 2)).max() < 5
