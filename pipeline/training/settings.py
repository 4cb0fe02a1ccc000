"""The hyper-parameters with which a learner trains."""

from dataclasses import dataclass

from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.training.choices import OptimizerName
from compress_ssl.pipeline.training.schedule import Schedule


@dataclass(frozen=True)
class TrainingSettings:
    """Hyper-parameters of a learner. All of them are part of the run's identity in its manifest."""

    optimizer: OptimizerName
    lr: float  # base learning rate for the global batch: the images that all ranks together show in a step
    momentum: float
    weight_decay: float
    norm_decay: bool  # whether weight decay applies to norms and biases too
    schedule: Schedule
    clip: float | None  # largest norm of the gradient; None: the gradient is not clipped
    ema: float | None  # decay of the averaged student per step; None: no average is kept
    precision: Precision
    seed: int
