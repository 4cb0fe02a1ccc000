"""Frozen heads: built from tensors they equal the module that was saved; exports store and use them."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.methods.base import MethodContext
from compress_ssl.pipeline.models import build, heads
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store import teacher_heads
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.preprocessing import IMAGENET
from compress_ssl.stages import distill, export_teacher, store_copy, verify

D = 8


def saved(module: nn.Module, name: str, seed: int = 0) -> dict[str, Tensor]:
    """A head's state dict as in a checkpoint, with random weights and random statistics of batch norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.sub_(0.6)
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


HEADS: dict[str, Callable[[], nn.Module]] = {
    "moco": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 5)),
    "swav": lambda: nn.Sequential(nn.Linear(D, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Linear(12, 5)),
    "simclr": lambda: nn.Sequential(
        nn.Linear(D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, 5, bias=False)
    ),
    "moco-v3": lambda: nn.Sequential(
        nn.Linear(D, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12, bias=False),
        nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5, bias=False), nn.BatchNorm1d(5, affine=False),
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(D, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5)),
    "one layer": lambda: nn.Linear(D, 5),
}  # fmt: skip
MOCO = HEADS["moco"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("moco", "fc"),
        ("swav", "projection_head"),
        ("simclr", "projection_head.layers"),
        ("moco-v3", "head"),
        ("layer norm", "projector.net"),
        ("one layer", "fc"),
    ],
)
def test_a_projection_head_equals_the_module_its_tensors_come_from(kind: str, name: str) -> None:
    module = HEADS[kind]()
    tensors = saved(module, name)
    ((stem, group),) = heads.group_by_head(tensors).items()
    assert stem == name
    head, x = heads.ProjectionHead(group), torch.randn(7, D)
    torch.testing.assert_close(head(x), module.eval()(x))
    head.train()
    torch.testing.assert_close(head(x), module(x), msg="a head must stay frozen in training mode")
    assert not any(p.requires_grad for p in head.parameters())
    assert heads.prototypes(group) is None


class DinoHead(nn.Module):
    """Linear, GELU, Linear, GELU, Linear, unit length, then weight-normalised prototypes; `norm`: with batch norm.

    old: weight normalisation as torch.nn.utils.weight_norm stores it, else as torch.nn.utils.parametrizations does.
    """

    def __init__(self, norm: bool, old: bool):
        super().__init__()
        between = [nn.BatchNorm1d(10)] if norm else []
        self.mlp = nn.Sequential(
            nn.Linear(D, 10), *between, nn.GELU(), nn.Linear(10, 10), *between, nn.GELU(), nn.Linear(10, 6)
        )
        wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        self.last_layer = wrap(nn.Linear(6, 11, bias=False))

    def bottleneck(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(x))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("old", [True, False])
def test_a_dino_head_gives_bottleneck_and_prototypes_for_both_kinds_of_weight_norm(old: bool, norm: bool) -> None:
    view, dense = DinoHead(norm, old), DinoHead(norm, old)
    tensors = saved(view, "head") | saved(dense, "head_dense", 1) | {"dino_loss.center": torch.ones(1, 11)}
    assert any(("weight_g" in key) == old for key in tensors if "last_layer" in key)
    kept = heads.group_by_head(tensors)
    assert list(kept) == ["head", "head_dense"]
    x = torch.randn(7, D)
    for name, module in (("head", view.eval()), ("head_dense", dense.eval())):
        made, prototypes = heads.ProjectionHead(kept[name]), heads.prototypes(kept[name])
        assert prototypes is not None
        torch.testing.assert_close(made(x), module.bottleneck(x))
        torch.testing.assert_close(made(x) @ prototypes.T, module(x))


def test_prototypes_without_weight_norm_are_returned_unchanged() -> None:
    weight = torch.randn(11, 6)
    kept = heads.group_by_head({"head.mlp.0.weight": torch.randn(6, D), "head.last_layer.weight": weight})
    assert heads.prototypes(kept["head"]) is weight


def test_a_layer_that_is_neither_linear_nor_a_norm_is_refused_with_its_shapes() -> None:
    with pytest.raises(UserError, match=r"layer 0 of the head is neither linear nor a norm \(weight \(4, 3, 1, 1\)\)"):
        heads.ProjectionHead({"0.weight": torch.zeros(4, 3, 1, 1)})


