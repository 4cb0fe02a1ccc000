"""The network that DDP wraps: all students of a method, and the method itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import Batch, Method, Outputs
from compress_ssl.pipeline.training.student import Student

LOCAL_PREFIX = "local_"
"""Prefix of a student's outputs on local crops: "local_embedding" is the embedding of the local crops."""


class DistillationModule(nn.Module):
    """Students and their method as one module, so that DDP averages all their gradients in one backward pass."""

    def __init__(self, students: Sequence[Student], method: Method):
        super().__init__()
        self.students, self.method = list(students), method
        self.models = nn.ModuleList([student.model for student in students])

    def forward(self, batch: Batch, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the losses of a batch: this is where the method's `forward` is called.

        Returns (one scalar loss per student, one detached embedding (B, W, d) per student). seed: set before the
        method runs, so that its random numbers do not depend on those that the students drew (dropout).
        """
        outputs = [self._forward_student(batch, number) for number in range(len(self.students))]
        torch.manual_seed(seed)
        losses = self.method(batch, outputs)
        return losses, [out["embedding"].detach() for out in outputs]

    def _forward_student(self, batch: Batch, number: int) -> Outputs:
        """The outputs that the method needs of student `number`: name -> (B, W, ...), for local crops (B, L, ...)."""
        needed, forward = self.method.needs.outputs, self.students[number].forward
        global_names = [name for name in needed if not name.startswith(LOCAL_PREFIX)]
        local_names = [name.removeprefix(LOCAL_PREFIX) for name in needed if name.startswith(LOCAL_PREFIX)]
        outputs = _unflatten(forward(batch.images[number], global_names), len(batch.rows))
        if local_names:
            local = _unflatten(forward(batch.local_images[number], local_names), len(batch.rows))
            outputs |= {LOCAL_PREFIX + name: value for name, value in local.items()}
        return outputs


def _unflatten(outputs: dict[str, Tensor], images: int) -> Outputs:
    """(B * W, ...) -> (B, W, ...) for B images; W is inferred."""
    return {name: value.unflatten(0, (images, -1)) for name, value in outputs.items()}
