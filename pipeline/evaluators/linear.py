"""The linear protocol of CompRess: a linear layer on frozen, whitened features.

Shapes: n training and n_val validation images, d dims, C classes, B images of a batch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import (
    AugmentedFeatures,
    Evaluator,
    Lines,
    Panel,
    Percent,
    Result,
    Score,
    Split,
    per_class,
    percent,
    require_labels,
)
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import UNSET, JsonObject, Positive, UnsetType, read_record, to_json
from compress_ssl.pipeline.search import exact

if TYPE_CHECKING:
    import torch

EPS = 1e-5  # added to the variance as by the authors. Not negligible: of unit vectors that is about 1/d or less
BLOCK = 4096  # rows handled at once: (4096, d) in float64 for the variance, (4096, C) logits for the ranking


@dataclass(frozen=True)
class Accuracy:
    """Percentages of the validation images."""

    top1: Percent | None
    top5: Percent | UnsetType | None = UNSET
    epoch: Positive | UnsetType = UNSET  # counted from 1
    selected_on: str | UnsetType = UNSET


@dataclass(frozen=True)
class Metrics:
    """The entry `linear` or `linear_augmented` of metrics.json."""

    last: Accuracy | UnsetType = UNSET
    best: Accuracy | UnsetType = UNSET
    protocol: str = ""  # how the layer was trained, in words


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Evaluator):
    """Top-1 and top-5 of a linear layer trained on frozen, L2-normalised, whitened features.

    The layer's input is x = (f/|f| - mean) / sqrt(var + 1e-5); mean and unbiased variance are those of the centre
    crops of the whole training set and stay fixed. The layer has a bias and is trained by SGD on cross-entropy with
    weight decay on both weight and bias. The learning rate is divided by 10 after 15/40 and again after 30/40 of the
    epochs.

    Source: CompRess (Koohpayegani et al. 2020, arXiv 2010.14713, "Linear"; eval_linear.py of the authors). The paper
    trains on random crops and flips: that is augment=true. The default trains on centre crops alone and is named as
    a protocol of its own in the metrics and in the report.

    Two scores: `last` is the layer after the last epoch. `best` is the epoch with the best top-1 on validation, which
    the authors report; it is selected on the set it is scored on.

    Options: `augment`; `epochs`; `lr`, `momentum` and `weight_decay` of SGD; `batch_size` in images; `seed` of the
    initial layer and of the order of images; `device` ("auto": cuda where there is one, else cpu).
    """

    augment: bool = False
    epochs: int = 40
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"protocol 'linear': {key}={getattr(self, key)} must be 1 or more")
        if not 0 < self.lr < math.inf:
            raise UserError(f"protocol 'linear': lr={self.lr} must be above 0 and finite, for instance 0.01")
        if not 0 <= self.momentum < 1:
            raise UserError(f"protocol 'linear': momentum={self.momentum} must be at least 0 and below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"protocol 'linear': weight_decay={self.weight_decay} must be at least 0 and finite")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"protocol 'linear': seed={self.seed} must be a number of 64 bits")

    @property
    def needs_augmented(self) -> bool:
        """True with augment=true: every epoch trains on another random view of each image."""
        return self.augment

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        """Metrics `last` and `best` {"top1", "top5"} and `protocol`. With fewer than five classes top5 is 100.

        Arrays: `curve` (epochs, 3), mean training loss in nats, top-1 and top-5 on validation; of the last epoch
        `weight` (C, d), `bias` (C,), `prediction` (n_val,) and `per_class` (C,) in percent; `mean` and `scale` (d,)
        with x = (f/|f| - mean) * scale. The global random state is neither used nor changed. Raises UserError if
        augment=true and there is no `augmented`.
        """
        require_labels(self.name, training=train, validation=val)
        if self.augment and augmented is None:
            raise UserError(
                "protocol 'linear:augment=true' embeds augmented training images in every epoch, and only stored "
                "features are at hand here; evaluate a run or a model with --train DATA, or use protocol 'linear'"
            )
        import torch

        unit = exact.normalize(train.features)
        mean, scale = whitening_statistics(unit)
        centre = None if self.augment else _whiten(unit, mean, scale)
        held_out = torch.from_numpy(_whiten(exact.normalize(val.features), mean, scale))  # (n_val, d)
        layer = _Layer(self, unit.shape[1], len(train.classes))
        label = torch.from_numpy(train.label.astype(np.int64))
        curve = np.empty((self.epochs, 3))
        for epoch in range(self.epochs):
            x = _whitened_view(augmented, epoch, unit.shape, mean, scale) if augmented and centre is None else centre
            loss = layer.train(torch.from_numpy(x), label, self.learning_rate(epoch))
            ranking = layer.rank(held_out)
            hits = ranking == val.label[:, None]
            curve[epoch] = loss, percent(hits[:, 0]), percent(hits.any(axis=1))
        weight, bias = layer.arrays()
        arrays = {"curve": curve, "weight": weight, "bias": bias, "mean": mean, "scale": scale}
        arrays |= {"prediction": ranking[:, 0], "per_class": per_class(ranking[:, 0], val.label, len(val.classes))}
        metrics: JsonObject = to_json(self._metrics(curve))
        scores = self.scores_of(self.name, metrics, self.name)
        return Result(metrics, arrays, scores, self.figures_of(metrics, arrays, train, val))

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        drops = sum(epoch >= -(-self.epochs * part // 40) for part in (15, 30))
        return self.lr * 0.1**drops

    def _metrics(self, curve: np.ndarray) -> Metrics:
        """The metrics of a (epochs, 3) curve. The text of `protocol` is what the report shows beside the scores."""
        best = int(curve[:, 1].argmax())
        trained_on = "augmented training images" if self.augment else "centre-crop features"
        return Metrics(
            last=Accuracy(float(curve[-1, 1]), float(curve[-1, 2])),
            best=Accuracy(float(curve[best, 1]), float(curve[best, 2]), best + 1, "validation"),
            protocol=f"{trained_on}, whitened",
        )

    @classmethod
    def entry(cls, options: JsonObject) -> str:
        """A probe on augmented images and one on centre crops are not comparable, so their entries differ."""
        return f"{cls.name}_augmented" if options.get("augment") else cls.name

    @classmethod
    def scores_of(cls, entry: str, metrics: JsonObject, where: str) -> list[Score]:
        """The last epoch, which comparisons plot, and the best one.

        The first metrics.json files had an augmented probe under `linear`: the text of `protocol` tells.
        """
        found = read_record(Metrics, metrics, where, ignore_unknown=True)
        title = "Linear (augmented)" if "augmented" in f"{entry} {found.protocol}" else "Linear"
        last = "top-1 of a linear layer on frozen features after its last epoch"
        top5 = "the same layer: the category is among the five likeliest"
        best = "its best epoch on validation: selected on the very set it is scored on"
        scores = []
        if found.last and found.last.top1 is not None:
            scores.append(
                Score("last.top1", title, found.last.top1, last, term="Linear", detail=found.protocol, plotted=True)
            )
        if found.last and isinstance(found.last.top5, float):
            scores.append(Score("last.top5", f"{title} top-5", found.last.top5, top5, term="top-5"))
        if found.best and found.best.top1 is not None:
            scores.append(Score("best.top1", f"{title} best", found.best.top1, best, term="best"))
        return scores

    @classmethod
    def figures_of(cls, metrics: JsonObject, arrays: dict[str, np.ndarray], train: Split, val: Split) -> list[Lines]:
        """Loss and accuracy by epoch."""
        curve, protocol = arrays["curve"], read_record(Metrics, metrics, cls.name, ignore_unknown=True).protocol
        epoch = np.arange(1, len(curve) + 1)
        panels = (
            Panel(title="training loss (nats)", x=epoch, lines={"loss": curve[:, 0]}),
            Panel(title="validation (%)", x=epoch, lines={"top-1": curve[:, 1], "top-5": curve[:, 2]}),
        )
        name = f"{cls.name}_augmented" if "augmented" in protocol else cls.name
        alt = "loss and accuracy of the linear layer by epoch"
        return [Lines(name=name, title="Linear layer", note=f"Protocol: {protocol}.", panels=panels, alt=alt)]


class _Layer:
    """A linear layer (C, d) with its SGD optimiser and its own random generator."""

    def __init__(self, probe: LinearProbe, dims: int, classes: int) -> None:
        import torch

        self.batch_size, self.device = probe.batch_size, _choose_device(probe.device)
        self.random = torch.Generator().manual_seed(probe.seed)
        bound = dims**-0.5  # torch.nn.Linear draws weight and bias from U(-1/sqrt(d), 1/sqrt(d))
        parts = [torch.empty(classes, dims), torch.empty(classes)]
        self.weight, self.bias = (
            part.uniform_(-bound, bound, generator=self.random).to(self.device).requires_grad_() for part in parts
        )
        self.sgd = torch.optim.SGD(
            [self.weight, self.bias], probe.lr, momentum=probe.momentum, weight_decay=probe.weight_decay
        )

    def train(self, x: "torch.Tensor", label: "torch.Tensor", rate: float) -> float:
        """Train one epoch on x (n, d) and label (n,) in a new random order; returns the mean loss in nats.

        The last batch has the n % batch_size images that are left.
        """
        import torch

        self.sgd.param_groups[0]["lr"] = rate
        total = torch.zeros((), dtype=torch.float64, device=self.device)  # read once an epoch: a step does not wait
        for rows in torch.split(torch.randperm(len(x), generator=self.random), self.batch_size):
            logits = torch.nn.functional.linear(x[rows].to(self.device), self.weight, self.bias)  # (B, C)
            loss = torch.nn.functional.cross_entropy(logits, label[rows].to(self.device))
            self.sgd.zero_grad()
            torch.autograd.backward(loss)
            self.sgd.step()
            total += loss.detach() * len(rows)
        return total.item() / len(x)

    def rank(self, x: "torch.Tensor") -> np.ndarray:
        """(n, min(5, C)) int64: the classes with the largest logits for each row of x (n, d), the largest first."""
        import torch

        most, ranks = min(5, len(self.bias)), []
        with torch.no_grad():
            for part in torch.split(x, BLOCK):
                logits = torch.nn.functional.linear(part.to(self.device), self.weight, self.bias)  # (BLOCK, C)
                ranks.append(logits.topk(most).indices.cpu())
        return torch.cat(ranks).numpy()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(weight (C, d), bias (C,)) on the CPU."""
        return self.weight.detach().cpu().numpy(), self.bias.detach().cpu().numpy()


