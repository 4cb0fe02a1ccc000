"""SEED: Self-supervised distillation for visual representation. Fang et al., ICLR 2021."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from pipeline.artifact import UserError
from pipeline.bank import MemoryBank, unit
from pipeline.method import Batch, Method, Needs, Outputs, Recipe, Setting, bank_size, exported, require, store_rows
from pipeline.philox import LOCAL
from pipeline.similarity import relation_cross_entropy

PUBLISHED = 65_536


class Seed(Method):
    """SEED: cross-entropy over the image's own teacher vector and a queue of teacher vectors.

    The student's embedding goes through a two-layer head to the teacher's width, dropped at the end.
    `tau_t` sharpens the teacher: at 0.01 (the default) and below nearly all its weight lies on the
    image's own vector, so the loss is close to contrastive learning against fixed keys; the
    release ran at 1e-4, where nothing else is left.

    `target=projection` is what was published: the teacher's own projection (`head=` and
    `--keep embedding,projection` when it was exported); the pooled embedding takes its place where
    the store keeps none. `small=true` adds the published term of small crops (`--local-views 6`):
    student and teacher embed each, which has a queue of its own that only the first of an image enters.
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
        target: Literal["auto", "projection", "embedding"] = "auto",
        small: bool | None = None,
    ):
        super().__init__()
        require(tau_t=tau_t, tau_s=tau_s)
        self.tau_t, self.tau_s = tau_t, tau_s
        self.target = "projection" if target == "auto" and "projection" in setting.widths else target
        if self.target == "auto":
            self.target = "embedding"
            setting.notes.append(
                f"seed: the store keeps no projection; the teacher's {setting.teacher_width}-d embedding is the target"
            )
        self.small = f"local_{self.target}" in setting.widths if small is None else small
        self.needs = Needs((self.target,))
        if self.small:
            self.needs = replace(
                self.needs, arrays=(self.target, f"local_{self.target}"), outputs=("embedding", "local_embedding")
            )
        for array in self.needs.arrays:
            if array not in setting.widths:
                raise UserError(f"seed needs {array!r} of the teacher, which the store lacks; {exported(array)}")
        student, width = setting.students[0].width, setting.widths[self.target][-1]
        self.head = nn.Sequential(nn.Linear(student, student), nn.ReLU(), nn.Linear(student, width))
        size = bank_size(bank, PUBLISHED, setting)
        self.bank = self._queue(setting, size, self.target, setting.view, start)
        if self.small:
            self.small_bank = self._queue(setting, size, f"local_{self.target}", LOCAL, start)

    def _queue(self, setting: Setting, size: int, array: str, view: int, start: str) -> MemoryBank:
        width = setting.widths[array][-1]
        bank = MemoryBank(size, {"teacher": width}, reread={"teacher": array}, seed=setting.seed)
        bank.start(start, store_rows(setting, size), view)
        return bank

    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        t = batch.teacher[self.target].flatten(0, 1)  # (B * W, D)
        s = self.head(outputs[0]["embedding"].flatten(0, 1))
        loss = relation_cross_entropy(t, s, self.bank["teacher"], self.tau_t, self.tau_s)
        if self.small:
            small = batch.teacher[f"local_{self.target}"]  # (B, L, D)
            s = self.head(outputs[0]["local_embedding"].flatten(0, 1))
            anchors = self.small_bank["teacher"]
            loss = loss + relation_cross_entropy(small.flatten(0, 1), s, anchors, self.tau_t, self.tau_s)
        return [loss]

    def after_step(self, batch: Batch) -> None:
        t = batch.teacher[self.target].flatten(0, 1)
        self.bank.push(batch.rows, batch.teacher_views, {"teacher": unit(t)})
        if self.small and batch.local_views is not None:
            first = batch.teacher[f"local_{self.target}"][:, 0]
            self.small_bank.push(batch.rows, batch.local_views[:, :1], {"teacher": unit(first)})
