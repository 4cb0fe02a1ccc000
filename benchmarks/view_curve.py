"""How many stored views are enough? Accuracy in percent over V, the number of stored views, for equal numbers of steps.

    python -m benchmarks.view_curve --out view-curve --images cifar10    # about an hour of one core

A student is trained by compress-1q on 2000 CIFAR-10 images, in these arms:

fresh-1   one stored view, the plain one, and a new random crop for the student in every step, as in the released code
          of CompRess with cached features
same-V    V stored random views in turn; the student sees the same pixels that the teacher embedded
live      stands for a teacher that runs in every step: 64 stored views for 64 epochs, so that no (i, v) is used twice.
          The student gets the features that a live teacher would compute, rounded to int8 as in all arms

All arms read the same store, take the same number of steps on the same images in the same order, and begin with the
same weights. The seeds differ in initial weights and order; the stored views are the same.
"""

from itertools import product
from typing import Any

from benchmarks.experiment import SEEDS, Experiment, parse_arguments

TEACHER, SIZE = "efficientnet-lite:2,crop=1", 64
STUDENT, METHOD = "convnet:channels=32+64+128", "compress-1q"
IMAGES, EPOCHS, BATCH, RATE = 2000, 64, 128, 0.2  # EPOCHS is four times the largest V

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
    "fresh-1": "1 plain view, fresh views for the student",
    "same-1": "V = 1",
    "same-4": "V = 4",
    "same-8": "V = 8",
    "same-16": "V = 16",
    "live": "live teacher",
}


def main() -> None:
    arguments = parse_arguments(__doc__, ARMS)
    experiment = Experiment(arguments.out, arguments.images)
    store = experiment.export(teacher=TEACHER, image_size=SIZE, views=1 + EPOCHS, limit=IMAGES)
    if arguments.only is None:
        experiment.references(store, STUDENT, IMAGES)
    for seed, arm in product(SEEDS, [arguments.only] if arguments.only else ARMS):
        experiment.distill(
            arm, seed, store=str(store), student=(STUDENT,), method=METHOD, epochs=EPOCHS, batch_size=BATCH, lr=RATE,
            schedule="cosine", **ARMS[arm],
        )  # fmt: skip
    experiment.finish(ROWS, ("Loss", "NN", "kNN 20", "Linear"))


if __name__ == "__main__":
    main()