WRONG_HEADS = {
    "no layer before the prototypes": {"last_layer.weight": torch.zeros(3, 2)},
    "a bias of another length": {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4)},
    "a tensor that no layer has": {"0.weight": torch.zeros(3, 2), "0.gamma": torch.zeros(3)},
    "statistics without a dimension": {"0.running_mean": torch.tensor(1.0)},
    "a norm with statistics of another length": {"0.weight": torch.zeros(3), "0.running_mean": torch.zeros(4)},
}


@pytest.mark.parametrize("name", WRONG_HEADS)
def test_tensors_that_form_no_head_are_refused_in_words(name: str) -> None:
    with pytest.raises(UserError, match="head"):
        heads.ProjectionHead(WRONG_HEADS[name])


@pytest.mark.parametrize("length", [None, torch.zeros(5), torch.zeros(3, 2)])
def test_prototypes_whose_lengths_are_missing_or_of_another_number_are_refused(length: torch.Tensor | None) -> None:
    for g, v in (("weight_g", "weight_v"), *[[f"parametrizations.weight.original{n}" for n in (0, 1)]]):
        tensors = {f"last_layer.{v}": torch.ones(3, 2)} | ({} if length is None else {f"last_layer.{g}": length})
        with pytest.raises(UserError, match=f"prototypes last_layer.{v} lack a last_layer.{g} of one number for each"):
            heads.prototypes(tensors)


# ---------------------------------------------------------------- a model's own heads

BARE = "convnet:channels=4+8"


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """file(**{"fc": module}) -> the spec of a teacher whose checkpoint also holds these heads."""

    def save_teacher(**modules: nn.Module) -> str:
        torch.manual_seed(3)
        state = OrderedDict(build(BARE, image_size=8).backbone.state_dict())
        for name, module in modules.items():
            state |= saved(module, name)
        torch.save(state, tmp_path / "teacher.pth")
        return f"{BARE},weights={tmp_path / 'teacher.pth'}"

    return save_teacher


def images() -> Tensor:
    return torch.rand(3, 3, 8, 8)


def test_a_teacher_projects_and_classifies_with_the_heads_of_its_file(file: Callable[..., str]) -> None:
    moco, fc = MOCO(), nn.Linear(D, 4)
    projecting = build(f"{file(fc=moco)},head=fc", image_size=8).enable_outputs(("projection",)).eval()
    classifying = build(f"{file(fc=fc)},head=fc", image_size=8).enable_outputs(("logits",)).eval()
    assert (projecting.shapes["projection"], classifying.shapes["logits"]) == ((5,), (4,))
    made = projecting.forward_outputs(images(), ("embedding", "projection"))
    torch.testing.assert_close(made["projection"], moco(made["embedding"]))
    made = classifying.forward_outputs(images(), ("logits", "embedding"))
    assert list(made) == ["logits", "embedding"]
    torch.testing.assert_close(made["logits"], fc(made["embedding"]))


def test_the_pretrained_classifier_is_built_only_when_logits_are_enabled() -> None:
    builds: list[int] = []
    layer = nn.Linear(8, 4)
    body = build(BARE, image_size=8).backbone
    network = Network(body, "known", replace(IMAGENET, size=8), classifier=lambda: (builds.append(1), layer)[1])
    embedder = Embedder(network)
    assert not builds
    made = embedder.enable_outputs(("logits",)).eval().forward_outputs(images(), ("embedding", "logits"))
    torch.testing.assert_close(made["logits"], layer(made["embedding"]))
    assert builds == [1]
    assert {name: tuple(t.shape) for name, t in embedder.head_tensors().items()} == {
        "logits.weight": (4, 8), "logits.bias": (4,)
    }  # fmt: skip


def test_a_projector_of_the_model_itself_is_its_projection_and_its_tensors_are_kept() -> None:
    body = build(BARE, image_size=8).backbone
    body.projector = MOCO()
    embedder = Embedder(Network(body, "own", replace(IMAGENET, size=8))).enable_outputs(("projection",)).eval()
    made = embedder.forward_outputs(images(), ("embedding", "projection"))
    torch.testing.assert_close(made["projection"], body.projector(made["embedding"]))
    kept = heads.group_by_head(embedder.head_tensors())
    torch.testing.assert_close(heads.ProjectionHead(kept["projection"])(made["embedding"]), made["projection"])


