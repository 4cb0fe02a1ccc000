"""Building the students and the learner of a `LearnerSpec`."""

import torch

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.store import teacher_heads
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.learner_spec import Execution, LearnerSpec
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.training.student_choice import StudentChoice


def build_learner(spec: LearnerSpec, store: FeatureStore, sampler: StepSampler, device: torch.device) -> Learner:
    """The learner of a spec. All initial weights are a function of `spec.sampling.seed`.

    Prints the notes of the method. Raises UserError for a student or method that cannot be built, and for a store or
    pairing that does not suffice for the method.
    """
    words = [choice.words for choice in spec.students]
    group = [
        # Peers of the same spec get different seeds, hence different initial weights.
        Student(
            choice.folder,
            build_student(choice, spec.sampling.seed + words[:number].count(choice.words), spec.execution, device),
            spec.ema,
        )
        for number, choice in enumerate(spec.students)
    ]
    first_view = int(sampler.epoch_views(0)[1][0])  # the first step reads the features of this view anyway
    context = MethodContext(
        [student.model for student in group], store.arrays, sampler.rows, first_view, spec.sampling.seed,
        heads=teacher_heads.load_heads(store), images=store.images,
    )  # fmt: skip
    method = _build_method(spec, context, device)
    for student in group:
        student.enable_outputs(method.needs.outputs, compiled=spec.execution.compile)
    for note in context.notes:
        echo(note)
    return Learner(group, method, spec.settings(sampler), context.resolved)


def build_student(choice: StudentChoice, seed: int, execution: Execution, device: torch.device) -> Embedder:
    """The student's network on the device. Its initial weights are a function of the seed.

    Seeds torch's default generator. Raises UserError for a spec that cannot be built.
    """
    torch.manual_seed(seed)
    embedder = build(choice.spec, image_size=choice.image_size, recorded=choice.preprocessing)
    if not any(p.requires_grad for p in embedder.parameters()):
        raise UserError(f"--student {choice.words} has no parameter that can be trained; choose another student")
    embedder.spec = choice.words  # it seeds the student's randomness and is recorded: the same for ever
    memory_format = torch.channels_last if execution.channels_last else torch.contiguous_format
    embedder = embedder.to(device).to(memory_format=memory_format)
    return collectives.convert_sync_batchnorm(embedder, device) if execution.sync_bn else embedder


def _build_method(spec: LearnerSpec, context: MethodContext, device: torch.device) -> Method:
    """The method on the device. Raises UserError if the store of the context or the pairing does not suffice."""
    method = spec.method.build(context).to(device)
    method = collectives.convert_sync_batchnorm(method, device) if spec.execution.sync_bn else method
    method.check_inputs(spec.method.words, context.widths, spec.sampling.pairing)
    return method
