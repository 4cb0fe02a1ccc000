"""Feature store + images -> students: the only training loop."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact
from pipeline.artifact import UserError
from pipeline.config import NOT_NEGATIVE, POSITIVE, flag, one_of, require
from pipeline.interrupt import Interrupt, Interrupted
from pipeline.progress import meter, say
from pipeline.storage import Folder

if TYPE_CHECKING:
    import torch

    from pipeline.apprentice import Apprentice, Training
    from pipeline.datasets.base import Dataset
    from pipeline.journal import Journal
    from pipeline.methods.base import Batch, Recipe
    from pipeline.model import Embedder
    from pipeline.pairs import Features, Plan
    from pipeline.store import FeatureStore
    from pipeline.views import ViewSpec

LOG_EVERY = 10  # steps between lines of metrics.jsonl


@dataclass(frozen=True)
class Config:
    """Train students to mimic the teacher's relative similarities, read from a store.

    Optimiser, rate, batch size and epochs default to the method's published recipe. The same
    command again continues; a larger --epochs trains on.
    """

    store: Path = flag(help="the teacher's feature store")
    student: tuple[str, ...] = flag(help="timm:NAME, torchvision:NAME, cifar-resnet:20, ...; may be repeated")
    method: str = flag(help="compress-2q, compress-2q-momentum, compress-1q, seed, python:module:Class")
    out: Path = flag(help="folder of the run; with several students, of their runs")
    data: str | None = flag(None, "the images, if they have moved since the export")
    epochs: float | None = flag(None, "passes over the images (default: as published)")
    steps: int | None = flag(None, "optimiser steps, instead of --epochs")
    batch_size: int | None = flag(None, "images per step on a device", short="-b")
    pairing: str = flag("same", "same, fresh or cross: how student and teacher views go together")
    views: int | None = flag(None, "use only views 0 to this-1 of the store (default: all it has now)")
    views_per_step: int = flag(1, "views of each image in a step, from one decode")
    image_size: int | None = flag(None, "side in pixels (default: the student's own)")
    seed: int = flag(0, "of order, initial weights and everything random in a step")
    optimizer: str | None = flag(None, "sgd or adamw")
    lr: float | None = flag(None, "base learning rate (default: published, scaled with the batch)")
    momentum: float | None = flag(None, "of SGD; beta 1 of AdamW")
    weight_decay: float | None = flag(None)
    norm_decay: bool = flag(True, "weight decay on norms and biases too, as published")
    schedule: str | None = flag(None, "cosine, step or constant")
    warmup_epochs: float | None = flag(None, "epochs of linear warm-up")
    clip: float | None = flag(None, "clip the gradient to this norm")
    ema: float | None = flag(None, "average the student with this decay; the average is what is kept")
    precision: str = flag("fp32", "fp32, bf16, fp16; similarities are always fp32")
    compile: bool = flag(False, "torch.compile the student")
    channels_last: bool = flag(True, "memory format of images and student")
    val: str | None = flag(None, "labelled images for a nearest-neighbour check while training")
    val_every: float = flag(1.0, "epochs between checks")
    save_every: int = flag(500, "steps between checkpoints")
    workers: int | None = flag(None, "loader processes (default: one per core up to 16; 1 on CPU)", short="-j")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1")
    allow_other_pixels: bool = flag(False, "train though this machine renders views differently from the exporting one")
    overwrite: bool = flag(False, "start anew; an earlier run is set aside, not deleted")


def run(config: Config) -> dict[str, Any]:
    """Train to the end, or continue. Returns {"summary", "runs": [...]}."""
    check(config)
    from pipeline.methods import METHODS
    from pipeline.models import MODELS

    for student in config.student:
        MODELS.parse(student)
    METHODS.parse(config.method)
    artifact.read(Folder(config.store), "store")
    if config.overwrite and (aside := artifact.set_aside(config.out)):
        say(f"set the earlier {config.out} aside as {aside}")

    from pipeline.store import FeatureStore

    store = FeatureStore(Folder(config.store))
    METHODS.check(config.method, given=("setting",))
    recipe = recipe_of(config)
    session = prepare(config, store, recipe)
    if session.start >= session.plan.steps:
        names = ", ".join(str(a.folder) for a in session.apprentices)
        return {"summary": f"{names} is finished already: {session.start} steps", "runs": names.split(", ")}
    train(config, session)
    return close(session)


def check(config: Config) -> None:
    """All that can be refused before torch is imported."""
    names = ("epochs", "steps", "batch_size", "views", "views_per_step", "image_size", "val_every", "save_every")
    positive = (*names, "lr", "clip")
    require(config, {name: POSITIVE for name in positive})
    require(config, {"workers": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "warmup_epochs": NOT_NEGATIVE})
    require(
        config,
        {
            "pairing": one_of("same", "fresh", "cross"),
            "precision": one_of("fp32", "bf16", "fp16"),
            "optimizer": one_of("sgd", "adamw"),
            "schedule": one_of("cosine", "step", "constant"),
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
            "ema": (lambda x: 0 < x < 1, "must be between 0 and 1"),
        },
    )
    if config.epochs and config.steps:
        raise UserError("--epochs and --steps were both given; keep one")
    if not config.student:
        raise UserError("no --student was given; name at least one, for example --student cifar-resnet:20")
    if repeated := {s for s in config.student if config.student.count(s) > 1}:
        raise UserError(f"--student {repeated.pop()} was given twice; name each student once")


def recipe_of(config: Config) -> "Recipe":
    """The published recipe with the flags that were given."""
    from pipeline.methods import METHODS
    from pipeline.methods.base import Method

    build = METHODS.resolve(METHODS.parse(config.method).kind)
    recipe = getattr(build, "recipe", Method.recipe)
    names = ("optimizer", "lr", "momentum", "weight_decay", "batch_size", "epochs", "schedule", "warmup_epochs")
    return replace(recipe, **{n: v for n in names if (v := getattr(config, n)) is not None})


@dataclass
class Session:
    """All that the loop works on."""

    store: "FeatureStore"
    dataset: "Dataset"
    val: "Dataset | None"
    spec: "ViewSpec"
    plan: "Plan"
    features: "Features"
    content: Any  # (N,) uint64: the images the teacher saw
    apprentices: list["Apprentice"]
    device: "torch.device"
    start: int

    @property
    def per_epoch(self) -> float:
        """Steps in an epoch."""
        return len(self.plan.rows) / self.plan.batch


def prepare(config: Config, store: "FeatureStore", recipe: "Recipe") -> Session:
    """Check store and images, claim the run folders, build the apprentices, restore what there is."""
    import numpy as np

    from pipeline.device import choose
    from pipeline.images import GOOD
    from pipeline.pairs import Features, Plan
    from pipeline.views import ViewSpec

    dataset = open_data(config, store)
    val = open_val(config, dataset)
    views = views_used(config, store)
    store.require_complete(views)
    rows = np.flatnonzero(store.table("status") == GOOD)
    if len(rows) < 2:
        raise UserError(f"{store.storage} has {len(rows)} usable images; at least 2 are needed to train")
    batch = min(recipe.batch_size, len(rows))
    if batch < recipe.batch_size:
        say(f"batch of {batch} instead of {recipe.batch_size}: that is all the usable images")
    steps = config.steps or max(1, round(recipe.epochs * len(rows) / batch))
    plan = Plan(config.seed, rows, views, batch, config.views_per_step, config.pairing, steps)
    spec = ViewSpec(**store.identity["views"])
    device = choose(config.device)
    features = Features(store, least=2 * config.views_per_step)
    training = training_of(config, recipe, plan)
    apprentices = [hire(config, s, k, store, plan, training, recipe, device) for k, s in enumerate(config.student)]
    start = restore(apprentices, features)
    plan = replace(plan, first=start)
    return Session(store, dataset, val, spec, plan, features, store.table("content"), apprentices, device, start)


def open_data(config: Config, store: "FeatureStore") -> "Dataset":
    """The images of the store, and that they look the same here. Raises UserError if they do not."""
    from pipeline.datasets import DATASETS
    from pipeline.model import Preprocessing
    from pipeline.pixels import require_same
    from pipeline.views import ViewSpec

    about = store.about["data"]
    dataset = DATASETS.order(config.data or about["spec"])
    dataset = dataset.subset(about["limit"]) if about["limit"] else dataset
    if dataset.fingerprint != store.identity["data"]["fingerprint"]:
        raise UserError(
            f"the images are not those of {config.store}: {dataset.unlike(store.table('sample_id'))}; "
            "give the right ones with --data or export these"
        )
    preprocessing = Preprocessing.of(store.identity["teacher"]["preprocessing"])
    spec = ViewSpec(**store.identity["views"])
    keys = store.table("view_key")
    if unlike := require_same(store.about["pixels"], dataset, spec, preprocessing, keys, config.allow_other_pixels):
        say(f"warning: {unlike}")
    return dataset


def open_val(config: Config, train: "Dataset") -> "Dataset | None":
    from pipeline.datasets import DATASETS

    if config.val is None:
        return None
    val = DATASETS.order(config.val)
    if (val.label < 0).all():
        raise UserError(f"--val {config.val} has no labels, so nearest neighbours cannot be scored; leave --val out")
    return val


def views_used(config: Config, store: "FeatureStore") -> tuple[int, ...]:
    """Stored views to train on: the random ones if there are any, else the plain one.

    A run goes on with the views it began with, also when the store has grown since.
    """
    total = config.views or store.views
    folder = Folder(run_folder(config, config.student[0]))
    if folder.exists(artifact.MANIFEST):
        total = config.views or artifact.read(folder, "run")["about"]["views"]
    if total > store.views:
        raise UserError(f"--views {total} was asked, but {config.store} has {store.views}; export more or ask for fewer")
    return tuple(range(1, total)) if total > 1 else (0,)


def run_folder(config: Config, student: str) -> Path:
    """OUT itself for one student, OUT/NAME for each of several."""
    if len(config.student) == 1:
        return config.out
    return config.out / "".join(c if c.isalnum() or c in "-_." else "-" for c in student)


def training_of(config: Config, recipe: "Recipe", plan: "Plan") -> "Training":
    from pipeline.apprentice import Training
    from pipeline.schedule import Schedule

    rate = recipe.lr if config.lr is not None else recipe.lr * plan.batch / 256
    run_epochs = plan.steps * plan.batch / len(plan.rows)
    schedule = Schedule(recipe.schedule, min(1.0, recipe.warmup_epochs / run_epochs), recipe.drops)
    return Training(
        recipe.optimizer, rate, recipe.momentum, recipe.weight_decay, config.norm_decay, schedule,
        config.clip, config.ema, config.precision, config.seed,
    )  # fmt: skip


def hire(
    config: Config, student: str, number: int, store: "FeatureStore", plan: "Plan", training: "Training",
    recipe: "Recipe", device: "torch.device",
) -> "Apprentice":  # fmt: skip
    """Build a student and its method, both from the seed, and claim their run folder."""
    import torch

    from pipeline.apprentice import Apprentice
    from pipeline.methods import METHODS
    from pipeline.methods.base import Setting
    from pipeline.model import build

    torch.manual_seed(config.seed)
    embedder = build(student, image_size=config.image_size, pretrained_default=False)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    embedder = embedder.to(device, memory_format=layout)
    setting = Setting([embedder], store.arrays, plan.rows, int(plan.epoch_views(0)[1][0]), config.seed)
    method = METHODS.order(config.method, setting=setting).to(device)
    suits(config, store, method)
    folder = run_folder(config, student)
    claim(config, folder, student, embedder, store, plan, training, recipe)
    apprentice = Apprentice(folder, embedder, method, training, number)
    if config.compile:
        apprentice.forward = torch.compile(embedder)
    for note in setting.notes:
        say(note)
    return apprentice


def suits(config: Config, store: "FeatureStore", method: Any) -> None:
    """Refuse in words what the method needs and is not there."""
    for name in method.needs.arrays:
        if name not in store.arrays:
            keep = ",".join([*store.arrays, name])
            raise UserError(f"{config.method} needs {name!r}, which {config.store} lacks; export with --keep {keep}")
    if config.pairing not in method.needs.pairings:
        raise UserError(f"{config.method} needs --pairing {' or '.join(method.needs.pairings)}, not {config.pairing}")
    if config.views_per_step < method.needs.views:
        raise UserError(f"{config.method} needs --views-per-step {method.needs.views} or more")


def claim(
    config: Config, folder: Path, student: str, embedder: "Embedder", store: "FeatureStore", plan: "Plan",
    training: "Training", recipe: "Recipe",
) -> None:  # fmt: skip
    """The run's manifest: what it is, what it came from. The end of the run is not identity: it may grow."""
    how = asdict(training)
    how["schedule"] |= {"warmup": None, "warmup_epochs": recipe.warmup_epochs}
    identity = {
        "store": store.fingerprint,
        "student": {"spec": student, "preprocessing": embedder.preprocessing.record(), "width": embedder.width},
        "method": config.method,
        "training": how,
        "batch_size": plan.batch,
        "pairing": plan.pairing,
        "views_per_step": plan.per_step,
        "views": list(plan.views),
    }
    identity["student"]["initial"] = embedder.digest()
    about = {
        "store": str(Path(config.store).absolute()),
        "data": store.about["data"],
        "views": config.views or store.views,
        "views_spec": store.identity["views"],
        "parameters": sum(p.numel() for p in embedder.backbone.parameters()),
        "teacher": store.about["teacher"],
        "name": embedder.name,
    }
    artifact.claim(Folder(folder), "run", identity, about)


