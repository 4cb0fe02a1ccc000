"""`Network`: what one kind of model (timm, torchvision, ...) returns before it is wrapped as an Embedder."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from compress_ssl.pipeline.models.pooling import Pool
from compress_ssl.pipeline.models.selection import CheckpointFormat
from compress_ssl.pipeline.views.preprocessing import Preprocessing


@dataclass
class Network:
    """A bare library module without its classifier, and what its library knows about it.

    Callables that are attributes of a Network must be picklable, because an Embedder is copied and pickled.
    """

    module: nn.Module
    """The network. Its state dict has the names that the library itself uses."""

    name: str
    """Name for files and tables, for example `timm-resnet18`."""

    preprocessing: Preprocessing

    trained: bool = False
    """Whether `module` already holds trained weights."""

    checkpoint_format: Callable[[], CheckpointFormat] = CheckpointFormat
    """Returns how the library's checkpoint files differ from `module`.

    It is called only when a file is loaded, because it may build the network a second time.
    """

    features: Callable[[nn.Module, Tensor], Tensor] | None = None
    """(module, images (B, 3, S, S)) -> output before pooling; None: the module itself is called."""

    regions: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None
    """(module, images (B, 3, S, S)) -> (regions (B, R, c), output before pooling); None: the last map is searched."""

    classifier: Callable[[], nn.Module] | None = None
    """Returns the trained layer that was removed from `module`; called only when logits are kept."""

    pool: Pool | None = None
    """What remains to be pooled, when the kind has applied the user's pool= itself; None: nothing was applied."""
