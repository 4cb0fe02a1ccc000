"""Local crops: how they are drawn, exported, stored, verified and shown to students."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress_ssl.benchmarks.store_records import plain_record
from compress_ssl.pipeline.datasets.decode import GOOD, NOT_FINITE
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.jsonl import read_jsonl as read_journal
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import GroupIdentity
from compress_ssl.pipeline.store.shards import Shard, done_key
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.views.augment import ResolvedView, ViewSpec, draw_variates, resolve_view
from compress_ssl.pipeline.views.groups import FRESH, LOCAL, LOCAL_CROPS
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest
from compress_ssl.pipeline.views.policies import LOCAL_POLICIES
from compress_ssl.pipeline.views.render import render_views
from compress_ssl.stages import distill, export_teacher, inspect, verify

TEACHER = "convnet:channels=4+8,pretrained=false"
IMAGES, SIZE = 20, 24
SMALL = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 smooth images of odd sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize((30 + i, 45 - i), Image.Resampling.BICUBIC).save(root / f"{i:02d}.png")
    return root


def config(images: Path, out: Path, **options: Any) -> export_teacher.Config:
    settings = {"teacher": TEACHER, "views": 3, "local_views": 6, "image_size": SIZE, "batch_size": 4, "shard_size": 8}
    return export_teacher.Config(data=str(images), out=out, **{**settings, "workers": 0, "device": "cpu", **options})


def export(images: Path, out: Path, **options: Any) -> FeatureStore:
    export_teacher.run(config(images, out, **options))
    return FeatureStore(Folder(out))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "store"
    export(images, out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def files(store: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != "history.jsonl"}


# ---------------------------------------------------------------- what they are

GOLDEN = {
    ("crop-flip", 0): ResolvedView(top=98, left=39, height=134, width=157, flip=True),
    ("crop-flip", 5): ResolvedView(top=159, left=144, height=143, width=160, flip=True),
    ("moco-v2", 1): ResolvedView(
        top=39, left=127, height=129, width=170, flip=True, grey=True,
        jitter=((3, -0.06191201345063746), (1, 1.361418649367988), (0, 0.9083032319322228), (2, 0.8560023985803127)),
    ),
    ("dino", 0): ResolvedView(
        top=55, left=27, height=221, width=260, flip=True, grey=True, sigma=1.7703741943463682,
        jitter=((1, 0.9647839495912194), (0, 1.3247256563976406), (2, 1.186576730851084), (3, 0.019296020641922956)),
    ),
    ("dino", 5): ResolvedView(top=77, left=98, height=241, width=269, flip=True, sigma=0.14104730959516018),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "number"), GOLDEN)
def test_golden_local_crops(policy: str, number: int) -> None:
    v = LOCAL + number
    assert resolve_view(ViewSpec(policy, 7, 0.875), draw_variates(7, 11, v), v, 333, 500) == GOLDEN[policy, number]


@pytest.mark.parametrize("policy", LOCAL_POLICIES)
def test_the_areas_of_local_crops_fill_the_range_of_their_policy(policy: str) -> None:
    spec, numbers = ViewSpec(policy, 3, 0.875), LOCAL + np.arange(6)
    boxes = [
        resolve_view(spec, u, int(v), 400, 500)
        for key in range(80)
        for u, v in zip(draw_variates(3, key, numbers), numbers, strict=True)
    ]
    areas = np.array([box.height * box.width / (400 * 500) for box in boxes])
    low, high = LOCAL_POLICIES[policy][0].scale
    assert (
        low * 0.97 < areas.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < areas.max() < high * 1.03
    )


def test_the_default_side_of_local_crops_is_3_sevenths_of_the_views_in_multiples_of_eight() -> None:
    assert [LOCAL_CROPS.side(size) for size in (224, 96, 64, 32, 8)] == [96, 40, 24, 16, 8]


def test_a_local_crop_shows_the_same_box_at_every_size() -> None:
    ramp = np.zeros((90, 120, 3), np.uint8)  # red increases along the width, green along the height
    ramp[..., 0], ramp[..., 1] = np.arange(120)[None] * 2, np.arange(90)[:, None] * 2
    spec, numbers = ViewSpec("crop-flip", 0, 0.875), LOCAL + np.arange(6)
    variates = draw_variates(0, 4, numbers)
    large, small = render_views(ramp, spec, variates, numbers.tolist(), [(32, "bilinear"), (8, "bilinear")])
    for v, u, big, little in zip(numbers, variates, large.float(), small.float(), strict=True):
        box = resolve_view(spec, u, int(v), 90, 120)
        assert float((big.mean((1, 2)) - little.mean((1, 2))).abs().max()) < 1
        across, down = 2 * (box.left + box.width / 2), 2 * (box.top + box.height / 2)
        assert big.mean((1, 2))[:2].tolist() == pytest.approx([across - 1, down - 1], abs=1.5)


def test_the_loader_renders_local_crops_with_or_without_global_views(images: Path) -> None:
    from compress_ssl.pipeline.datasets.folder import Folder as ImageFolder

    data, spec, rows = ImageFolder(images), ViewSpec("crop-flip", 0, 0.875), np.array([3, 11])
    views, local = np.array([[1, 2]] * 2), LOCAL + np.array([[0, 1, 5]] * 2)
    sizes = {"global": [(SIZE, "bilinear")], "local": [(SMALL, "bilinear"), (16, "bilinear")]}
    view_dataset = ViewDataset(data, spec, np.arange(IMAGES), sizes, [])
    both = view_dataset.load(ViewRequest(rows, {"global": views, "local": local}))
    alone = view_dataset.load(ViewRequest(rows, {"local": local}))
    assert [tuple(p.shape) for p in both.pixels["local"]] == [(2, 3, 3, SMALL, SMALL), (2, 3, 3, 16, 16)]
    assert list(alone.pixels) == ["local"] and not alone.bad
    for j, i in enumerate(rows.tolist()):
        image, _ = data.load(i)
        for n, size in enumerate((SMALL, 16)):
            (want,) = render_views(image, spec, draw_variates(0, i, local[j]), local[j].tolist(), [(size, "bilinear")])
            assert torch.equal(both.pixels["local"][n][j], want) and torch.equal(alone.pixels["local"][n][j], want)


# ---------------------------------------------------------------- in the store


def test_local_crops_have_their_own_arrays_shards_and_done_records(whole: Path) -> None:
    store = FeatureStore(Folder(whole))
    assert store.other_views == list(range(LOCAL, LOCAL + 6)) and store.views == 3
    assert store.identity.local == GroupIdentity(views=6, size=SMALL)
    shapes = {name: store.array(name).shape for name in ("embedding", "local_embedding", "local_embedding_scale")}
    assert shapes == {"embedding": (20, 3, 8), "local_embedding": (20, 6, 8), "local_embedding_scale": (20, 6)}
    first = {done_key(0, 0, 3), done_key(0, LOCAL, LOCAL + 4), done_key(0, LOCAL + 4, LOCAL + 6)}
    assert {name for name in files(whole) if name.startswith("done/0000000.")} == first
    apart = [store.read("local_embedding", v) for v in store.other_views]
    assert all(not np.allclose(apart[0], other) for other in apart[1:])


@pytest.mark.parametrize("settings", [{"workers": 2}, {"scheduler": "processes:2"}])
def test_the_stored_bytes_of_local_crops_do_not_depend_on_the_kind_of_worker(
    settings: dict[str, Any], images: Path, whole: Path, tmp_path: Path
) -> None:
    export(images, tmp_path / "store", **settings)
    assert files(tmp_path / "store") == files(whole)


class Killed(BaseException):
    pass


def test_an_export_with_local_crops_killed_at_any_write_and_repeated_leaves_the_same_bytes(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, left = Folder.put, [0]

    def dying(self: Folder, key: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        put(self, key, data)

    monkeypatch.setattr(Folder, "put", dying)
    out, kills, lacks = tmp_path / "store", 0, set()
    for allowed in (
        range(3, 60, 5),
        range(1, 60),
    ):  # first while the store is created, then while its shards are written
        for count in allowed:
            left[0] = count
            try:
                export(images, out)
                break
            except Killed:
                kills += 1
            if (out / "copy/manifest.json").exists():
                lacks |= {frozenset(bool(v & LOCAL) for v in s.views) for s in FeatureStore(Folder(out)).pending()}
                if allowed.step == 5:
                    break
    monkeypatch.undo()
    export(images, out)
    assert kills > 5 and frozenset({True}) in lacks, "never with all views there and local crops missing"
    assert files(out) == files(whole)


@pytest.mark.parametrize("lost", [(0, 3), (LOCAL, LOCAL + 4), (LOCAL + 4, LOCAL + 6)])
def test_lost_views_or_local_crops_alone_are_made_again(
    lost: tuple[int, int], images: Path, whole: Path, copy: Path
) -> None:
    (copy / done_key(1, *lost)).unlink()
    (pending,) = FeatureStore(Folder(copy)).pending()
    assert (pending.block, pending.views) == (1, tuple(range(*lost)))
    export(images, copy)
    assert files(copy) == files(whole)


def test_growing_the_views_leaves_the_local_crops_unchanged(images: Path, whole: Path, copy: Path) -> None:
    def local(store: Path) -> dict[str, tuple[int, bytes]]:
        found = [p for p in store.rglob("*") if p.is_file() and ("local" in str(p) or f".{LOCAL // 10}" in p.name)]
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in found if "zarr.json" not in p.name}

    before = local(copy)
    assert len(before) > 10
    grown = export(images, copy, views=6)
    assert local(copy) == before and grown.views == 6 and len(grown.other_views) == 6
    with pytest.raises(UserError, match="local.views is 6 there, 8 asked"):
        export(images, copy, views=6, local_views=8)


@pytest.mark.parametrize(("later", "earlier"), [("embedding", "local_embedding"), ("local_embedding", "embedding")])
def test_an_image_that_is_found_bad_in_one_group_of_views_is_blanked_in_the_other_one_too(
    later: str, earlier: str, tmp_path: Path
) -> None:
    """Its other group was stored before, so nothing of that group is handed to the store again."""
    arrays = {"embedding": (3,), "local_embedding": (3,)}
    record = plain_record(5, 2, 3, "float32", 5, arrays=arrays, local=GroupIdentity(2, SMALL))
    store = FeatureStore.create(
        Folder(tmp_path), record, {"sample_id": list("abcde"), "label": [0] * 5, "view_key": range(5)}
    )
    numbers, features = {"embedding": (0, 1), "local_embedding": (LOCAL, LOCAL + 1)}, np.ones((5, 2, 3), np.float32)
    for name, bad in ((earlier, {}), (later, {3: "not finite"})):
        status = np.array([NOT_FINITE if i in bad else GOOD for i in range(5)], np.uint8)
        store.write(Shard(0, 0, 5, numbers[name]), {name: (features, None)}, status, np.arange(5, dtype=np.uint64), bad)
    assert not store.pending() and not list(integrity.check_shards(store))
    for name in arrays:
        for view in numbers[name]:
            assert store.read(name, view).any(1).tolist() == [True, True, True, False, True]


TWO_SIZES = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
    def forward(self, x):
        if x.shape[-1] in REFUSED:
            raise ValueError("too small")
        out = torch.relu(self.conv(x)).mean((2, 3))
        return out / 0 if x.shape[-1] in BROKEN and bool(x.std() > 0) else out
"""