@pytest.mark.parametrize(
    ("modules", "options", "output", "message"),
    [
        ({}, "", "projection", "has no one projection: no head was set aside; .* as in weights=FILE,head=fc"),
        ({"fc": MOCO(), "g": MOCO()}, ",head=fc+g", "projection", r"head= set 2 heads aside \(fc, g\)"),
        (
            {},
            "",
            "logits",
            "has no classifier: .* or name the linear layer in the weights' file, as in weights=FILE,head=fc",
        ),
        ({"fc": MOCO()}, ",head=fc", "logits", "has no classifier"),
        ({}, "", "colours", "a model has no output 'colours'. Known: embedding, projection, logits, regions"),
    ],
)
def test_an_output_that_a_teacher_lacks_is_refused_with_a_remedy(
    modules: dict[str, nn.Module], options: str, output: str, message: str, file: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match=message):
        build(file(**modules) + options, image_size=8).enable_outputs((output,))


def patches(body: Any, x: Tensor) -> Tensor:
    """Patch tokens of the last layer of a timm ViT, from timm's own interface."""
    return body.get_intermediate_layers(x, n=1, norm=True)[0]


def cells(body: Any, x: Tensor) -> Tensor:
    """Cells of the last map (B, h, w, c) of a timm Swin, one by one."""
    grid = body.forward_features(x)
    return torch.stack([grid[:, row, column] for row in range(grid.shape[1]) for column in range(grid.shape[2])], 1)


def pixels(body: Any, x: Tensor) -> Tensor:
    """Cells of the last map (B, c, h, w) of a ResNet, one by one."""
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = getattr(body, name)(x)
    return torch.stack([x[:, :, row, column] for row in range(x.shape[2]) for column in range(x.shape[3])], 1)


@pytest.mark.parametrize(
    ("spec", "size", "shape", "reference"),
    [
        ("timm:vit_tiny_patch16_224,depth=1", 32, (4, 192), patches),
        ("timm:vit_small_patch14_reg4_dinov2,depth=1", 28, (4, 384), patches),  # 4 register tokens are no regions
        ("timm:swin_tiny_patch4_window7_224", 64, (4, 768), cells),
        ("torchvision:resnet18", 64, (4, 512), pixels),
    ],
)
def test_regions_are_the_tokens_of_patches_or_the_cells_of_the_last_map(
    spec: str, size: int, shape: tuple[int, int], reference: Callable[..., Tensor]
) -> None:
    embedder = build(spec, image_size=size, pretrained_default=False).enable_outputs(("regions",)).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        made = embedder.forward_outputs(x, ("embedding", "regions"))
        torch.testing.assert_close(made["regions"], reference(embedder.backbone, x))
        torch.testing.assert_close(made["embedding"], embedder(x))
    assert embedder.shapes["regions"] == shape


# ---------------------------------------------------------------- exported and stored


def export(teacher: str, out: Path, **flags: Any) -> FeatureStore:
    default = {"views": 2, "image_size": 8, "limit": 24, "batch_size": 8, "workers": 0, "device": "cpu"}
    export_teacher.run(export_teacher.Config("digits", teacher, out, **{**default, **flags}))
    return FeatureStore(Folder(out))


def test_the_stored_projection_is_the_stored_head_applied_to_the_stored_embedding(
    file: Callable[..., str], tmp_path: Path
) -> None:
    module = HEADS["swav"]()
    teacher = f"{file(projection_head=module)},head=projection_head"
    store = export(teacher, tmp_path / "store", keep="embedding,projection", codec="float32", local_views=2)
    assert store.arrays == {"embedding": (8,), "projection": (5,), "local_embedding": (8,), "local_projection": (5,)}
    kept = teacher_heads.load_heads(store)
    assert {name: t.tolist() for name, t in kept.items()} == {
        f"projection_head.{name}": t.tolist() for name, t in module.state_dict().items()
    }
    assert safetensors.torch.load_file(tmp_path / "store/heads.safetensors").keys() == kept.keys()
    head = heads.ProjectionHead(heads.group_by_head(kept)["projection_head"])
    for kind, views in (("", range(2)), ("local_", store.other_views)):
        for view in views:
            embedding, projection = (store.read(f"{kind}{name}", view) for name in ("embedding", "projection"))
            with torch.no_grad():
                np.testing.assert_allclose(head(torch.from_numpy(embedding)).numpy(), projection, rtol=1e-4, atol=1e-5)


