"""The images of an evaluation: those for neighbours, clusters and probes, and those that are scored."""

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.evaluators.scored_model import ScoredModel
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store import source_images


def open_images(scored: ScoredModel, train: str | None, limit: int | None, val: str) -> tuple[Dataset, Dataset]:
    """(training images, validation images) of two specs.

    train: None for the images that the scored model was trained or exported on; limit: use only this many of `train`.
    Raises UserError if the images of a run or store have moved or changed, or if `val` has a class that labelled
    training images lack: no protocol could predict it.
    """
    if train:
        known = DATASETS.build(train)
        known = known.subset(limit) if limit else known
    else:
        assert scored.data
        of = str(scored.run or scored.model.store)
        known = source_images.open_recorded(scored.data, scored.sample_ids or tuple, given=None, flag="--train", of=of)
    scored_images = DATASETS.build(val)
    unknown = [name for name in scored_images.classes if name not in known.classes]
    if unknown and (known.label >= 0).any():
        raise UserError(
            f"{len(unknown)} of {len(scored_images.classes)} classes of --val {val} are not among the training images, "
            f"the first is {unknown[0]!r}; give training images of all classes with --train, or remove these classes "
            "from --val"
        )
    return known, scored_images
