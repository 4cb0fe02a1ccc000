"""DoGo: Distill on the Go, peers that learn without a teacher. Bhat, Arani, Zonooz, CVPR workshops 2021."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import (
    Batch,
    Method,
    MethodContext,
    Needs,
    Outputs,
    Recipe,
    Target,
    choose_target,
    require_positive,
)
from compress_ssl.pipeline.models.precision import at_least_float32, l2_normalize
from compress_ssl.pipeline.runtime.artifact import UserError

RECIPE = Recipe(optimizer="adam", lr=3e-4, weight_decay=1e-6, batch_size=256, epochs=1000, schedule="constant")
WEIGHT = 100 / 256  # the release divides by B * B and weighs by 100; at its batch of 256 this is that of a batch mean


class Dogo(Method):
    """Two or more students teach each other: each has a contrastive loss and follows the others' similarities.

    Every peer sees two views of its own (of more the first two count). Its loss is NT-Xent at
    `tau_ssl` plus `weight` times KL(Q || P), batch mean: rows of P and Q are softmax(z z'^T / `tau`)
    between the first and the second views of the batch, P of the peer and Q of another, which takes
    no gradient from it; over several others the mean. Nothing is read from the teacher;
    `--pairing fresh` gives views without end.
    """

    needs = Needs(arrays=(), views=2, peers=True, independent=True)
    recipe = RECIPE

    def __init__(
        self,
        *,
        context: MethodContext,
        tau: float = 0.1,
        tau_ssl: float = 0.5,
        weight: float = WEIGHT,
        width: int = 128,
    ):
        super().__init__()
        require_positive(tau=tau, tau_ssl=tau_ssl, width=width)
        if len(context.students) < 2:
            raise UserError("dogo needs two or more students that teach each other; repeat --student")
        self.tau, self.tau_ssl, self.weight = tau, tau_ssl, weight
        self.heads = nn.ModuleList(projection(student.width, width) for student in context.students)

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        with torch.autocast(batch.rows.device.type, enabled=False):
            pairs = [pair(head, out) for head, out in zip(self.heads, outputs, strict=True)]
            relations = [log_relations(one, two, self.tau) for one, two in pairs]
            losses = []
            for mine, (one, two) in enumerate(pairs):
                others = [q for number, q in enumerate(relations) if number != mine]
                mutual = torch.stack([kl(q.detach(), relations[mine]) for q in others]).mean()
                losses.append(nt_xent(one, two, self.tau_ssl) + self.weight * mutual)
        return losses


class DogoFrozen(Method):
    """DoGo with a peer that has finished learning: the teacher of the store, whose features are its views.

    The student has its contrastive loss and follows the similarities between two stored views of
    the batch, the first two of a step. As peers see views of their own anyway, `--pairing cross` and
    `same` are alike faithful.
    `target=projection` is what a peer would show: the teacher's own projection (`head=` and
    `--keep embedding,projection`); the embedding takes its place where the store keeps none.
    """

    needs = Needs(views=2)
    recipe = RECIPE

    def __init__(
        self,
        *,
        context: MethodContext,
        tau: float = 0.1,
        tau_ssl: float = 0.5,
        weight: float = WEIGHT,
        width: int = 128,
        target: Target = "auto",
    ):
        super().__init__()
        require_positive(tau=tau, tau_ssl=tau_ssl, width=width)
        self.tau, self.tau_ssl, self.weight = tau, tau_ssl, weight
        self.target = choose_target(context, target, "dogo-frozen")
        self.needs = replace(type(self).needs, arrays=(self.target,))
        self.head = projection(context.students[0].width, width)

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        with torch.autocast(batch.rows.device.type, enabled=False):
            one, two = pair(self.head, outputs[0])
            t = collectives.gather(l2_normalize(batch.teacher[self.target][:, :2].contiguous()))  # (B, 2, D)
            theirs = log_relations(t[:, 0], t[:, 1], self.tau)
            mine = log_relations(one, two, self.tau)
            return [nt_xent(one, two, self.tau_ssl) + self.weight * kl(theirs, mine)]


def projection(width: int, out: int) -> nn.Sequential:
    """SimCLR's head as the release has it: d -> 512 without bias, batch norm, ReLU, -> out."""
    return nn.Sequential(nn.Linear(width, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, out))


def pair(head: nn.Module, out: Outputs) -> tuple[Tensor, Tensor]:
    """Unit projections of the first two views, of all ranks: (B, P) each."""
    z = at_least_float32(out["embedding"][:, :2])  # (B, 2, d)
    z = collectives.gather(l2_normalize(head(z.flatten(0, 1))).unflatten(0, z.shape[:2]))
    return z[:, 0], z[:, 1]


def nt_xent(one: Tensor, two: Tensor, tau: float) -> Tensor:
    """Chen et al. 2020, eq. 1, mean over 2 B rows: (B, P) unit vectors, row j of both being one image."""
    n = len(one)
    z = torch.cat([one, two])
    logits = (z @ z.T / tau).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, (torch.arange(2 * n, device=z.device) + n) % (2 * n))


def log_relations(one: Tensor, two: Tensor, tau: float) -> Tensor:
    """(B, B) log softmax over the second views of the batch, the image's own included."""
    return (one @ two.T / tau).log_softmax(1)


def kl(theirs: Tensor, mine: Tensor) -> Tensor:
    """KL(theirs || mine) of rows of log probabilities, batch mean, in nats."""
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
