"""The one training loop: a session from where it stands to its end, logged, checked and saved on the way."""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.runtime.lease import Lease
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.signals import Interrupted, StopRequest
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.metrics_log import MetricsLog
from compress_ssl.pipeline.training.run import Rows, TrainingRun

LOG_EVERY = 10  # steps between lines of metrics.jsonl


@dataclass
class Trainer:
    """Takes a session's steps. Rank 0 alone writes, and while it does nobody else writes these runs."""

    training_run: TrainingRun
    val: Any  # labelled images for a nearest-neighbour check, or None
    val_every: float  # epochs between checks
    save_every: int  # steps between checkpoints
    workers: int  # loader processes
    logs: dict[Path, MetricsLog] = field(init=False, default_factory=dict)  # by run folder; none on other ranks

    def train(self) -> None:
        """To the plan's last step.

        Raises Interrupted when asked to stop, Diverged if no lesson is left, UserError if another process writes
        these runs. What is saved stays.
        """
        training_run, steps = self.training_run, self.training_run.plan.steps
        with ExitStack() as stack:
            stop = collectives.SharedStopRequest(stack.enter_context(StopRequest()))
            folders = [student.folder for student in training_run.students] if collectives.rank() == 0 else []
            leases = [stack.enter_context(Lease(Folder(folder))) for folder in folders]
            echo(training_run.summary())
            bar = stack.enter_context(progress_bar("distill", steps, "steps", training_run.start))
            for learner in training_run.learners if folders else []:
                for student in learner.students:
                    self.logs[student.folder] = stack.enter_context(MetricsLog(student.folder, learner.start))
            view_batches = stack.enter_context(closing(training_run.load_views(self.workers)))
            waited, clock, began = 0.0, time.monotonic(), time.monotonic()
            for step in range(training_run.start, steps):
                view_batch = next(view_batches)
                waited += time.monotonic() - clock
                at_log = step % LOG_EVERY == 0 or step == steps - 1
                rows = training_run.step(step, view_batch, at_log)
                passed = max(1e-9, time.monotonic() - began)
                rate = training_run.plan.batch * (step + 1 - training_run.start) / passed
                if at_log:
                    self._log(rows, {"images_per_s": rate, "data_wait": waited / passed})
                losses = " ".join(f"{row['loss']:.4f}" if row else "-" for row in rows)
                bar.advance(1, f"loss {losses}  {rate:.0f} images/s  data wait {waited / passed:.0%}")
                for lease in leases:
                    lease.check()
                self._end_of_step(step + 1, stop.signum())
                clock = time.monotonic()

    def _log(self, rows: Rows, speed: dict[str, float]) -> None:
        """rows: of a step, in the order of the session's apprentices."""
        for row, student in zip(rows, self.training_run.students, strict=True):
            if row and self.logs:
                self.logs[student.folder].write({**row, **speed})

    def _end_of_step(self, done: int, asked: int) -> None:
        """Check and save when it is time; stop when asked to, which is a signal's number."""
        training_run, total = self.training_run, self.training_run.plan.steps
        per_check = max(1, round(self.val_every * training_run.per_epoch))
        for learner in training_run.learners:
            if done <= learner.start or learner.failure:
                continue
            if self.val is not None and (done % per_check == 0 or done == total):
                self._examine(learner, done)
            if done == total or asked or done % self.save_every == 0:
                with training_run.isolating_divergence(learner):
                    learner.save(done)
        if asked and done < total:
            collectives.barrier()  # rank 0 has saved
            raise Interrupted(asked, f"saved at step {done} of {total}; repeat the command to continue")

    def _examine(self, learner: Learner, done: int) -> None:
        """Leave-one-out nearest neighbours on `val`; the best so far is kept. Rank 0 does it, and the others wait."""
        training_run = self.training_run
        for student in learner.students if self.logs else []:
            score = student.validate(
                self.val, training_run.spec, training_run.device, learner.training.precision, self.workers
            )
            learner.save_if_best(student, score, done)
            epoch = round(done / training_run.per_epoch, 4)
            self.logs[student.folder].write({"step": done, "epoch": epoch, "val_nn": score})
