"""A step in several parts, on one rank or two, is the step of the whole batch."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segkit import train
from segkit.core import config, distributed
from segkit.core.labels import IGNORE
from segkit.training.build import losses_per_micro_batch
from segkit.training.losses import LOSSES, Criterion, Loss, build_loss
from segkit.training.step import StepResult, train_step

WEIGHTS = [0.2, 1.0, 3.0]
TERMS: dict[str, Any] = {
    **{name: {"name": name} for name in LOSSES if name not in ("presence", "mask_classification")},
    "class weights": {"name": "cross_entropy", "class_weights": WEIGHTS, "label_smoothing": 0.1},
    "focal alpha": {"name": "focal", "gamma": 0.5, "alpha": WEIGHTS},
    "sigmoid focal alpha": {"name": "sigmoid_focal", "gamma": 1.5, "alpha": 0.3},
    "dice per image": {"name": "dice", "smooth": 1.0, "per_image": True},
    "tversky all": {"name": "tversky", "classes": "all"},
    "jaccard all per image": {"name": "jaccard", "classes": "all", "per_image": True},
    "jaccard metric all": {"name": "jaccard_metric", "classes": "all", "smooth": 1.0},
}


def criterion_of(name: str) -> Criterion:
    """The loss beside a term of another kind, on every output, presence without background."""
    other = "dice" if TERMS[name]["name"] == "cross_entropy" else "cross_entropy"
    terms = [TERMS[name], other, {"name": "presence", "background": False}]
    return build_loss(terms, num_classes=3, aux_weight=(0.4, 0.2))


SHARED = [name for name in TERMS if not criterion_of(name).accumulated("mean")]
ALONE = [name for name in TERMS if name not in SHARED]


class Network(nn.Module):
    def __init__(self, *, norm: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm or nn.GroupNorm(2, 6))
        self.dropout = nn.Dropout(dropout)
        self.out, self.aux, self.presence = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1), nn.Linear(6, 3)
        self.seen: list[Tensor] = []
        self.double()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.dropout(self.stem(images).relu())
        outputs = {"out": self.out(features), "aux": self.aux(features)}
        self.seen.append(outputs["out"].detach())
        return {**outputs, "aux_presence": self.presence(features.mean((2, 3)))}


def batch() -> tuple[Tensor, Tensor]:
    """8 images: a share of 0 to all of an image is ignored, and one class is in two images only."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 9, 7, generator=rng, dtype=torch.float64)
    masks = torch.randint(0, 2, (8, 9, 7), generator=rng)
    masks[2, :3] = masks[3, 5:] = 2
    ignored = torch.tensor([0.0, 0.95, 0.3, 0.1, 0.9, 1.0, 0.5, 0.8])[:, None, None]
    masks[torch.rand(masks.shape, generator=rng) < ignored] = IGNORE
    return images, masks.to(torch.uint8)


