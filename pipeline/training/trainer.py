"""The one training loop: takes the steps of a run, and logs, validates and saves on the way."""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.runtime.lease import Lease
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.signals import Interrupted, StopRequest
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.metrics_log import MetricsLog, MetricsRow
from compress_ssl.pipeline.training.run import Rows, TrainingRun

LOG_EVERY = 10  # steps between rows of metrics.jsonl


@dataclass
class Trainer:
    """Trains a run to its last step. Rank 0 alone writes, under a lease that keeps other processes from writing."""

    training_run: TrainingRun
    val: Dataset | None  # labelled images for the nearest-neighbour validation; None: no validation
    val_every: float  # epochs between validations
    save_every: int  # steps between checkpoints
    workers: int  # loader processes
    logs: dict[Path, MetricsLog] = field(init=False, default_factory=dict)  # by run folder; empty on other ranks

    def train(self) -> None:
        """Take every step that is left: load its pixels, call `TrainingRun.step`, log, validate and save.

        Raises Interrupted after a signal to stop, Diverged if no learner is left, UserError if another process
        writes these runs. Checkpoints that were saved before stay.
        """
        training_run, steps = self.training_run, self.training_run.sampler.steps
        with ExitStack() as stack:
            # -------------------------------------------------------- set-up
            stop = collectives.SharedStopRequest(stack.enter_context(StopRequest()))
            folders = [student.folder for student in training_run.students] if collectives.rank() == 0 else []
            leases = [stack.enter_context(Lease(Folder(folder))) for folder in folders]
            training_run.record_changes()
            echo(training_run.summary())
            bar = stack.enter_context(progress_bar("distill", steps, "steps", training_run.start))
            for learner in training_run.learners if folders else []:
                for student in learner.students:
                    self.logs[student.folder] = stack.enter_context(MetricsLog(student.folder, learner.start))
            view_batches = stack.enter_context(closing(training_run.load_views(self.workers)))

            # -------------------------------------------------------- steps
            waited, clock, began = 0.0, time.monotonic(), time.monotonic()  # waited: seconds spent on the loader
            for step in range(training_run.start, steps):
                view_batch = next(view_batches)
                waited += time.monotonic() - clock
                log_now = step % LOG_EVERY == 0 or step == steps - 1
                rows = training_run.step(step, view_batch, log_now)
                passed = max(1e-9, time.monotonic() - began)
                rate = training_run.sampler.batch * (step + 1 - training_run.start) / passed
                if log_now:
                    self._log(rows, {"images_per_s": rate, "data_wait": waited / passed})
                losses = " ".join(f"{row.loss:.4f}" if row else "-" for row in rows)
                bar.advance(1, f"loss {losses}  {rate:.0f} images/s  data wait {waited / passed:.0%}")
                for lease in leases:
                    lease.check()
                self._validate_and_save(step + 1, stop.signum())
                clock = time.monotonic()

    def _log(self, rows: Rows, speed: dict[str, float]) -> None:
        """Write each student's row. rows: of one step, in the order of the run's students."""
        for row, student in zip(rows, self.training_run.students, strict=True):
            if row and self.logs:
                self.logs[student.folder].write(MetricsRow(row.step, {**row.values, **speed}))

    def _validate_and_save(self, done: int, signum: int) -> None:
        """Validate and save where these are due after `done` steps.

        signum: number of the signal that requested a stop, or 0. After a signal, all learners are saved and
        Interrupted is raised.
        """
        training_run, total = self.training_run, self.training_run.sampler.steps
        steps_per_check = max(1, round(self.val_every * training_run.steps_per_epoch))
        for learner in training_run.learners:
            if done <= learner.start or learner.failure:
                continue
            if self.val is not None and (done % steps_per_check == 0 or done == total):
                self._validate(learner, self.val, done)
            if done == total or signum or done % self.save_every == 0:
                with training_run.isolating_divergence(learner):
                    learner.save(done)
        if signum and done < total:
            collectives.barrier()  # no rank may end before rank 0 has saved
            raise Interrupted(signum, f"saved at step {done} of {total}; repeat the command to continue")

    def _validate(self, learner: Learner, val: Dataset, done: int) -> None:
        """Leave-one-out nearest neighbours on `val`; keeps the best model so far. Rank 0 alone does this."""
        training_run = self.training_run
        spec, device, precision = training_run.batches.spec, training_run.device, learner.settings.precision
        for student in learner.students if self.logs else []:
            score = student.validate(val, spec, device, precision, self.workers)
            learner.save_if_best(student, score, done)
            epoch = round(done / training_run.steps_per_epoch, 4)
            self.logs[student.folder].write(MetricsRow(done, {"epoch": epoch, "val_nn": score}))
