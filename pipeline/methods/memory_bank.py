"""MemoryBank: anchors of the last steps, slot j of every column being the same (i, v).

A ring of K slots. What can be read again from the store is not in the checkpoint; its (i, v) is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.models.precision import l2_normalize

Read = Callable[[Tensor, Tensor, str], Tensor]  # (n,) rows, (n,) views, array of the store -> (n, D) float32


class MemoryBank(nn.Module):
    """K slots with unit vectors in named columns, score first and push after the backward pass.

    columns: {name: width}; reread: {column: array of the store that `fill` takes it from}.
    Random slots are U(-s, s), s = sqrt(3 / d), so of expected norm 1 (the CompRess release's start).
    """

    rows: Tensor  # (K,) int64, -1 for a random slot
    views: Tensor  # (K,) int64

    def __init__(
        self, size: int, columns: Mapping[str, int], *, reread: Mapping[str, str] | None = None, seed: int = 0
    ):
        super().__init__()
        self.size, self.names, self.reread = size, tuple(columns), dict(reread or {})
        self.pointer = self.filled = 0
        self.register_buffer("rows", torch.full((size,), -1))
        self.register_buffer("views", torch.zeros(size, dtype=torch.int64))
        generator = torch.Generator().manual_seed(seed)
        for name, width in columns.items():
            reach = (3.0 / width) ** 0.5
            start = torch.empty(size, width).uniform_(-reach, reach, generator=generator)
            self.register_buffer(f"column_{name}", start, persistent=name not in self.reread)

    def __getitem__(self, name: str) -> Tensor:
        """(filled, width): the anchors there are."""
        return getattr(self, f"column_{name}")[: self.filled]

    def start(self, how: str, rows: Tensor | None = None, view: int = 0) -> None:
        """`empty`: anchors come with the first steps; `random`: K random ones; `store`: these (K,) rows."""
        if how == "empty":
            return
        self.filled = self.size
        if how == "store":
            assert rows is not None
            self.rows.copy_(rows[: self.size])
            self.views.fill_(view)

    def refill(self, read: Read, block: int = 8192) -> None:
        """Read the columns in `reread` again, for the slots that hold an (i, v)."""
        for name, array in self.reread.items():
            column = getattr(self, f"column_{name}")
            for slots in torch.nonzero(self.rows >= 0).flatten().split(block):
                column[slots] = l2_normalize(read(self.rows[slots], self.views[slots], array).to(column.device))

    @torch.no_grad()
    def push(self, rows: Tensor, views: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Overwrite the oldest slots with W vectors of each of B images: the images of all ranks.

        rows (B,), views (B, W), or (B,) for one of each; columns {name: (B * W, width) unit vectors}.
        """
        views = views.reshape(len(rows), -1)
        rows, columns = collectives.gather(rows), {name: _gather(columns[name], len(views)) for name in self.names}
        views = collectives.gather(views)
        rows, views = rows.repeat_interleave(views.shape[1]), views.flatten()
        n = min(len(rows), self.size)
        slots = (torch.arange(n, device=self.rows.device) + self.pointer) % self.size
        self.rows[slots], self.views[slots] = rows[-n:].to(self.rows), views[-n:].to(self.views)
        for name, column in columns.items():
            mine = getattr(self, f"column_{name}")
            mine[slots] = column[-n:].detach().to(mine)
        self.pointer = (self.pointer + n) % self.size
        self.filled = min(self.size, self.filled + n)

    def get_extra_state(self) -> dict[str, int]:
        return {"pointer": self.pointer, "filled": self.filled}

    def set_extra_state(self, state: Any) -> None:
        self.pointer, self.filled = state["pointer"], state["filled"]


def _gather(vectors: Tensor, images: int) -> Tensor:
    """(B * W, width) of the whole step, image by image, from a rank's share of the images."""
    return collectives.gather(vectors.unflatten(0, (images, -1))).flatten(0, 1)
