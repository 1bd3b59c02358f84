"""EoMT, on the tokens of a small Vision Transformer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.core.errors import ConfigError
from segkit.models.backbones.vit import vit
from segkit.models.decoders.eomt import EoMT
from segkit.models.segmenter import Segmenter, build_model, create_model
from segkit.training.losses import build_loss

CLASSES, QUERIES, BLOCKS = 3, 6, 2


def small(*, rotary: bool = False, num_classes: int = CLASSES, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    backbone = vit(
        width=16, depth=6, heads=2, patch=8, positions=0 if rotary else 3, registers=2,
        output="tokens", omitted_blocks=BLOCKS,
    )  # fmt: skip
    decoder = EoMT(
        channels=backbone.channels, strides=backbone.strides, num_classes=num_classes,
        queries=QUERIES, blocks=BLOCKS, heads=2, rotary=rotary, **options,
    )  # fmt: skip
    return Segmenter(backbone, decoder)


def image(batch: int = 2, height: int = 65, width: int = 97) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


variants = pytest.mark.parametrize("options", [{}, {"rotary": True}, {"annealing": 100}])


@variants
@pytest.mark.parametrize("num_classes", [1, CLASSES])
def test_outputs_and_gradients(options: dict[str, Any], num_classes: int) -> None:
    model = small(num_classes=num_classes, **options)
    outputs = model(image())
    assert list(outputs) == ["out", "query_classes", "query_masks"]
    assert outputs["out"].shape == (2, num_classes, 65, 97)
    assert outputs["query_classes"].shape == (BLOCKS + 1, 2, QUERIES, max(2, num_classes) + 1)
    assert outputs["query_masks"].shape == (BLOCKS + 1, 2, QUERIES, 4 * 9, 4 * 13)
    sum(x.float().square().mean() for x in outputs.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        assert list(model.eval()(image())) == ["out"]


@variants
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(options: dict[str, Any]) -> None:
    model = small(**options).double().eval()
    images = image(3).double()
    with torch.no_grad():
        together, alone = model(images)["out"], model(images[1:2])["out"]
    torch.testing.assert_close(together[1:2], alone)


@variants
def test_bfloat16_is_finite(options: dict[str, Any]) -> None:
    model = small(**options)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(image())
    sum(x.float().square().mean() for x in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_share_of_masked_queries_falls_block_by_block() -> None:
    decoder = small(annealing=400).decoder  # four parts: before, one for each block, after
    shares = []
    for done in (0, 100, 150, 200, 300, 400):
        decoder.forward_passes.fill_(done)
        shares.append([round(float(decoder.masked_share(i)), 3) for i in range(BLOCKS)])
    half = round(0.5**0.9, 3)
    assert shares == [[1, 1], [1, 1], [half, 1], [0, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("annealing", "passes", "blocks"), [(0, 0, 0), (400, 250, 1), (400, 400, 0)]
)
def test_evaluation_predicts_masks_only_for_blocks_that_use_them(
    annealing: int, passes: int, blocks: int
) -> None:
    """At 250 of 400 passes the first block has a masked share of 0, the second of over a half."""
    saved = small(annealing=annealing)
    saved.decoder.forward_passes.fill_(passes)
    model = small(annealing=annealing).double().eval()
    model.load_state_dict(saved.double().state_dict())
    calls: list[object] = []
    model.decoder.class_head.register_forward_hook(lambda *_: calls.append(_))
    masks: list[Tensor | None] = []
    for block in model.decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[2]))
    with torch.no_grad():
        expected = model(image(1).double())["out"]
    assert (len(calls), sum(x is not None for x in masks)) == (1 + blocks, blocks)
    saved.decoder.forward_passes.fill_(0)
    trained = small(annealing=annealing).double()
    trained.decoder.forward_passes.fill_(passes)
    with torch.no_grad():
        torch.testing.assert_close(trained.eval()(image(1).double())["out"], expected)


def test_forward_passes_are_counted_in_training_alone() -> None:
    model = small(annealing=10)
    model(image())
    model.eval()(image())
    assert model.state_dict()["decoder.forward_passes"] == 1


def test_a_masked_query_ignores_the_patches_outside_of_its_mask() -> None:
    model = small(annealing=10**6).double().eval()
    decoder = model.decoder
    seen: list[Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    predicted = decoder._predict
    grids: list[Tensor] = []

    def recorded(x: Tensor, grid: Any) -> tuple[Tensor, Tensor]:
        grids.append(predicted(x, grid)[1])
        return predicted(x, grid)

    decoder._predict = recorded
    with torch.no_grad():
        model(image(1).double())
    (mask,) = seen
    patches = 9 * 13
    inside = nn.functional.interpolate(grids[0], (9, 13), mode="bilinear").flatten(2) > 0
    assert torch.equal(mask[:, 0, :QUERIES, -patches:], inside)
    assert 0 < inside.double().mean() < 1
    assert mask[:, :, QUERIES:].all()  # the others see all
    assert mask[..., :-patches].all()  # and all see the queries


@pytest.mark.slow
def test_four_images_are_learned() -> None:
    torch.manual_seed(0)
    model = small(annealing=150)
    masks = torch.randint(0, CLASSES, (4, 6, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = nn.functional.one_hot(masks, CLASSES).permute(0, 3, 1, 2).float()
    criterion = build_loss(["mask_classification"], num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        criterion(model(images), masks).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(images)["out"].argmax(1)
    assert (predicted == masks).float().mean() > 0.9


def test_other_backbones_are_refused() -> None:
    with pytest.raises(ConfigError, match='output "tokens"'):
        create_model("eomt", "resnet18", num_classes=3)
    with pytest.raises(ConfigError, match="omitted_blocks"):
        create_model("eomt", {"name": "vit_s_dinov2", "omitted_blocks": 3}, num_classes=3)


def test_parameters_of_a_whole_model() -> None:
    """ViT-S/14 with 100 queries, a head of 150 classes and "none", and two doublings."""
    with torch.device("meta"):
        model = build_model(
            {"name": "vit_s_dinov2", "output": "tokens", "omitted_blocks": 3},
            {"name": "eomt", "blocks": 3},
            num_classes=150,
        )
    width = 384
    upscaling = (4 * width**2 + width) + 9 * width + 2 * width
    heads = 3 * (width**2 + width) + (width + 1) * 151
    expected = 22_056_192 + 100 * width + heads + 2 * upscaling
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.slow
@variants
def test_an_export_gives_the_same_logits_at_other_sizes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = small(**options)
    model.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    model.eval()
    for size in ((1, 65, 97), (3, 64, 96), (2, 131, 77)):
        with torch.no_grad():
            ours, theirs = model(image(*size))["out"], program(image(*size))["out"]
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * ours.abs().max().item())
