"""How many stored views are enough? The curve over V at equal steps, for compress-1q on 2000 CIFAR-10 images.

    python -m benchmarks.view_curve --out view-curve --images cifar10    # about an hour of one core

fresh-1   one stored view, the plain one, and a new random crop for the student every time: as the CompRess
          release does with its cached features
same-V    V stored random views in turns; the student sees the same pixels that the teacher embedded
live      a teacher that runs in every step. Here 64 stored views in 64 epochs: no (i, v) is used twice, so the student
          gets what a live teacher would have given it, rounded to int8 as in all arms

All arms read one store, take the same number of steps of the same images in the same order, and begin with the same
weights. Seeds differ in weights and order; the pool of views is one.
"""

from itertools import product
from typing import Any

from benchmarks.experiment import SEEDS, Experiment, asked

TEACHER, SIZE = "efficientnet-lite:2,crop=1", 64
STUDENT, METHOD = "convnet:channels=32+64+128", "compress-1q"
IMAGES, EPOCHS, BATCH, RATE = 2000, 64, 128, 0.2  # epochs are four times the largest V

ARMS: dict[str, dict[str, Any]] = {  # stored views 1..V are random, so --views V + 1 trains on V of them
    "fresh-1": {"views": 1, "pairing": "fresh"},
    "same-1": {"views": 2},
    "same-4": {"views": 5},
    "same-8": {"views": 9},
    "same-16": {"views": 17},
    "live": {"views": 1 + EPOCHS},
}
ROWS = {
    "teacher": "teacher",
    "untrained": "student, untrained",
    "fresh-1": "1 plain view, student's fresh",
    "same-1": "V = 1",
    "same-4": "V = 4",
    "same-8": "V = 8",
    "same-16": "V = 16",
    "live": "live teacher",
}


def main() -> None:
    given = asked(__doc__, ARMS)
    experiment = Experiment(given.out, given.images)
    store = experiment.export(teacher=TEACHER, image_size=SIZE, views=1 + EPOCHS, limit=IMAGES)
    if given.only is None:
        experiment.references(store, STUDENT, IMAGES)
    for seed, arm in product(SEEDS, [given.only] if given.only else ARMS):
        experiment.distill(
            arm, seed, store=store, student=(STUDENT,), method=METHOD, epochs=EPOCHS, batch_size=BATCH, lr=RATE,
            schedule="cosine", **ARMS[arm],
        )  # fmt: skip
    experiment.finish(ROWS, ("Loss", "NN", "kNN 20", "Linear"))


if __name__ == "__main__":
    main()
