"""SimCLR v2's distillation of class probabilities. Chen et al., NeurIPS 2020, arXiv 2006.10029."""

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
from compress_ssl.pipeline.runtime.errors import UserError


class SimClrV2(Method):
    """SimCLR v2: cross-entropy to the teacher's class probabilities at temperature tau, without labels (eq. 2).

    Chen et al., "Big Self-Supervised Models are Strong Semi-Supervised Learners", NeurIPS 2020, arXiv 2006.10029.
    With t the teacher's logits and s those of a linear classifier that is trained on the student's embedding:

        p = softmax(t / tau)    loss = -tau² Σ_c p_c log softmax_c(s / tau), batch mean, in nats

    The factor tau² is in the authors' notebook, not in eq. 2. The teacher's logits are those in the store, or those
    of a linear head that `compress label-head` fitted to a few labels on the stored embeddings: then another task
    needs no new export. The student's classifier is exported with it, as head.safetensors.

    Keys:
        head: file of a linear head for the teacher's embedding, (C, D); by default the stored logits are used.
        tau: temperature, more than 0. For self-distillation (a student of the teacher's architecture) the paper
            takes 0.1.

    Raises UserError for a tau that is not positive, if there is neither a head nor logits in the store, and for a
    file that is no linear head of D inputs.

    Differences from the paper: no loss on labelled images is added; lr scales linearly with the batch size, in the
    paper with its square root; 5 epochs of warm-up are our choice.

    Example:
        compress distill --store teacher --student timm:resnet18 --method simclr-v2:head=head.safetensors --out run
    """

    # lr 0.4 for 256 images is the published 6.4 = 0.1 * sqrt(4096) for 4096.
    recipe = Recipe(
        optimizer="lars", lr=0.4, weight_decay=1e-4, batch_size=4096, epochs=400, schedule="cosine", warmup_epochs=5
    )

    def __init__(self, *, context: MethodContext, head: Path | None = None, tau: float = 1.0):
        super().__init__()
        require_positive(tau=tau)
        self.tau = tau
        self.teacher_head = _load_teacher_head(head, context.teacher_width) if head else None
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
        names = self.teacher_head.names if self.teacher_head else None  # class names are not stored with logits
        weight, bias = self.classifier.weight.detach(), self.classifier.bias.detach()
        return LinearHead(weight, bias, names, unit=False)


def _load_teacher_head(file: Path, width: int) -> LinearHead:
    """The linear head in `file`. Raises UserError if it is none, or not for embeddings of `width` dimensions."""
    head = linear_head.load(file)
    if head.width != width:
        raise UserError(
            f"{file} is for embeddings of {head.width} dimensions, and the store's have {width}; "
            "make one from this store with compress label-head"
        )
    return head
