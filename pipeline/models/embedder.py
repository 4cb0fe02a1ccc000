"""`Embedder`: a teacher or student as the rest of the code uses it. Pixels in, one pooled embedding per image out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.models import OUTPUTS, heads, regions
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.models.pooling import Pool, pool_output
from compress_ssl.pipeline.models.selection import State
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception

T = TypeVar("T")


class Embedder(nn.Module):
    """A backbone with its preprocessing, its pooling and, if enabled, frozen heads.

    The widths of all outputs are measured by a forward pass and not taken from a table. The state dict of
    `backbone` has the names that the backbone's own library gives to the model without classifier.

    Attributes: `spec`, the text the model was built from; `name`, a name for files; `keys_in_head`, the tensors
    of the weights' file that head= put aside, by name; `shapes`, for each enabled output the shape of one
    image's output.
    """

    # ---------------------------------------------------------------- building

    def __init__(self, network: Network, pool: Pool = "auto", keys_in_head: State | None = None):
        """Raises UserError if the network cannot process an image of its own input size."""
        super().__init__()
        self.spec = network.name
        self.name = network.name
        self.backbone = network.module
        self.preprocessing = network.preprocessing
        self.keys_in_head = keys_in_head or {}
        self.heads = nn.ModuleDict()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._network = network
        self._pool = pool
        self._last_map = regions.OUTPUT_IS_THE_MAP  # name of a submodule; used if the network has no `regions`
        self.enable_outputs(("embedding",))

    @property
    def width(self) -> int:
        """d, the number of dimensions of the embedding."""
        return self.shapes["embedding"][0]

    def enable_outputs(self, names: Sequence[str]) -> "Embedder":
        """Enable further outputs and record their shapes. Returns the embedder itself.

        Raises UserError for a name that is not in OUTPUTS and for an output that this model lacks.
        """
        for name in names:
            if name in self.shapes:
                continue
            if name not in OUTPUTS:
                raise UserError(f"a model has no output {name!r}. Known: {', '.join(OUTPUTS)}")
            if name in ("projection", "logits"):
                head = self._build_projection() if name == "projection" else self._build_classifier()
                self.heads[name] = head.to(self._device())
            if name == "regions" and not self._network.regions:
                self._last_map = self._find_last_map()
            self.shapes[name] = self._measure_shape(name)
        return self

    def require_size(self, size: int, flag: str) -> None:
        """Check that the model also takes images of side `size` (pixels), which the command-line `flag` asks for.

        Raises UserError if it does not, or if the embedding then has another width. A ViT of timm may need
        dynamic_img_size=true.
        """
        try:
            width = self._forward_black_images(self, size).shape[1]
        except UserError as error:
            what = str(error).partition(";")[0]
            raise UserError(
                f"{what}; choose another {flag}, or build the model so that it takes images of any size "
                "(many models of timm: dynamic_img_size=true)"
            ) from None
        if width != self.width:
            raise UserError(
                f"{self.name} has {width} dimensions for images of {size} pixels and {self.width} for its own size; "
                f"choose another {flag}"
            )

    # ---------------------------------------------------------------- forward

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, 3, S, S) -> normalised float32 of the same shape, memory format and device."""
        mean = torch.tensor(self.preprocessing.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.preprocessing.std, device=pixels.device).view(3, 1, 1)
        return (pixels / 255).sub_(mean).div_(std)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> embedding (B, d)."""
        return self.forward_outputs(images)["embedding"]

    def forward_outputs(self, images: Tensor, names: Sequence[str] = ("embedding",)) -> dict[str, Tensor]:
        """Several outputs of one forward pass over normalised images (B, 3, S, S), in the order of `names`.

        embedding (B, d); regions (B, R, c), the last map before pooling; projection (B, P) and logits (B, C),
        frozen heads applied to the embedding. All but the embedding must be enabled first: `enable_outputs`.
        """
        outputs: dict[str, Tensor] = {}
        if "regions" in names:
            out, outputs["regions"] = self._forward_with_regions(images)
        else:
            out = self._forward_backbone(images)
        outputs["embedding"] = pool_output(out, self._pool)
        for name in names:
            if name in self.heads:
                outputs[name] = self.heads[name](outputs["embedding"])
        return {name: outputs[name] for name in names}

    def _forward_backbone(self, images: Tensor) -> Tensor:
        """The backbone's output before pooling. Raises UserError if it is not one tensor."""
        features = self._network.features
        out = features(self.backbone, images) if features else self.backbone(images)
        if not isinstance(out, Tensor):
            raise UserError(f"the model returns a {type(out).__name__}, not one tensor; wrap it in a python: factory")
        return out

    def _forward_with_regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the output before pooling, regions (B, R, c))"""
        if self._network.regions:
            tokens, out = self._network.regions(self.backbone, images)
            return out, tokens
        return regions.forward_with_regions(self.backbone, self._last_map, lambda: self._forward_backbone(images))

    # ---------------------------------------------------------------- tensors

    # Names of the first version, which methods of users may call.
    def equip(self, names: Sequence[str]) -> "Embedder":
        return self.enable_outputs(names)

    def outputs(self, images: Tensor, names: Sequence[str] = ("embedding",)) -> dict[str, Tensor]:
        return self.forward_outputs(images, names)

    def head_tensors(self) -> State:
        """Tensors of the frozen heads, by name.

        Heads from the weights' file keep the names of that file; a head of the library is called `logits.*`
        and the network's own projector `projection.*`.
        """
        tensors = dict(self.keys_in_head)
        for name, head in self.heads.items():
            if not isinstance(head, heads.ProjectionHead):  # a ProjectionHead was built from keys_in_head
                tensors |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
        return tensors

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and bytes of the backbone's tensors, in hexadecimal."""
        return state_digest(self.backbone.state_dict())

    # ---------------------------------------------------------------- heads

    def _build_projection(self) -> nn.Module:
        """The one projection head of the weights' file, else the backbone's own `projector`."""
        groups = heads.group_by_head(self.keys_in_head)
        candidates = {name: tensors for name, tensors in groups.items() if "dense" not in name}  # EsViT: head_dense
        own = getattr(self.backbone, "projector", None)
        if not candidates and isinstance(own, nn.Module):
            return own
        if len(candidates) == 1:
            return heads.ProjectionHead(next(iter(candidates.values())))
        found = f"head= set {len(candidates)} heads aside ({', '.join(candidates)})"
        raise UserError(
            f"{self.name} has no one projection: {found if candidates else 'no head was set aside'}; name the "
            "projection head in the weights' file, as in weights=FILE,head=fc"
        )

    def _build_classifier(self) -> nn.Module:
        """The classifier that was removed from the backbone, else the one linear layer that head= put aside."""
        if self._network.classifier:
            return heads.frozen_classifier(self._network.classifier())
        groups = heads.group_by_head(self.keys_in_head).values()
        linear = [tensors for tensors in groups if tensors.keys() <= {"0.weight", "0.bias"}]
        if len(linear) != 1:
            raise UserError(
                f"{self.name} has no classifier: take pretrained weights that come with one, or name the linear layer "
                "in the weights' file, as in weights=FILE,head=fc"
            )
        return heads.ProjectionHead(linear[0])

    # ---------------------------------------------------------------- probing

    def _device(self) -> torch.device:
        """The device of the backbone's tensors; the CPU for a backbone without any."""
        return next((tensor.device for tensor in self.backbone.state_dict().values()), torch.device("cpu"))

    def _find_last_map(self) -> str:
        """Name of the submodule that returns the last map. Raises UserError if there is no map."""

        def search(images: Tensor) -> str | None:
            return regions.find_last_map(self.backbone, lambda: self._forward_backbone(images))

        name = self._forward_black_images(search)
        if name is None:
            raise UserError(f"{self.name} yields no map of regions; keep embedding only, or take another model")
        return name

    def _measure_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one image's output. Raises UserError if two images do not give two floating-point rows."""
        out = self._forward_black_images(lambda images: self.forward_outputs(images, (name,))[name])
        if out.shape[:1] != (2,) or not out.is_floating_point():
            raise UserError(
                f"{self.name} turns 2 images into {out.dtype} {tuple(out.shape)}, but must return floating-point "
                "numbers of shape (2, d); wrap it in a python: factory"
            )
        return tuple(out.shape[1:])

    @torch.no_grad()
    def _forward_black_images(self, forward: Callable[[Tensor], T], size: int | None = None) -> T:
        """Result of `forward` on two black images (2, 3, size, size), normalised; size: None for the model's own.

        It runs in evaluation mode, so that statistics of batch norm do not change, and restores the mode of
        every submodule. Raises UserError, with the model's name, for every exception.
        """
        size = size or self.preprocessing.size
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return forward(self.prepare(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=self._device())))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        except Exception as error:  # any library may raise anything for an image size it cannot process
            raise UserError(
                f"{self.name} cannot take images of {size} pixels ({describe_exception(error)}); "
                "choose another --image-size (or size=)"
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in hexadecimal. The memory format does not matter."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
