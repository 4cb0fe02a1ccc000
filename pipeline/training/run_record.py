"""The manifest of a run: what makes a run what it is, and what its folder tells readers about it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.storage import Folder, absolute
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.student import Student


def claim_run_folders(learners: Sequence[Learner], store: FeatureStore, sampler: StepSampler) -> None:
    """Write a manifest into each student's folder, or compare it with the manifest that is there.

    Raises Mismatch, which lists what differs. Neither the number of steps nor the number of ranks is part of the
    identity: a run may be made longer, and may continue on other machines.
    """
    for learner in learners:
        peers = [_student_identity(student) for student in learner.students]
        for student, student_identity in zip(learner.students, peers, strict=True):
            identity = _run_identity(learner, student_identity, peers, store, sampler)
            artifact.claim(Folder(student.folder), "run", identity, _run_about(student, store, sampler))


def _run_identity(
    learner: Learner,
    student_identity: dict[str, Any],
    peers: list[dict[str, Any]],
    store: FeatureStore,
    sampler: StepSampler,
) -> dict[str, Any]:
    settings = asdict(learner.settings)
    # As a fraction of the run, the warm-up would change when the run is made longer: epochs are recorded instead.
    settings["schedule"] |= {"warmup": None, "warmup_epochs": learner.warmup_epochs}
    identity = {
        "store": store.fingerprint,
        "images": len(sampler.rows),
        "student": student_identity,
        "method": learner.name,
        "training": settings,
        "batch_size": sampler.batch,
        "pairing": sampler.pairing,
        "views_per_step": sampler.views_per_step,
        "views": list(sampler.views),
    }
    if len(learner.students) > 1:
        identity["peers"] = peers
    return identity


def _student_identity(student: Student) -> dict[str, Any]:
    model = student.model
    preprocessing = model.preprocessing.record()
    return {"spec": model.spec, "preprocessing": preprocessing, "width": model.width, "initial": model.digest()}


def _run_about(student: Student, store: FeatureStore, sampler: StepSampler) -> dict[str, Any]:
    """Facts for readers of the run that may change without making it another run."""
    return {
        "store": absolute(str(store.storage)),
        "data": to_json(store.export.data),
        "views": sampler.views[-1] + 1,
        "views_spec": store.identity.views.record(),
        "parameters": sum(p.numel() for p in student.model.backbone.parameters()),
        "teacher": store.export.teacher,
        "name": student.model.name,
    }
