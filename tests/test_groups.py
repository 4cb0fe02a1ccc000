"""View groups: numbers, names and sizes of views; and that a further group is one more entry of the list of groups."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress_ssl.benchmarks.store_records import plain_record
from compress_ssl.pipeline.extraction.embed import embed, store_source
from compress_ssl.pipeline.extraction.extract import LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.store_record import describe_store
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.jsonl import read_jsonl
from compress_ssl.pipeline.runtime.records import UNSET, UnsetType
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store import done_record, integrity, records
from compress_ssl.pipeline.store.done_record import DoneRecord
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import GroupIdentity, StoreIdentity, StoreRecord
from compress_ssl.pipeline.store.shards import done_key
from compress_ssl.pipeline.views import groups
from compress_ssl.pipeline.views.augment import draw_variates, resolve_view
from compress_ssl.pipeline.views.groups import FRESH, GLOBAL_VIEWS, GROUPS, LOCAL, LOCAL_CROPS, ROOM, ViewGroup
from compress_ssl.pipeline.views.policies import Augmentation
from compress_ssl.stages import distill, export_teacher

FRESH_VIEWS, FRESH_CROPS = GLOBAL_VIEWS.fresh(), LOCAL_CROPS.fresh()

# ---------------------------------------------------------------- the groups that there are


@pytest.mark.parametrize(
    ("view", "group", "name"),
    [
        (0, GLOBAL_VIEWS, "view 0"),
        (7, GLOBAL_VIEWS, "view 7"),
        (LOCAL, LOCAL_CROPS, "local crop 0"),
        (LOCAL + 5, LOCAL_CROPS, "local crop 5"),
        (FRESH + 3, FRESH_VIEWS, "view 3"),
        (FRESH + LOCAL + 9, FRESH_CROPS, "local crop 9"),
    ],
)
def test_a_view_number_belongs_to_one_group_which_names_it(view: int, group: ViewGroup, name: str) -> None:
    assert [one for one in GROUPS if one.contains(view)] == [groups.group_of(view)] == [group]
    assert groups.view_name(view) == name and group.first + group.column(view) == view


@pytest.mark.parametrize("view", [-1, ROOM, LOCAL - 1, LOCAL + ROOM, FRESH - 1, 2**32, 2**70])
def test_a_number_of_no_group_is_refused(view: int) -> None:
    with pytest.raises(UserError, match=f"^{view} is the number of no view; "):
        groups.group_of(view)


def test_the_numbers_of_the_groups_do_not_overlap() -> None:
    first = sorted(group.first for group in GROUPS)
    assert all(b - a >= ROOM for a, b in zip(first, [*first[1:], 2**32], strict=True))


def test_an_array_belongs_to_the_group_with_the_longest_prefix_that_fits() -> None:
    for array, group, output in (
        ("embedding", GLOBAL_VIEWS, "embedding"), ("regions", GLOBAL_VIEWS, "regions"),
        ("local_projection", LOCAL_CROPS, "projection"),
    ):  # fmt: skip
        assert groups.group_of_array(array) == group
        assert group.output(array) == output and group.array(output) == array
    outputs = ("embedding", "projection", "logits", "regions")
    assert GLOBAL_VIEWS.arrays(outputs) == {name: name for name in outputs}
    assert LOCAL_CROPS.arrays(outputs) == {"local_embedding": "embedding", "local_projection": "projection"}


def test_a_stored_group_shows_the_same_views_in_every_epoch_and_a_fresh_one_never_shows_a_view_again() -> None:
    epochs = np.array([0, 0, 1, 5])
    stored, fresh = replace(LOCAL_CROPS, count=3), LOCAL_CROPS.fresh(3)
    assert stored.numbers_in(epochs).tolist() == [[LOCAL, LOCAL + 1, LOCAL + 2]] * 4
    assert (fresh.numbers_in(epochs) - FRESH - LOCAL).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [15, 16, 17]]
    assert stored.stored and not fresh.stored and fresh.numbers_in(epochs).dtype == np.int64
    assert replace(GLOBAL_VIEWS, count=8, start=4).numbers == range(4, 8)


def test_view_0_alone_is_plain_and_a_fresh_view_is_drawn_like_a_stored_one_of_its_group() -> None:
    for policy, number in (("dino", 1), ("dino", 2), ("crop-flip", 3)):
        assert FRESH_VIEWS.augmentation(policy, FRESH + number) == GLOBAL_VIEWS.augmentation(policy, number)
        assert FRESH_CROPS.augmentation(policy, FRESH + LOCAL) == LOCAL_CROPS.augmentation(policy, LOCAL)
        assert GLOBAL_VIEWS.augmentation(policy, 0) is None and FRESH_VIEWS.augmentation(policy, FRESH) is not None
    assert all(group.augmentation("none", group.first + 1) is None for group in GROUPS)


def test_the_groups_of_a_store_state_how_many_views_of_which_size_it_holds() -> None:
    identity = plain_record(10, 6, 8, "int8", 5, local=GroupIdentity(2, 56)).identity
    whole, crops = identity.groups(6, 4)
    assert (whole.numbers, whole.size, whole.side(32)) == (range(4, 6), 224, 32)
    assert (crops.numbers, crops.size) == (range(LOCAL, LOCAL + 2), 56)
    assert [crops.side(size) for size in (224, 64, 16)] == [56, 16, 8], "a quarter, as for the teacher"
    assert [group.name for group in plain_record(10, 6, 8, "int8", 5).identity.groups(6)] == ["global"]


# ---------------------------------------------------------------- one more group

MID = ViewGroup(
    "mid", "middle crop", 2**29, "mid_", {"crop-flip": (Augmentation(scale=(0.3, 0.5)),)}, ratio=(1, 2),
    outputs=("embedding",),
)  # fmt: skip
"""Crops between global views and local crops, of half the side of the global views."""

NETWORK = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
    def forward(self, x):
        return torch.relu(self.conv(x)).mean((2, 3))
"""

