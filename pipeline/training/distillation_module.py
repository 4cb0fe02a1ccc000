"""The network that DDP wraps: all students of a method, and the method itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import Batch, Method, Outputs
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.views.groups import ViewGroup, group_of_array


class DistillationModule(nn.Module):
    """Students and their method as one module, so that DDP averages all their gradients in one backward pass."""

    def __init__(self, students: Sequence[Student], method: Method):
        super().__init__()
        self.students, self.method = list(students), method
        self.models = nn.ModuleList([student.model for student in students])
        self.outputs: dict[ViewGroup, list[str]] = {}  # of the students, by the group of views that they are of
        for name in sorted(method.needs.outputs, key=lambda name: group_of_array(name).first):
            group = group_of_array(name)
            self.outputs.setdefault(group, []).append(group.output(name))

    def forward(self, batch: Batch, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the losses of a batch: this is where the method's `forward` is called.

        Returns (one scalar loss per student, one detached embedding (B, W, d) per student). seed: set before the
        method runs, so that its random numbers do not depend on those that the students drew (dropout).
        """
        outputs = [self._forward_student(batch, number) for number in range(len(self.students))]
        torch.manual_seed(seed)
        losses = self.method(batch, outputs)
        _require_losses(losses, len(self.students), type(self.method).__name__)
        return losses, [out["embedding"].detach() for out in outputs]

    def _forward_student(self, batch: Batch, number: int) -> Outputs:
        """The outputs that the method needs of student `number`: name -> (B, V, ...) for V views of their group."""
        forward, found = self.students[number].forward, Outputs()
        for group, names in self.outputs.items():
            outputs = _unflatten(forward(batch.images_of(group)[number], names), len(batch.rows))
            found |= {group.array(name): value for name, value in outputs.items()}
        return found


def _require_losses(losses: object, students: int, method: str) -> None:
    """Raise UserError unless a method, which may be a user's, has returned a scalar with a gradient per student."""
    if not isinstance(losses, list | tuple) or len(losses) != students:
        what = f"{len(losses)} losses" if isinstance(losses, list | tuple) else f"a {type(losses).__name__}"
        raise UserError(
            f"{method}.forward returned {what}; return a list with one loss for each of {students} students"
        )
    for loss in losses:
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            what = f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UserError(f"{method}.forward returned {what}; each loss must be a scalar tensor with a gradient")


def _unflatten(outputs: dict[str, Tensor], images: int) -> Outputs:
    """(B * V, ...) -> (B, V, ...) for B images; V is inferred."""
    return {name: value.reshape(images, -1, *value.shape[1:]) for name, value in outputs.items()}
