"""EsViT with a frozen teacher: pairs of views, matched regions, prototypes or similarities, computed in loops."""

import math
from typing import Any

import pytest
import torch
from papers import (
    REGIONS,
    STORE,
    STUDENT_REGIONS,
    B,
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
from torch import Tensor

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.runtime.errors import UserError

ARRAYS = ("embedding", "regions")
TAU_T, TAU_S = 0.3, 0.5
TAUS = f"tau_t={TAU_T},tau_s={TAU_S}"
PROTOTYPES = 8

Vector = list[float]


def dino_head(seed: int, name: str, fresh: bool = False) -> dict[str, Tensor]:
    """A DINO head's tensors: D -> 5 -> GELU -> 4, unit, weight-normed prototypes."""
    g, v = ("original0", "original1") if fresh else ("weight_g", "weight_v")
    last = f"{name}.last_layer.{'parametrizations.weight.' if fresh else ''}"
    return {
        f"{name}.mlp.0.weight": noise(seed, 5, D), f"{name}.mlp.0.bias": noise(seed + 1, 5),
        f"{name}.mlp.2.weight": noise(seed + 2, 4, 5), f"{name}.mlp.2.bias": noise(seed + 3, 4),
        f"{last}{g}": 1 + noise(seed + 4, PROTOTYPES, 1).abs(), f"{last}{v}": noise(seed + 5, PROTOTYPES, 4),
    }  # fmt: skip


HEADS = {**dino_head(50, "head"), **dino_head(60, "head_dense", fresh=True)}
CENTRES = {"dino_loss.center": noise(70, 1, PROTOTYPES), "dino_loss.center_grid": noise(71, 1, PROTOTYPES)}


def logits(tensors: dict[str, Tensor], name: str, x: Vector) -> Vector:
    """Logits (C,) of a DINO head for one vector x (D,)."""
    own = {key.removeprefix(f"{name}."): t.float().double() for key, t in tensors.items() if key.startswith(f"{name}.")}
    hidden = [dot(row, x) + b for row, b in zip(own["mlp.0.weight"].tolist(), own["mlp.0.bias"].tolist(), strict=True)]
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
    out = [
        dot(row, hidden) + b for row, b in zip(own["mlp.2.weight"].tolist(), own["mlp.2.bias"].tolist(), strict=True)
    ]
    bottleneck = normalize(out)
    g = next(t for key, t in own.items() if key.endswith(("weight_g", "original0"))).flatten().tolist()
    v = next(t for key, t in own.items() if key.endswith(("weight_v", "original1"))).tolist()
    return [scale * dot(normalize(row), bottleneck) for scale, row in zip(g, v, strict=True)]


def paper(method: Any, batch: Any, out: dict[str, Tensor], view: Any, region: Any) -> float:
    """0.5 view + 0.5 region, mean over all pairs of a student view and a different teacher view.

    view, region: (teacher's vector, student's projected vector) -> cross-entropy.
    """
    student = [(out["embedding"][:, v], out["regions"][:, v], int(batch.student_views[0, v])) for v in range(2)]
    if "local_embedding" in out:
        for c in range(out["local_embedding"].shape[1]):
            student.append((out["local_embedding"][:, c], out["local_regions"][:, c], -1))
    pairs = []
    for s, z, v in student:
        for u in range(batch.teacher_views.shape[1]):
            if int(batch.teacher_views[0, u]) == v:
                continue
            views, regions = [], []
            for b in range(B):
                t, y = batch.teacher["embedding"][b, u].tolist(), batch.teacher["regions"][b, u].tolist()
                views.append(view(t, apply_linear(method.view.projector, s[b].tolist())))
                for zi in z[b].tolist():
                    mine = apply_linear(method.region.projector, zi)
                    best = max(range(len(y)), key=lambda j, mine=mine, y=y: dot(normalize(mine), normalize(y[j])))  # type: ignore
                    regions.append(region(y[best], mine))
            pairs.append(0.5 * mean(views) + 0.5 * mean(regions))
    return mean(pairs)


@pytest.mark.parametrize("crops", [0, 3])
def test_with_the_teachers_heads_the_loss_is_the_papers_and_centres_move_after_the_step(crops: int) -> None:
    method = build_method(f"esvit:crops={crops},{TAUS}", ARRAYS, heads=HEADS)
    centres = {"head": [0.0] * PROTOTYPES, "head_dense": [0.0] * PROTOTYPES}

    def compare(name: str) -> Any:
        def term(t: Vector, s: Vector) -> float:
            theirs = [x - c for x, c in zip(logits(HEADS, name, t), centres[name], strict=True)]
            return cross_entropy(softmax([x / TAU_T for x in theirs]), [x / TAU_S for x in logits(HEADS, name, s)])

        return term

    for step in range(2):
        batch, out = make_batch(step, ARRAYS, w=2), student_outputs(step, w=2, crops=crops, regions=True)
        want = paper(method, batch, out, compare("head"), compare("head_dense"))
        assert take_step(method, batch, [out])[0] == pytest.approx(want, rel=1e-5), step
        for name, array in (("head", "embedding"), ("head_dense", "regions")):
            all_logits = [logits(HEADS, name, x) for x in batch.teacher[array].flatten(0, -2).tolist()]
            for j in range(PROTOTYPES):
                centres[name][j] = 0.9 * centres[name][j] + 0.1 * mean(row[j] for row in all_logits)
        assert method.view.centre.tolist() == pytest.approx(centres["head"], rel=1e-5)
        assert method.region.centre.tolist() == pytest.approx(centres["head_dense"], rel=1e-5)


def test_centres_of_the_teachers_file_are_used_and_stay_constant() -> None:
    method = build_method(f"esvit:crops=0,{TAUS}", ARRAYS, heads={**HEADS, **CENTRES})
    for step in range(2):
        take_step(method, make_batch(step, ARRAYS, w=2), [student_outputs(step, w=2, regions=True)])
    torch.testing.assert_close(
        method.view.centre, CENTRES["dino_loss.center"].flatten().float().double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(method.region.centre, CENTRES["dino_loss.center_grid"].flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("crops", [0, 2])
def test_without_heads_the_loss_is_over_banks_of_earlier_teacher_vectors(crops: int) -> None:
    method = build_method(f"esvit:crops={crops},bank=9,{TAUS}", ARRAYS)
    assert method.view.bank.filled == 9 and method.region.bank.filled == 0
    held: dict[str, list[Vector]] = {"view": method.view.bank["teacher"].tolist(), "region": []}

    def compare(name: str) -> Any:
        def term(t: Vector, s: Vector) -> float:
            p = softmax([dot(normalize(t), a) / TAU_T for a in [normalize(t), *held[name]]])
            return cross_entropy(p, [dot(normalize(s), a) / TAU_S for a in [normalize(t), *held[name]]])

        return term

    for step in range(4):
        batch, out = make_batch(step, ARRAYS, w=2), student_outputs(step, w=2, crops=crops, regions=True)
        want = paper(method, batch, out, compare("view"), compare("region"))
        assert take_step(method, batch, [out])[0] == pytest.approx(want, rel=1e-5), step
        entered = method.region.bank["teacher"].tolist()[-B * 2 :] if step == 0 else []
        for vector, (b, u) in zip(entered, [(b, u) for b in range(B) for u in (0, 1)], strict=bool(entered)):
            regions = [normalize(y) for y in batch.teacher["regions"][b, u].tolist()]
            assert max(dot(vector, y) for y in regions) == pytest.approx(1, abs=1e-5), "a region of its own view"
        held = {"view": method.view.bank["teacher"].tolist(), "region": method.region.bank["teacher"].tolist()}
    assert set(method.view.bank.rows.tolist()) <= set(range(20)) and len(method.region.bank["teacher"]) == 9


def test_a_view_is_never_compared_with_itself_whatever_the_pairing() -> None:
    method = build_method(f"esvit:crops=0,{TAUS}", ARRAYS, heads=HEADS)
    seen: list[Tensor] = []
    plain = method.view.forward
    method.view.forward = lambda t, s: (seen.append(t), plain(t, s))[1]
    for shift, pairs in ((0, [1, 0]), (1, [0, 1]), (2, [0, 1, 0, 1])):  # same, cross, fresh
        batch = make_batch(0, ARRAYS, w=2)
        batch.student_views = batch.teacher_views.roll(shift, 1) if shift < 2 else batch.teacher_views + 2**31
        seen.clear()
        method(batch, [student_outputs(0, w=2, regions=True)])
        assert [t.tolist() for t in seen] == [batch.teacher["embedding"][:, u].tolist() for u in pairs]


def test_regions_are_matched_by_their_best_cosine_and_several_may_share_one() -> None:
    from compress_ssl.pipeline.methods.esvit import match_regions

    theirs, mine = noise(1, B, REGIONS, D), noise(2, B, STUDENT_REGIONS, D)
    mine[:, 2] = 5 * mine[:, 1]
    found = match_regions(theirs, mine)
    for b in range(B):
        for i in range(STUDENT_REGIONS):
            cosines = [dot(normalize(mine[b, i].tolist()), normalize(y)) for y in theirs[b].tolist()]
            assert torch.equal(found[b, i], theirs[b, cosines.index(max(cosines))])
    assert torch.equal(found[:, 1], found[:, 2])


@pytest.mark.parametrize("heads", [HEADS, {}])
def test_the_gradient_is_exact_and_reaches_only_the_projectors(heads: dict[str, Tensor]) -> None:
    method = build_method(f"esvit:crops=2,bank=9,{TAUS}", ARRAYS, heads=heads)
    take_step(method, make_batch(0, ARRAYS, w=2), [student_outputs(0, w=2, crops=2, regions=True)])
    assert gradient_is_exact(method, make_batch(1, ARRAYS, w=2), student_outputs(1, w=2, crops=2, regions=True))
    names = {f"{term}.projector.{kind}" for term in ("view", "region") for kind in ("weight", "bias")}
    assert {name for name, p in method.named_parameters() if p.grad is not None} == names
    assert {name for name, p in method.named_parameters() if p.requires_grad} == names


def test_the_bank_of_regions_is_saved_and_the_bank_of_views_is_not() -> None:
    kept = set(build_method("esvit:bank=9", ARRAYS).state_dict())
    assert "region.bank.column_teacher" in kept and "view.bank.column_teacher" not in kept
    assert STORE["regions"].shape[2:] == (REGIONS, D)


def test_a_store_without_regions_is_refused_with_the_flag() -> None:
    with pytest.raises(
        UserError, match="esvit needs 'regions' of the teacher, .* export with --keep embedding,regions"
    ):
        build_method("esvit")


def test_a_negative_number_of_crops_is_refused() -> None:
    with pytest.raises(UserError, match="crops=-1 was asked, but must be 0 or more"):
        build_method("esvit:crops=-1", ARRAYS)


def test_its_needs_are_two_views_and_eight_local_crops_of_the_student_alone() -> None:
    needs = build_method("esvit:bank=9", ARRAYS).needs
    assert (needs.views, needs.crops, needs.arrays) == (2, 8, ARRAYS)
    assert needs.outputs == ("embedding", "regions", "local_embedding", "local_regions")
    assert build_method("esvit:bank=9,crops=0", ARRAYS).needs.outputs == ("embedding", "regions")
    recipe = METHODS.resolve("esvit").recipe
    assert (recipe.optimizer, recipe.lr, recipe.batch_size, recipe.epochs) == ("adamw", 5e-4, 512, 300)
