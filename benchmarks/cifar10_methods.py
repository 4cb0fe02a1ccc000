"""Every method on CIFAR-10 images: one teacher, one store, one student, equal steps, and the baselines.

    python -m benchmarks.cifar10_methods --out methods --images cifar10    # about an hour of one core

Optimiser, temperatures and weight decay are each method's published ones. Published rates are for runs hundreds of
times as long: here every method has the rate of its optimiser in RATES, half an epoch of warm-up and a cosine.
`supervised` is the same network with a linear layer on the labels of the same images: the same pixels in the same order
for as many steps. A step shows each image once; to a student of dogo and dogo-frozen twice, of esvit twice and in two
small crops besides.
"""

from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import functional as F

from benchmarks.experiment import CLUSTERS, PROTOCOLS, SEEDS, Experiment, asked
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewDataset, iterate_views
from compress_ssl.stages import distill, label_head

TEACHER, SIZE, VIEWS, IMAGES = "efficientnet-lite:2,crop=1", 96, 5, 5000
STUDENT = "convnet:channels=32+64+128"
EPOCHS, BATCH, WARMUP = 10, 128, 0.5
RATES = {"sgd": 0.2, "adam": 3e-3, "adamw": 3e-3, "lars": 2.0}

METHODS: dict[str, dict[str, Any]] = {  # arm: its method, and flags where it needs some
    "compress-1q": {"method": "compress-1q"},
    "compress-2q": {"method": "compress-2q"},
    "compress-2q-momentum": {"method": "compress-2q-momentum:momentum=0.99"},  # 0.999 would hardly leave the start
    "seed": {"method": "seed"},
    "regression": {"method": "regression"},
    "regression-bn": {"method": "regression:norm=batch"},
    "crd": {"method": "crd"},
    "simclr-v2-1%": {"method": "simclr-v2", "labels": "1%"},
    "simclr-v2-10%": {"method": "simclr-v2", "labels": "10%"},
    "dogo": {"method": "dogo", "student": (STUDENT, STUDENT)},
    "dogo-frozen": {"method": "dogo-frozen"},
    "esvit": {"method": "esvit:crops=2", "keep": "embedding,regions"},
}
ROWS = ("teacher", "untrained", "supervised", *METHODS)


def main() -> None:
    given = asked(__doc__, ("supervised", *METHODS))
    experiment = Experiment(given.out, given.images, (*PROTOCOLS, *CLUSTERS))
    store = export(experiment)
    if given.only is None:
        experiment.references(store, STUDENT, IMAGES)
    for seed, arm in product(SEEDS, [given.only] if given.only else ("supervised", *METHODS)):
        if arm == "supervised":
            weights = supervised(store, seed, experiment.out / "runs" / arm / f"seed-{seed}")
            model = f"{STUDENT},weights={weights}"
            experiment.score(arm, seed, model=model, train=experiment.train, limit=IMAGES)
        else:
            experiment.distill(arm, seed, **settings(experiment, **METHODS[arm]))
    experiment.finish({arm: arm for arm in ROWS}, ("NN", "kNN 20", "Cluster", "Linear"))


def export(experiment: Experiment, keep: str = "embedding") -> Path:
    """The store that most methods share, or one that holds more of the teacher: regions are nine times as large."""
    name = "teacher" if keep == "embedding" else f"teacher-{keep.replace(',', '-')}"
    return experiment.export(name, teacher=TEACHER, image_size=SIZE, views=VIEWS, limit=IMAGES, keep=keep)


def settings(
    experiment: Experiment, method: str, keep: str = "embedding", labels: str | None = None, **flags: Any
) -> dict[str, Any]:
    """Flags of a method's runs: those all have, its own, and what has to be made before it can begin."""
    store = export(experiment, keep)
    if labels:
        head = store.parent / f"head-{labels.rstrip('%')}.safetensors"
        if not head.exists():
            label_head.run(label_head.Config(store, head, labels))
        method = f"{method}:head={head}"
    given = {"store": store, "student": (STUDENT,), "method": method, "epochs": EPOCHS, "batch_size": BATCH, **flags}
    optimizer = distill.recipe_of(distill.Config(out=store, **given)).optimizer
    return {"lr": RATES[optimizer], "schedule": "cosine", "warmup_epochs": WARMUP, **given}


def supervised(store: Path, seed: int, out: Path) -> Path:
    """The student's weights after the steps of the other arms, from labels: SGD with momentum, cross-entropy."""
    file = out / "student.safetensors"
    if file.exists():
        return file
    config = distill.Config(store, (STUDENT,), "compress-1q", out, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    images = FeatureStore(Folder(store))
    plan = distill.build_sampler(config, images)
    torch.manual_seed(seed)
    student = build(STUDENT, pretrained_default=False).to(memory_format=torch.channels_last)
    layer = torch.nn.Linear(student.width, len(images.about["classes"]))
    modules = torch.nn.ModuleList([student, layer]).train()
    sgd = torch.optim.SGD(modules.parameters(), RATES["sgd"], momentum=0.9, weight_decay=1e-4)
    schedule, sees = Schedule("cosine", warmup=WARMUP / EPOCHS), student.preprocessing
    dataset, spec = distill.open_images(config, images), ViewSpec(**images.identity["views"])
    label = torch.from_numpy(images.table("label"))
    view_dataset = ViewDataset(dataset, spec, images.table("view_key"), [(sees.size, sees.interpolation)], plan)
    for step, view_batch in enumerate(iterate_views(view_dataset, workers=0)):
        sgd.param_groups[0]["lr"] = RATES["sgd"] * schedule(step / plan.steps)
        rows, pixels = torch.from_numpy(plan.step_indices(step)[0]), view_batch.pixels[0].flatten(0, 1)
        loss = F.cross_entropy(layer(student(student.prepare(pixels))), label[rows])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in student.backbone.state_dict().items()}, file)
    return file


if __name__ == "__main__":
    main()
