"""A model as everybody here sees it: pixels in, one pooled embedding per image out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.models import heads, weights
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.views.preprocessing import Preprocessing

pass

OUTPUTS = ("embedding", "projection", "logits", "regions")  # of a model, and the arrays they are kept in
Pool = Literal["auto", "avg", "cls", "max", "none"]


@dataclass
class Network:
    """What a kind of model hands over: a bare library module and what its library knows about it."""

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    trained: bool = False  # its weights came with it
    checkpoint_format: Callable[[], weights.CheckpointFormat] = (
        weights.CheckpointFormat
    )  # asked only when a file is loaded: it may cost a build
    features: Callable[[nn.Module, Tensor], Tensor] | None = None  # instead of calling the module; must pickle
    regions: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None  # -> tokens (B, R, c), and the output
    classifier: Callable[[], nn.Module] | None = None  # the layer taken off, asked only when logits are kept
    pool: Pool | None = None  # what is left to pool, where the kind has seen to the user's pool= itself


class Embedder(nn.Module):
    """A backbone with its preprocessing and pooling; widths are probed, not assumed.

    The state dict of `backbone` is what its own library calls the model without classifier.
    """

    def __init__(self, network: Network, pool: Pool = "auto", keys_in_head: weights.State | None = None):
        super().__init__()
        self.spec = network.name
        self.name = network.name
        self.backbone = network.module
        self.preprocessing = network.preprocessing
        self.keys_in_head = keys_in_head or {}
        self.heads = nn.ModuleDict()
        self._network = network
        self._pool = pool
        self._map = ""  # the submodule whose output is a map, where the kind does not say
        self.shapes: dict[str, tuple[int, ...]] = {}  # of one image, by output
        self.enable_outputs(("embedding",))

    @property
    def width(self) -> int:
        """d of the embedding."""
        return self.shapes["embedding"][0]

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, 3, S, S) -> normalised float32 of the same shape, memory format and device."""
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return (pixels / 255).sub_(mean).div_(std)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, d)"""
        return self.forward_outputs(images)["embedding"]

    def forward_outputs(self, images: Tensor, names: Sequence[str] = ("embedding",)) -> dict[str, Tensor]:
        """What is asked for, from one pass: (B, 3, S, S) -> by name, in this order.

        embedding (B, d), regions (B, R, c): the last map before pooling, projection (B, P) and
        logits (B, C): frozen heads on the embedding. `equip` first for all but the embedding.
        """
        made: dict[str, Tensor] = {}
        if "regions" in names:
            out, made["regions"] = self._with_regions(images)
        else:
            out = self._output(images)
        made["embedding"] = pool_output(out, self._pool)
        for name in names:
            if name in self.heads:
                made[name] = self.heads[name](made["embedding"])
        return {name: made[name] for name in names}

    def enable_outputs(self, names: Sequence[str]) -> "Embedder":
        """Be ready for `outputs` of these names, and know their `shapes`. Raises UserError for what it has not."""
        for name in (name for name in names if name not in self.shapes):
            if name not in OUTPUTS:
                raise UserError(f"a model has no output {name!r}. Known: {', '.join(OUTPUTS)}")
            if name in ("projection", "logits"):
                head = self._projection() if name == "projection" else self._classifier()
                self.heads[name] = head.to(next(self.backbone.parameters()).device)
            if name == "regions" and not self._network.regions:
                self._map = self._find_map()
            self.shapes |= self._probe(name)
        return self

    def head_tensors(self) -> weights.State:
        """Tensors of the frozen heads: as the file named those set aside, `logits.*` and `projection.*` of others."""
        own = {name: head for name, head in self.heads.items() if not isinstance(head, heads.ProjectionHead)}
        built = {f"{name}.{k}": v for name, head in own.items() for k, v in head.state_dict().items()}
        return {**self.keys_in_head, **built}

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and bytes of the backbone's tensors, in hexadecimal."""
        return state_digest(self.backbone.state_dict())

    def _output(self, images: Tensor) -> Tensor:
        features = self._network.features
        return self._tensor(features(self.backbone, images) if features else self.backbone(images))

    def _tensor(self, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise UserError(f"the model returns a {type(out).__name__}, not one tensor; wrap it in a python: factory")
        return out

    def _with_regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the output before pooling, regions (B, R, c))"""
        if self._network.regions:
            regions, out = self._network.regions(self.backbone, images)
            return out, regions
        if not self._map:  # the output is the map itself
            out = self._output(images)
            return out, out.flatten(2).transpose(1, 2)
        seen: list[Tensor] = []
        hook = self.backbone.get_submodule(self._map).register_forward_hook(lambda _m, _i, out: seen.append(out))
        try:
            out = self._output(images)
        finally:
            hook.remove()
        return out, seen[-1].flatten(2).transpose(1, 2)

    def _find_map(self) -> str:
        """Name of the submodule that yields the last map (B, c, h, w), h * w > 1; "" if the output is one itself."""
        found: list[str] = []

        def note(name: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, out: Any) -> None:
                if isinstance(out, Tensor) and out.dim() == 4 and out.shape[2] * out.shape[3] > 1:
                    found.append(name)

            return hook

        named = [(name, module) for name, module in self.backbone.named_modules() if name]
        try:
            hooks = [module.register_forward_hook(note(name)) for name, module in named]
        except RuntimeError:
            hooks = []  # a TorchScript program lets nobody listen
        try:
            out = self._try(lambda images: self._output(images))
        finally:
            for hook in hooks:
                hook.remove()
        if out.dim() == 4 and out.shape[2] * out.shape[3] > 1:
            return ""
        if not found:
            raise UserError(f"{self.name} yields no map of regions; keep embedding only, or take another model")
        return found[-1]

    def _projection(self) -> nn.Module:
        own = getattr(self.backbone, "projector", None)
        kept = heads.group_by_head(self.keys_in_head)
        plain = {stem: tensors for stem, tensors in kept.items() if "dense" not in stem}
        if not plain and isinstance(own, nn.Module):
            return own
        if len(plain) != 1:
            what = f"head= set {len(plain)} heads aside ({', '.join(plain)})" if plain else "no head was set aside"
            raise UserError(
                f"{self.name} has no one projection: {what}; name the projection head in the weights' file, "
                "as in weights=FILE,head=fc"
            )
        return heads.ProjectionHead(next(iter(plain.values())))

    def _classifier(self) -> nn.Module:
        if self._network.classifier:
            return heads.frozen_classifier(self._network.classifier())
        kept = [t for t in heads.group_by_head(self.keys_in_head).values() if t.keys() <= {"0.weight", "0.bias"}]
        if len(kept) != 1:
            raise UserError(
                f"{self.name} has no classifier: take pretrained weights that come with one, or name the linear layer "
                "in the weights' file, as in weights=FILE,head=fc"
            )
        return heads.ProjectionHead(kept[0])

    def _probe(self, name: str) -> dict[str, tuple[int, ...]]:
        """{name: shape of one image's output}"""
        out = self._try(lambda images: self.forward_outputs(images, (name,))[name])
        if out.shape[:1] != (2,) or not out.is_floating_point():
            raise UserError(f"{self.name} turns 2 images into {out.dtype} {tuple(out.shape)}; wanted is float (2, d)")
        return {name: tuple(out.shape[1:])}

    @torch.no_grad()
    def _try(self, act: Callable[[Tensor], Tensor], size: int | None = None) -> Tensor:
        """One act on two black images in eval mode, which leaves batch-norm statistics alone. Raises UserError."""
        size, modes = size or self.preprocessing.size, [(module, module.training) for module in self.modules()]
        here = next((tensor.device for tensor in self.backbone.state_dict().values()), torch.device("cpu"))
        self.eval()
        try:
            return act(self.prepare(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=here)))
        except UserError as wrong:
            raise UserError(f"{self.name}: {wrong}") from None
        except Exception as wrong:  # any library, any reason: to the user it is one thing
            raise UserError(
                f"{self.name} cannot take images of {size} pixels ({describe_exception(wrong)}); "
                "choose another --image-size (or size=)"
            ) from wrong
        finally:
            for module, mode in modes:
                module.training = mode

    def require_size(self, size: int, flag: str) -> None:
        """Raises UserError if it cannot take images of that side too: a ViT may need dynamic_img_size=true."""
        try:
            width = self._try(lambda images: self(images), size).shape[1]
        except UserError as wrong:
            raise UserError(
                f"{str(wrong).partition(';')[0]}; choose another {flag}, or let the model take any (for many of "
                "timm's: dynamic_img_size=true)"
            ) from None
        if width != self.width:
            raise UserError(f"{self.name} has {width} dimensions at {size} pixels, {self.width} at its own size")


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def pool_output(out: Tensor, pool: Pool) -> Tensor:
    """A map (B, C, H, W), tokens (B, T, C) or a vector (B, d) -> (B, d). `auto` is the mean of a map.

    Raises UserError where there is nothing to pool, or tokens and no word on how.
    """
    if pool == "none" or (out.dim() == 2 and pool == "auto"):
        return out.flatten(1)
    if out.dim() == 4 and pool != "cls":
        return out.amax((2, 3)) if pool == "max" else out.mean((2, 3))
    if out.dim() == 3 and pool != "auto":
        return out[:, 0] if pool == "cls" else out.amax(1) if pool == "max" else out.mean(1)
    advice = {2: "leave pool= out", 3: "say pool=cls or pool=avg"}.get(out.dim(), "say pool=avg or pool=none")
    raise UserError(f"the model's output has shape {tuple(out.shape)}, which pool={pool} does not fit; {advice}")
