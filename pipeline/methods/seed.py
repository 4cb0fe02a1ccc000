"""SEED: Self-supervised distillation for visual representation. Fang et al., ICLR 2021."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from pipeline.bank import MemoryBank, unit
from pipeline.method import Batch, Method, Outputs, Recipe, Setting, bank_size, require, store_rows
from pipeline.similarity import relation_cross_entropy


class Seed(Method):
    """SEED: cross-entropy over the image's own teacher vector and a queue of teacher vectors.

    The student's embedding goes through a two-layer head to the teacher's width, dropped at the end.
    `tau_t` sharpens the teacher: at 0.01 (the default) and below nearly all its weight lies on the
    image's own vector, so the loss is close to contrastive learning against fixed keys; the
    release ran at 1e-4, where nothing else is left. Published on the teacher's projection; where
    the store keeps none, the pooled embedding takes its place.
    """

    recipe = Recipe(lr=0.03, weight_decay=1e-4, batch_size=256, epochs=200, schedule="cosine")

    def __init__(
        self,
        *,
        setting: Setting,
        bank: int | None = None,
        tau_t: float = 0.01,
        tau_s: float = 0.2,
        start: Literal["store", "empty", "random"] = "store",
    ):
        super().__init__()
        require(tau_t=tau_t, tau_s=tau_s)
        self.tau_t, self.tau_s = tau_t, tau_s
        width, target = setting.students[0].width, setting.teacher_width
        setting.notes.append(f"seed: the store keeps no projection; the teacher's {target}-d embedding is the target")
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, target))
        size = bank_size(bank, 65_536, setting)
        self.bank = MemoryBank(size, {"teacher": target}, reread=("teacher",), seed=setting.seed)
        self.bank.start(start, store_rows(setting, size), setting.view)
        self._seen: dict[str, Tensor] = {}

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher["embedding"].flatten(0, 1)  # (B * W, D)
        s = self.head(outputs[0]["embedding"].flatten(0, 1))
        self._seen = {"teacher": unit(t)}
        return [relation_cross_entropy(t, s, self.bank["teacher"], self.tau_t, self.tau_s)]

    def after_step(self, batch: Batch) -> None:
        self.bank.push(batch.pair_rows, batch.teacher_views.flatten(), self._seen)
