"""The flags of `compress distill`, and what can be said of them before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.runtime import launch_env
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.training.choices import OptimizerName, Pairing
from compress_ssl.pipeline.training.run_folders import list_run_folders, require_run_folders
from compress_ssl.pipeline.training.schedule import ScheduleKind


@dataclass(frozen=True)
class Config:
    """Train students to reproduce the teacher's similarities between images, read from a feature store.

    Optimizer, learning rate, batch size and epochs default to the method's published recipe. Running the same
    command again continues an interrupted run; a larger --epochs makes a finished run longer. A flag that is left out
    then keeps the value with which the run was begun.
    """

    store: str = flag(
        help="The teacher's feature store: a folder, or s3://BUCKET/PREFIX, gs:// or az://.", metavar="STORE"
    )
    student: tuple[str, ...] = flag(
        help="A student: timm:NAME, torchvision:NAME, cifar-resnet:20, ... (compress models lists the kinds). Repeat "
        "the flag for several students.",
        metavar="SPEC",
    )
    method: str = flag(
        help="The loss: compress-1q, compress-2q, seed, ... (compress methods lists them) or python:module:Class.",
        metavar="SPEC",
    )
    out: Path = flag(
        help="The folder of the run; for several students, the folder that holds their runs.", metavar="RUN"
    )
    data: str | None = flag(
        None, "The images, if they have moved since the export. Default: where the store says they are.", metavar="SPEC"
    )

    epochs: float | None = flag(None, "Passes over the images. Default: as published for the method.", panel="Recipe")
    steps: int | None = flag(
        None, "Optimizer steps of the whole run, instead of --epochs. Default: as many as --epochs makes.",
        panel="Recipe",
    )  # fmt: skip
    batch_size: int | None = flag(
        None, "Images per step on each device. Default: as published, for all devices together.", panel="Recipe",
        short="-b",
    )  # fmt: skip
    optimizer: OptimizerName | None = flag(
        None, "The optimizer of students and method. Default: as published.", panel="Recipe"
    )
    lr: float | None = flag(
        None, "The learning rate, used as it is. Default: as published, scaled with the batch size.", panel="Recipe"
    )
    momentum: float | None = flag(
        None, "Momentum of sgd and lars; beta 1 of adam and adamw. Default: as published.", panel="Recipe"
    )
    weight_decay: float | None = flag(None, "Weight decay. Default: as published.", panel="Recipe")
    norm_decay: bool | None = flag(
        None, "Apply weight decay to norms and biases too. Default: as published.", panel="Recipe"
    )
    schedule: ScheduleKind | None = flag(
        None, "How the learning rate falls during the run. Default: as published.", panel="Recipe"
    )
    warmup_epochs: float | None = flag(
        None, "Epochs in which the learning rate rises linearly from 0. Default: as published.", panel="Recipe"
    )
    clip: float | None = flag(
        None, "Clip the gradient of a student to this L2 norm. Default: as published; most methods do not clip.",
        panel="Recipe",
    )  # fmt: skip
    ema: float | None = flag(
        None, "Export a moving average of the student's weights, with this decay per step. Default: the last weights.",
        panel="Recipe",
    )  # fmt: skip
    seed: int | None = flag(
        None, "Seed of the order of images, the initial weights and the steps' randomness. Default: 0.", panel="Recipe"
    )

    pairing: Pairing | None = flag(
        None,
        "The student sees the same view as the teacher, a fresh view that no store holds, or another stored view "
        "(cross). Default: same.",
        panel="Views",
    )
    views: int | None = flag(
        None,
        "Train on the stored views below this number; on view 0 only if it is the only one. Default: all.",
        panel="Views",
    )
    views_per_step: int | None = flag(
        None, "Views per image and step. Default: as many as the method needs.", panel="Views"
    )
    image_size: int | None = flag(
        None, "Side of the student's input images in pixels. Default: the student's own.", panel="Views",
        metavar="PIXELS",
    )  # fmt: skip
    allow_other_pixels: bool = flag(
        False, "Train even if this machine renders views differently from the one that made the store.", panel="Views"
    )

    device: str = flag("auto", "Device to train on: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    devices: int | None = flag(
        None, "Train on this many devices of this machine. Do not give it under torchrun. Default: one device.",
        panel="Speed",
    )  # fmt: skip
    precision: Precision | None = flag(
        None, "Arithmetic of the student; similarities are always computed in fp32. Default: fp32.", panel="Speed"
    )
    compile: bool | None = flag(None, "Compile the student with torch.compile. Default: it is not.", panel="Speed")
    channels_last: bool | None = flag(
        None, "Use the channels-last memory format for images and student. Default: yes.", panel="Speed"
    )
    sync_bn: bool | None = flag(
        None, "Compute the statistics of batch norm over the batches of all CUDA devices. Default: no.", panel="Speed"
    )
    workers: int | None = flag(
        None, "Loader processes. Default: one per core, at most 16; at most 4 if the model runs on the CPU.",
        panel="Speed", short="-j",
    )  # fmt: skip
    cache_images: Path | None = flag(
        None, "Keep decoded images in this folder: each is decoded once, not once per epoch. Default: no folder.",
        panel="Speed", metavar="FOLDER",
    )  # fmt: skip
    cache: Path | None = flag(
        None, "The folder for the local copy of a store in a bucket. Default: compress in the XDG cache.",
        panel="Speed", metavar="FOLDER",
    )  # fmt: skip

    val: str | None = flag(
        None, "Labelled images that score nearest neighbours while training. Default: no validation.", panel="Output",
        metavar="SPEC",
    )  # fmt: skip
    val_every: float = flag(1.0, "Epochs between validations.", panel="Output")
    save_every: int = flag(500, "Steps between checkpoints.", panel="Output")
    overwrite: bool = flag(False, "Start anew. An earlier run is moved aside, not deleted.", panel="Output")


def check(config: Config) -> None:
    """Raises UserError for a config that can be refused before torch is imported, which takes seconds."""
    positive = (
        "steps", "batch_size", "views", "views_per_step", "image_size", "save_every", "devices", "epochs", "val_every",
        "lr", "clip",
    )  # fmt: skip
    require(
        config,
        {
            **{name: POSITIVE for name in positive},
            **{name: NOT_NEGATIVE for name in ("workers", "weight_decay", "warmup_epochs")},
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
            "momentum": (lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
            "ema": (lambda x: 0 < x < 1, "must be between 0 and 1"),
        },
    )
    launched = launch_env.read_launch() is not None  # refuses what no launcher sets
    if config.devices and launched:
        raise UserError(
            "--devices starts ranks, but this process is already one of several, as by torchrun; leave --devices out"
        )
    if config.epochs and config.steps:
        raise UserError("--epochs and --steps were both given; keep one")
    for student in config.student:
        MODELS.parse(student)
    METHODS.parse(config.method)
    if not config.student:
        raise UserError("no --student was given; name at least one, for example --student cifar-resnet:20")
    folders = list_run_folders(config.out, config.student, lambda: needs_peers(config.method))
    require_run_folders(config.out, config.student, folders, config.overwrite)


def needs_peers(method: str) -> bool:
    """Whether the method of a spec trains its students together. Imports the method, and so torch."""
    from compress_ssl.pipeline.methods.options import find_typed

    return find_typed(method).method.needs.peers
