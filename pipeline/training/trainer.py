"""The one training loop: a session from where it stands to its end, logged, checked and saved on the way."""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.runtime.lease import Lease
from compress_ssl.pipeline.runtime.progress import meter, say
from compress_ssl.pipeline.runtime.signals import Interrupt, Interrupted
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training.learner import Lesson
from compress_ssl.pipeline.training.metrics_log import Journal
from compress_ssl.pipeline.training.run import Rows, Session

LOG_EVERY = 10  # steps between lines of metrics.jsonl


@dataclass
class Trainer:
    """Takes a session's steps. Rank 0 alone writes, and while it does nobody else writes these runs."""

    session: Session
    val: Any  # labelled images for a nearest-neighbour check, or None
    val_every: float  # epochs between checks
    save_every: int  # steps between checkpoints
    workers: int  # loader processes
    logs: dict[Path, Journal] = field(init=False, default_factory=dict)  # by run folder; none on other ranks

    def train(self) -> None:
        """To the plan's last step.

        Raises Interrupted when asked to stop, Diverged if no lesson is left, UserError if another process writes
        these runs. What is saved stays.
        """
        session, steps = self.session, self.session.plan.steps
        with ExitStack() as stack:
            stop = collectives.Stop(stack.enter_context(Interrupt()))
            folders = [apprentice.folder for apprentice in session.apprentices] if collectives.rank() == 0 else []
            leases = [stack.enter_context(Lease(Folder(folder))) for folder in folders]
            say(session.introduction())
            bar = stack.enter_context(meter("distill", steps, "steps", session.start))
            for lesson in session.lessons if folders else []:
                for apprentice in lesson.apprentices:
                    self.logs[apprentice.folder] = stack.enter_context(Journal(apprentice.folder, lesson.start))
            sights = stack.enter_context(closing(session.sights(self.workers)))
            waited, clock, began = 0.0, time.monotonic(), time.monotonic()
            for step in range(session.start, steps):
                sight = next(sights)
                waited += time.monotonic() - clock
                at_log = step % LOG_EVERY == 0 or step == steps - 1
                rows = session.step(step, sight, at_log)
                passed = max(1e-9, time.monotonic() - began)
                rate = session.plan.batch * (step + 1 - session.start) / passed
                if at_log:
                    self._log(rows, {"images_per_s": rate, "data_wait": waited / passed})
                losses = " ".join(f"{row['loss']:.4f}" if row else "-" for row in rows)
                bar.advance(1, f"loss {losses}  {rate:.0f} images/s  data wait {waited / passed:.0%}")
                for lease in leases:
                    lease.check()
                self._end_of_step(step + 1, stop.asked())
                clock = time.monotonic()

    def _log(self, rows: Rows, speed: dict[str, float]) -> None:
        """rows: of a step, in the order of the session's apprentices."""
        for row, apprentice in zip(rows, self.session.apprentices, strict=True):
            if row and self.logs:
                self.logs[apprentice.folder].write({**row, **speed})

    def _end_of_step(self, done: int, asked: int) -> None:
        """Check and save when it is time; stop when asked to, which is a signal's number."""
        session, total = self.session, self.session.plan.steps
        per_check = max(1, round(self.val_every * session.per_epoch))
        for lesson in session.lessons:
            if done <= lesson.start or lesson.over:
                continue
            if self.val is not None and (done % per_check == 0 or done == total):
                self._examine(lesson, done)
            if done == total or asked or done % self.save_every == 0:
                with session.alone(lesson):
                    lesson.save(done)
        if asked and done < total:
            collectives.largest()  # rank 0 has saved
            raise Interrupted(asked, f"saved at step {done} of {total}; repeat the command to continue")

    def _examine(self, lesson: Lesson, done: int) -> None:
        """Leave-one-out nearest neighbours on `val`; the best so far is kept. Rank 0 does it, and the others wait."""
        session = self.session
        for apprentice in lesson.apprentices if self.logs else []:
            score = apprentice.examine(self.val, session.spec, session.device, lesson.training.precision, self.workers)
            lesson.keep_best(apprentice, score, done)
            epoch = round(done / session.per_epoch, 4)
            self.logs[apprentice.folder].write({"step": done, "epoch": epoch, "val_nn": score})
