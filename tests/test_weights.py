"""Checkpoints as other projects write them: read without running code, loaded completely or not at all."""

import argparse
import functools
import os
import pickle
import pkgutil
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models import timm as timm_kind
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.selection import CheckpointFormat, Selection, matches
from compress_ssl.pipeline.models.torchvision import resized
from compress_ssl.pipeline.models.weights import load, read
from compress_ssl.pipeline.runtime.errors import UserError

CNN = "torchvision:shufflenet_v2_x0_5"
VIT = "timm:vit_tiny_patch16_224,depth=2"


pytestmark = pytest.mark.usefixtures("one_thread")


def cnn(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return torchvision.models.shufflenet_v2_x0_5().state_dict()


def vit(seed: int, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", depth=2, **options).state_dict()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def headless(state: dict[str, Tensor], head: str = "fc") -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(f"{head}.")}


def mlp(head: str, layers: tuple[int, ...] = (0, 2)) -> dict[str, Tensor]:
    return {f"{head}.{layer}.{kind}": torch.randn(4, 4) for layer in layers for kind in ("weight", "bias")}


def save(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


def assert_holds(model: Embedder, state: dict[str, Tensor]) -> None:
    own = model.backbone.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)


def advice(text: str) -> list[str]:
    """The options that an error text suggests."""
    return re.sub(r".*Try ", "", text).split(" or ")


def refused(spec: str) -> list[str]:
    """The options that the error suggests when a spec is refused."""
    with pytest.raises(UserError, match="Nothing was loaded") as caught:
        build(spec, image_size=32)
    return advice(str(caught.value))


@pytest.fixture(scope="module")
def moco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoders = [under(f"module.encoder_{which}.", headless(cnn(seed)) | mlp("fc")) for seed, which in enumerate("qk")]
    state = encoders[0] | encoders[1] | {"module.queue": torch.randn(128, 16), "module.queue_ptr": torch.zeros(1)}
    checkpoint = {
        "epoch": 200,
        "arch": "shufflenet",
        "best_acc1": torch.tensor(0.0),
        "state_dict": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 0.03}]},
    }
    return save(tmp_path_factory.mktemp("moco") / "moco_v2_200ep.pth.tar", checkpoint)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = {
        "student": under("module.backbone.", headless(vit(0), "head")) | under("module.", mlp("head.mlp")),
        "teacher": under("backbone.", headless(vit(1), "head")) | mlp("head.mlp"),
        "dino_loss": {"center": torch.zeros(1, 8)},
        "args": argparse.Namespace(arch="vit_tiny"),
        "epoch": 100,
    }
    return save(tmp_path_factory.mktemp("dino") / "dino_full_checkpoint.pth", checkpoint)


def test_a_moco_checkpoint_is_refused_and_the_suggested_options_load_it(moco: Path) -> None:
    query, key = refused(f"{CNN},weights={moco}")
    assert query == "key=state_dict,prefix=module.encoder_q.,drop=fc"
    assert key == "key=state_dict,prefix=module.encoder_k.,drop=fc"
    for seed, advised in enumerate((query, key)):
        model = build(f"{CNN},weights={moco},{advised}", image_size=32)
        assert_holds(model, headless(cnn(seed)))


def test_a_two_layer_head_is_not_mistaken_for_the_librarys_classifier(moco: Path) -> None:
    assert "drop=fc" in refused(f"{CNN},weights={moco},prefix=module.encoder_q.")[0]


def test_tensors_that_match_head_are_returned_separately(moco: Path) -> None:
    model = build(f"{CNN},weights={moco},prefix=module.encoder_q.,head=fc", image_size=32)
    assert_holds(model, headless(cnn(0)))
    assert sorted(model.keys_in_head) == ["fc.0.bias", "fc.0.weight", "fc.2.bias", "fc.2.weight"]


