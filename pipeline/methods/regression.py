"""Regression on the teacher's embedding: the baseline for methods that compare similarities."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext, Outputs, Recipe
from compress_ssl.pipeline.models.precision import at_least_float32, l2_normalize


class Regression(Method):
    """Squared distance between the student's linearly projected embedding and the teacher's embedding.

    The baselines Reg and Reg-BN of Koohpayegani, Tejankar, Pirsiavash, "CompRess", NeurIPS 2020, arXiv
    2010.14713. A trained linear layer d -> D takes the student's embedding to s; it is not part of the exported
    student. t is the teacher's embedding. There is no bank and no temperature.

    Keys:
        norm: `l2` (Reg) compares unit vectors: loss = ||s / ||s|| - t / ||t||||² = 2 - 2 cos(s, t), batch mean, from
            0 to 4. `batch` (Reg-BN) standardises both sides per dimension over the batch of all ranks and takes
            the mean squared difference over batch and dimensions; this batch norm has no trained parameters.

    Example:
        compress distill --store teacher --student timm:resnet18 --method regression:norm=batch --out run
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
        return [F.mse_loss(_standardize(s), _standardize(t))]


def _standardize(x: Tensor) -> Tensor:
    """(n, D) of this rank -> (ranks * n, D) with mean 0 and variance 1 in every dimension over all rows."""
    return F.batch_norm(collectives.gather(x), None, None, training=True)