# ---------------------------------------------------------------- whitening


def whitening_statistics(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, scale), each (d,) float32, of (n, d) normalised features: scale = 1 / sqrt(var + 1e-5).

    The variance is unbiased. A dimension that is constant has scale 316, as in the authors' code.
    """
    mean = unit.mean(axis=0, dtype=np.float64)
    square = np.zeros_like(mean)
    for start in range(0, len(unit), BLOCK):  # by blocks, because float64 doubles the memory
        square += np.square(unit[start : start + BLOCK] - mean).sum(axis=0)
    scale = 1 / np.sqrt(square / (len(unit) - 1) + EPS)
    return mean.astype(np.float32), scale.astype(np.float32)


def _whiten(unit: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Whiten in place: `unit` is the caller's own copy, and a second one might not fit into memory."""
    unit -= mean
    unit *= scale
    return unit


def _whitened_view(
    augmented: AugmentedFeatures, epoch: int, shape: tuple[int, ...], mean: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """(n, d): the augmented features of an epoch, whitened by the statistics of the centre crops."""
    features = augmented(epoch)
    if features.shape != shape:
        raise ValueError(f"augmented({epoch}) gave features of shape {features.shape}, not {shape}")
    return _whiten(exact.normalize(features), mean, scale)


# ---------------------------------------------------------------- device


def _choose_device(name: str) -> "torch.device":
    """The torch device of an option. Raises UserError if torch cannot allocate on it."""
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).splitlines()[0]
        raise UserError(f"protocol 'linear': device={name} cannot be used ({first}); give auto, cpu or cuda") from None
    return device