def test_a_dino_checkpoint_is_refused_and_the_suggested_options_load_it(dino: Path) -> None:
    student, teacher = refused(f"{VIT},weights={dino}")
    assert teacher == "key=teacher,prefix=backbone."
    assert student == "key=student,prefix=module.backbone."
    for seed, advised in enumerate((student, teacher)):
        model = build(f"{VIT},weights={dino},{advised}", image_size=224)
        assert_holds(model, headless(vit(seed), "head"))


def test_a_head_beside_the_backbone_is_found_by_its_full_name(dino: Path) -> None:
    model = build(f"{VIT},weights={dino},key=teacher,prefix=backbone.,head=head", image_size=224)
    assert len(model.keys_in_head) == 4
    assert all(key.startswith("head.mlp.") for key in model.keys_in_head)


def test_a_misspelt_key_is_refused_with_the_nearest_one(dino: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        build(f"{VIT},weights={dino},key=techer", image_size=32)


def test_a_simsiam_checkpoint_is_refused_and_the_suggested_options_load_it(tmp_path: Path) -> None:
    encoder = under("module.encoder.", headless(cnn(3)) | mlp("fc", (0, 1, 3, 4, 6)))
    state = encoder | under("module.predictor.", mlp("0", (0, 3)))
    file = save(tmp_path / "simsiam.pth.tar", {"state_dict": state, "epoch": 99})
    (advised,) = refused(f"{CNN},weights={file}")
    assert advised == "key=state_dict,prefix=module.encoder.,drop=fc"
    assert_holds(build(f"{CNN},weights={file},{advised}", image_size=32), headless(cnn(3)))


def test_a_plain_torchvision_state_dict_loads_with_its_file_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    model = build(f"torchvision:resnet18,weights={save(tmp_path / 'resnet18.pth', state)}", image_size=32)
    assert_holds(model, headless(state))


def test_a_plain_timm_state_dict_loads_with_its_file_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("levit_128s").state_dict()  # it has two classifiers of batch norm and a linear layer
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model = build(f"timm:levit_128s,weights={tmp_path / 'model.safetensors'}")
    bare = timm.create_model("levit_128s", num_classes=0)
    assert_holds(model, {key: state[key] for key in bare.state_dict()})


@pytest.mark.parametrize("size", [96, 224])
def test_a_timm_vit_is_resized_by_timms_own_filter(tmp_path: Path, size: int) -> None:
    state = vit(5)
    model = build(f"{VIT},weights={save(tmp_path / 'vit.pth', {'model': state})}", image_size=size)
    positions = model.backbone.get_parameter("pos_embed")
    assert positions.shape[1] == 1 + (size // 16) ** 2
    assert torch.equal(positions[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(positions, state["pos_embed"]) is (size == 224)


def test_a_torchvision_vit_is_resized_by_torchvisions_own_function(tmp_path: Path) -> None:
    small, large = (VisionTransformer(size, 16, 1, 2, 32, 64) for size in (32, 64))
    file = save(tmp_path / "vit.pth", small.state_dict())
    load(large, file, name="vit", checkpoint_format=CheckpointFormat(translate=functools.partial(resized, large)))
    assert torch.equal(large.encoder.pos_embedding[:, 0], small.encoder.pos_embedding[:, 0])
    assert torch.equal(large.conv_proj.weight, small.conv_proj.weight)


def test_an_old_checkpoint_is_translated_by_the_filter_of_its_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    state = timm.create_model("deit3_small_patch16_224", **options).state_dict()
    old = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in state.items()}
    assert old.keys() != state.keys()
    keys = ",".join(f"{key}={value}" for key, value in options.items())
    model = build(f"timm:deit3_small_patch16_224,{keys},weights={save(tmp_path / 'deit3.pth', old)}")
    assert_holds(model, headless(state, "head"))


@pytest.mark.parametrize(
    ("name", "function", "bound"),
    [
        ("resnet18", None, {}),
        ("densenet121", "densenet._filter_torchvision_pretrained", {}),
        ("regnety_002", "regnet._filter_fn", {}),
        ("vit_tiny_patch16_224", "vision_transformer.checkpoint_filter_fn", {}),
        ("vit_tiny_patch16_224.augreg_in21k", "vision_transformer.checkpoint_filter_fn", {}),
        ("vit_small_resnet26d_224", "vision_transformer_hybrid.checkpoint_filter_fn", {}),  # its backbone has no filter
        ("vitamin_small_224", "vision_transformer.checkpoint_filter_fn", {}),
        ("deit3_small_patch16_224", "vision_transformer.checkpoint_filter_fn", {"adapt_layer_scale": True}),
        (
            "flexivit_small",
            "vision_transformer.checkpoint_filter_fn",
            {"interpolation": "bilinear", "antialias": False},
        ),
    ],
)
def test_timms_filter_is_found_without_a_download_and_without_changing_timm(
    name: str, function: str | None, bound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_download(*_: Any, **__: Any) -> None:
        raise AssertionError("timm tried to download weights")

    for loader in ("load_state_dict_from_url", "load_state_dict_from_hf", "download_cached_file"):
        monkeypatch.setattr(f"timm.models._builder.{loader}", refuse_download)
    before = dict(vars(sys.modules["timm.models._builder"]))
    with torch.device("meta"):
        timm_kind._create(name, None, recorder := timm_kind._FilterRecorder(), {}, classes=1000)
    found: Any = recorder.filter
    assert vars(sys.modules["timm.models._builder"]) == before
    assert getattr(found, "keywords", {}) == bound
    assert getattr(found, "func", found) is (pkgutil.resolve_name(f"timm.models.{function}") if function else None)


def test_a_data_parallel_prefix_is_removed_only_with_prefix(tmp_path: Path) -> None:
    file = save(tmp_path / "ddp.pth", under("module.", cnn(0)))
    assert refused(f"{CNN},weights={file}") == ["prefix=module."]
    assert_holds(build(f"{CNN},weights={file},prefix=module.", image_size=32), headless(cnn(0)))
    assert_holds(build(f"{CNN},weights={file},prefix=module", image_size=32), headless(cnn(0)))


def test_a_file_with_two_sets_of_weights_that_fit_is_refused_with_their_keys(tmp_path: Path) -> None:
    file = save(tmp_path / "both.pth", {"state_dict": cnn(0), "state_dict_ema": cnn(1)})
    with pytest.raises(UserError, match="key=state_dict, key=state_dict_ema"):
        build(f"{CNN},weights={file}", image_size=32)
    assert_holds(build(f"{CNN},weights={file},key=state_dict_ema", image_size=32), headless(cnn(1)))


def test_a_checkpoint_of_another_network_is_refused_with_shapes_and_without_suggestions(tmp_path: Path) -> None:
    file = save(tmp_path / "wide.pth", torchvision.models.shufflenet_v2_x1_0().state_dict())
    with pytest.raises(UserError, match=r"have another shape \(.* there, .* wanted, .*another network\?"):
        build(f"{CNN},weights={file}", image_size=32)


def test_a_refused_file_does_not_change_the_module(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    file = save(tmp_path / "half.pth", {"weight": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=r"1 of 2 tensors are missing \(bias\)"):
        load(module, file, name="linear")
    assert torch.equal(module.weight, before)


def test_a_tensor_that_drop_matches_is_still_loaded_if_the_module_has_it(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    content = {"weight": torch.zeros(2, 3), "bias": torch.ones(2), "weight_norm": torch.ones(1)}
    load(module, save(tmp_path / "f.pth", content), name="linear", selection=Selection(drop=("weight*",)))
    assert not module.weight.any()


def test_a_pattern_is_the_beginning_of_a_name_up_to_a_dot_or_a_glob() -> None:
    assert matches("fc.0.weight", ["fc"])
    assert matches("fc.0.weight", ["head", "fc."])
    assert matches("module.queue", ["*queue*"])
    assert not matches("fc_norm.weight", ["fc"])


def test_a_head_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "plain.pth", nn.Linear(3, 2).state_dict())
    with pytest.raises(UserError, match="nothing matches head=fc"):
        load(nn.Linear(3, 2), file, name="linear", selection=Selection(head=("fc",)))


def test_files_without_num_batches_tracked_can_be_loaded(tmp_path: Path) -> None:
    state = {key: value for key, value in cnn(0).items() if not key.endswith("num_batches_tracked")}
    model = build(f"{CNN},weights={save(tmp_path / 'old.pth', state)}", image_size=32)
    assert torch.equal(model.backbone.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_selecting_tensors_without_a_file_is_refused() -> None:
    with pytest.raises(UserError, match="prefix=module. selects from a file of weights, and none is given"):
        build(f"{CNN},prefix=module.", image_size=32)


class CodeInPickle:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path: Path, how: str) -> None:
    file, content = tmp_path / "evil.pth", {"weight": torch.zeros(2), "extra": CodeInPickle(tmp_path / "mark")}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match=r"runs? code.*compress reads only tensors"):
        read(file)
    assert not (tmp_path / "mark").exists()


def test_a_pickled_module_is_refused_with_its_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch.nn.modules.linear.Linear"):
        read(save(tmp_path / "module.pth", nn.Linear(1, 1)))


@pytest.mark.parametrize("name", ["f.pth", "f.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_a_truncated_file_is_refused_as_damaged(tmp_path: Path, name: str, share: float) -> None:
    file, state = tmp_path / name, {"weight": torch.randn(1000)}
    if name.endswith("pth"):
        torch.save(state, file)
    else:
        safetensors.torch.save_file(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="is damaged"):
        read(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_files_that_are_no_checkpoint_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint\n" * 9)
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    for name, message in {
        "nowhere.pth": "does not exist",
        ".": "cannot be read: Is a directory",
        "text.pth": "is damaged",
        "script.pt": "name it as the model: torchscript:",
    }.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    with pytest.raises(UserError, match="holds a list"):
        read(save(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(UserError, match="no tensors by name"):
        load(nn.Linear(1, 1), save(tmp_path / "empty.pth", {"epoch": 3}), name="linear")


def test_safetensors_files_are_recognised_by_content_and_not_by_name(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "model.bin")
    assert read(tmp_path / "model.bin")["weight"].sum() == 2


def save_pickle(file: Path, content: bytes) -> Path:
    """A checkpoint in torch's format whose pickle is `content`."""
    torch.save({}, file)
    with zipfile.ZipFile(file) as saved:
        parts = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(file, "w") as changed:
        for name, data in parts.items():
            changed.writestr(name, content if name.endswith("data.pkl") else data)
    return file


KEY = b"X\x01\x00\x00\x00a"  # the text "a" in a pickle
PICKLES = {
    "dictionaries inside each other": b"\x80\x02" + (b"}" + KEY) * 50_000 + b"N" + b"s" * 50_000 + b".",
    "lists inside each other": b"\x80\x02}" + KEY + b"]" * 50_000 + b"N" + b"a" * 50_000 + b"s.",
    "tuples inside each other": b"\x80\x02}" + KEY + b"N" + b"\x85" * 50_000 + b"s.",
    "each dictionary twice in the next": b"\x80\x02}q\x00"
    + b"".join(b"}q%c(%sh%cX\x01\x00\x00\x00bh%cu" % (n, KEY, n - 1, n - 1) for n in range(1, 31))
    + b".",
    "a dictionary that contains itself": b"\x80\x02}q\x00" + KEY + b"h\x00s.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_checkpoint_without_end_is_refused_in_words(name: str, tmp_path: Path) -> None:
    file = save_pickle(tmp_path / "deep.pth", PICKLES[name])
    with pytest.raises(UserError, match="deep.pth holds (dictionaries more than 32 levels|no tensors by name)"):
        load(nn.Linear(1, 1), file, name="linear")
