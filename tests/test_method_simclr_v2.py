"""SimCLR v2's distillation, from stored logits and from a head on the embedding."""

import json
import math
from pathlib import Path

import pytest
import torch
from papers import (
    C,
    D,
    batch,
    cross_entropy,
    gradients_check,
    learner,
    looks,
    losses,
    mean,
    noise,
    norm,
    softmax,
    through,
)

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.models.linear_head import LinearHead, save
from compress_ssl.pipeline.runtime.artifact import UserError

W = 2


@pytest.fixture
def head(tmp_path: Path) -> tuple[str, LinearHead]:
    made = LinearHead(noise(7, 3, D).float(), noise(8, 3).float(), ["ant", "bee", "cat"])
    save(made, tmp_path / "head.safetensors", {})
    return str(tmp_path / "head.safetensors"), made


@pytest.mark.parametrize("tau", [1.0, 0.1, 3.0])
def test_it_is_the_cross_entropy_of_softened_logits_times_tau_squared(tau: float) -> None:
    made, now, out = learner(f"simclr-v2:tau={tau}", ("embedding", "logits")), batch(0, ("logits",), w=W), looks(0, w=W)
    want = mean(
        cross_entropy(softmax([x / tau for x in t]), [x / tau for x in through(made.classifier, z)]) * tau**2
        for t, z in zip(
            now.teacher["logits"].flatten(0, 1).tolist(), out["embedding"].flatten(0, 1).tolist(), strict=True
        )
    )
    assert losses(made, now, [out])[0] == pytest.approx(want)
    assert made.classifier.out_features == C


def test_a_head_on_the_stored_embedding_takes_the_place_of_logits(head: tuple[str, LinearHead]) -> None:
    file, theirs = head
    made, now, out = learner(f"simclr-v2:head={file},tau=0.5"), batch(0, w=W), looks(0, w=W)
    assert made.needs.arrays == ("embedding",)
    rows, bias = theirs.weight.tolist(), theirs.bias.tolist()
    want = []
    for t, z in zip(
        now.teacher["embedding"].flatten(0, 1).tolist(), out["embedding"].flatten(0, 1).tolist(), strict=True
    ):
        logits = [sum(a * b for a, b in zip(row, norm(t), strict=True)) + b for row, b in zip(rows, bias, strict=True)]
        p = softmax([x / 0.5 for x in logits])
        want.append(0.25 * cross_entropy(p, [x / 0.5 for x in through(made.classifier, z)]))
    assert losses(made, now, [out])[0] == pytest.approx(mean(want))


def test_the_scale_of_stored_embeddings_does_not_matter_to_a_head(head: tuple[str, LinearHead]) -> None:
    made, now, out = learner(f"simclr-v2:head={head[0]}"), batch(0), looks(0)
    (before,) = losses(made, now, [out])
    now.teacher["embedding"] = now.teacher["embedding"] * 11
    assert losses(made, now, [out])[0] == pytest.approx(before)


def test_its_gradient_is_the_losses_and_trains_the_students_classifier_alone(head: tuple[str, LinearHead]) -> None:
    made = learner(f"simclr-v2:head={head[0]},tau=0.7")
    assert gradients_check(made, batch(0), looks(0))
    losses(made, batch(0), [looks(0)])
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert made.teacher_head is not None and not list(made.teacher_head.parameters())


def test_a_student_that_says_what_the_teacher_says_has_the_teachers_entropy(head: tuple[str, LinearHead]) -> None:
    made, now = learner("simclr-v2", ("embedding", "logits")), batch(0, ("logits",))
    with torch.no_grad():
        made.classifier.weight.zero_()
        made.classifier.bias.zero_()
    now.teacher["logits"] = torch.zeros_like(now.teacher["logits"])
    assert losses(made, now, [looks(0)])[0] == pytest.approx(math.log(C))


def test_the_students_classifier_is_delivered(head: tuple[str, LinearHead]) -> None:
    made = learner(f"simclr-v2:head={head[0]}")
    kept = made.exported_head()
    assert kept is not None and kept.names == ("ant", "bee", "cat")
    z = 3 * noise(5, 7, 5)  # as they are: no length is taken out
    torch.testing.assert_close(kept(z), made.classifier(z))


def test_the_classifier_of_a_teacher_with_logits_knows_no_names() -> None:
    kept = learner("simclr-v2", ("embedding", "logits")).exported_head()
    assert kept is not None and kept.names is None and (kept.classes, kept.width) == (C, 5)


def test_without_logits_or_a_head_both_ways_to_them_are_said() -> None:
    with pytest.raises(
        UserError, match=r"compress label-head .* simclr-v2:head=FILE, or export with --keep embedding,"
    ):
        learner("simclr-v2")


def test_a_head_that_is_none_or_of_another_width_is_refused(tmp_path: Path, head: tuple[str, LinearHead]) -> None:
    with pytest.raises(UserError, match="is no linear head .* make one with compress label-head"):
        learner(f"simclr-v2:head={tmp_path / 'gone.safetensors'}")
    (tmp_path / "text").write_text(json.dumps({"weight": 1}))
    with pytest.raises(UserError, match="is no linear head"):
        learner(f"simclr-v2:head={tmp_path / 'text'}")
    save(LinearHead(noise(1, 3, D + 1).float(), noise(2, 3).float(), "abc"), tmp_path / "wide", {})
    with pytest.raises(UserError, match="is for embeddings of 7 dimensions, and the store's have 6"):
        learner(f"simclr-v2:head={tmp_path / 'wide'}")


def test_the_recipe_is_lars_at_the_published_rate_for_its_batch_of_4096() -> None:
    recipe = METHODS.resolve("simclr-v2").recipe
    assert recipe.lr * 4096 / 256 == pytest.approx(0.1 * math.sqrt(4096))
    assert (recipe.optimizer, recipe.weight_decay, recipe.batch_size, recipe.epochs) == ("lars", 1e-4, 4096, 400)