def network(folder: Path, refused: str = "()", broken: str = "()") -> str:
    (folder / "net.py").write_text(TWO_SIZES.replace("REFUSED", refused).replace("BROKEN", broken))
    return f"python:{folder / 'net.py'}:Net"


def test_a_crop_feature_that_is_not_finite_makes_a_bad_image_whose_reason_names_the_crop(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"none of the 20 images could be used.*\(local_embedding, local crop 0, as int8\)"
    ):
        export(images, tmp_path / "store", teacher=network(tmp_path, broken="(8,)"))


def test_a_teacher_that_cannot_take_crops_is_refused_before_anything_is_made(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot take images of 8 pixels .* choose another --local-size"):
        export(images, tmp_path / "store", teacher=network(tmp_path, refused="(8,)"))
    assert not (tmp_path / "store").exists()


# ---------------------------------------------------------------- checked, shown


def test_verify_checks_all_digests_of_local_crops_and_embeds_some_again(whole: Path) -> None:
    made = verify.run(verify.Config(store=str(whole), sample=1.0))
    assert made["exact"] == IMAGES and made["cosine"] > 0.999
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        pick = FeatureStore.read_rows
        patch.setattr(FeatureStore, "read_rows", lambda *arguments: (drawn.append(arguments[2]), pick(*arguments))[1])
        verify.run(verify.Config(store=str(whole), sample=1.0))
    assert any(view & LOCAL for view in drawn) and any(not view & LOCAL for view in drawn)


def test_a_damaged_local_crop_is_detected_named_and_made_again(images: Path, whole: Path, copy: Path) -> None:
    shard = copy / "features.zarr/local_embedding/c/1/1/0"
    data = bytearray(shard.read_bytes())
    data[9] ^= 4
    shard.write_bytes(data)
    damaged = [damage.key for damage in integrity.check_shards(FeatureStore(Folder(copy)))]
    assert damaged == [done_key(1, LOCAL + 4, LOCAL + 6)]
    verify.run(verify.Config(store=str(copy), sample=0, repair=True))
    export(images, copy)
    assert files(copy) == files(whole)


def test_swapped_local_crops_are_distinguished_from_rounding(copy: Path) -> None:
    store = FeatureStore(Folder(copy))
    for block in range(3):
        start, stop = store.span(block)
        rows = slice(start, stop)
        stored = [store.stored("local_embedding", LOCAL + v, rows) for v in (1, 2, 3, 0)]
        features = np.stack([s for s, _ in stored], 1), np.stack([c for _, c in stored if c is not None], 1)
        store.storage.delete(done_key(block, LOCAL, LOCAL + 4))
        shard = Shard(block, start, stop, tuple(range(LOCAL, LOCAL + 4)))
        tables = store.table("status", rows), store.table("content", rows)
        store.write(shard, {"local_embedding": features}, *tables, {})
    with pytest.raises(UserError, match="local crop [0-3].* is stored as .* local crop [0-3]"):
        verify.run(verify.Config(store=str(copy), sample=1.0))


def test_inspect_shows_the_local_crops(whole: Path) -> None:
    made = inspect.run(inspect.Config(whole))
    assert made["local crops"] == "6 of 8 pixels" and "local_embedding 8" in made["arrays"]


# ---------------------------------------------------------------- in training

WITNESS = """
from compress_ssl.pipeline.methods.base import Method, Needs
class Witness(Method):
    needs = Needs(("embedding", "local_embedding"), ("embedding", "local_embedding"))
    def __init__(self, *, context, shift: int = 0):
        super().__init__()
        self.shift = shift
    def forward(self, batch, outputs):
        whole = (outputs[0]["embedding"] - batch.teacher["embedding"]).abs().max()
        small = outputs[0]["local_embedding"] - batch.teacher["local_embedding"].roll(self.shift, 1)
        return [whole + small.abs().max()]
"""


@pytest.mark.parametrize("policy", ["crop-flip", "moco-v2"])
def test_a_student_equal_to_the_teacher_reproduces_the_stored_features_of_every_crop(
    policy: str, images: Path, tmp_path: Path
) -> None:
    net = network(tmp_path)
    (tmp_path / "witness.py").write_text(WITNESS)
    export(images, tmp_path / "store", teacher=net, codec="float32", policy=policy)

    def worst(shift: int) -> float:
        out = tmp_path / f"run-{shift}"
        method = f"python:{tmp_path / 'witness.py'}:Witness,shift={shift}"
        options = {"steps": 2, "batch_size": 10, "image_size": SIZE, "lr": 1e-9, "workers": 0, "device": "cpu"}
        distill.run(distill.Config(store=tmp_path / "store", student=(net,), method=method, out=out, **options))  # type: ignore
        return max(row["loss"] for row in read_journal(out / "metrics.jsonl"))

    assert worst(0) < 1e-5
    assert worst(1) > 0.01, "another crop would not have passed"


def test_a_student_that_cannot_take_crops_is_refused_before_the_first_step(whole: Path, tmp_path: Path) -> None:
    student = network(tmp_path, refused="(8,)")
    with pytest.raises(UserError, match="cannot take images of 8 pixels .* choose another --image-size"):
        options = {"steps": 1, "image_size": SIZE, "workers": 0, "device": "cpu"}
        distill.run(distill.Config(whole, (student,), "seed:bank=5", tmp_path / "run", **options))  # type: ignore
    assert not (tmp_path / "run").exists()


def test_every_step_uses_all_stored_crops_or_as_many_fresh_ones() -> None:
    def plan(**options: Any) -> StepSampler:
        return StepSampler(3, np.arange(10), (1, 2), 4, 1, "same", 100, **options)

    assert list(plan()[0].views) == ["global"]
    stored = replace(LOCAL_CROPS, count=6)
    assert plan(beside=(stored,))[7].views["local"].tolist() == [list(range(LOCAL, LOCAL + 6))] * 4
    fresh = plan(beside=(LOCAL_CROPS.fresh(3),))
    seen = set()
    for step in range(30):
        rows, local = fresh[step].rows, fresh[step].views["local"]
        assert local.shape == (4, 3)
        assert np.all(local & LOCAL) and np.all(local & FRESH), "never one that a store keeps"
        seen |= {(int(i), int(v)) for i, views in zip(rows, local, strict=True) for v in views}
    assert len(seen) == 30 * 4 * 3, "a fresh crop was shown twice"
