"""Building the students and the learners of a run from the specs of a command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.store import teacher_heads
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student import Student


@dataclass(frozen=True)
class LearnerSpec:
    """A method and the students that it trains, as a command names them."""

    method: str  # spec of the method, as the user wrote it
    students: Sequence[str]  # specs of the students; peers may have the same one
    folders: Sequence[Path]  # folder of each student's run
    peers: bool  # whether one learner trains all students together; if not, each student gets its own
    pairing: str  # same, fresh or cross
    warmup_epochs: float  # the warm-up as it was asked for, for the manifest


@dataclass(frozen=True)
class StudentOptions:
    """How the students' networks are built and run."""

    image_size: int | None = None  # side of the input images in pixels; None for the student's own
    channels_last: bool = True  # memory format of the weights: channels-last, or contiguous
    compiled: bool = False  # whether the students run by torch.compile
    sync_bn: bool = False  # whether batch norm statistics are those of all CUDA devices together


def build_learners(
    spec: LearnerSpec,
    options: StudentOptions,
    settings: TrainingSettings,
    store: FeatureStore,
    sampler: StepSampler,
    device: torch.device,
) -> list[Learner]:
    """One learner per student, or one for all students if the method trains them as peers.

    All initial weights are a function of `settings.seed`. Prints the notes of the methods. Raises UserError for a
    student or method that cannot be built, and for a store or pairing that does not suffice for the method.
    """
    numbers_of_all = list(range(len(spec.students)))
    groups = [numbers_of_all] if spec.peers else [[number] for number in numbers_of_all]
    first_view = int(sampler.epoch_views(0)[1][0])  # the first step reads the features of this view anyway
    learners = []
    for numbers in groups:
        group = [
            Student(spec.folders[n], _build_numbered_student(spec, n, options, settings.seed, device), settings.ema)
            for n in numbers
        ]
        context = MethodContext(
            [student.model for student in group], store.arrays, sampler.rows, first_view, settings.seed,
            heads=teacher_heads.load_heads(store), images=store.images,
        )  # fmt: skip
        method = _build_method(spec, context, options, device)
        for student in group:
            student.enable_outputs(method.needs.outputs, compiled=options.compiled)
        learners.append(Learner(group, method, settings, name=spec.method, warmup_epochs=spec.warmup_epochs))
        for note in context.notes:
            echo(note)
    return learners


def build_student(spec: str, seed: int, options: StudentOptions, device: torch.device) -> Embedder:
    """The student's network on the device. Its initial weights are a function of the seed.

    Seeds torch's default generator. Raises UserError for a spec that cannot be built.
    """
    torch.manual_seed(seed)
    embedder = build(spec, image_size=options.image_size, pretrained_default=False)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    embedder = embedder.to(device).to(memory_format=memory_format)
    return collectives.convert_sync_batchnorm(embedder, device) if options.sync_bn else embedder


def _build_numbered_student(
    spec: LearnerSpec, number: int, options: StudentOptions, seed: int, device: torch.device
) -> Embedder:
    """Student `number`. Peers of the same spec get different seeds, hence different initial weights."""
    student = spec.students[number]
    return build_student(student, seed + spec.students[:number].count(student), options, device)


def _build_method(spec: LearnerSpec, context: MethodContext, options: StudentOptions, device: torch.device) -> Method:
    """The method on the device. Raises UserError if the store of the context or the pairing does not suffice."""
    method: Method = METHODS.build(spec.method, context=context).to(device)
    method = collectives.convert_sync_batchnorm(method, device) if options.sync_bn else method
    method.check_inputs(spec.method, context.widths, spec.pairing)
    return method