def restore(apprentices: Sequence["Apprentice"], features: "Features") -> int:
    """Go back to the newest step that all apprentices have, and read the banks' anchors. -> that step."""
    import torch

    from pipeline import checkpoint

    common = set.intersection(*({0, *checkpoint.steps(a.folder / "checkpoints")} for a in apprentices))
    start = max(common)
    for apprentice in apprentices:
        if start:
            apprentice.restore(start)
        apprentice.method.fill(
            lambda rows, views: torch.from_numpy(features.rows(rows.cpu().numpy(), views.cpu().numpy()))
        )
    return start


def train(config: Config, session: Session) -> None:
    """Steps start..end. Saves every so often, at the end, and when asked to stop."""
    from pipeline.device import loader_workers
    from pipeline.journal import Journal
    from pipeline.loader import Eyes, feed

    plan, apprentices = session.plan, session.apprentices
    sizes = list(dict.fromkeys((a.student.preprocessing.size, a.student.preprocessing.interpolation) for a in apprentices))
    eyes = Eyes(session.dataset, session.spec, session.store.table("view_key"), sizes, plan)
    introduce(config, session)
    with ExitStack() as stack:
        stop = stack.enter_context(Interrupt())
        bar = stack.enter_context(meter("distill", plan.steps, "steps", session.start))
        logs = [stack.enter_context(Journal(a.folder, session.start)) for a in apprentices]
        sights = feed(eyes, loader_workers(config.workers, session.device))
        waited, clock, began = 0.0, time.monotonic(), time.monotonic()
        for step in range(session.start, plan.steps):
            sight = next(sights)
            waited += time.monotonic() - clock
            batch = gather(session, step)
            verify(session, batch, sight)
            at_log = step % LOG_EVERY == 0 or step == plan.steps - 1
            passed = max(1e-9, time.monotonic() - began)
            speed = {"images_per_s": plan.batch * (step + 1 - session.start) / passed, "data_wait": waited / passed}
            rows = [learn(session, apprentice, batch, sight, sizes, at_log) for apprentice in apprentices]
            if at_log:
                for row, log in zip(rows, logs, strict=True):
                    log.write({**row, **speed})
            losses = " ".join(f"{row['loss']:.4f}" for row in rows)
            bar.advance(1, f"loss {losses}  {speed['images_per_s']:.0f} images/s  data wait {speed['data_wait']:.0%}")
            end_of_step(config, session, step + 1, logs, stop)
            clock = time.monotonic()


