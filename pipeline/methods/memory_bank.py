"""MemoryBank: a FIFO queue of embeddings of the last steps, which a loss uses as anchors.

The queue is a ring buffer of K slots. Features that the store holds are left out of the checkpoint;
their (i, v) are in it, and `refill` reads the features again.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.models.precision import l2_normalize

Read = Callable[[Tensor, Tensor, str], Tensor]
"""Reads stored features: (n,) rows, (n,) views, name of the array -> (n, D) float32."""


class MemoryBank(nn.Module):
    """K slots of L2-normalised vectors in named columns; slot j of every column belongs to the same (i, v).

    Score first, and `push` after the backward pass: then the current batch is not among its own anchors and
    no copy of the bank is needed. Before a start the columns hold random vectors, uniform in (-s, s) with
    s = sqrt(3 / width), whose expected squared norm is 1, as in CompRess's released code (Koohpayegani et
    al. 2020, arXiv 2010.14713).

    size: K. columns: {name: width}. reread: {column: array of the store from which `refill` reads it}. seed: of
    the random vectors.

    >>> bank = MemoryBank(4, {"teacher": 2})
    >>> bank.push(torch.tensor([7]), torch.tensor([0]), {"teacher": torch.tensor([[0.0, 1.0]])})
    >>> bank["teacher"]
    tensor([[0., 1.]])
    """

    rows: Tensor  # (K,) int64: image i of each slot, -1 for a random vector
    views: Tensor  # (K,) int64: view v of each slot

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
            bound = (3.0 / width) ** 0.5
            vectors = torch.empty(size, width).uniform_(-bound, bound, generator=generator)
            self.register_buffer(f"column_{name}", vectors, persistent=name not in self.reread)

    def __getitem__(self, name: str) -> Tensor:
        """(filled, width) view, not a copy, of the slots that hold an anchor."""
        column: Tensor = getattr(self, f"column_{name}")
        return column[: self.filled]

    def start(self, how: str, rows: Tensor | None = None, view: int = 0) -> None:
        """Set the anchors of the first step.

        how: `empty` has none before the first push, `random` K random vectors, `store` the features of `rows`
        (K,) in `view`, which `refill` then reads.
        """
        if how == "empty":
            return
        self.filled = self.size
        if how == "store":
            assert rows is not None
            self.rows.copy_(rows[: self.size])
            self.views.fill_(view)

    def refill(self, read: Read, block: int = 8192) -> None:
        """Read the `reread` columns from the store, for all slots with an (i, v), `block` slots at a time."""
        for name, array in self.reread.items():
            column = getattr(self, f"column_{name}")
            for slots in torch.nonzero(self.rows >= 0).flatten().split(block):
                column[slots] = l2_normalize(read(self.rows[slots], self.views[slots], array).to(column.device))

    @torch.no_grad()
    def push(self, rows: Tensor, views: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Overwrite the oldest slots with W vectors of each of B images; all ranks store the images of all ranks.

        rows: (B,) int64. views: (B, W) int64, or (B,) for W = 1. columns: {name: (B * W, width)}, L2-normalised.
        """
        views = views.reshape(len(rows), -1)
        rows, columns = collectives.gather(rows), {name: _gather(columns[name], len(views)) for name in self.names}
        views = collectives.gather(views)
        rows, views = rows.repeat_interleave(views.shape[1]), views.flatten()
        n = min(len(rows), self.size)
        slots = (torch.arange(n, device=self.rows.device) + self.pointer) % self.size
        self.rows[slots], self.views[slots] = rows[-n:].to(self.rows), views[-n:].to(self.views)
        for name, column in columns.items():
            stored = getattr(self, f"column_{name}")
            stored[slots] = column[-n:].detach().to(stored)
        self.pointer = (self.pointer + n) % self.size
        self.filled = min(self.size, self.filled + n)

    def get_extra_state(self) -> dict[str, int]:
        return {"pointer": self.pointer, "filled": self.filled}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Raises ValueError for a pointer or a number of filled slots that this bank cannot have."""
        pointer, filled = state["pointer"], state["filled"]
        if type(pointer) is not int or type(filled) is not int or not (0 <= pointer < self.size >= filled >= 0):
            raise ValueError(f"a bank of {self.size} slots has the pointer {pointer!r:.40} and {filled!r:.40} filled")
        self.pointer, self.filled = pointer, filled


def _gather(vectors: Tensor, images: int) -> Tensor:
    """Vectors of all ranks, image by image: (B * W, width) of this rank -> (ranks * B * W, width). `images` is B."""
    return collectives.gather(vectors.unflatten(0, (images, -1))).flatten(0, 1)
