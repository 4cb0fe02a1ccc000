"""Load rendered views ahead of their use, in worker processes or in threads.

Threads are for programs that may not start processes of their own, such as a Dask worker.
"""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import BadImage
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.groups import PerGroup
from compress_ssl.pipeline.views.render import render_views

PREFETCH = 2  # requests in flight per worker

Sizes = Sequence[tuple[int, str]]
"""(side S in pixels, interpolation) of each rendering."""


@dataclass(frozen=True)
class ViewRequest:
    """Rows of a data set, and for each row the views to render."""

    rows: np.ndarray  # (n,) int64
    views: PerGroup[np.ndarray]  # (n, V) int64; a group of which no view is wanted is left out


class Requests(Protocol):
    """What a loader loads, by number: a list of requests, or the sampler of a training."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> ViewRequest: ...


@dataclass
class ViewBatch:
    """The rendered views of one request."""

    pixels: PerGroup[list[torch.Tensor]]  # per size of the group: (n, V, 3, S, S) uint8; zeros where the image is bad
    status: np.ndarray  # (n,) uint8, the codes of datasets/decode.py
    content: np.ndarray  # (n,) uint64 content hashes; 0 where the image is bad
    bad: dict[int, str]  # row -> reason

    def pin_memory(self) -> "ViewBatch":
        """Copy the pixels to pinned memory, so that the transfer to a GPU overlaps with computing.

        DataLoader calls this method when it is given `pin_memory=True`.
        """
        pinned = {group: [tensor.pin_memory() for tensor in tensors] for group, tensors in self.pixels.items()}
        return replace(self, pixels=pinned)


class ViewDataset:
    """Maps the index of a request to its ViewBatch. Each image is decoded once for all its views and sizes."""

    def __init__(
        self,
        dataset: Dataset,
        spec: ViewSpec,
        view_key: np.ndarray,
        sizes: PerGroup[Sizes],
        requests: Requests = (),
    ):
        """view_key: (N,) uint64, one key per row of the data set; see `augment.draw_variates`.

        sizes: of each group that the requests name.
        """
        self.dataset, self.spec, self.view_key, self.sizes, self.requests = dataset, spec, view_key, sizes, requests

    def with_requests(self, requests: Requests) -> "ViewDataset":
        """The same views of the same images, for other requests."""
        return ViewDataset(self.dataset, self.spec, self.view_key, self.sizes, requests)

    def with_images(self, dataset: Dataset) -> "ViewDataset":
        """The views of other images, each with the number of its row as its key."""
        return ViewDataset(dataset, self.spec, np.arange(len(dataset)), self.sizes)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> ViewBatch:
        return self.load(self.requests[number])

    def load(self, request: ViewRequest) -> ViewBatch:
        """Decode the images of a request and render their views."""
        n, keys = len(request.rows), self.view_key[request.rows][:, None]
        pixels: dict[str, list[torch.Tensor]] = {}
        groups = []
        for name, views in request.views.items():
            sizes = self.sizes[name]
            pixels[name] = [torch.zeros((*views.shape, 3, size, size), dtype=torch.uint8) for size, _ in sizes]
            groups.append((views, draw_variates(self.spec.seed, keys, views), sizes, pixels[name]))
        status, content = np.zeros(n, np.uint8), np.zeros(n, np.uint64)
        bad: dict[int, str] = {}
        for j, i in enumerate(request.rows.tolist()):
            try:
                image, content[j] = self.dataset.load(i)
                for views, variates, sizes, outputs in groups:
                    rendered = render_views(image, self.spec, variates[j], views[j], sizes)
                    for output, tensor in zip(outputs, rendered, strict=True):
                        output[j] = tensor
            except BadImage as problem:
                status[j], bad[i] = problem.status, str(problem)
        return ViewBatch(pixels, status, content, bad)


def iterate_views(
    view_dataset: ViewDataset, workers: int, threads: bool = False, pin: bool = False
) -> Generator[ViewBatch, None, None]:
    """Yield the batches of all requests in order, with PREFETCH requests per worker in flight.

    workers: number of processes, or of threads if `threads`; 0 loads each batch when it is asked for.
    pin: put the pixels into pinned memory (processes only).
    Use the generator under `contextlib.closing`. Otherwise, after an error, its workers live on and the program waits
    for them when it ends.
    """
    if workers and threads:
        yield from _iterate_with_threads(view_dataset, workers)
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


def _iterate_with_threads(view_dataset: ViewDataset, workers: int) -> Iterator[ViewBatch]:
    with ThreadPoolExecutor(workers, thread_name_prefix="views") as pool:
        in_flight: deque[Future[ViewBatch]] = deque()
        for number in range(len(view_dataset)):
            in_flight.append(pool.submit(view_dataset.__getitem__, number))
            if len(in_flight) > workers * PREFETCH:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()


def _prepare_worker(_: int) -> None:
    # Lower the priority: a model on the CPU waits for its slowest thread, so a loader must not displace one.
    os.nice(10)
    # Ctrl-C and a batch system send these signals to the whole process group; the parent process handles them.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
