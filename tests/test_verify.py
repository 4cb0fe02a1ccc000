"""`compress verify`: damage is detected, named, and repaired to the same bytes."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.extraction import verification
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard, done_key
from compress_ssl.stages import export_teacher, inspect, verify

TEACHER = "convnet:channels=4+8,pretrained=false"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> export_teacher.Config:
    """A finished store of 24 images, one of them bad, 5 views, 3 row blocks."""
    top = tmp_path_factory.mktemp("verify")
    random = np.random.default_rng(0)
    for number in range(24):
        (top / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        big = Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC)
        big.save(top / "images" / str(number % 2) / f"{number:02d}.png")
    (top / "images/1/23.png").write_bytes(b"no image")
    settings = {"views": 5, "image_size": 16, "batch_size": 4, "shard_size": 8, "workers": 0}
    config = export_teacher.Config(data=str(top / "images"), teacher=TEACHER, out=top / "store", **settings)  # type: ignore
    export_teacher.run(config)
    return config


@pytest.fixture
def damaged(export: export_teacher.Config, tmp_path: Path) -> export_teacher.Config:
    """A copy of the store that a test may damage."""
    shutil.copytree(export.out, tmp_path / "store")
    return dataclasses.replace(export, out=tmp_path / "store")


WITHOUT_DIGEST = ("history.jsonl", "bad-images.tsv")  # files that no digest covers, because no result depends on them


def files(store: Path) -> dict[str, bytes]:
    found = [p for p in store.rglob("*") if p.is_file() and p.name not in WITHOUT_DIGEST]
    return {str(p.relative_to(store)): p.read_bytes() for p in found}


def kind(name: str) -> str:
    """The kind of a file of a store."""
    if name in WITHOUT_DIGEST or name in ("manifest.json", "copy/manifest.json"):
        return name
    if name.startswith("done/"):
        return "done records"
    where = "second copies of " if name.startswith("copy/") else ""
    if name.endswith("zarr.json"):
        return where + "Zarr metadata"
    tables = ("sample_id", "label", "view_key")
    return where + ("tables" if any(f"/{table}/c/" in name for table in tables) else "shards")


def values(out: Path) -> dict[str, bytes]:
    """Everything that distill and evaluate can read of a store. Raises UserError if reading does."""
    store = FeatureStore(Folder(out))
    store.require_complete()
    read = {name: store.table(name) for name in ("sample_id", "label", "view_key", "content", "status")}
    read |= {f"embedding of {view}": store.read("embedding", view) for view in range(store.views)}
    manifest = digests.canonical([store.manifest.identity, store.manifest.about])
    return {**{name: str(part.tolist()).encode() for name, part in read.items()}, "manifest": manifest}


def damage(out: Path, name: str, random: np.random.Generator) -> str:
    """Flip a random bit of a file and return a description of its position."""
    data = bytearray((out / name).read_bytes())
    place, bit = int(random.integers(len(data))), int(random.integers(8))
    data[place] ^= 1 << bit
    (out / name).write_bytes(data)
    return f"bit {bit} of byte {place} of {name}"


def noticed_by_readers(out: Path, whole: Mapping[str, bytes]) -> bool:
    """Whether reading a damaged store is an error. If not, all values must be the undamaged ones."""
    try:
        assert values(out) == whole
    except UserError as problem:
        assert "damaged" in str(problem)
        return True
    return False


def repair_store(config: export_teacher.Config, where: str) -> None:
    """Check that verify reports the damage, then repair it with --repair and the same export command."""
    with pytest.raises(UserError, match="is damaged in"):
        verify.run(verify.Config(store=str(config.out), sample=0))
        pytest.fail(f"{where} was not found")
    verify.run(verify.Config(store=str(config.out), sample=0, repair=True))
    export_teacher.run(config)


def flip(config: export_teacher.Config, name: str, before: Mapping[str, bytes], random: np.random.Generator) -> bool:
    """Flip a bit of a file and check that it is repaired to the same bytes; return whether readers noticed it too."""
    values_before = values(config.out)
    where = damage(config.out, name, random)
    noticed = noticed_by_readers(config.out, values_before)
    if name in WITHOUT_DIGEST:
        assert not noticed, where
        verify.run(verify.Config(store=str(config.out), sample=0))
        inspect.run(inspect.Config(path=config.out))
        export_teacher.run(config)
        assert "complete already" in export_teacher.run(config)["summary"]
    else:
        assert noticed or kind(name).startswith(("done", "second", "copy")), f"{where} was read as if it were whole"
        repair_store(config, where)
    assert files(config.out) == before, where
    return noticed


def test_an_intact_store_passes_and_its_features_are_those_of_the_live_teacher(export: export_teacher.Config) -> None:
    made = verify.run(verify.Config(store=str(export.out), sample=1.0))
    assert made["damaged"] == [] and made["pending"] == 0
    assert made["cosine"] > 0.9999
    for control in ("wrong_view", "wrong_image"):
        assert made[control] < made["cosine"] - 0.0005
    assert made["exact"] == 23  # the same device and precision give the same bits


def test_the_error_of_a_coarse_codec_is_not_mistaken_for_another_teacher(
    export: export_teacher.Config, tmp_path: Path
) -> None:
    coarse = dataclasses.replace(export, out=tmp_path / "store", codec="pq:2+zstd")
    export_teacher.run(coarse)
    made = verify.run(verify.Config(store=str(coarse.out), sample=1.0))
    assert made["exact"] == 23 and made["wrong_view"] < made["cosine"] < 0.9999


def test_a_bit_flipped_anywhere_is_detected_and_repaired_to_the_same_bytes(damaged: export_teacher.Config) -> None:
    before, random = files(damaged.out), np.random.default_rng(1)
    by_kind: dict[str, list[str]] = {}
    for name in sorted([*before, *WITHOUT_DIGEST]):
        by_kind.setdefault(kind(name), []).append(name)
    assert len(by_kind) == 10
    for names in by_kind.values():
        flip(damaged, str(random.choice(names)), before, random)


@pytest.mark.soak
def test_two_hundred_bits_flipped_at_random_are_detected_and_repaired(
    damaged: export_teacher.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before, random = files(damaged.out), np.random.default_rng(2)
    kept = {name: (damaged.out / name).read_bytes() for name in WITHOUT_DIGEST}
    by_kind: dict[str, list[str]] = {}
    for name in sorted([*before, *WITHOUT_DIGEST]):
        by_kind.setdefault(kind(name), []).append(name)
    count: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    for number in range(200):
        what = sorted(by_kind)[number % len(by_kind)]
        count[what] += 1
        noticed[what] += flip(damaged, str(random.choice(by_kind[what])), before, random)
        for name, data in kept.items():
            (damaged.out / name).write_bytes(data)
    with capsys.disabled():
        print(*(f"\n{what}: {n} bits flipped, {noticed[what]} noticed by readers" for what, n in count.items()))


def test_a_history_that_is_not_text_is_ignored(damaged: export_teacher.Config) -> None:
    history = Path(damaged.out) / "history.jsonl"
    history.write_bytes(history.read_bytes().replace(b"seconds", b"sec\xf3nds"))
    assert inspect.run(inspect.Config(path=str(damaged.out)))["kind"] == "store"
    export_teacher.run(damaged)


def test_repair_marks_exactly_the_damaged_shard(damaged: export_teacher.Config) -> None:
    shard = damaged.out / "features.zarr/embedding/c/1/0/0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    made = verify.run(verify.Config(store=str(damaged.out), sample=0, repair=True))
    assert made["mended"] == ["done/0000001.0000-0004.json"]
    (pending,) = FeatureStore(Folder(damaged.out)).pending()
    assert (pending.block, pending.views) == (1, (0, 1, 2, 3))


# ---------------------------------------------------------------- the live teacher


def rewrite(config: export_teacher.Config, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the features (rows, views, D) of the first shard, with digests that fit the new ones."""
    store = FeatureStore(Folder(config.out))
    start, stop = store.span(0)
    rows = slice(start, stop)
    features = change(np.stack([store.read("embedding", v, rows) for v in range(4)], 1))
    store.storage.delete(done_key(0, 0, 4))
    status, content = store.table("status", rows), store.table("content", rows)
    encoded = store.codecs["embedding"].encode(features)
    store.write(Shard(0, start, stop, (0, 1, 2, 3)), {"embedding": encoded}, status, content, {})


