"""SimCLR v2's distillation, from stored logits and from a head on the embedding."""

import json
import math
from pathlib import Path

import pytest
import torch
from papers import (
    C,
    D,
    apply_linear,
    build_method,
    cross_entropy,
    dot,
    gradient_is_exact,
    make_batch,
    mean,
    noise,
    normalize,
    softmax,
    student_outputs,
    take_step,
)

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.models.linear_head import LinearHead, save
from compress_ssl.pipeline.runtime.errors import UserError

W = 2


@pytest.fixture
def head(tmp_path: Path) -> tuple[str, LinearHead]:
    method = LinearHead(noise(7, 3, D).float(), noise(8, 3).float(), ["ant", "bee", "cat"])
    save(method, tmp_path / "head.safetensors", {})
    return str(tmp_path / "head.safetensors"), method


@pytest.mark.parametrize("tau", [1.0, 0.1, 3.0])
def test_the_loss_is_the_cross_entropy_of_softened_logits_times_tau_squared(tau: float) -> None:
    method, batch, out = (
        build_method(f"simclr-v2:tau={tau}", ("embedding", "logits")),
        make_batch(0, ("logits",), w=W),
        student_outputs(0, w=W),
    )
    want = mean(
        cross_entropy(softmax([x / tau for x in t]), [x / tau for x in apply_linear(method.classifier, z)]) * tau**2
        for t, z in zip(
            batch.teacher["logits"].flatten(0, 1).tolist(), out["embedding"].flatten(0, 1).tolist(), strict=True
        )
    )
    assert take_step(method, batch, [out])[0] == pytest.approx(want)
    assert method.classifier.out_features == C


def test_a_head_on_the_stored_embedding_replaces_stored_logits(head: tuple[str, LinearHead]) -> None:
    file, theirs = head
    method, batch, out = build_method(f"simclr-v2:head={file},tau=0.5"), make_batch(0, w=W), student_outputs(0, w=W)
    assert method.needs.arrays == ("embedding",)
    rows, bias = theirs.weight.tolist(), theirs.bias.tolist()
    want = []
    for t, z in zip(
        batch.teacher["embedding"].flatten(0, 1).tolist(), out["embedding"].flatten(0, 1).tolist(), strict=True
    ):
        logits = [dot(row, normalize(t)) + b for row, b in zip(rows, bias, strict=True)]
        p = softmax([x / 0.5 for x in logits])
        want.append(0.25 * cross_entropy(p, [x / 0.5 for x in apply_linear(method.classifier, z)]))
    assert take_step(method, batch, [out])[0] == pytest.approx(mean(want))


def test_the_loss_with_a_head_is_invariant_to_the_scale_of_stored_embeddings(head: tuple[str, LinearHead]) -> None:
    method, batch, out = build_method(f"simclr-v2:head={head[0]}"), make_batch(0), student_outputs(0)
    (before,) = take_step(method, batch, [out])
    batch.teacher["embedding"] = batch.teacher["embedding"] * 11
    assert take_step(method, batch, [out])[0] == pytest.approx(before)


def test_the_gradient_is_exact_and_trains_only_the_students_classifier(head: tuple[str, LinearHead]) -> None:
    method = build_method(f"simclr-v2:head={head[0]},tau=0.7")
    assert gradient_is_exact(method, make_batch(0), student_outputs(0))
    take_step(method, make_batch(0), [student_outputs(0)])
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert method.teacher_head is not None and not list(method.teacher_head.parameters())


def test_a_student_that_equals_the_teacher_has_the_teachers_entropy_as_loss(
    head: tuple[str, LinearHead],
) -> None:
    method, batch = build_method("simclr-v2", ("embedding", "logits")), make_batch(0, ("logits",))
    with torch.no_grad():
        method.classifier.weight.zero_()
        method.classifier.bias.zero_()
    batch.teacher["logits"] = torch.zeros_like(batch.teacher["logits"])
    assert take_step(method, batch, [student_outputs(0)])[0] == pytest.approx(math.log(C))


def test_the_students_classifier_is_exported(head: tuple[str, LinearHead]) -> None:
    method = build_method(f"simclr-v2:head={head[0]}")
    kept = method.exported_head()
    assert kept is not None and kept.names == ("ant", "bee", "cat")
    z = 3 * noise(5, 7, 5)  # not L2-normalised
    torch.testing.assert_close(kept(z), method.classifier(z))


def test_a_classifier_trained_on_stored_logits_has_no_class_names() -> None:
    kept = build_method("simclr-v2", ("embedding", "logits")).exported_head()
    assert kept is not None and kept.names is None and (kept.classes, kept.width) == (C, 5)


def test_without_logits_and_head_the_error_names_both_remedies() -> None:
    with pytest.raises(
        UserError, match=r"compress label-head .* simclr-v2:head=FILE, or export with --keep embedding,"
    ):
        build_method("simclr-v2")


def test_no_head_and_a_head_of_another_width_are_refused(tmp_path: Path, head: tuple[str, LinearHead]) -> None:
    with pytest.raises(UserError, match="is no linear head .* make one with compress label-head"):
        build_method(f"simclr-v2:head={tmp_path / 'gone.safetensors'}")
    (tmp_path / "text").write_text(json.dumps({"weight": 1}))
    with pytest.raises(UserError, match="is no linear head"):
        build_method(f"simclr-v2:head={tmp_path / 'text'}")
    save(LinearHead(noise(1, 3, D + 1).float(), noise(2, 3).float(), "abc"), tmp_path / "wide", {})
    with pytest.raises(UserError, match="is for embeddings of 7 dimensions, and the store's have 6"):
        build_method(f"simclr-v2:head={tmp_path / 'wide'}")


def test_the_recipe_is_lars_at_the_published_rate_for_its_batch_of_4096() -> None:
    recipe = METHODS.resolve("simclr-v2").recipe
    assert recipe.lr * 4096 / 256 == pytest.approx(0.1 * math.sqrt(4096))
    assert (recipe.optimizer, recipe.weight_decay, recipe.batch_size, recipe.epochs) == ("lars", 1e-4, 4096, 400)
