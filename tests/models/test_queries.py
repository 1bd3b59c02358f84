"""Outputs of mask transformers: semantic logits by hand, and their way through the segmenter."""

import math

import pytest
import torch
from torch import Tensor, nn

from segkit.models.queries import QueryClassifier, semantic_logits
from segkit.models.segmenter import Segmenter


def predictions(classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, classes + 1), (2, 3, 4, 5)
    first, second = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return first.to(dtype), second.to(dtype)


def test_semantic_logits_by_hand() -> None:
    # Two queries of one pixel: probabilities of classes (0.5, 0.25, 0.25) and (0.1, 0.8, 0.1),
    # of masks 0.5 and 0.75.
    classes = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]], dtype=torch.float64).log()
    masks = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 2, 1, 1)
    logits = semantic_logits(classes, masks, num_classes=2)
    expected = [0.5 * 0.5 + 0.75 * 0.1, 0.5 * 0.25 + 0.75 * 0.8]
    assert logits.exp().flatten().tolist() == pytest.approx(expected)
    odds = semantic_logits(classes, masks, num_classes=1)
    assert odds.shape == (1, 1, 1, 1)
    assert odds.sigmoid().item() == pytest.approx(expected[1] / sum(expected))


def test_softmax_of_semantic_logits_is_the_normalized_probability() -> None:
    classes, masks = predictions(4)
    shares = torch.zeros(2, 4, 4, 5, dtype=torch.float64)
    for b in range(2):
        for q in range(3):
            for c in range(4):
                shares[b, c] += classes[b, q].softmax(0)[c] * masks[b, q].sigmoid()
    probabilities = semantic_logits(classes, masks, num_classes=4).softmax(1)
    torch.testing.assert_close(probabilities, shares / shares.sum(1, keepdim=True))


def test_semantic_logits_are_finite_where_no_query_claims_a_pixel() -> None:
    classes, masks = predictions(3, torch.float16)
    logits = semantic_logits(classes, torch.full_like(masks, -6e4), num_classes=3)
    assert logits.dtype == torch.float16
    assert logits.isfinite().all()
    assert (logits == logits[:, :1]).all(), "no class is preferred"


@pytest.mark.parametrize(("num_classes", "outputs"), [(1, 3), (2, 3), (5, 6)])
def test_a_query_has_each_class_and_no_object(num_classes: int, outputs: int) -> None:
    assert QueryClassifier(8, num_classes)(torch.zeros(2, 7, 8)).shape == (2, 7, outputs)


def test_the_segmenter_resizes_the_semantic_logits_alone() -> None:
    class Decoder(nn.Module):
        def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
            classes, masks = predictions(5, torch.float32)
            out = semantic_logits(classes, masks, num_classes=5)
            return {"out": out, "query_classes": classes[None], "query_masks": masks[None]}

    outputs = Segmenter(nn.Identity(), Decoder())(torch.zeros(2, 3, 16, 20))
    shapes = {name: tuple(x.shape) for name, x in outputs.items()}
    assert shapes == {
        "out": (2, 5, 16, 20),
        "query_classes": (1, 2, 3, 6),
        "query_masks": (1, 2, 3, 4, 5),
    }
