"""SimCLR v2's distillation: the student learns a task head's opinions. Chen et al., NeurIPS 2020."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext, Needs, Outputs, Recipe, require_positive
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.models.precision import at_least_float32
from compress_ssl.pipeline.runtime.artifact import UserError


class SimClrV2(Method):
    """Cross-entropy to the softened class probabilities of the teacher, labels unused: their eq. 2.

    The teacher's logits are those in the store (`--keep logits`), or `head=FILE`, a linear head that
    `compress label-head` fitted to a few labels on the stored embeddings: the task can then be
    changed without another export. Both sides are softened by `tau` and the loss is weighted by
    tau^2, as the authors' notebook has it. The student's own linear classifier is delivered beside
    it, as head.safetensors. A student of the teacher's own architecture makes it self-distillation,
    for which the paper takes tau = 0.1.
    """

    recipe = Recipe(
        optimizer="lars", lr=0.4, weight_decay=1e-4, batch_size=4096, epochs=400, schedule="cosine", warmup_epochs=5
    )

    def __init__(self, *, context: MethodContext, head: Path | None = None, tau: float = 1.0):
        super().__init__()
        require_positive(tau=tau)
        self.tau = tau
        self.teacher_head = _of_the_teacher(head, context.teacher_width) if head else None
        if self.teacher_head is None:
            self.needs = replace(Needs(), arrays=("logits",))
            if "logits" not in context.widths:
                raise UserError(
                    "simclr-v2 needs the teacher's logits: fit a head to a few labels with compress label-head and "
                    "give it as simclr-v2:head=FILE, or export with --keep embedding,logits"
                )
        classes = context.widths["logits"][-1] if self.teacher_head is None else self.teacher_head.classes
        self.classifier = nn.Linear(context.students[0].width, classes)

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(batch.rows.device.type, enabled=False):
            if self.teacher_head is None:
                t = batch.teacher["logits"]
            else:
                t = self.teacher_head(batch.teacher["embedding"])
            p = (t.flatten(0, 1) / self.tau).softmax(1)  # (B * W, C)
        logits = at_least_float32(self.classifier(outputs[0]["embedding"].flatten(0, 1)))
        return [F.cross_entropy(logits / self.tau, p) * self.tau**2]

    def exported_head(self) -> LinearHead:
        names = self.teacher_head.names if self.teacher_head else None  # stored logits come without
        weight, bias = self.classifier.weight.detach(), self.classifier.bias.detach()
        return LinearHead(weight, bias, names, unit=False)


def _of_the_teacher(file: Path, width: int) -> LinearHead:
    head = linear_head.load(file)
    if head.width != width:
        raise UserError(
            f"{file} is for embeddings of {head.width} dimensions, and the store's have {width}; "
            "make one from this store with compress label-head"
        )
    return head