def test_features_of_another_view_are_distinguished_from_other_arithmetic(damaged: export_teacher.Config) -> None:
    rewrite(damaged, lambda features: features[:, [3, 0, 1, 2]])
    moved = r"not this teacher's feature: that of \(row (\d), view (\d)\) is stored as \(row \1, view (?!\2)\d\)"
    with pytest.raises(UserError, match=moved):
        verify.run(verify.Config(store=str(damaged.out), sample=1.0))


def test_features_of_another_image_are_distinguished_from_other_arithmetic(damaged: export_teacher.Config) -> None:
    rewrite(damaged, lambda features: np.roll(features, -1, axis=0))
    moved = r"not this teacher's feature: that of \(row (\d), view (\d)\) is stored as \(row (?!\1)\d, view \2\)"
    with pytest.raises(UserError, match=moved):
        verify.run(verify.Config(store=str(damaged.out), sample=1.0))


def test_other_arithmetic_is_distinguished_from_other_pixels(damaged: export_teacher.Config) -> None:
    rewrite(damaged, lambda features: -features)
    with pytest.raises(UserError, match="pixels were checked first, so the arithmetic differs"):
        verify.run(verify.Config(store=str(damaged.out), sample=1.0))


def test_changed_pixels_are_detected_before_any_feature_is_computed(
    export: export_teacher.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(export.data, tmp_path / "images")
    names = sorted((tmp_path / "images").rglob("*.png"))
    monkeypatch.setattr(verification, "embed_again", lambda *_: pytest.fail("the teacher was run"))
    Image.new("RGB", (24, 20)).save(names[0])
    with pytest.raises(UserError, match="probe images do not look as they did to the teacher, the first is 0/00.png"):
        verify.run(verify.Config(store=str(export.out), data=str(tmp_path / "images"), sample=1.0))


def test_a_changed_image_that_is_no_probe_is_named_too(export: export_teacher.Config, tmp_path: Path) -> None:
    shutil.copytree(export.data, tmp_path / "images")
    Image.new("RGB", (24, 20)).save(tmp_path / "images/0/02.png")
    with pytest.raises(UserError, match="image 0/02.png changed since"):
        verify.run(verify.Config(store=str(export.out), data=str(tmp_path / "images"), sample=1.0))


LINEAR = """
import torch

class Linear(torch.nn.Module):
    preprocessing = {"size": 16, "crop_ratio": 1.0}

    def __init__(self, weight):
        super().__init__()
        self.net = torch.nn.Linear(3 * 16, 8)
        torch.nn.init.constant_(self.net.bias, weight)

    def forward(self, images):
        return ACTIVATION(self.net(images.mean(3).flatten(1)))

def linear(weight: float = 0.0):
    return Linear(weight)
"""


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("weight: float = 0.0", "weight: float = 0.1", "has other weights here"),
        ("ACTIVATION", "torch.relu", "pixels were checked first, so the arithmetic differs"),
        ("ACTIVATION", "torch.ones_like", "the arithmetic differs|proves nothing"),
    ],
)
def test_the_error_of_a_changed_teacher_says_what_changed(
    export: export_teacher.Config, tmp_path: Path, before: str, after: str, words: str
) -> None:
    file = tmp_path / "linear.py"
    file.write_text(LINEAR.replace("ACTIVATION", "torch.tanh"))
    mine = dataclasses.replace(export, teacher=f"python:{file}:linear", out=tmp_path / "store")
    export_teacher.run(mine)
    assert verify.run(verify.Config(store=str(mine.out), sample=1.0))["exact"] == 23
    file.write_text(LINEAR.replace(before, after).replace("ACTIVATION", "torch.tanh"))
    with pytest.raises(UserError, match=words):
        verify.run(verify.Config(store=str(mine.out), sample=1.0))