def parts_of_rank(parts: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of each part, as ``TrainOrder`` divides a step."""
    world_size, rank = distributed.world_size(), distributed.rank()
    images, masks = (tensor.chunk(parts * world_size) for tensor in batch())
    mine = range(rank, parts * world_size, world_size)
    return [(images[i], masks[i]) for i in mine]


def teacher(images: Tensor) -> Tensor:
    return torch.cat([images, images.flip(1)], 3)[..., ::2].softmax(1)


def step(
    net: nn.Module, criterion: Criterion, batches: list[tuple[Tensor, Tensor]], **options: Any
) -> StepResult:
    """A step of learning rate 0: what it leaves are the gradients and BatchNorm's statistics."""
    return train_step(
        net, criterion, torch.optim.SGD(net.parameters(), lr=0.0), batches,
        amp=None, scaler=torch.amp.GradScaler("cpu", enabled=False), clip_norm=None,
        teacher=teacher, **options,
    )  # fmt: skip


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def results(name: str, parts: int, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradients, loss and its terms of a step."""
    model = Network()
    net = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    done = step(net, criterion_of(name), parts_of_rank(parts), **options)
    return gradients(model), done.loss, done.terms


def assert_equal(ours: Any, whole: Any) -> None:
    gradient, loss, terms = whole
    torch.testing.assert_close(ours[0], gradient, rtol=0, atol=1e-12 * float(gradient.norm()))
    torch.testing.assert_close(ours[1:], (loss, terms), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SHARED)
def test_four_parts_are_the_whole_batch(name: str) -> None:
    assert_equal(results(name, 4, exact=True), results(name, 1))


@pytest.mark.parametrize("parts", [2, 8])
def test_without_a_second_pass_what_masks_tell_is_exact(parts: int) -> None:
    """A part with every pixel ignored included."""
    for name in SHARED:
        terms = [TERMS[name], {"name": "presence", "background": False}]
        criterion = build_loss(terms, num_classes=3)
        whole, model = Network(), Network()
        expected = step(whole, criterion, parts_of_rank(1))
        done = step(model, criterion, parts_of_rank(parts))
        difference = (gradients(model) - gradients(whole)).norm() / gradients(whole).norm()
        if criterion.accumulated("two_pass"):
            assert difference > 0.01  # or a test of the second pass would show nothing
        else:
            assert difference < 1e-12
            torch.testing.assert_close(done.loss, expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALONE)
def test_losses_that_share_nothing_are_the_mean_over_parts(name: str) -> None:
    done = step(Network(), build_loss([name], num_classes=3), parts_of_rank(4), exact=True)
    torch.testing.assert_close(done.terms[name], mean_of_four(name))


def mean_of_four(name: str) -> Tensor:
    """The mean of the losses of four parts, each computed alone."""
    loss = LOSSES[name]()
    assert isinstance(loss, Loss)
    with torch.no_grad():
        each = [loss(Network()(images)["out"], masks) for images, masks in parts_of_rank(4)]
    return torch.stack(each).mean()


def of_rank() -> Any:
    shared = {name: results(name, 2, exact=True) for name in SHARED}
    seeds = train.dropout_seeds(config.override(config.Config(), ["train.accumulate=2"]), 3)
    model = Network(dropout=0.5)
    done = step(
        DistributedDataParallel(model), criterion_of("dice"), parts_of_rank(2),
        seeds=seeds, exact=True,
    )  # fmt: skip
    shared["dropout"] = gradients(model), done.loss, done.terms
    alone = step(
        DistributedDataParallel(Network()), build_loss(["lovasz"], num_classes=3), parts_of_rank(2)
    )
    assert alone.terms.keys() == {"lovasz", "aux", "aux_presence"}
    return float(alone.terms["lovasz"]), [
        (name, gradient.numpy(), float(loss), {key: float(part) for key, part in terms.items()})
        for name, (gradient, loss, terms) in shared.items()
    ]


def test_two_parts_on_two_ranks_are_the_whole_batch() -> None:
    """With dropout, as many parts over all ranks draw the same; what is logged is of all ranks."""
    model = Network(dropout=0.5)
    seeds = train.dropout_seeds(config.override(config.Config(), ["train.accumulate=4"]), 3)
    done = step(model, criterion_of("dice"), parts_of_rank(4), seeds=seeds, exact=True)
    expected = {name: results(name, 1) for name in SHARED}
    expected["dropout"] = gradients(model), done.loss, done.terms
    for lovasz, steps in run_ranks(of_rank, 2):
        assert lovasz == pytest.approx(float(mean_of_four("lovasz")), rel=1e-12)
        for name, gradient, loss, terms in steps:
            wide = {key: torch.tensor(part, dtype=torch.float64) for key, part in terms.items()}
            ours = torch.from_numpy(gradient), torch.tensor(loss, dtype=torch.float64), wide
            assert_equal(ours, expected[name])


@pytest.mark.parametrize("seeds", [None, [5, 6, 7, 8]])
def test_the_first_pass_draws_the_same_dropout_and_leaves_statistics_alone(
    seeds: list[int] | None,
) -> None:
    twice, once = (Network(norm=nn.BatchNorm2d(6), dropout=0.5) for _ in range(2))
    criterion = build_loss(["cross_entropy", "jaccard", "jaccard_metric"], num_classes=3)
    torch.manual_seed(9)
    done = step(twice, criterion, parts_of_rank(4), seeds=seeds, exact=True)
    first, second = twice.seen[:4], twice.seen[4:]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len({float(out.sum()) for out in second}) == 4
    if seeds is None:
        torch.manual_seed(9)
        seeds = torch.randint(2**62, (4,)).tolist()
    # By hand: outputs of the parts, joined, and one loss of them.
    joined: dict[str, list[Tensor]] = {}
    for seed, (images, _) in zip(seeds, parts_of_rank(4), strict=True):
        torch.manual_seed(seed)
        for name, output in once(images).items():
            joined.setdefault(name, []).append(output)
    outputs = {name: torch.cat(parts) for name, parts in joined.items()}
    images, masks = batch()
    loss = criterion(outputs, masks, teacher(images))
    loss.backward()
    torch.testing.assert_close(done.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(twice), gradients(once), rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(twice.named_buffers()), dict(once.named_buffers()))


def test_a_second_pass_is_made_only_where_it_is_needed() -> None:
    for terms, passes in ((["cross_entropy"], 4), (["cross_entropy", "dice"], 8)):
        model = Network()
        step(model, build_loss(terms, num_classes=3), parts_of_rank(4), exact=True)
        assert len(model.seen) == passes


def test_losses_of_parts_are_named() -> None:
    parts = ["train.accumulate=2"]
    criterion = build_loss(["cross_entropy", "dice", "lovasz"], num_classes=3)
    cfg = config.override(config.Config(), parts)
    assert losses_per_micro_batch(criterion, cfg) == ["dice", "lovasz"]
    cfg = config.override(cfg, ["train.accumulate_exact=true"])
    assert losses_per_micro_batch(criterion, cfg) == ["lovasz"]
