"""The loss of mask transformers: its assignment by brute force, its values by hand and in loops."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from segkit.core import distributed
from segkit.core.errors import ConfigError
from segkit.core.labels import IGNORE
from segkit.training.assignment import assign
from segkit.training.losses import build_loss
from segkit.training.mask_classification import MaskClassification
from segkit.training.pixels import StepTotals

RNG = np.random.default_rng(0)

# ---- the assignment


def least(costs: np.ndarray) -> float:
    """The least total cost of all assignments."""
    if costs.shape[0] > costs.shape[1]:
        costs = costs.T
    rows = range(costs.shape[0])
    choices = permutations(range(costs.shape[1]), costs.shape[0])
    return min(sum(costs[i, columns[i]] for i in rows) for columns in choices)


def check_assignment(costs: np.ndarray) -> None:
    rows, columns = assign(costs)
    assert len(rows) == len(columns) == min(costs.shape)
    assert (np.diff(rows) > 0).all()
    assert len(set(columns.tolist())) == len(columns)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 3), (4, 6), (6, 4), (5, 7)])
@pytest.mark.parametrize("kind", ["random", "ties", "similar"])
def test_an_assignment_has_the_least_cost(shape: tuple[int, int], kind: str) -> None:
    for _ in range(10):
        costs = RNG.normal(size=shape)
        if kind == "ties":
            costs = costs.round()
        if kind == "similar":  # every row prefers the same columns
            costs = 0.05 * costs + RNG.normal(size=(1, shape[1]))
        check_assignment(costs)
        assert costs[assign(costs)].sum() == pytest.approx(least(costs), abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (60, 60)])
def test_a_large_assignment_is_scipys(shape: tuple[int, int]) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    costs = RNG.normal(size=shape)
    check_assignment(costs)
    expected = costs[optimize.linear_sum_assignment(costs)].sum()
    assert costs[assign(costs)].sum() == pytest.approx(expected, abs=1e-9)


def test_a_large_assignment_is_proved_by_prices() -> None:
    """A permuted diagonal of zeros in a matrix of positive costs is the only best assignment."""
    best = RNG.permutation(80)
    costs = RNG.uniform(0.1, 1, (80, 80))
    costs[np.arange(80), best] = 0
    costs += RNG.normal(size=(80, 1)) + RNG.normal(size=(1, 80))  # changes every total by the same
    assert (assign(costs)[1] == best).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
def test_nothing_is_assigned_to_nothing(shape: tuple[int, int]) -> None:
    rows, columns = assign(np.zeros(shape))
    assert rows.size == columns.size == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_costs_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="costs"):
        assign(np.array([[0.0, value]]))


# ---- the loss


LATTICE = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
"""The centers of the pixels of a 2 x 2 map."""


ON_LATTICE = MaskClassification(points=4, oversampling=1.0, importance=1.0)


def lattice(*shape: int, device: object = None) -> Tensor:
    """Points in place of random ones: the lattice, again and again."""
    return LATTICE.repeat(-(-shape[1] // 4), 1)[: shape[1]].expand(shape)


@pytest.fixture
def on_lattice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lattice)


def predictions(
    layers: int = 2,
    images: int = 3,
    *,
    queries: int = 5,
    classes: int = 4,
    size: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    shapes = {
        "query_classes": (layers, images, queries, classes + 1),
        "query_masks": (layers, images, queries, *size),
    }
    values = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}
    return {name: x.requires_grad_() for name, x in values.items()}


def targets(images: int = 3) -> Tensor:
    """2 x 2 pixels; from the third image on, part of it is ignored."""
    masks = [[[0, 1], [1, 3]], [[2, 2], [2, 2]], [[3, IGNORE], [IGNORE, 0]], [[IGNORE] * 2] * 2]
    return torch.tensor(masks[:images], dtype=torch.uint8)


@pytest.mark.usefixtures("on_lattice")
def test_one_segment_worked_by_hand() -> None:
    # One image of one class; query 1 fits it better in class and mask.
    outputs = {
        "query_classes": torch.tensor([[[[0.0, 0.0], [math.log(3), 0.0]]]], dtype=torch.float64),
        "query_masks": torch.tensor([-1.0, math.log(3)], dtype=torch.float64).view(1, 1, 2, 1, 1),
    }
    target = torch.zeros(1, 1, 1, dtype=torch.uint8)
    loss = MaskClassification(points=4, no_object=0.2)
    loss._points = lambda masks, *_: torch.full((len(masks), 4, 2), 0.5)
    value = loss(outputs, target)
    # Probability of its class 3/4, of each of 4 points 3/4. Query 0 has "no object" with 1/2.
    named = (-math.log(0.75) - 0.2 * math.log(0.5)) / 1.2
    dice = 1 - (2 * 3 + 1) / (3 + 4 + 1)
    assert value.item() == pytest.approx(2 * named - 5 * math.log(0.75) + 5 * dice)


def pair(mask: Tensor, inside: Tensor) -> Tensor:
    """The cost of a mask, and its loss: logits and truth of the valid pixels."""
    p, truth = mask.sigmoid(), inside.to(mask)
    dice = 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    return 5 * F.binary_cross_entropy(p, truth) + 5 * dice


def best_match(scores: Tensor, masks: Tensor, truth: Tensor, labels: list[int]) -> tuple[int, ...]:
    """The queries of ``labels``, by trying all."""
    chances = scores.softmax(1)
    costs = torch.tensor(
        [
            [pair(m, truth == c) - 2 * p[c] for c in labels]
            for m, p in zip(masks, chances, strict=True)
        ]
    )
    choices = permutations(range(len(scores)), len(labels))
    return min(choices, key=lambda chosen: float(costs[list(chosen), range(len(labels))].sum()))


def reference(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
    """The loss on the lattice, whose points are pixels, in plain loops."""
    named, masked = [], []
    layers = zip(outputs["query_classes"], outputs["query_masks"], strict=True)
    for classes, maps in layers:
        coefficients = segments = 0.0
        for scores, planes, truth in zip(classes, maps.flatten(2), target.flatten(1), strict=True):
            valid = truth != IGNORE
            labels = truth[valid].unique().tolist()
            if not labels:
                continue
            chosen = best_match(scores.detach(), planes.detach()[:, valid], truth[valid], labels)
            matched = dict(zip(chosen, labels, strict=True))
            masked += [pair(planes[q, valid], truth[valid] == c) for q, c in matched.items()]
            for query, row in enumerate(scores):
                coefficient = 1.0 if query in matched else 0.1
                named.append(-coefficient * row.log_softmax(0)[matched.get(query, -1)])
                coefficients += coefficient
            segments += len(labels)
    return 2 * torch.stack(named).sum() / coefficients + torch.stack(masked).sum() / segments


@pytest.mark.usefixtures("on_lattice")
@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_the_loss_is_that_of_plain_loops(images: int) -> None:
    outputs, target = predictions(images=images), targets(images)
    loss = ON_LATTICE(outputs, target)
    expected = reference(outputs, target)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, list(outputs.values())) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_more_classes_than_queries_match_as_many_as_there_are() -> None:
    outputs = predictions(images=1, queries=2)
    loss = MaskClassification(points=64)(outputs, targets(1))
    gradient = torch.autograd.grad(loss, outputs["query_masks"])[0]
    assert loss.isfinite()
    assert (gradient.abs().sum((3, 4)) > 0).all(), "both queries are matched"


def test_every_pixel_ignored_gives_zero_with_a_gradient() -> None:
    outputs = predictions()
    target = torch.full((3, 8, 8), IGNORE, dtype=torch.uint8)
    loss = MaskClassification(points=16)(outputs, target)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, list(outputs.values())):
        assert (gradient == 0).all()


def test_ignored_pixels_have_no_gradient() -> None:
    outputs = predictions(images=1, size=(8, 8))
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    target[:, :, 8:] = IGNORE
    loss = MaskClassification(points=500)(outputs, target)
    (gradient,) = torch.autograd.grad(loss, outputs["query_masks"])
    # A point in the left half is interpolated from the first five columns of the mask.
    assert (gradient[..., 5:] == 0).all()
    assert (gradient[..., :4].abs().sum((2, 3)) > 0).all()


@pytest.mark.usefixtures("on_lattice")
def test_an_unknown_image_changes_nothing() -> None:
    outputs, target = predictions(images=4), targets(4)
    known = {name: x[:, :3] for name, x in outputs.items()}
    torch.testing.assert_close(ON_LATTICE(outputs, target), ON_LATTICE(known, target[:3]))


def test_a_perfect_prediction_has_almost_no_loss() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    target[:, 2:] = 1
    inside = torch.stack([target[0] == 0, target[0] == 1, target[0] == 9])  # query 2 has nothing
    outputs = {
        "query_classes": 40 * torch.eye(3)[None, None],
        "query_masks": (80.0 * inside - 40)[None, None],
    }
    loss = MaskClassification(points=2000)
    swapped = {name: x[:, :, [1, 0, 2]] for name, x in outputs.items()}
    swapped["query_classes"] = outputs["query_classes"]
    torch.manual_seed(0)
    # Only points within half a pixel of an edge are interpolated to less certain logits.
    assert loss(outputs, target) < 2
    assert loss(swapped, target) > 10


def test_points_depend_on_the_seed_alone_and_are_uncertain() -> None:
    outputs = predictions(size=(8, 8))
    target = torch.randint(0, 4, (3, 16, 16), generator=torch.Generator().manual_seed(0))

    def at(seed: int) -> float:
        torch.manual_seed(seed)
        return MaskClassification(points=32)(outputs, target).item()

    assert at(0) == at(0) != at(1)
    ramp = torch.linspace(-9, 9, 64).view(1, 1, 1, 64).expand(1, 1, 8, 64)
    torch.manual_seed(0)
    labels, image = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    points = MaskClassification(points=400)._points(ramp, labels, image)
    assert points.shape == (1, 400, 2)
    near = ((points[..., 0] - 0.5).abs() < 0.2).double().mean()
    # 1 in 4 is random, and the 3 of 12 candidates nearest to the middle are within 1/8 of it.
    assert near > 0.75


@pytest.mark.usefixtures("on_lattice")
def test_parts_of_a_step_have_the_loss_of_the_step() -> None:
    outputs, target = predictions(images=4), targets(4)
    parts = target[:1], target[1:]
    totals = StepTotals(parts)
    sliced = ({name: x[:, at] for name, x in outputs.items()} for at in (slice(1), slice(1, 4)))
    values = [ON_LATTICE(x, part, totals) for x, part in zip(sliced, parts, strict=True)]
    torch.testing.assert_close(torch.stack(values).mean(), ON_LATTICE(outputs, target))


def one_rank() -> list[list]:
    """The loss and the gradient of this rank: 1 image of the first rank, 3 of the other."""
    torch.rand = lattice
    results = of_images(slice(1) if distributed.rank() == 0 else slice(1, 4))
    return [x.tolist() for x in results]


def of_images(at: slice) -> tuple[Tensor, ...]:
    outputs = {name: x[:, at].detach() for name, x in predictions(images=4).items()}
    for x in outputs.values():
        x.requires_grad_()
    loss = ON_LATTICE(outputs, targets(4)[at])
    return loss.detach(), *torch.autograd.grad(loss, list(outputs.values()))


@pytest.mark.slow
def test_two_uneven_ranks_have_the_loss_and_the_gradient_of_the_whole_batch(
    on_lattice: None,
) -> None:
    first, second = (
        [torch.tensor(x, dtype=torch.float64) for x in values] for values in run_ranks(one_rank, 2)
    )
    loss, *gradients = of_images(slice(None))
    torch.testing.assert_close(first[0], loss)
    torch.testing.assert_close(second[0], loss)
    for a, b, whole in zip(first[1:], second[1:], gradients, strict=True):
        torch.testing.assert_close(torch.cat([a, b], 1) / 2, whole)


# ---- as a term of a criterion


def outputs_of_decoder() -> dict[str, Tensor]:
    return {"out": torch.zeros(3, 4, 8, 8, requires_grad=True), **predictions(dtype=torch.float32)}


def test_a_criterion_scores_queries_once_and_maps_with_the_other_terms() -> None:
    target = torch.randint(0, 4, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    criterion = build_loss(
        [{"name": "mask_classification", "weight": 0.5, "points": 64}, "cross_entropy"]
    )
    torch.manual_seed(0)
    loss, values = criterion.with_terms(outputs_of_decoder(), target)
    assert values.keys() == {"mask_classification", "cross_entropy"}
    torch.manual_seed(0)
    expected = MaskClassification(points=64)(outputs_of_decoder(), target)
    torch.testing.assert_close(values["mask_classification"], expected.detach())
    torch.testing.assert_close(values["cross_entropy"], torch.tensor(math.log(4)))
    torch.testing.assert_close(loss, 0.5 * expected + math.log(4))


def test_queries_are_scored_without_being_asked_for() -> None:
    target = torch.zeros(3, 8, 8, dtype=torch.uint8)
    values = build_loss("dice").with_terms(outputs_of_decoder(), target)[1]
    assert values.keys() == {"mask_classification", "dice"}


def test_a_criterion_of_this_term_alone_has_no_other() -> None:
    target = torch.zeros(3, 8, 8, dtype=torch.uint8)
    criterion = build_loss("mask_classification")
    assert list(criterion.with_terms(outputs_of_decoder(), target)[1]) == ["mask_classification"]
    with pytest.raises(ConfigError, match="scores a decoder's queries"):
        criterion({"out": torch.zeros(3, 4, 8, 8)}, target)


def test_half_precision_is_computed_in_fp32() -> None:
    outputs = {name: x.detach().half() for name, x in predictions(size=(8, 8)).items()}
    target = torch.randint(0, 4, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for cast in (Tensor.half, Tensor.float):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            values = {name: cast(x) for name, x in outputs.items()}
            losses.append(MaskClassification(points=64)(values, target))
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1])
