"""DoGo: Distill on the Go, mutual distillation. Bhat, Arani, Zonooz, CVPR workshops 2021, arXiv 2104.09866."""

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
from compress_ssl.pipeline.runtime.errors import UserError

RECIPE = Recipe(optimizer="adam", lr=3e-4, weight_decay=1e-6, batch_size=256, epochs=1000, schedule="constant")
"""The released code's settings. Its cosine schedule has a final rate equal to the first, so it is constant."""

WEIGHT = 100 / 256
"""Weight of the KL term, a batch mean here. The released code multiplies a mean over B * B elements by 100, which is
the same at its B = 256."""


class Dogo(Method):
    """DoGo: two or more students, each with a contrastive loss and a KL to the other students' similarities.

    Bhat, Arani, Zonooz, "Distill on the Go: Online knowledge distillation in self-supervised learning", CVPR
    workshops 2021, arXiv 2104.09866. Each student (peer) is given two views of its own; if it has more, the first
    two are used. z and z' (B, width) are its L2-normalised projections of the first and second views, by a trained
    head that is not part of the exported student. For a peer with similarities P and another with Q:

        P = softmax_rows(z z'ᵀ / tau)    loss = NT-Xent(z, z'; tau_ssl) + weight * KL(Q || P)

    Both terms are batch means in nats. Q takes no gradient from this loss; with several other peers the KL is the
    mean over them. Nothing is read from the teacher. With `--pairing fresh` the number of views is not limited.

    Keys:
        tau: temperature of P and Q, more than 0.
        tau_ssl: temperature of NT-Xent, more than 0.
        weight: of the KL term; 0.390625 equals the released 100 on a mean over 256 * 256 elements.
        width: dimensions of the projections.

    Raises UserError for fewer than two students and for values that are not positive.

    Difference from the released code: its template gives the second peer weight 1; here all peers have `weight`.

    Example:
        compress distill --store teacher --student timm:resnet18 --student timm:resnet34 --method dogo --out run
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
            raise UserError(f"dogo needs two or more students, not {len(context.students)}; repeat --student")
        self.tau, self.tau_ssl, self.weight = tau, tau_ssl, weight
        self.heads = nn.ModuleList(build_projection_head(student.width, width) for student in context.students)

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        with torch.autocast(batch.rows.device.type, enabled=False):
            pairs = [project_pair(head, out) for head, out in zip(self.heads, outputs, strict=True)]
            log_similarities = [compute_log_similarities(one, two, self.tau) for one, two in pairs]  # (B, B) each
            losses = []
            for peer, (one, two) in enumerate(pairs):
                others = [log_q for number, log_q in enumerate(log_similarities) if number != peer]
                mutual = torch.stack([kl_divergence(q.detach(), log_similarities[peer]) for q in others]).mean()
                losses.append(nt_xent(one, two, self.tau_ssl) + self.weight * mutual)
        return losses


class DogoFrozen(Method):
    """DoGo with the frozen teacher as the second peer: a contrastive loss and a KL to the teacher's similarities.

    Our adaptation of Bhat, Arani, Zonooz, arXiv 2104.09866, which trains both peers. The loss of the student is that
    of `dogo`, with Q from the teacher's L2-normalised stored vectors of the step's first two views. In DoGo the peers
    are given different views in any case, so `--pairing cross` and `--pairing same` are both faithful to it.

    Keys:
        tau, tau_ssl, weight, width: as for dogo.
        target: `projection` is what a peer of the paper provides, the output of the teacher's own projection head
            (export with head= and --keep embedding,projection); `embedding` is the pooled embedding; `auto` takes
            the projection if the store has it.

    Raises UserError for values that are not positive.

    Example:
        compress distill --store teacher --student timm:resnet18 --method dogo-frozen:target=embedding --out run
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
        self.head = build_projection_head(context.students[0].width, width)

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        with torch.autocast(batch.rows.device.type, enabled=False):
            one, two = project_pair(self.head, outputs[0])
            t = collectives.gather(l2_normalize(batch.teacher[self.target][:, :2].contiguous()))  # (B, 2, D)
            log_q = compute_log_similarities(t[:, 0], t[:, 1], self.tau)
            log_p = compute_log_similarities(one, two, self.tau)
            return [nt_xent(one, two, self.tau_ssl) + self.weight * kl_divergence(log_q, log_p)]


def build_projection_head(width: int, out: int) -> nn.Sequential:
    """The released code's SimCLR head: Linear(width, 512, no bias), batch norm, ReLU, Linear(512, out)."""
    return nn.Sequential(nn.Linear(width, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, out))


def project_pair(head: nn.Module, out: Outputs) -> tuple[Tensor, Tensor]:
    """L2-normalised projections of the first two views of the images of all ranks: (B, width) each."""
    z = at_least_float32(out["embedding"][:, :2])  # (B, 2, d)
    z = collectives.gather(l2_normalize(head(z.flatten(0, 1))).unflatten(0, z.shape[:2]))
    return z[:, 0], z[:, 1]


def nt_xent(one: Tensor, two: Tensor, tau: float) -> Tensor:
    """SimCLR's contrastive loss NT-Xent (Chen et al., ICML 2020, eq. 1), mean over 2 B rows, in nats.

    one, two: (B, width) unit vectors; row j of both is the same image in two views. With z the 2 B vectors, i and j a
    pair of views: -log(exp(z_i · z_j / tau) / Σ_{k ≠ i} exp(z_i · z_k / tau)).
    """
    n = len(one)
    z = torch.cat([one, two])
    logits = (z @ z.T / tau).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, (torch.arange(2 * n, device=z.device) + n) % (2 * n))


def compute_log_similarities(one: Tensor, two: Tensor, tau: float) -> Tensor:
    """(B, B) log softmax_rows(one twoᵀ / tau), the image's own second view included."""
    return (one @ two.T / tau).log_softmax(1)


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(Q || P) from log probabilities (B, n), batch mean, in nats."""
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