WITNESS = """
from compress_ssl.pipeline.methods.base import Method, Needs
NAMES = ("embedding", "local_embedding", "mid_embedding")
class Witness(Method):
    needs = Needs(NAMES, NAMES)
    def __init__(self, *, context, shift: int = 0):
        super().__init__()
        self.shift = shift
    def forward(self, batch, outputs):
        assert batch.mid_views.shape == (len(batch.rows), 5) and batch.mid_images[0].shape[-1] == 16
        stored = {name: batch.teacher[name] for name in NAMES}
        stored["mid_embedding"] = stored["mid_embedding"].roll(self.shift, 1)
        return [sum((outputs[0][name] - stored[name]).abs().max() for name in NAMES)]
"""


@dataclass(frozen=True)
class Identity(StoreIdentity):
    arrays: dict[str, tuple[int, ...]]  # type: ignore[assignment]
    mid: GroupIdentity | UnsetType = UNSET


@dataclass(frozen=True)
class Record(StoreRecord):
    identity: Identity


@dataclass(frozen=True)
class Done(DoneRecord):
    digest: dict[str, tuple[str, ...]]


@pytest.fixture
def with_mid_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more entry in the list of groups, and in the records that name groups and arrays on disk."""
    for module in (groups, records):
        monkeypatch.setattr(module, "GROUPS", (*GROUPS, MID, MID.fresh()))
    monkeypatch.setattr(records, "StoreRecord", Record)
    monkeypatch.setattr(done_record, "DoneRecord", Done)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """10 smooth images of odd sizes."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(10):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize((30 + i, 45 - i), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


def export_with_mid_crops(images: Path, out: Path, net: str) -> FeatureStore:
    """An export of 3 global views of 32 pixels, 2 local crops of 8 and 5 middle crops of 16."""
    teacher = build(net, image_size=32, pretrained_default=True)
    flags: dict[str, Any] = {"views": 3, "local_views": 2, "local_size": 8, "batch_size": 4, "shard_size": 8}
    job = export_teacher.resolve(export_teacher.Config(str(images), net, str(out), codec="float32", **flags))
    record, dataset = describe_store(job, teacher), job.dataset
    fields = dict(vars(record.identity))
    fields["arrays"] = {**record.identity.arrays, "mid_embedding": (6,)}
    identity = Identity(**fields, mid=GroupIdentity(5, 16))
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    store = FeatureStore.create(Folder(out), Record(identity, record.about), tables)
    extractor = FeatureExtractor(teacher, torch.device("cpu"), "fp32", 4)
    embed(store, store_source(store, dataset, extractor, LoaderSettings()), store.pending())
    return store


@pytest.mark.usefixtures("one_thread", "with_mid_crops")
def test_a_further_group_is_rendered_stored_and_shown_to_students_without_further_code(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "witness.py").write_text(WITNESS)
    net = f"python:{tmp_path / 'net.py'}:Net"
    store = export_with_mid_crops(images, tmp_path / "store", net)

    assert [(group.name, group.count, group.size) for group in store.groups] == [
        ("global", 3, 32), ("local", 2, 8), ("mid", 5, 16)
    ]  # fmt: skip
    assert not store.pending() and not list(integrity.check_shards(store))
    assert store.array("mid_embedding").shape == (10, 5, 6)
    spans = [(0, 3), (2**29, 2**29 + 4), (2**29 + 4, 2**29 + 5), (LOCAL, LOCAL + 2)]
    assert sorted(store.storage.list("done")) == sorted(done_key(block, *span) for block in (0, 1) for span in spans)
    crop = resolve_view(store.identity.views, draw_variates(0, 3, 2**29 + 1), 2**29 + 1, 400, 400)
    assert 0.29 < crop.height * crop.width / 400**2 < 0.51

    def largest_difference(shift: int) -> float:
        out, method = tmp_path / f"run-{shift}", f"python:{tmp_path / 'witness.py'}:Witness,shift={shift}"
        options: dict[str, Any] = {"steps": 2, "batch_size": 5, "image_size": 32, "lr": 1e-9, "workers": 0}
        distill.run(distill.Config(str(tmp_path / "store"), (net,), method, out, device="cpu", **options))
        return max(row["loss"] for row in read_jsonl(out / "metrics.jsonl"))

    assert largest_difference(0) < 1e-5
    assert largest_difference(1) > 0.01, "another crop would not have passed"