def introduce(config: Config, session: Session) -> None:
    plan, first = session.plan, session.apprentices[0]
    epochs = plan.steps * plan.batch / len(plan.rows)
    say(
        f"{len(session.apprentices)} student{'s' * (len(session.apprentices) > 1)}, {config.method}: steps "
        f"{session.start} to {plan.steps} ({epochs:g} epochs), global batch {plan.batch} images x {plan.per_step} views, "
        f"{first.training.optimizer} at {first.training.lr:g}, on {session.device}"
    )


def gather(session: Session, step: int) -> "Batch":
    """The step's (i, v) and the teacher's side of it."""
    import torch

    from pipeline.methods.base import Batch

    rows, student_views, teacher_views = session.plan.at(step)
    flat = teacher_views.flatten()
    picked = session.features.rows(rows.repeat(session.plan.per_step), flat)
    shape = (len(rows), session.plan.per_step, *picked.shape[1:])
    to = session.device
    return Batch(
        step,
        torch.from_numpy(rows).to(to),
        torch.from_numpy(student_views).to(to),
        torch.from_numpy(teacher_views).to(to),
        {"embedding": torch.from_numpy(picked.reshape(shape)).to(to)},
        [],
    )


def verify(session: Session, batch: "Batch", sight: Any) -> None:
    """The images are the ones the teacher saw. Raises UserError with the first that is not."""
    import numpy as np

    rows = batch.rows.cpu().numpy()
    changed = np.flatnonzero((sight.content != session.content[rows]) | (sight.status != 0))
    if len(changed):
        i = int(rows[changed[0]])
        why = sight.bad.get(i, "its content differs from what the teacher saw")
        raise UserError(
            f"image {session.dataset.ids[i]} changed since the export: {why}; put it back, or export into a new store"
        )


