"""Accuracy in percent of one student on CIFAR-10, trained by every method for the same number of steps; baselines.

    python -m benchmarks.cifar10_methods --out methods --images cifar10    # about an hour of one core

Optimiser, temperatures and weight decay are those published for each method. The published learning rates are for runs
hundreds of times as long; here every method has the rate of its optimiser in RATES, half an epoch of warm-up and a
cosine schedule. `supervised` is the same network with a linear layer, trained on the labels of the same pixels in the
same order for as many steps. In a step, a student gets one view of each image of the batch; with dogo and dogo-frozen
two views, with esvit two views and two local crops.
"""

from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import functional as F

from benchmarks.experiment import CLUSTERS, PROTOCOLS, SEEDS, Experiment, parse_arguments
from compress_ssl.pipeline.methods.options import find_typed
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.source_images import open_store_images
from compress_ssl.pipeline.training.sampler import make_sampler
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.views.loader import ViewDataset, iterate_views
from compress_ssl.stages import distill, label_head

TEACHER, SIZE, VIEWS, IMAGES = "efficientnet-lite:2,crop=1", 96, 5, 5000
STUDENT = "convnet:channels=32+64+128"
EPOCHS, BATCH, WARMUP = 10, 128, 0.5
RATES = {"sgd": 0.2, "adam": 3e-3, "adamw": 3e-3, "lars": 2.0}

METHODS: dict[str, dict[str, Any]] = {  # {arm: its method and further settings}
    "compress-1q": {"method": "compress-1q"},
    "compress-2q": {"method": "compress-2q"},
    # with momentum 0.999 the moving average would stay near the initial weights in so few steps
    "compress-2q-momentum": {"method": "compress-2q-momentum:momentum=0.99"},
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
    arguments = parse_arguments(__doc__, ("supervised", *METHODS))
    experiment = Experiment(arguments.out, arguments.images, (*PROTOCOLS, *CLUSTERS))
    store = export(experiment)
    if arguments.only is None:
        experiment.references(store, STUDENT, IMAGES)
    for seed, arm in product(SEEDS, [arguments.only] if arguments.only else ("supervised", *METHODS)):
        if arm == "supervised":
            weights = train_supervised(store, seed, experiment.out / "runs" / arm / f"seed-{seed}")
            model = f"{STUDENT},weights={weights}"
            experiment.score(arm, seed, model=model, train=experiment.train, limit=IMAGES)
        else:
            experiment.distill(arm, seed, **run_settings(experiment, **METHODS[arm]))
    experiment.finish({arm: arm for arm in ROWS}, ("NN", "kNN 20", "Cluster", "Linear"))


def export(experiment: Experiment, keep: str = "embedding") -> Path:
    """Export the store for `keep`. Most methods share one; regions are in another, as they are nine times as large."""
    name = "teacher" if keep == "embedding" else f"teacher-{keep.replace(',', '-')}"
    return experiment.export(name, teacher=TEACHER, image_size=SIZE, views=VIEWS, limit=IMAGES, keep=keep)


def run_settings(
    experiment: Experiment, method: str, keep: str = "embedding", labels: str | None = None, **flags: Any
) -> dict[str, Any]:
    """Flags of `distill` for a method; its store and its label head are created first if they do not exist.

    labels: share of the labels that the method's head is fitted to, such as "1%"; None: the method needs no head.
    """
    store = export(experiment, keep)
    if labels:
        head = store.parent / f"head-{labels.rstrip('%')}.safetensors"
        if not head.exists():
            label_head.run(label_head.Config(str(store), head, labels))
        method = f"{method}:head={head}"
    flags_of_run: dict[str, Any] = {
        "store": str(store),
        "student": (STUDENT,),
        "method": method,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        **flags,
    }
    optimizer = find_typed(method).method.recipe.optimizer
    return {"lr": RATES[optimizer], "schedule": "cosine", "warmup_epochs": WARMUP, **flags_of_run}


def train_supervised(store: Path, seed: int, out: Path) -> Path:
    """Train the student on labels, for the steps of the other arms; return the file of its weights.

    The optimiser is SGD with momentum, the loss is the cross-entropy.
    """
    file = out / "student.safetensors"
    if file.exists():
        return file
    config = distill.Config(str(store), (STUDENT,), "compress-1q", out, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    images = FeatureStore(Folder(store))
    sampler = make_sampler(images, distill.resolve(config).sampling, config.store)
    torch.manual_seed(seed)
    student = build(STUDENT, pretrained_default=False).to(memory_format=torch.channels_last)
    layer = torch.nn.Linear(student.width, len(images.export.classes))
    modules = torch.nn.ModuleList([student, layer]).train()
    sgd = torch.optim.SGD(modules.parameters(), RATES["sgd"], momentum=0.9, weight_decay=1e-4)
    schedule, preprocessing = Schedule("cosine", warmup=WARMUP / EPOCHS), student.preprocessing
    dataset, spec = open_store_images(images, config.data), images.identity.views
    label = torch.from_numpy(images.table("label"))
    sizes = {"global": [(preprocessing.size, preprocessing.interpolation)]}
    requests = [sampler[step] for step in range(sampler.steps)]
    view_dataset = ViewDataset(dataset, spec, images.table("view_key"), sizes, requests)
    for step, view_batch in enumerate(iterate_views(view_dataset, workers=0)):
        sgd.param_groups[0]["lr"] = RATES["sgd"] * schedule(step / sampler.steps)
        rows, pixels = torch.from_numpy(sampler.step_indices(step)[0]), view_batch.pixels["global"][0].flatten(0, 1)
        loss = F.cross_entropy(layer(student(student.prepare(pixels))), label[rows])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in student.backbone.state_dict().items()}, file)
    return file


if __name__ == "__main__":
    main()
