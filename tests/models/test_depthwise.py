"""Gradients of depthwise convolutions, computed in tiles, equal PyTorch's."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segkit.models.kernels.depthwise import DepthwiseConv2d, _Convolve, speed_up_depthwise
from segkit.models.segmenter import build_model

ATROUS = {"name": "deeplabv3plus", "rates": [2, 3, 30]}


def gradients(conv: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and the parameters, for a loss in which no channel counts as another does."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    (y.square() * torch.linspace(1, 2, y.shape[1]).view(-1, 1, 1)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in conv.parameters())]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (5, {"padding": 2}),
        (5, {"padding": 2, "stride": 2}),
        (5, {"padding": 0, "bias": False}),
        (5, {"padding": 4, "dilation": 2}),
        (3, {"padding": 12, "dilation": 12}),
        (3, {"padding": 2, "dilation": 2, "stride": 2}),
        (7, {"padding": 3}),
        ((4, 7), {"padding": (1, 3), "stride": (1, 2)}),
    ],
)
def test_gradients_are_the_same(
    kernel: object, options: dict, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, kernel, groups=6, **options).double()
    fast = copy.deepcopy(plain)
    speed_up_depthwise(fast)
    assert type(fast) is DepthwiseConv2d
    x = torch.randn(2, 6, 11, 14, dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(gradients(fast, x), gradients(plain, x), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(fast, x[:, :, :7, :8].clone().requires_grad_())


def test_gradients_are_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 5, groups=16, padding=2)
    fast = copy.deepcopy(plain)
    speed_up_depthwise(fast)
    x = torch.randn(2, 16, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(gradients(fast, x), gradients(plain, x), strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(
                actual, expected, rtol=0.02, atol=0.02 * expected.abs().max()
            )


@pytest.mark.parametrize(("dilation", "products"), [(11, 9), (14, 1), (30, 1)])
def test_values_that_meet_only_padding_are_left_out(dilation: int, products: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, 3, groups=6, padding=dilation, dilation=dilation).double()
    fast = copy.deepcopy(plain)
    speed_up_depthwise(fast)
    x = torch.randn(2, 6, 11, 14, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        actual = fast(x)
    assert counter.get_total_flops() == 2 * products * x.numel()
    torch.testing.assert_close(actual, plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(fast, x), gradients(plain, x), rtol=1e-10, atol=1e-12)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights whose gradient would be found in squares."""
    shapes: list[tuple[int, ...]] = []
    apply = _Convolve.apply

    def watched(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        shapes.append(tuple(weight.shape))
        return apply(x, weight, *rest)

    monkeypatch.setattr(_Convolve, "apply", watched)
    return shapes


def test_only_wide_depthwise_convolutions_change(calls: list[tuple[int, ...]]) -> None:
    others = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 5), nn.Conv2d(6, 12, 5, groups=6)
    )
    speed_up_depthwise(others)
    others(torch.randn(2, 6, 16, 16))
    assert not calls


@pytest.mark.parametrize(
    ("backbone", "decoder", "count"),
    [
        ("mobilenet_v3_small", "unet", 8),
        ({"name": "mobilenet_v2", "output_stride": 16}, "unet", 3),  # 3 x 3, dilated
        ("efficientnet_b0", "unet", 9),
        ({"name": "efficientnet_b0", "like": "smp"}, "unet", 9),
        ("convnext_tiny", "unet", 18),
        ({"name": "resnet18_half", "output_stride": 16}, ATROUS, 2),
    ],
)
def test_models_train_with_it(
    backbone: object, decoder: object, count: int, calls: list[tuple[int, ...]]
) -> None:
    model = build_model(backbone, decoder, num_classes=3)
    model.train()(torch.randn(2, 3, 64, 64))
    assert len(calls) == count
    model.eval()(torch.randn(2, 3, 64, 64))
    assert len(calls) == count