def learn(
    session: Session, apprentice: "Apprentice", batch: "Batch", sight: Any, sizes: list, at_log: bool
) -> dict[str, Any]:
    """One apprentice's step. Raises UserError if the loss is not finite."""
    from pipeline.apprentice import agreement, spread

    step, student = batch.step, apprentice.student
    pixels = sight.pixels[sizes.index((student.preprocessing.size, student.preprocessing.interpolation))]
    batch.images = [student.prepare(pixels.flatten(0, 1).to(session.device, non_blocking=True))]
    loss, z = apprentice.step(batch, step / session.plan.steps)
    if loss != loss or loss in (float("inf"), float("-inf")):
        rate = apprentice.optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the loss of {apprentice.folder} is {loss} at step {step} (learning rate {rate:g}, precision "
            f"{apprentice.training.precision}); the last checkpoint before it is kept. Likely causes: a rate too high "
            "(lower --lr, add --warmup-epochs or --clip 1), fp16 overflow (--precision bf16), a temperature too low"
        )
    row: dict[str, Any] = {"step": step + 1, "epoch": round((step + 1) / session.per_epoch, 4), "loss": loss}
    if at_log:
        row["lr"] = apprentice.optimizer.param_groups[0]["lr"]
        row["spread"] = spread(z)
        row["agreement"] = agreement(z, batch.teacher["embedding"].flatten(0, 1))
    return row


