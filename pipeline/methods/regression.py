"""Regression on the teacher's embedding: the baseline that every relational method is held against."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext, Outputs, Recipe
from compress_ssl.pipeline.models.precision import at_least_float32, l2_normalize


class Regression(Method):
    """Squared distance between the student's embedding, through one linear layer, and the teacher's.

    `norm=l2` compares unit vectors: mean over the batch of ||s - t||^2 = 2 - 2 cos, from 0 to 4.
    `norm=batch` standardises both sides per dimension over the batch, without trained parameters,
    and takes the mean over batch and dimensions: the rows Reg and Reg-BN of the CompRess paper's
    table (Koohpayegani et al. 2020). The layer is dropped at the end. No bank, no temperature.
    """

    recipe = Recipe(lr=0.01, weight_decay=1e-4, batch_size=256, epochs=130, schedule="step")

    def __init__(self, *, context: MethodContext, norm: Literal["l2", "batch"] = "l2"):
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(context.students[0].width, context.teacher_width)

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher["embedding"].flatten(0, 1)  # (B * W, D)
        s = at_least_float32(self.head(outputs[0]["embedding"].flatten(0, 1)))  # (B * W, D)
        if self.norm == "l2":
            return [(l2_normalize(s) - l2_normalize(t)).pow(2).sum(1).mean()]
        return [F.mse_loss(_standardised(s), _standardised(t))]


def _standardised(x: Tensor) -> Tensor:
    """(n, D) with mean 0 and variance 1 in every dimension, over the rows of all ranks."""
    return F.batch_norm(collectives.gather(x), None, None, training=True)
