"""CRD: Contrastive Representation Distillation. Tian, Krishnan, Isola, ICLR 2020."""

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


class Crd(Method):
    """Noise-contrastive estimation between student and teacher, one memory slot per image on either side.

    Both embeddings go through a trained linear layer to `width` dimensions. The positive of an image
    is its own slot in the other network's memory, `negatives` slots are drawn uniformly (the release
    draws them from other classes, which needs labels), so the image itself may be among them. A slot
    moves by 1 - `momentum` towards what was seen, after it was scored. The normalising constants
    are those of the first batch, times the number of images. All views of an image share a slot.
    """

    recipe = Recipe(
        lr=0.2, weight_decay=5e-4, batch_size=64, epochs=240, schedule="step",
        drops=((150 / 240, 0.1), (180 / 240, 0.01), (210 / 240, 0.001)),
    )  # fmt: skip
    rows: Tensor  # (n,) the good rows, ascending: slot j is that of rows[j]
    student_memory: Tensor  # (n, width) unit vectors
    teacher_memory: Tensor
    constants: Tensor  # (2,) of the student's and the teacher's memory, 0 before the first batch

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
        reach = (3.0 / width) ** 0.5
        for name in ("student_memory", "teacher_memory"):
            start = torch.empty(n, width).uniform_(-reach, reach, generator=generator)
            self.register_buffer(name, start)
        self.register_buffer("constants", torch.zeros(2))
        self.register_buffer("rows", torch.from_numpy(context.rows), persistent=False)
        self._seen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        w = batch.teacher_views.shape[1]
        slots = self.slots(batch).repeat_interleave(w)  # (B * W,)
        with torch.autocast(slots.device.type, enabled=False):
            s = l2_normalize(
                self.student_head(at_least_float32(outputs[0]["embedding"].flatten(0, 1)))
            )  # (B * W, width)
            t = l2_normalize(self.teacher_head(batch.teacher["embedding"].flatten(0, 1)))
            self._seen = s.detach().unflatten(0, (-1, w)), t.detach().unflatten(0, (-1, w))
            shape = collectives.world_size() * len(batch.rows), w, self.negatives
            drawn = torch.randint(len(self.rows), shape, device=slots.device)[
                collectives.rank() :: collectives.world_size()
            ]
            picked = torch.cat([slots[:, None], drawn.flatten(0, 1)], 1)  # (B * W, 1 + K), the positive first
            return [self._nce(s, self.teacher_memory, picked, 1) + self._nce(t, self.student_memory, picked, 0)]

    def slots(self, batch: Batch) -> Tensor:
        """(B,) slot of each image."""
        return torch.searchsorted(self.rows, batch.rows)

    def _nce(self, anchors: Tensor, memory: Tensor, picked: Tensor, side: int) -> Tensor:
        """-(log h+ + sum log(1 - h-)), batch mean; h = e / (e + K / n), e = exp(cosine / tau) / Z.

        All cosines are taken at once and the drawn ones picked: less memory than K vectors for each anchor.
        """
        scores = ((anchors @ memory.T).gather(1, picked) / self.tau).exp()  # (n, 1 + K)
        if not self.constants[side]:
            self.constants[side] = collectives.gather(scores.detach().mean(1)).mean() * len(memory)
        e = scores / self.constants[side].clone()  # the other side's is set before this one's gradient is taken
        noise = self.negatives / len(memory)
        positive = (e[:, 0] / (e[:, 0] + noise + EPS)).log()
        negative = (noise / (e[:, 1:] + noise + EPS)).log().sum(1)
        return -(positive + negative).mean()

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        slots = collectives.gather(self.slots(batch))
        for memory, seen in zip((self.student_memory, self.teacher_memory), self._seen, strict=True):
            for now in collectives.gather(seen).unbind(1):
                memory[slots] = l2_normalize(memory[slots] * self.momentum + now * (1 - self.momentum))
