"""Exported programs: the same logits at any size and batch, on the library's every decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pyramids import PYRAMID_DECODERS
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.errors import SegkitError
from segkit.models.backbones.beit import beit
from segkit.models.backbones.swin import Swin
from segkit.models.decoders import DECODERS
from segkit.models.export import export
from segkit.models.layers import _averages
from segkit.models.segmenter import Segmenter, build_model

# arguments that make a decoder small enough to trace soon
SMALL: dict[str, dict[str, Any]] = {
    "deeplabv3": {"width": 8},
    "deeplabv3plus": {"width": 8, "low_width": 4},
    "fcn": {"width": 8},
    "mask2former": {"width": 16, "queries": 4, "heads": 2, "layers": 3, "pixel_layers": 1},
    "ocrnet": {"width": 8, "key_width": 4},
    "pspnet": {"width": 8},
    "segformer": {"width": 8},
    "stlnet": {"width": 8, "levels": 16},
    "unet": {"widths": (16, 8, 8, 4)},
    "unet3plus": {"width": 4, "deep_supervision": True, "presence": True},
    "unetplusplus": {"widths": (16, 8, 8, 4, 4), "average": True},
    "upernet": {"width": 8},
}
SIZES = ((1, 65, 97), (3, 64, 96), (2, 131, 77))  # odd, whole strides and windows, upright
SOON = {"pspnet", "unet"}  # the others are slow tests
decoders = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in SOON))
        for name in PYRAMID_DECODERS
    ],
)


def image(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def check(model: nn.Module, path: Path, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> None:
    """Export, read the file back, and compare at each size."""
    export(model, path)
    program = torch.export.load(path).module()
    model.eval()
    for size in sizes:
        with torch.no_grad():
            ours, theirs = model(image(*size)), program(image(*size))
        assert ours.keys() == theirs.keys() == {"out"}
        largest = ours["out"].abs().max().item()
        torch.testing.assert_close(theirs["out"], ours["out"], rtol=0, atol=1e-4 * largest)


def test_every_decoder_is_exported() -> None:
    assert [*SMALL] == PYRAMID_DECODERS


@decoders
def test_a_decoder_gives_the_same_logits_at_other_sizes(name: str, tmp_path: Path) -> None:
    model = build_model("resnet18_half", {"name": name, **SMALL[name]}, num_classes=3)
    check(model, tmp_path / "model.pt2")


def small_swin(version: Any) -> Segmenter:
    torch.manual_seed(0)
    swin = Swin(width=8, depths=(1, 2, 1, 2), heads=(1, 1, 2, 2), version=version)
    for name, table in swin.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(table)
    decoder = DECODERS["fcn"](
        channels=swin.channels, strides=swin.strides, num_classes=3, **SMALL["fcn"]
    )
    return Segmenter(swin, decoder)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_swin_gives_the_same_logits_with_one_window_or_more(version: Any, tmp_path: Path) -> None:
    check(small_swin(version), tmp_path / "model.pt2", (*SIZES, (1, 224, 448), (1, 256, 500)))


@pytest.mark.slow
def test_beit_gives_the_same_logits_on_any_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = beit(width=8, depth=12, heads=2, window=3)
    for block in backbone.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    shape = {"channels": backbone.channels, "strides": backbone.strides, "num_classes": 3}
    check(Segmenter(backbone, DECODERS["pspnet"](**shape, width=8)), tmp_path / "model.pt2")


FAMILIES = (
    {"name": "resnet18", "output_stride": 8},
    "resnet50_v1c",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "regnet_x_400mf",
    "convnext_tiny",
    "convnext_v2_atto",
    {"name": "convnext_tiny", "output_norms": True},
    "swin_t",
    "swin_v2_t",
    "mit_b0",
    "vit_s_dinov2",
    "vit_s_plus_dinov3",
    "hrnet_w18",
    {"name": "hrnet_w18", "upsampling": "bilinear_by_factor", "align_corners": False},
    "se_resnet50",
    {"name": "unet", "width": 8},
)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_every_family_gives_the_same_logits_at_other_sizes(backbone: Any, tmp_path: Path) -> None:
    model = build_model(backbone, {"name": "pspnet", "width": 8}, num_classes=3)
    check(model, tmp_path / "model.pt2", (*SIZES, (1, 225, 97)))


@pytest.mark.parametrize("bins", [2, 3, 6])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 12, 17])
def test_averaging_matrices_are_adaptive_pooling(bins: int, length: int) -> None:
    x = image(1, length, 7)
    rows, columns = _averages(length, bins, x), _averages(7, bins, x)
    torch.testing.assert_close(rows @ x @ columns.T, F.adaptive_avg_pool2d(x, bins))


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = build_model("mobilenet_v2", "fcn", num_classes=3, freeze_batch_norm=True)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    model.train().export(tmp_path / "model.pt2")
    assert model.training
    assert model.decoder.training
    assert not model.backbone.features[0][1].training  # type: ignore[union-attr, index]
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.pt", "model", "model.pt2.bak"])
def test_another_ending_is_refused(name: str, tmp_path: Path) -> None:
    model = build_model("resnet18_half", "fcn", num_classes=3)
    with pytest.raises(SegkitError, match=f"{name}: expected a file name that ends in .pt2 or"):
        model.export(tmp_path / name)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("resnet18_half", "fcn", num_classes=3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SegkitError, match=r"model\.onnx: .* pip install onnx onnxscript$"):
        model.export(tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PYRAMID_DECODERS, "swin"])
def test_onnx_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the export extra is not installed")
    import onnxruntime

    if name == "swin":
        model = small_swin(1)
    else:
        model = build_model("resnet18_half", {"name": name, **SMALL[name]}, num_classes=3)
    model.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    model.eval()
    for size in SIZES:
        (theirs,) = session.run(["out"], {"image": image(*size).numpy()})
        with torch.no_grad():
            ours = model(image(*size))["out"]
        largest = ours.abs().max().item()
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=3e-5 * largest)
