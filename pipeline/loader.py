"""Pixels ahead of their use: worker processes, or threads where processes may have no children."""

import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.images import BadImage
from pipeline.views import ViewSpec, draw, see


@dataclass(frozen=True)
class Piece:
    """Rows of a data set and the views wanted of each."""

    rows: np.ndarray  # (n,) int64
    views: np.ndarray  # (n, V) int64


@dataclass
class Sight:
    """What a loader worker saw of a piece."""

    pixels: list[torch.Tensor]  # per size: (n, V, 3, S, S) uint8; zeros where the image is bad
    status: np.ndarray  # (n,) uint8
    content: np.ndarray  # (n,) uint64
    bad: dict[int, str]  # row -> reason


class Eyes:
    """(piece) -> what it looks like. Each image is decoded once for all its views and sizes."""

    def __init__(
        self, dataset: Any, spec: ViewSpec, view_key: np.ndarray, sizes: Sequence[tuple[int, str]], pieces: Sequence
    ):
        self.dataset, self.spec, self.view_key = dataset, spec, view_key
        self.sizes, self.pieces = list(sizes), pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> Sight:
        return self.look(self.pieces[number])

    def look(self, piece: Piece) -> Sight:
        n, v = piece.views.shape
        pixels = [torch.zeros((n, v, 3, size, size), dtype=torch.uint8) for size, _ in self.sizes]
        status, content = np.zeros(n, np.uint8), np.zeros(n, np.uint64)
        bad: dict[int, str] = {}
        variates = draw(self.spec.seed, self.view_key[piece.rows][:, None], piece.views)
        for j, i in enumerate(piece.rows.tolist()):
            try:
                image, content[j] = self.dataset.load(i)
                for out, seen in zip(
                    pixels, see(image, self.spec, variates[j], piece.views[j], self.sizes), strict=True
                ):
                    out[j] = seen
            except BadImage as problem:
                status[j], bad[i] = problem.status, str(problem)
        return Sight(pixels, status, content, bad)


def feed(eyes: Eyes, workers: int, threads: bool = False, ahead: int = 2) -> Iterator[Sight]:
    """The sights of all pieces, in order, `ahead` per worker in flight.

    workers processes (0: none, seen as they are asked for); `threads` instead of processes.
    """
    if workers and threads:
        yield from _by_threads(eyes, workers, ahead)
    elif workers:
        yield from DataLoader(
            eyes,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead,
            worker_init_fn=_quiet,
        )
    else:
        for number in range(len(eyes)):
            yield eyes[number]


def _by_threads(eyes: Eyes, workers: int, ahead: int) -> Iterator[Sight]:
    with ThreadPoolExecutor(workers, thread_name_prefix="eyes") as pool:
        flight: deque[Future[Sight]] = deque()
        for number in range(len(eyes)):
            flight.append(pool.submit(eyes.__getitem__, number))
            if len(flight) > workers * ahead:
                yield flight.popleft().result()
        while flight:
            yield flight.popleft().result()


def _quiet(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pieces_of(start: int, stop: int, views: Sequence[int], size: int, most_bytes: int = 32_000_000) -> list[Piece]:
    """Rows start..stop-1, all in the same views, cut so that a piece's pixels stay below `most_bytes`."""
    step = max(1, most_bytes // (len(views) * 3 * size * size))
    cuts = range(start, stop, step)
    return [Piece(rows := np.arange(a, min(a + step, stop)), np.tile(np.array(views), (len(rows), 1))) for a in cuts]
