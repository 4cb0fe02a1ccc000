"""CRD: Contrastive Representation Distillation. Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import (
    Batch,
    Method,
    MethodContext,
    Outputs,
    Recipe,
    require_fractions,
    require_positive,
)
from compress_ssl.pipeline.models.precision import at_least_float32, l2_normalize

EPS = 1e-7
"""Added to denominators, as in the released code; without a unit."""


class Crd(Method):
    """Noise-contrastive estimation between student and teacher, with a memory of one vector per image for each.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699. Student and
    teacher embeddings go through one trained linear layer each to `width` dimensions and are L2-normalised, to
    v_s and v_t. Each network has a memory of n vectors m_i, one per usable image. For an anchor v of one
    network and the memory of the other:

        e_j = exp(v · m_j / tau) / Z        h_j = e_j / (e_j + K / n)
        loss = -(log h_i + Σ_{k drawn} log(1 - h_k)), batch mean, in nats, summed over both directions

    i is the image itself, the K negatives k are drawn uniformly. Z is fixed by the first batch: the mean of
    exp(v · m / tau) times n. After the step each slot of the batch becomes the L2-normalised
    momentum * m_i + (1 - momentum) * v. The gradient reaches the student and both linear layers, not the memories.

    Keys:
        negatives: K, more than 0, at most the number of usable images.
        tau: temperature, more than 0.
        momentum: of the memories, from 0 to 1.
        width: dimensions of v_s and v_t.

    Raises UserError for values outside these ranges.

    Differences from the released code: it draws negatives from other classes, which needs labels; here an image
    may be its own negative. It adds a cross-entropy on labels, which does not exist here. All views of an image
    share a slot.

    Example:
        compress distill --store teacher --student timm:resnet18 --method crd:negatives=4096 --out run
    """

    recipe = Recipe(
        lr=0.2, weight_decay=5e-4, batch_size=64, epochs=240, schedule="step",
        drops=((150 / 240, 0.1), (180 / 240, 0.01), (210 / 240, 0.001)),
    )  # fmt: skip  # 0.2 for 256 images is the published 0.05 for 64
    rows: Tensor  # (n,) int64 usable rows, ascending: slot j belongs to image rows[j]
    student_memory: Tensor  # (n, width) unit vectors
    teacher_memory: Tensor
    constants: Tensor  # (2,) Z of the student's and of the teacher's memory, 0 before the first batch

    def __init__(
        self,
        *,
        context: MethodContext,
        negatives: int = 16_384,
        tau: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
    ):
        super().__init__()
        require_positive(negatives=negatives, tau=tau, width=width)
        require_fractions(momentum=momentum)
        n = len(context.rows)
        self.tau, self.momentum = tau, momentum
        self.negatives = min(negatives, n)
        if self.negatives < negatives:
            context.notes.append(f"crd: {n} negatives instead of {negatives}: there are no more images")
        self.student_head = nn.Linear(context.students[0].width, width)
        self.teacher_head = nn.Linear(context.teacher_width, width)
        generator = torch.Generator().manual_seed(context.seed)
        bound = (3.0 / width) ** 0.5  # uniform vectors of expected squared norm 1, as in the released code
        for name in ("student_memory", "teacher_memory"):
            vectors = torch.empty(n, width).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, vectors)
        self.register_buffer("constants", torch.zeros(2))
        self.register_buffer("rows", torch.from_numpy(context.rows), persistent=False)
        self._projections: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        w = batch.teacher_views.shape[1]
        slots = self.slots(batch).repeat_interleave(w)  # (B * W,)
        with torch.autocast(slots.device.type, enabled=False):
            embedding = at_least_float32(outputs[0]["embedding"].flatten(0, 1))  # (B * W, d)
            s = l2_normalize(self.student_head(embedding))  # (B * W, width)
            t = l2_normalize(self.teacher_head(batch.teacher["embedding"].flatten(0, 1)))
            self._projections = s.detach().unflatten(0, (-1, w)), t.detach().unflatten(0, (-1, w))
            chosen = torch.cat([slots[:, None], self._draw_negatives(len(batch.rows), w)], 1)  # the positive first
            return [self._nce(s, self.teacher_memory, chosen, 1) + self._nce(t, self.student_memory, chosen, 0)]

    def _draw_negatives(self, images: int, w: int) -> Tensor:
        """(images * w, K) slots: every rank draws those of all ranks and keeps its own."""
        ranks = collectives.world_size()
        drawn = torch.randint(len(self.rows), (ranks * images, w, self.negatives), device=self.rows.device)
        return drawn[collectives.rank() :: ranks].flatten(0, 1)

    def slots(self, batch: Batch) -> Tensor:
        """(B,) int64 memory slot of each image of the batch."""
        return torch.searchsorted(self.rows, batch.rows)

    def _nce(self, anchors: Tensor, memory: Tensor, chosen: Tensor, side: int) -> Tensor:
        """Loss of one direction, batch mean, in nats; `side` is the memory's index in `constants`.

        anchors: (B * W, width). memory: (n, width). chosen: (B * W, 1 + K) slots, the positive first. The cosines
        to all n slots are computed and the chosen ones gathered: that takes less memory than to gather 1 + K
        vectors for each anchor.
        """
        scores = ((anchors @ memory.T).gather(1, chosen) / self.tau).exp()  # (B * W, 1 + K)
        if not self.constants[side]:
            self.constants[side] = collectives.gather(scores.detach().mean(1)).mean() * len(memory)
        # Cloned: the other direction writes to `constants` before autograd reads this value.
        e = scores / self.constants[side].clone()
        noise = self.negatives / len(memory)
        positive = (e[:, 0] / (e[:, 0] + noise + EPS)).log()
        negative = (noise / (e[:, 1:] + noise + EPS)).log().sum(1)
        return -(positive + negative).mean()

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        slots = collectives.gather(self.slots(batch))
        for memory, vectors in zip((self.student_memory, self.teacher_memory), self._projections, strict=True):
            for of_view in collectives.gather(vectors).unbind(1):  # (ranks * B, width)
                memory[slots] = l2_normalize(memory[slots] * self.momentum + of_view * (1 - self.momentum))
