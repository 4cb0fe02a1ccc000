"""The worker's side of an export on dask: each dask worker builds an `ExportWorker` of its own from `WorkerSettings`.

`build_worker` and its settings are pickled with every task, so both must stay at the top level of a module.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from compress_ssl.pipeline.datasets import open_images
from compress_ssl.pipeline.extraction import cluster
from compress_ssl.pipeline.extraction.embed import store_source
from compress_ssl.pipeline.extraction.export_job import StoreFlags
from compress_ssl.pipeline.extraction.extract import LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.teacher import load_live_teacher
from compress_ssl.pipeline.extraction.worker import ExportWorker
from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import open_storage
from compress_ssl.pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True)
class WorkerSettings:
    """What a dask worker must know to build its ExportWorker. Specs and paths are absolute."""

    data: str  # spec of the data set
    teacher: str  # spec of the teacher
    store: str  # folder or URL of the store
    flags: StoreFlags
    device: str  # auto, cpu, cuda or cuda:N
    workers: int | None  # threads that decode, as --workers
    threads: int | None  # torch threads; None: torch's default
    command: str  # a random text, different in each command, so that the cache serves the tasks of one command only


@lru_cache(maxsize=1)
def build_worker(settings: WorkerSettings) -> ExportWorker:
    """Build the ExportWorker of this process: images, store and teacher on the device of this worker.

    Raises UserError if this worker finds other images than the command did, or other weights of the teacher.
    """
    flags = settings.flags
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dataset = open_images(settings.data, flags.limit)
    store = FeatureStore(open_storage(settings.store))
    device = _choose_worker_device(settings.device)
    embedder = load_live_teacher(store, settings.teacher)
    if dataset.fingerprint != store.identity.data.fingerprint:
        raise UserError(
            f"{settings.data} holds other images on this worker than on the machine that started the export; "
            "give a path that leads to the same images on all machines"
        )
    extractor = FeatureExtractor(embedder, device, flags.precision, flags.batch_size, flags.outputs)
    # threads, because a dask worker cannot have child processes
    loader = LoaderSettings(loader_workers(settings.workers, device), threads=True)
    return ExportWorker(store, store_source(store, dataset, extractor, loader))


def _choose_worker_device(name: str) -> torch.device:
    """The device of this worker. If it is any GPU, worker k uses visible GPU k, modulo their number."""
    device = choose_device(name)
    if device == torch.device("cuda"):
        return torch.device("cuda", cluster.worker_number() % torch.cuda.device_count())
    return device


def worker_threads(scheduler: str) -> int | None:
    """Torch threads of a worker of --scheduler, or None for torch's default.

    The number of threads decides the last bits of a result on the CPU, so workers of processes:N use as many
    threads as --scheduler local does on this machine.
    """
    return torch.get_num_threads() if scheduler.startswith("processes") else None
