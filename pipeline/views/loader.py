"""Pixels ahead of their use: worker processes, or threads where processes may have no children."""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from compress_ssl.pipeline.datasets.decode import BadImage
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.render import render_views

REQUEST_BYTES = 32_000_000
PREFETCH = 2  # pieces in flight, per worker


@dataclass(frozen=True)
class ViewRequest:
    """Rows of a data set and the views wanted of each."""

    rows: np.ndarray  # (n,) int64
    views: np.ndarray  # (n, V) int64
    local: np.ndarray | None = None  # (n, L) int64: local crops wanted too, at sizes of their own


@dataclass
class ViewBatch:
    """What a loader worker saw of a piece."""

    pixels: list[torch.Tensor]  # per size: (n, V, 3, S, S) uint8; zeros where the image is bad
    local: list[torch.Tensor]  # per local size: (n, L, 3, s, s) uint8
    status: np.ndarray  # (n,) uint8
    content: np.ndarray  # (n,) uint64
    bad: dict[int, str]  # row -> reason

    def pin_memory(self) -> "ViewBatch":
        """With pixels in pinned memory, from which a GPU fetches them while it computes. DataLoader asks for it."""
        pixels, local = ([tensor.pin_memory() for tensor in kind] for kind in (self.pixels, self.local))
        return replace(self, pixels=pixels, local=local)


class ViewDataset:
    """(piece) -> what it looks like. Each image is decoded once for all its views and sizes."""

    def __init__(
        self,
        dataset: Any,
        spec: ViewSpec,
        view_key: np.ndarray,
        sizes: Sequence[tuple[int, str]],
        requests: Sequence,
        local_sizes: Sequence[tuple[int, str]] = (),
    ):
        self.dataset, self.spec, self.view_key = dataset, spec, view_key
        self.sizes, self.local_sizes, self.requests = list(sizes), list(local_sizes), requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> ViewBatch:
        return self.load(self.requests[number])

    def load(self, request: ViewRequest) -> ViewBatch:
        n = len(request.rows)
        kinds = [(request.views, self.sizes)]
        if request.local is not None:
            kinds.append((request.local, self.local_sizes))
        drawn = [draw_variates(self.spec.seed, self.view_key[request.rows][:, None], views) for views, _ in kinds]
        pixels = [
            [torch.zeros((n, views.shape[1], 3, size, size), dtype=torch.uint8) for size, _ in sizes]
            for views, sizes in kinds
        ]
        status, content = np.zeros(n, np.uint8), np.zeros(n, np.uint64)
        bad: dict[int, str] = {}
        for j, i in enumerate(request.rows.tolist()):
            try:
                image, content[j] = self.dataset.load(i)
                for (views, sizes), variates, outs in zip(kinds, drawn, pixels, strict=True):
                    wanted = sizes if views.shape[1] else []  # a shard may lack nothing but its local crops
                    for out, seen in zip(
                        outs, render_views(image, self.spec, variates[j], views[j], wanted), strict=False
                    ):
                        out[j] = seen
            except BadImage as problem:
                status[j], bad[i] = problem.status, str(problem)
        return ViewBatch(pixels[0], pixels[1] if len(pixels) > 1 else [], status, content, bad)


def iterate_views(
    view_dataset: ViewDataset, workers: int, threads: bool = False, pin: bool = False
) -> Generator[ViewBatch, None, None]:
    """The sights of all pieces, in order, AHEAD per worker in flight.

    workers processes (0: none, seen as they are asked for); `threads` instead of processes. Use it
    under contextlib.closing: workers that outlive an error would be waited for at the program's end.
    """
    if workers and threads:
        yield from _by_threads(view_dataset, workers)
    elif workers:
        yield from DataLoader(
            view_dataset,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            pin_memory=pin,
            worker_init_fn=_prepare_worker,
        )
    else:
        for number in range(len(view_dataset)):
            yield view_dataset[number]


def _by_threads(view_dataset: ViewDataset, workers: int) -> Iterator[ViewBatch]:
    with ThreadPoolExecutor(workers, thread_name_prefix="eyes") as pool:
        flight: deque[Future[ViewBatch]] = deque()
        for number in range(len(view_dataset)):
            flight.append(pool.submit(view_dataset.__getitem__, number))
            if len(flight) > workers * PREFETCH:
                yield flight.popleft().result()
        while flight:
            yield flight.popleft().result()


def _prepare_worker(_: int) -> None:
    os.nice(10)  # a model on the CPU waits for the slowest of its threads: none of them should wait for a loader
    for signum in (signal.SIGINT, signal.SIGTERM):  # both may come to the whole group: the parent decides
        signal.signal(signum, signal.SIG_IGN)


def split_rows(
    start: int, stop: int, views: Sequence[int], size: int, local: Sequence[int] = (), local_size: int = 0
) -> list[ViewRequest]:
    """Rows start..stop-1, in the same views and local crops, cut so that a piece's pixels stay below PIECE_BYTES."""
    step = max(1, REQUEST_BYTES // (3 * (len(views) * size * size + len(local) * local_size * local_size)))
    cuts = [np.arange(a, min(a + step, stop)) for a in range(start, stop, step)]
    return [ViewRequest(rows, _same(views, rows), _same(local, rows) if local else None) for rows in cuts]


def _same(views: Sequence[int], rows: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.array(views, np.int64), (len(rows), len(views)))  # one copy, however many pieces