def end_of_step(config: Config, session: Session, done: int, logs: Sequence["Journal"], stop: Interrupt) -> None:
    """Check against --val and save when it is time; stop when asked to."""
    last = done == session.plan.steps
    per_check = max(1, round(config.val_every * session.per_epoch))
    if session.val is not None and (done % per_check == 0 or last):
        for apprentice, log in zip(session.apprentices, logs, strict=True):
            check_neighbours(config, session, apprentice, log, done)
    if last or stop.requested or done % config.save_every == 0:
        for apprentice in session.apprentices:
            apprentice.save(done)
    if stop.requested and not last:
        raise Interrupted(stop.signum, f"saved at step {done} of {session.plan.steps}; repeat the command to continue")


def check_neighbours(config: Config, session: Session, apprentice: "Apprentice", log: "Journal", done: int) -> None:
    """Leave-one-out nearest-neighbour accuracy on --val, view 0; the best so far is kept as best.pt."""
    from pipeline import checkpoint
    from pipeline.validation import leave_one_out

    assert session.val is not None
    score = leave_one_out(apprentice.learned, session.val, session.spec, session.device, config.precision)
    log.write({"step": done, "epoch": round(done / session.per_epoch, 4), "val_nn": score})
    if score > apprentice.best:
        apprentice.best = score
        Folder(apprentice.folder).put("checkpoints/best.pt", checkpoint.spell({"step": done, **apprentice.parts()}))


def close(session: Session) -> dict[str, Any]:
    """Write the bare students and say what was made."""
    lines, runs = [], []
    for apprentice in session.apprentices:
        apprentice.deliver()
        runs.append(str(apprentice.folder))
        best = f", best val nearest neighbour {apprentice.best:.2f} %" if apprentice.best >= 0 else ""
        lines.append(f"{apprentice.folder}: {session.plan.steps} steps, student.safetensors{best}")
    return {"summary": "\n".join(lines), "runs": runs, "steps": session.plan.steps}