def test_a_moved_teacher_is_loaded_from_the_given_path(export: export_teacher.Config, tmp_path: Path) -> None:
    file = tmp_path / "linear.py"
    file.write_text(LINEAR.replace("ACTIVATION", "torch.tanh"))
    mine = dataclasses.replace(export, teacher=f"python:{file}:linear", out=tmp_path / "store")
    export_teacher.run(mine)
    moved = file.rename(tmp_path / "moved.py")
    with pytest.raises(UserError, match=r"linear\.py does not exist"):
        verify.run(verify.Config(store=str(mine.out), sample=1.0))
    assert verify.run(verify.Config(store=str(mine.out), sample=1.0, teacher=f"python:{moved}:linear"))["exact"] == 23


def test_a_teacher_with_constant_features_is_refused_because_it_proves_nothing(
    export: export_teacher.Config, tmp_path: Path
) -> None:
    (tmp_path / "linear.py").write_text(LINEAR.replace("ACTIVATION", "torch.ones_like"))
    mine = dataclasses.replace(export, teacher=f"python:{tmp_path}/linear.py:linear", out=tmp_path / "store")
    export_teacher.run(mine)
    with pytest.raises(UserError, match="fits nearly as well, so this proves nothing"):
        verify.run(verify.Config(store=str(mine.out), sample=1.0))


def test_another_precision_passes_within_the_tolerance_and_is_reported(export: export_teacher.Config) -> None:
    made = verify.run(verify.Config(store=str(export.out), sample=1.0, precision="bf16", device="cpu"))
    assert made["cosine"] >= 0.999 and made["exact"] < 23
    assert "on cpu in bf16 (stored in fp32)" in made["summary"]


def test_the_sample_has_the_requested_size_and_skips_pending_shards(damaged: export_teacher.Config) -> None:
    def count(**settings: Any) -> str:
        return verify.run(verify.Config(store=str(damaged.out), **settings))["summary"]

    assert "; 16 features embedded again" in count(sample=0.01)
    assert "; 20 features embedded again" in count(sample=20 / 24)
    assert "embedded again" not in count(sample=0)
    (damaged.out / "done/0000000.0004-0005.json").unlink()
    assert "1 row block pending; 15 features embedded again" in count(sample=1.0)