def test_damaged_heads_are_detected_and_repaired(file: Callable[..., str], tmp_path: Path) -> None:
    store = export(f"{file(fc=MOCO())},head=fc", tmp_path / "store", keep="embedding,projection")
    kept, path = teacher_heads.load_heads(store), tmp_path / "store/heads.safetensors"
    whole = path.read_bytes()
    for damage in (whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:], whole[:5], b"", None):
        path.write_bytes(damage) if damage is not None else path.unlink()
        with pytest.raises(UserError, match="heads.safetensors is damaged; compress verify --repair"):
            teacher_heads.load_heads(store)
        verify.run(verify.Config(str(tmp_path / "store"), sample=0, repair=True))
        assert path.read_bytes() == whole and teacher_heads.load_heads(store).keys() == kept.keys()


def test_a_partial_copy_with_another_codec_keeps_local_crops_and_heads_and_a_run_finds_them(
    file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"{file(head=DinoHead(False, False))},head=head"
    how: dict[str, Any] = {"keep": "embedding,regions", "views": 3, "local_views": 2, "image_size": 16}
    source = export(spec, tmp_path / "source", codec="float32", **how)
    store_copy.run(store_copy.Config(str(tmp_path / "source"), str(tmp_path / "part"), images="::2", codec="pq:4"))
    part, rows = FeatureStore(Folder(tmp_path / "part")), np.arange(0, 24, 2)
    assert part.identity.codec == "pq:4" and part.other_views == source.other_views
    for name, view in [("embedding", 1), ("regions", 0), *(("local_embedding", view) for view in part.other_views)]:
        want, got = source.read(name, view)[rows], part.read(name, view)
        assert (F.cosine_similarity(torch.from_numpy(want), torch.from_numpy(got), dim=-1) > 0.99).all()
    found: list[Any] = []

    def record_context(*parts: Any, **more: Any) -> MethodContext:
        found.append(MethodContext(*parts, **more))
        return found[-1]

    monkeypatch.setattr("compress_ssl.pipeline.training.build_learners.MethodContext", record_context)
    run = {"steps": 2, "batch_size": 4, "image_size": 16, "workers": 0, "device": "cpu"}
    distill.run(distill.Config(str(tmp_path / "part"), (BARE,), "esvit:crops=0", tmp_path / "run", **run))  # type: ignore[arg-type]
    kept = teacher_heads.load_heads(source)
    assert kept and {name: t.tolist() for name, t in found[0].heads.items()} == {
        name: t.tolist() for name, t in kept.items()
    }


def test_logits_and_regions_are_kept_and_pool_to_the_embedding(file: Callable[..., str], tmp_path: Path) -> None:
    fc = nn.Linear(8, 3)
    teacher = f"{file(fc=fc)},head=fc"
    store = export(teacher, tmp_path / "store", keep="logits,regions", codec="float32", image_size=16)
    assert store.arrays == {"embedding": (8,), "logits": (3,), "regions": (16, 8)}
    embedding = torch.from_numpy(store.read("embedding", 1))
    np.testing.assert_allclose(store.read("logits", 1), fc(embedding).detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(store.read("regions", 1).mean(1), embedding.numpy(), rtol=1e-4, atol=1e-5)


def test_a_changed_head_makes_another_store(file: Callable[..., str], tmp_path: Path) -> None:
    module = MOCO()
    export(f"{file(fc=module)},head=fc", tmp_path / "store", keep="embedding,projection")
    with torch.no_grad():
        module[0].weight.add_(1)
    state = torch.load(tmp_path / "teacher.pth")
    torch.save({**state, "fc.0.weight": module[0].weight}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="teacher.heads is .* there, .* asked"):
        export(f"{BARE},weights={tmp_path / 'teacher.pth'},head=fc", tmp_path / "store", keep="embedding,projection")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("embedding,projection", "no head was set aside; .* weights=FILE,head=fc"),
        ("embedding,logits", "has no classifier"),
        ("embedding,projections", "there is no output 'projections'; did you mean 'projection'"),
    ],
)
def test_keeping_an_output_that_a_teacher_lacks_is_refused_and_nothing_is_written(
    keep: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(f"{BARE},pretrained=false", tmp_path / "store", keep=keep)
    assert not (tmp_path / "store").exists()
