"""Weights of other projects: names, orders and windows by hand, refusals, and no code run."""

import json
import pickle
import random
import re
import struct
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import load_state
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.swin_transformer import PatchMerging

from segkit.commands.weights import main
from segkit.core import checkpoint
from segkit.core.errors import CheckpointError
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import beit
from segkit.models.backbones.hrnet import HRNet
from segkit.models.backbones.swin import Swin
from segkit.models.backbones.torchvision import convnext, deep_stem, half_resnet18, resnet
from segkit.models.decoders import DECODERS
from segkit.models.pretrained import Report, load_file
from segkit.models.pretrained.beit import resize_table
from segkit.models.pretrained.loading import windows
from segkit.models.pretrained.mit import PROJECTS as MIT
from segkit.models.pretrained.names import first_project
from segkit.models.pretrained.reading import read_file
from segkit.models.pretrained.recognition import recognize
from segkit.models.pretrained.safetensors import read_safetensors
from segkit.models.pretrained.swin import from_unfold, resize_bias_table
from segkit.models.segmenter import Segmenter, build_model

State = dict[str, Tensor]


def small_swin(window: int = 3) -> Swin:
    return Swin(width=8, depths=(2, 1, 1, 1), heads=(1, 2, 2, 2), window=window)


def model_of(
    backbone: nn.Module, decoder: str, *, num_classes: int = 3, **options: Any
) -> Segmenter:
    head = DECODERS[decoder](
        channels=backbone.channels, strides=backbone.strides, num_classes=num_classes, **options
    )
    return Segmenter(backbone, head)


def random_state(module: nn.Module, seed: int = 0) -> State:
    """Values of a module's entries such that no two entries are equal."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        drawn = torch.rand(value.shape, generator=generator) + 0.1
        state[name] = drawn if value.is_floating_point() else value
    return state


def renamed(state: State, *rules: tuple[str, str | Callable[[re.Match], str]]) -> State:
    """Every name after the first rule whose pattern is in it."""
    out = {}
    for name, tensor in state.items():
        for pattern, becomes in rules:
            if re.search(pattern, name):
                name = re.sub(pattern, becomes, name)
                break
        out[name] = tensor
    return out


def same(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    for name, tensor in model.state_dict().items():
        if not name.endswith(but or "?"):
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=name)


# ---- files


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_safetensors_by_hand(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("F16", [2], 3, 7),  # two bytes wide at an odd place
        "a": entry("U8", [3], 0, 3),
        "c": entry("BF16", [1, 1], 7, 9),
        "none": entry("F32", [0, 4], 9, 9),
        "d": entry("I64", [], 9, 17),
    }
    data = bytes([7, 8, 9]) + struct.pack("<2e", 1.5, -2) + b"\x80\x3f" + struct.pack("<q", -5)
    tensors = read_safetensors(safetensors(tmp_path / "x.safetensors", header, data))
    assert tensors["a"].tolist() == [7, 8, 9]
    assert tensors["b"].dtype == torch.float16
    assert tensors["b"].tolist() == [1.5, -2]
    assert tensors["c"].tolist() == [[1]]
    assert tensors["none"].shape == (0, 4)
    assert tensors["d"].item() == -5


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        (b"{", b"", "its header is not JSON"),
        (b"[" * 100_000, b"", "its header is not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "the key 'a' is duplicated in one object"),
        ({"a": 1}, b"", "'a' lacks its dtype"),
        ({"a": entry("F4", [1], 0, 1)}, b"1", "'a' has dtype 'F4'; expected one of: F64"),
        ({"a": entry("U8", [-1], 0, 1)}, b"1", "are not whole numbers"),
        ({"a": entry("U8", [True], 0, 1)}, b"1", "are not whole numbers"),
        ({"a": entry("U8", [2], 0, 1)}, b"1", "has 1 bytes for the shape .2."),
        ({"a": entry("F32", [10**30, 10**30], 0, 4)}, b"1234", "has 4 bytes for the shape"),
        ({"a": entry("U8", [9], 0, 9)}, b"1", "its tensors end at byte"),
        ({"a": entry("U8", [1], 1, 2)}, b"12", "'a' does not begin where"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123", "'b' does not begin"),
        ({"a": entry("U8", [1], 0, 1)}, b"12", "its tensors end at byte"),
    ],
)
def test_malformed_safetensors(header: Any, data: bytes, sentence: str, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{sentence}") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 200, 100_000_001])
def test_a_safetensors_header_is_bounded(length: int, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "bad.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"would be {length} bytes long in a file of 10"):
        read_file(path)
    path.write_bytes(b"\x01")
    with pytest.raises(CheckpointError, match="in a file of 1"):
        read_file(path)


class Bomb:
    """Writes a file when it is unpickled by someone careless."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_never_runs(archive: bool, tmp_path: Path) -> None:
    bomb, target = tmp_path / "bomb.pth", tmp_path / "boom"
    state = {"conv1.weight": torch.zeros(1), "extra": Bomb(target)}
    torch.save(state, bomb, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match="objects whose code would have to run"):
        read_file(bomb)
    bomb.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(CheckpointError, match="is not a file of weights"):
        read_file(bomb)
    assert not target.exists()
    pickle.loads(bomb.read_bytes())
    assert target.exists()  # the bomb is a real one


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([1, 2], "expected a state dict, names to tensors"),
        ({}, "it is empty"),
        ({"state_dict": {"a": 1}}, "'a' is not a tensor"),
        ({1: torch.zeros(1)}, "expected a state dict, names to tensors"),
        ({"a\x1b[2J": torch.zeros(1)}, r"the name 'a.x1b.2J' has control characters"),
        ({"conv": torch.zeros(1)}, r"its names \('conv', ...\) are of no backbone that segkit"),
    ],
)
def test_other_things_than_weights(value: Any, sentence: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{sentence}"):
        load_file(model_of(small_swin(), "fcn"), tmp_path / "x.pth")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path / "nowhere.safetensors"):
        with pytest.raises(CheckpointError, match=r"nowhere\..*: cannot be read \(No such file"):
            read_file(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_file(tmp_path)


def test_damaged_files_of_each_kind_are_told_in_a_sentence(tmp_path: Path) -> None:
    """Cut short and with a byte changed, at many places: an error of ours, or weights."""
    state = {"a.weight": torch.arange(6.0), "b": torch.ones(2, 2)}
    header = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [1], 8, 9)}
    kinds = {
        "new.pth": lambda path: torch.save(state, path),
        "old.pth": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "x.safetensors": lambda path: safetensors(path, header, bytes(9)),
    }
    rng = random.Random(0)
    refused = 0
    for name, write in kinds.items():
        path = tmp_path / name
        write(path)
        whole = path.read_bytes()
        for _ in range(60):
            at = rng.randrange(len(whole))
            changed = bytearray(whole)
            changed[at] ^= 1 << rng.randrange(8)
            for data in (whole[:at], bytes(changed)):
                path.write_bytes(data)
                refused += is_refused(path)
    assert refused > 200


def is_refused(path: Path) -> bool:
    """Return True if a file is refused in one sentence."""
    try:
        read_file(path)
    except CheckpointError as error:
        return "\n" not in str(error)
    return False


def test_wrappers_and_prefixes_come_off(tmp_path: Path) -> None:
    value = torch.arange(3.0)
    for i, wrapped in enumerate(
        (
            {"model": {"a": value}, "epoch": 3},
            {"state_dict": {"module.a": value}, "meta": {"classes": ["x"]}},
            {"model": {"state_dict": {"_orig_mod.model.a": value}}},
        )
    ):
        torch.save(wrapped, tmp_path / f"{i}.pt")
        state = read_file(tmp_path / f"{i}.pt")
        assert list(state) == ["a"]
        assert torch.equal(state["a"], value)


# ---- torchvision's classifiers


def test_real_weights_load_from_a_file(shared_data: Path) -> None:
    path = shared_data / "weights" / "mobilenet_v2_imagenet.pth"
    model = build_model("mobilenet_v2", "fcn", num_classes=3, weights=str(path))
    whole = models.mobilenet_v2()
    whole.load_state_dict(torch.load(path, weights_only=True))
    image = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        deepest = model.eval().backbone(image)[-1]
        torch.testing.assert_close(deepest, whole.eval().features[:18](image))
    report = model.report
    assert report is not None
    assert len(report.loaded) == len(model.backbone.state_dict())
    assert {name.split(".")[0] for name in report.skipped} == {"features", "classifier"}
    assert {name.split(".")[0] for name in report.initialized} == {"decoder"}
    assert report.summary() == (
        f"{path}: classifier by torchvision's names; 306 entries loaded, "
        f"{len(report.initialized)} newly initialized "
        f"(the file has no decoder: {len(report.initialized)}), "
        "8 skipped (not of a backbone: 8)"
    )


@pytest.fixture(scope="module")
def resnet18() -> State:
    return random_state(models.resnet18())


@pytest.mark.parametrize("weights", ["imagenet", "IMAGENET1K_V1"])
def test_torchvisions_weights_load_by_name(
    weights: str, resnet18: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(url: str, path: str, digest: str) -> None:
        asked.append((url, digest))
        torch.save(resnet18, path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = build_model("resnet18", "fcn", num_classes=3, weights=weights)
    assert asked == [(models.ResNet18_Weights.IMAGENET1K_V1.url, "f37072fd")]
    assert (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").exists()
    assert model.report is not None
    assert not model.report.notes
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], resnet18["conv1.weight"])
    assert set(model.report.skipped) == {"fc.weight", "fc.bias"}


def test_a_file_from_before_batches_were_counted(resnet18: State) -> None:
    old = {k: v for k, v in resnet18.items() if not k.endswith("num_batches_tracked")}
    model = build_model("resnet18", "fcn", num_classes=3)
    report = load_state(model, old, source="old")
    same(model.backbone, resnet18, but=("num_batches_tracked",))
    assert sum(name.startswith("backbone.") for name in report.initialized) == 20


def without(state: State, name: str) -> State:
    return {k: v for k, v in state.items() if k != name}


def test_backbones_load_whole_or_not_at_all(resnet18: State) -> None:
    model = build_model("resnet18", "fcn", num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for state, sentence in (
        (
            without(resnet18, "layer2.0.bn1.bias"),
            r"has 119 of the backbone's 120 entries, 'layer2.0.bn1.bias' is missing \(ResNet\); "
            "no backbone of segkit has its structure",
        ),
        (
            resnet18 | {"layer1.0.se.fc1.weight": torch.zeros(4, 64, 1, 1)},
            "has 1 entries more than the backbone, the first 'layer1.0.se.fc1.weight'",
        ),
        (
            resnet18 | {"bn_data.bias": torch.zeros(3)},
            "has 1 entries more than the backbone, the first 'bn_data.bias'",
        ),
        (
            resnet18 | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"'conv1.weight' has shape \(64, 3, 3, 3\), the backbone expects \(64, 3, 7, 7\)",
        ),
    ):
        with pytest.raises(CheckpointError, match=f"theirs: {sentence}"):
            load_state(model, state, source="theirs")
    same(model, before)


def test_a_deeper_network_of_the_same_family_is_refused_and_named() -> None:
    deeper = models.resnet34().state_dict()
    with torch.device("meta"):
        model = build_model("resnet18", "fcn", num_classes=3)
    sentence = (
        r"has 96 entries more than the backbone, the first 'layer1.2.conv1.weight' \(ResNet\); "
        "choose the backbone it fits: resnet34$"
    )
    with pytest.raises(CheckpointError, match=sentence):
        load_state(model, deeper, source="theirs")


def test_torchvisions_whole_models() -> None:
    for decoder, build, head in (
        ("fcn", models.segmentation.FCN, FCNHead),
        ("deeplabv3", models.segmentation.DeepLabV3, DeepLabHead),
    ):
        with torch.random.fork_rng():
            layers = IntermediateLayerGetter(models.resnet18(), {"layer4": "out", "layer3": "aux"})
            state = random_state(build(layers, head(512, 3), FCNHead(256, 3)))
        model = build_model("resnet18", decoder, num_classes=3)
        report = load_state(model, state, source="theirs")
        assert not report.initialized
        assert not report.skipped
        assert sorted(v.sum().item() for v in model.state_dict().values()) == sorted(
            v.sum().item() for v in state.values()
        )
        assert report.notes == ("made with backbone.output_stride 8, this model has 32",)


# ---- Swin


def test_patch_merging_order_by_hand() -> None:
    # two channels, a and b; mmsegmentation has a00 a01 a10 a11 b00 b01 b10 b11
    norm = torch.arange(8)
    expected = [0, 4, 2, 6, 1, 5, 3, 7]  # a00 b00, a10 b10, a01 b01, a11 b11
    assert from_unfold("features.2.norm.weight", norm).tolist() == expected
    reduction = torch.stack([norm, 10 + norm])
    assert from_unfold("features.6.reduction.weight", reduction).tolist() == [
        expected,
        [10 + x for x in expected],
    ]
    for name in ("features.1.0.norm1.weight", "features.0.2.weight", "norm0.weight"):
        assert from_unfold(name, norm) is norm


def test_patch_merging_order_by_the_operations_themselves() -> None:
    torch.manual_seed(0)
    ours = PatchMerging(3)
    norm, weight = torch.rand(2, 12), torch.rand(6, 12)
    image = torch.rand(1, 3, 4, 6)
    columns = F.unfold(image, 2, stride=2).transpose(1, 2)  # mmsegmentation's
    theirs = F.layer_norm(columns, (12,), norm[0], norm[1]) @ weight.T
    state = {"norm.weight": norm[0], "norm.bias": norm[1], "reduction.weight": weight}
    ours.load_state_dict({k: from_unfold(f"features.2.{k}", v) for k, v in state.items()})
    torch.testing.assert_close(ours(image.permute(0, 2, 3, 1)).flatten(1, 2), theirs)


def test_bias_tables_are_resized_as_images_by_hand() -> None:
    # window 2 to 3: 3x3 offsets to 5x5; only the middle row is not zero
    table = torch.tensor([0.0, 0, 0, 1, 1, 1, 0, 0, 0]).unsqueeze(1)
    resized = resize_bias_table(torch.cat([table, 2 * table], 1), 25)
    # New row i lies at 0.6 i - 0.2 of the old: -0.2, 0.4, 1. The bicubic kernel (a = -0.75) has
    # -0.096 at distance 1.2 and 0.46 at 0.6; rows beyond the edge repeat it.
    profile = torch.tensor([-0.096, 0.46, 1, 0.46, -0.096])
    torch.testing.assert_close(resized[:, 0], profile.repeat_interleave(5))
    torch.testing.assert_close(resized[:, 1], 2 * resized[:, 0])
    assert torch.equal(resize_bias_table(table, 9), table)
    assert resize_bias_table(table.half(), 25).dtype == torch.float16


def _as(block: str, merging: str, first: int, *parts: tuple[str, str]) -> list:
    """Rules from our names of a Swin's entries to another project's."""

    def name_block(tail: str) -> Callable[[re.Match], str]:
        return lambda m: f"{block.format((int(m[1]) - 1) // 2, m[2])}.{m.expand(tail)}"

    return [
        *(
            (rf"^features\.([1357])\.(\d+)\.{pattern}", name_block(becomes))
            for pattern, becomes in parts
        ),
        (
            r"^features\.([246])\.",
            lambda m: f"{merging.format(int(m[1]) // 2 - 1 + first)}.",
        ),
    ]


MICROSOFT = _as(
    "layers.{}.blocks.{}",
    "layers.{}.downsample",
    0,
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.3", "mlp.fc2"),
    ("(.*)", r"\3"),
)
TIMM = _as(
    "layers.{}.blocks.{}",
    "layers.{}.downsample",
    1,
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.3", "mlp.fc2"),
    ("(.*)", r"\3"),
)
OPENMMLAB = _as(
    "stages.{}.blocks.{}",
    "stages.{}.downsample",
    0,
    (r"attn\.(.*)", r"attn.w_msa.\3"),
    (r"mlp\.0", "ffn.layers.0.0"),
    (r"mlp\.3", "ffn.layers.1"),
    ("(.*)", r"\3"),
)
HUGGING_FACE = _as(
    "encoder.layers.{}.blocks.{}",
    "encoder.layers.{}.downsample",
    0,
    (r"attn\.(relative.*)", r"attention.self.\3"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.0", "intermediate.dense"),
    (r"mlp\.3", "output.dense"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    ("(.*)", r"\3"),
)
PATCHES = [(r"^features\.0\.0", "patch_embed.proj"), (r"^features\.0\.2", "patch_embed.norm")]


def to_unfold(name: str, tensor: Tensor) -> Tensor:
    """The way back from our order of patch merging to mmsegmentation's."""
    if not re.match(r"features\.[246]", name):
        return tensor
    places = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return places.transpose(-1, -2).flatten(-2)


def swin_names(project: str, state: State) -> State:
    """A Swin of ours as another project's file."""
    if project == "microsoft":
        return renamed(state, *MICROSOFT, *PATCHES) | {
            "norm.weight": torch.zeros(64),
            "head.weight": torch.zeros(1000, 64),
            "layers.0.blocks.1.attn_mask": torch.zeros(1),
        }
    if project == "timm":
        state = {k: v for k, v in state.items() if "position_index" not in k}
        return renamed(state, *TIMM, *PATCHES) | {"head.fc.weight": torch.zeros(21841, 64)}
    if project == "mmsegmentation":
        state = {name: to_unfold(name, value) for name, value in state.items()}
        patches = [(p, n.replace("proj", "projection")) for p, n in PATCHES]
        return renamed(state, *OPENMMLAB, *patches)
    out: State = {}
    patches = [(r"^features\.0\.0", "embeddings.patch_embeddings.projection")]
    patches += [(r"^features\.0\.2", "embeddings.norm")]
    patches += [(rf"^norm{i}", f"hidden_states_norms.stage{i + 1}") for i in range(4)]
    for name, value in renamed(state, *HUGGING_FACE, *patches).items():
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[name.replace("attn.qkv", f"attention.self.{part}")] = third
        else:
            out[name] = value
    return out


PROJECTS = ["microsoft", "timm", "mmsegmentation", "hugging face"]


@pytest.mark.parametrize("project", PROJECTS)
def test_swin_by_every_projects_names(project: str) -> None:
    model = model_of(small_swin(), "fcn")
    state = random_state(model.backbone)
    theirs = swin_names(project, state)
    if project in ("microsoft", "timm"):  # classifiers, without norms of stages
        theirs = {k: v for k, v in theirs.items() if not re.match(r"norm\d", k)}
    index = {k: v.clone() for k, v in model.backbone.state_dict().items() if "index" in k}
    report = load_state(model, theirs, source="theirs")
    norms = {f"backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    initialized = {name for name in report.initialized if name.startswith("backbone.")}
    assert initialized == (norms if project in ("microsoft", "timm") else set())
    same(model.backbone, state | index, but=tuple(n.removeprefix("backbone.") for n in initialized))
    titles = {"microsoft": "Microsoft", "hugging face": "Hugging Face"}
    assert report.title == f"Swin by {titles.get(project, project)}'s names"
    for name, why in report.skipped.items():
        window = name.endswith("relative_position_index")
        assert why == ("follows from the window" if window else "not of a backbone")


def test_another_window_resizes_the_biases_and_keeps_its_own_index() -> None:
    source, model = small_swin(3), model_of(small_swin(4), "fcn")
    state = random_state(source)
    index = model.backbone.state_dict()["features.1.1.attn.relative_position_index"].clone()
    report = load_state(model, swin_names("microsoft", state), source="theirs")
    assert report.notes[0] == "position biases resized from window 3 to 4"
    loaded = model.backbone.state_dict()
    table = "features.1.1.attn.relative_position_bias_table"
    assert torch.equal(loaded[table], resize_bias_table(state[table], 49))
    assert torch.equal(loaded["features.1.1.attn.relative_position_index"], index)
    assert index.max() == 48


def test_the_window_of_a_swin_v2_is_told_by_its_coordinates() -> None:
    def swin(window: int) -> Swin:
        sizes: Any = {"width": 8, "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1)}
        return Swin(**sizes, version=2, window=window)

    with torch.random.fork_rng():
        model, source = model_of(swin(4), "fcn"), swin(3)
    report = load_state(model, source.state_dict(), source="theirs")
    assert report.notes == ("position biases are computed for window 4, the file's are for 3",)
    assert windows(recognize(source.state_dict(), source="theirs")) == [3]
    assert not load_state(model, swin(4).state_dict(), source="theirs").notes


@pytest.mark.parametrize(
    ("project", "sentence"),
    [
        ("timm", "timm fills maps up to whole windows after it shifted them"),
        ("microsoft", "if it is of Microsoft's segmentation code, its project shifts windows"),
        ("mmsegmentation", "its project shifts windows along a side that a single window covers"),
        ("hugging face", "its project shifts windows along a side that a single window covers"),
    ],
)
def test_the_report_tells_where_a_project_shifts_otherwise(project: str, sentence: str) -> None:
    model = model_of(small_swin(), "fcn")
    theirs = swin_names(project, random_state(model.backbone))
    [note] = load_state(model, theirs, source="theirs").notes
    assert note.startswith(sentence)


def test_a_swin_with_more_than_ours_is_refused() -> None:
    theirs = swin_names("microsoft", random_state(small_swin()))
    theirs["absolute_pos_embed"] = torch.zeros(1, 9, 8)
    with pytest.raises(CheckpointError, match="the first 'absolute_pos_embed'"):
        load_state(model_of(small_swin(), "fcn"), theirs, source="theirs")


@pytest.mark.parametrize(
    ("project", "change", "sentence"),
    [
        ("mmsegmentation", {"stages.0.downsample.norm.weight": torch.ones(7)}, "has shapes that"),
        (
            "hugging face",
            {"encoder.layers.0.blocks.0.attention.self.key.bias": torch.tensor(1.0)},
            "has shapes that are of no Swin by Hugging Face's names",
        ),
        (  # the same once more, by the name it has in memory
            "hugging face",
            {"encoder.layers.0.blocks.0.attention.q_proj.bias": torch.zeros(8)},
            "has 1 entries more than the backbone, the first 'encoder.layers.0.blocks.0.attention",
        ),
        ("microsoft", {"patch_embed.proj.weight": torch.tensor(0.0)}, r"has shape \(\), the back"),
        (
            "microsoft",
            {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(8, 1)},
            r"has shape \(8, 1\), the backbone expects \(25, 1\)",
        ),
    ],
)
def test_shapes_that_cannot_be(project: str, change: State, sentence: str) -> None:
    model = model_of(small_swin(), "fcn")
    theirs = swin_names(project, random_state(model.backbone)) | change
    with pytest.raises(CheckpointError, match=f"theirs: .*{sentence}"):
        load_state(model, theirs, source="theirs")


# ---- BEiT


def test_beits_position_biases_keep_near_and_far_offsets() -> None:
    """Offsets of -1, 0, 1 and the class token stay; the farthest are the new grid's farthest."""
    table = torch.randn(9**2 + 3, 2, generator=torch.Generator().manual_seed(0))
    resized = resize_table(table, 15**2 + 3)
    assert torch.equal(resized[-3:], table[-3:])
    old, new = table[:-3].reshape(9, 9, 2), resized[:-3].reshape(15, 15, 2)
    torch.testing.assert_close(new[6:9, 6:9], old[3:6, 3:6])
    torch.testing.assert_close(new[::14, ::14], old[::8, ::8], rtol=1e-3, atol=1e-3)


def test_beits_window_may_differ_and_is_named() -> None:
    def model(window: int) -> Segmenter:
        backbone = beit(width=8, depth=12, heads=2, window=window)
        return Segmenter(backbone, nn.Identity())

    source, other = model(3).backbone, model(5)
    for name, value in source.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(value)
    names = (
        (r"\.ls([12])\.gamma", r".gamma_\1"),
        (r"attn\.qkv\.bias", "attn.q_bias"),
    )
    state = renamed(source.state_dict(), *names)
    for name in [name for name in state if name.endswith("q_bias")]:
        query, _, value = state[name].chunk(3)
        state |= {name: query, name.replace("q_bias", "v_bias"): value}
    neck = ((r"^neck\.levels\.0\.", "fpn1."), (r"^neck\.levels\.1\.", "fpn2.0."))
    segmentation = {f"backbone.{name}": x for name, x in renamed(state, *neck).items()}
    assert not load_state(model(3), segmentation, source="theirs").initialized
    state = {name: value for name, value in state.items() if not name.startswith("neck.")}
    report = load_state(other, state, source="theirs")
    assert report.notes == ("position biases resized from window 3 to 5",)
    assert all(name.startswith("backbone.neck.") for name in report.initialized)
    ours = other.backbone.state_dict()
    table = "blocks.7.attn.relative_position_bias_table"
    assert torch.equal(ours[table], resize_table(source.state_dict()[table], 84))
    assert torch.equal(ours["blocks.3.attn.proj.weight"], state["blocks.3.attn.proj.weight"])
    del state["blocks.11.gamma_2"]
    with pytest.raises(CheckpointError, match=r"'blocks\.11\.ls2\.gamma' is missing"):
        load_state(other, state, source="theirs")


# ---- whole models


def openmmlab_head(state: State, spelled: bool = False) -> State:
    """A UPerNet of ours by mmsegmentation's names, or ``spelled`` out by Hugging Face's."""
    norm, head = ("batch_norm", "classifier") if spelled else ("bn", "conv_seg")
    parts = {
        r"pool\.branches\.(\d)": r"decode_head.psp_modules.\1.1",
        r"pool\.fuse": "decode_head.bottleneck",
        r"laterals\.(\d)": r"decode_head.lateral_convs.\1",
        r"smooth\.(\d)": r"decode_head.fpn_convs.\1",
        r"fuse": "decode_head.fpn_bottleneck",
        r"aux(?=\.[01])": "auxiliary_head.convs.0",
    }
    rules: list = [(r"^decoder\.classifier", f"decode_head.{head}")]
    rules += [(r"^decoder\.aux\.4", f"auxiliary_head.{head}")]
    for ours, theirs in parts.items():
        rules += [(rf"^decoder\.{ours}\.0", f"{theirs}.conv")]
        rules += [(rf"^decoder\.{ours}\.1", f"{theirs}.{norm}")]
    return renamed(state, *rules)


def parts(model: Segmenter, seed: int = 0) -> tuple[State, State]:
    """Random values of a model's backbone, without a prefix, and of its decoder, with it."""
    state = random_state(model, seed)
    backbone = {k[9:]: v for k, v in state.items() if k.startswith("backbone.")}
    return backbone, {k: v for k, v in state.items() if k.startswith("decoder.")}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("project", ["mmsegmentation", "hugging face", "microsoft"])
def test_upernet_on_swin_whole(project: str) -> None:
    """Microsoft's segmentation code has its own Swin under mmsegmentation's head."""
    model = model_of(small_swin(), "upernet", width=4, aux_width=4)
    backbone, head = parts(model)
    theirs = under("backbone.", swin_names(project, backbone))
    theirs |= openmmlab_head(head, spelled=project == "hugging face")
    index = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items() if "index" in k}
    report = load_state(model, theirs, source="theirs")
    assert not report.initialized
    same(model, under("backbone.", backbone) | head | index)


def test_mmsegmentations_pspnet_whole() -> None:
    model = model_of(small_swin(), "pspnet", width=16, aux_width=4)
    backbone, head = parts(model)
    theirs = under("backbone.", swin_names("mmsegmentation", backbone)) | openmmlab_head(head)
    report = load_state(model, theirs, source="theirs")
    assert report.title == "PSPNet of mmsegmentation, Swin by mmsegmentation's names"
    assert not report.initialized
    same(model, under("backbone.", backbone) | head, but=("index",))


def test_class_heads_of_another_size_stay_fresh_and_are_told() -> None:
    model = model_of(small_swin(), "upernet", width=4, aux_width=4, num_classes=5)
    backbone, head = parts(model_of(small_swin(), "upernet", width=4, aux_width=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = under("backbone.", swin_names("mmsegmentation", backbone)) | openmmlab_head(head)
    report = load_state(model, theirs, source="theirs")
    heads = [f"decoder.{h}.{k}" for h in ("classifier", "aux.4") for k in ("weight", "bias")]
    assert report.initialized == dict.fromkeys(heads, "3 classes in the file, 5 here")
    assert report.skipped["decode_head.conv_seg.weight"] == "not of this model"
    same(model, under("backbone.", backbone) | head | {h: before[h] for h in heads}, but=("index",))
    assert "4 newly initialized (3 classes in the file, 5 here: 4)" in report.summary()


def test_parts_that_serve_training_may_be_missing_on_either_side() -> None:
    with_aux = model_of(small_swin(), "upernet", width=4, aux_width=4)
    bare = model_of(small_swin(), "upernet", width=4, aux_width=None)
    backbone, head = parts(with_aux)
    theirs = under("backbone.", swin_names("mmsegmentation", backbone)) | openmmlab_head(head)
    report = load_state(bare, theirs, source="theirs")
    assert not report.initialized
    skipped = {k for k, why in report.skipped.items() if why == "not of this model"}
    assert skipped == {name for name in theirs if name.startswith("auxiliary_head")}
    theirs = {k: v for k, v in theirs.items() if k not in skipped}
    report = load_state(with_aux, theirs, source="theirs")
    assert {name.split(".")[1] for name in report.initialized} == {"aux"}
    assert set(report.initialized.values()) == {"not in the file"}


def test_another_decoder_leaves_ours_fresh_and_says_why() -> None:
    backbone, head = parts(model_of(small_swin(), "upernet", width=4, aux_width=4))
    theirs = under("backbone.", swin_names("mmsegmentation", backbone)) | openmmlab_head(head)
    wider = model_of(small_swin(), "upernet", width=8)
    for model, sentence in (
        (model_of(small_swin(), "pspnet", width=4), "'decoder.laterals.0.0.weight' is more"),
        (wider, r"'decoder.pool.branches.0.0.weight' has shape \(4, 64, 1, 1\), here \(8, "),
    ):
        before = {k: v.clone() for k, v in model.decoder.state_dict().items()}
        report = load_state(model, theirs, source="theirs")
        same(model.backbone, backbone, but=("index",))
        same(model.decoder, before)
        assert set(report.initialized) == {f"decoder.{name}" for name in before}
        assert re.match(
            f"the file's decoder, upernet, differs: {sentence}", first(report.initialized)
        )
        assert report.skipped["decode_head.conv_seg.weight"] == "of a decoder"


def first(reasons: Any) -> str:
    return next(iter(reasons.values()))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["decode_head.convs.0.conv.weight", "decode_head.conv_seg.weight"], "no decoder of its"),
        (["decode_head.query.weight"], "no decoder of its structure"),
    ],
)
def test_mmsegmentations_other_models_give_their_backbone(names: list[str], why: str) -> None:
    """A ResNet with a deep stem, as FCN and DeepLabV3+ have it there."""
    with torch.random.fork_rng():
        model = model_of(resnet(partial(deep_stem, half_resnet18)), "fcn")
    backbone = random_state(model.backbone)
    theirs = renamed(backbone, (r"^conv1\.", "stem."), (r"^bn1\.", "stem.7."))
    assert "stem.6.weight" in theirs
    theirs = under("backbone.", theirs) | {name: torch.zeros(2) for name in names}
    report = load_state(model, theirs, source="theirs")
    same(model.backbone, backbone)
    assert why in first(report.initialized)
    assert [k for k, reason in report.skipped.items() if reason == "of a decoder"] == names


def _separable(ours: str, theirs: str) -> list:
    """A separable convolution with BatchNorm inside, by mmsegmentation's names."""
    return [
        (rf"^decoder\.{ours}\.0\.0\.", rf"{theirs}.depthwise_conv.conv."),
        (rf"^decoder\.{ours}\.0\.1\.", rf"{theirs}.depthwise_conv.bn."),
        (rf"^decoder\.{ours}\.0\.3\.", rf"{theirs}.pointwise_conv.conv."),
        (rf"^decoder\.{ours}\.1\.", rf"{theirs}.pointwise_conv.bn."),
    ]


def _plain(ours: str, theirs: str) -> list:
    return [
        (rf"^decoder\.{ours}\.0\.", rf"{theirs}.conv."),
        (rf"^decoder\.{ours}\.1\.", rf"{theirs}.bn."),
    ]


MMSEG_HEADS = {
    "fcn": [
        *_plain(r"convs\.([01])", r"decode_head.convs.\1"),
        (r"^decoder\.classifier\.4", "decode_head.conv_seg"),
        *_plain("classifier", "decode_head.conv_cat"),
        (r"^decoder\.aux_classifier\.4", "auxiliary_head.conv_seg"),
        *_plain("aux_classifier", "auxiliary_head.convs.0"),
    ],
    "deeplabv3plus": [
        *_plain(r"aspp\.branches\.0", "decode_head.aspp_modules.0"),
        *_separable(r"aspp\.branches\.([123])", r"decode_head.aspp_modules.\1"),
        *_plain(r"aspp\.average", "decode_head.image_pool.1"),
        *_plain(r"aspp\.project", "decode_head.bottleneck"),
        *_plain("low", "decode_head.c1_bottleneck"),
        *_separable(r"fuse\.([01])", r"decode_head.sep_bottleneck.\1"),
        (r"^decoder\.classifier", "decode_head.conv_seg"),
        (r"^decoder\.aux\.4", "auxiliary_head.conv_seg"),
        *_plain("aux", "auxiliary_head.convs.0"),
    ],
}


@pytest.mark.parametrize("name", MMSEG_HEADS)
def test_mmsegmentations_convolutional_heads_whole(name: str) -> None:
    with torch.random.fork_rng():
        backbone = resnet(partial(deep_stem, half_resnet18))
        model = model_of(backbone, name, layout="mmsegmentation", width=4, aux=True)
    backbone_state, head = parts(model)
    theirs = renamed(head, *MMSEG_HEADS[name])
    assert all(key.startswith(("decode_head.", "auxiliary_head.")) for key in theirs)
    if name == "deeplabv3plus":  # mmsegmentation joins the image's average first, and we last
        join = "decode_head.bottleneck.conv.weight"
        *branches, average = theirs[join].split(4, 1)
        theirs[join] = torch.cat([average, *branches], 1)
    stem = renamed(backbone_state, (r"^conv1\.", "stem."), (r"^bn1\.", "stem.7."))
    report = load_state(model, under("backbone.", stem) | theirs, source="theirs")
    same(model.backbone, backbone_state)
    same(model.decoder, {key.removeprefix("decoder."): value for key, value in head.items()})
    assert not report.initialized
    assert not report.skipped
    untold = ["backbone.output_stride, 32"]
    if name == "deeplabv3plus":
        untold += [r"decoder.rates, \(12, 24, 36\)", "decoder.align_corners, True"]
    else:
        untold += ["align_corners, False"]
    for note, path in zip(report.notes, untold, strict=False):
        assert re.match(f"the file does not tell {path} in this model: mmsegmentation's", note)
    assert len(report.notes) == len(untold) + 1
    assert re.match("mmsegmentation's (d6|mg124) models dilate", report.notes[-1])
    backbone.contract_dilation = False
    report = load_state(model, under("backbone.", stem) | theirs, source="theirs")
    assert report.notes[0] == "made with backbone.contract_dilation True, this model has False"


OCR_AUTHORS = [
    (r"^decoder\.regions\.0\.([01])", r"aux_head.\1"),
    (r"^decoder\.regions\.1", "aux_head.3"),
    (r"^decoder\.pixels", "conv3x3_ocr"),
    (r"^decoder\.classifier", "cls_head"),
    (r"^decoder\.fuse\.0", "ocr_distri_head.conv_bn_dropout.0"),
    (r"^decoder\.fuse\.1", "ocr_distri_head.conv_bn_dropout.1.0"),
    *(
        (
            rf"^decoder\.{ours}\.{i}\.{j}",
            f"ocr_distri_head.object_context_block.{theirs}.{2 * i + j}{'.0' if j else ''}",
        )
        for ours, theirs in (("query", "f_pixel"), ("key", "f_object"))
        for i in (0, 1)
        for j in (0, 1)
    ),
    *(
        (
            rf"^decoder\.{ours}\.{j}",
            f"ocr_distri_head.object_context_block.{theirs}.{j}{'.0' if j else ''}",
        )
        for ours, theirs in (("value", "f_down"), ("context", "f_up"))
        for j in (0, 1)
    ),
]
CONTEXT = "decode_head.1.object_context_block"
OCR_OPENMMLAB = [
    (r"^decoder\.regions\.1", "decode_head.0.conv_seg"),
    (r"^decoder\.classifier", "decode_head.1.conv_seg"),
    *(
        (rf"^decoder\.{ours}\.{j}", f"{theirs}.{kind}")
        for ours, theirs in (
            (r"regions\.0", "decode_head.0.convs.0"),
            ("pixels", "decode_head.1.bottleneck"),
            ("fuse", f"{CONTEXT}.bottleneck"),
            ("value", f"{CONTEXT}.value_project"),
            ("context", f"{CONTEXT}.out_project"),
            (r"query\.0", f"{CONTEXT}.query_project.0"),
            (r"query\.1", f"{CONTEXT}.query_project.1"),
            (r"key\.0", f"{CONTEXT}.key_project.0"),
            (r"key\.1", f"{CONTEXT}.key_project.1"),
        )
        for j, kind in ((0, "conv"), (1, "bn"))
    ),
]


@pytest.mark.parametrize("project", ["authors", "mmsegmentation"])
def test_ocrnet_whole(project: str, tmp_path: Path) -> None:
    theirs_corners = project == "authors"
    model = model_of(
        HRNet(width=4), "ocrnet", width=8, key_width=4, bias=theirs_corners, num_classes=3
    )
    backbone, head = parts(model)
    if project == "authors":
        theirs = under("model.", backbone | renamed(head, *OCR_AUTHORS))
        theirs["loss.weight"] = torch.zeros(3)
        assert {
            "model.aux_head.3.weight",
            "model.ocr_distri_head.object_context_block.f_pixel.3.0.running_mean",
            "model.ocr_distri_head.object_context_block.f_up.1.0.weight",
        } < set(theirs)
    else:
        theirs = under("backbone.", backbone) | renamed(head, *OCR_OPENMMLAB)
        assert {
            "decode_head.1.object_context_block.query_project.1.bn.weight",
            "decode_head.0.convs.0.conv.weight",
        } < set(theirs)
    torch.save({"state_dict": theirs}, tmp_path / "ocr.pth")
    report = load_file(model, tmp_path / "ocr.pth")
    assert not report.initialized
    same(model, under("backbone.", backbone) | head)
    told = [f"made with {part}.align_corners False, this model has True" for part in PARTS]
    told += [
        "made with backbone.upsampling 'bilinear_by_factor', this model has 'bilinear'",
    ]
    assert sorted(report.notes) == ([] if project == "authors" else sorted(told))
    if project == "authors":  # an older HRNet's only head serves as the auxiliary one
        older = {k.replace("aux_head", "last_layer"): v for k, v in theirs.items()}
        torch.save(older, tmp_path / "ocr.pth")
        assert not load_file(model, tmp_path / "ocr.pth").initialized


PARTS = ("decoder", "backbone")


def test_hrnets_classifier_resizes_otherwise_and_the_report_says_so() -> None:
    model = model_of(HRNet(width=4), "fcn")
    backbone = random_state(model.backbone)
    theirs = backbone | {"incre_modules.0.0.conv1.weight": torch.zeros(1)}
    report = load_state(model, theirs, source="theirs")
    same(model.backbone, backbone)
    assert report.notes == ("made with backbone.upsampling 'nearest', this model has 'bilinear'",)


def test_how_hrnet_upsamples_is_told_by_the_head_beside_it_or_not_at_all() -> None:
    model = model_of(HRNet(width=4), "fcn")
    backbone = random_state(model.backbone)
    [note] = load_state(model, backbone, source="theirs").notes
    assert note.startswith("the file does not tell backbone.upsampling, 'bilinear' in this model: ")
    earlier = backbone | {"last_layer.3.weight": torch.zeros(3, 60, 1, 1)}
    assert load_state(model, earlier, source="theirs").notes == (note,)
    openmmlab = under("backbone.", backbone) | {"decode_head.conv_seg.weight": torch.zeros(3, 60)}
    assert load_state(model, openmmlab, source="theirs").notes == (
        "made with backbone.align_corners False, this model has True",
        "made with backbone.upsampling 'bilinear_by_factor', this model has 'bilinear'",
    )
    hrnet = HRNet(width=4, upsampling="bilinear_by_factor", align_corners=False)
    assert not load_state(model_of(hrnet, "fcn"), openmmlab, source="theirs").notes


def smp_deeplab(state: State) -> State:
    return renamed(
        state,
        (r"^decoder\.aspp\.branches", "decoder.aspp.0.convs"),
        (r"^decoder\.aspp\.average\.0", "decoder.aspp.0.convs.4.1"),
        (r"^decoder\.aspp\.average\.1", "decoder.aspp.0.convs.4.2"),
        (r"^decoder\.aspp\.project", "decoder.aspp.0.project"),
        (r"^decoder\.smooth\.0", "decoder.aspp.1"),
        (r"^decoder\.smooth\.1", "decoder.aspp.2"),
        (r"^decoder\.low", "decoder.block1"),
        (r"^decoder\.fuse", "decoder.block2"),
        (r"^decoder\.classifier", "segmentation_head.0"),
    )


def test_smps_models_whole() -> None:
    for decoder, options in (("unetplusplus", {}), ("deeplabv3plus", {"width": 8})):
        with torch.random.fork_rng():
            encoder = {"name": "resnet18_half", "output_stride": 16}
            model = build_model(encoder, {"name": decoder, **options}, num_classes=3)
        backbone, head = parts(model)
        theirs = smp_deeplab(head)
        if decoder == "unetplusplus":
            theirs = renamed(head, (r"^decoder\.classifier", "segmentation_head.0"))
        report = load_state(model, under("encoder.", backbone) | theirs, source="theirs")
        assert not report.initialized
        assert not report.skipped
        same(model, under("backbone.", backbone) | head)
        untold = [note.split(" in this model")[0] for note in report.notes if "not tell" in note]
        if decoder == "deeplabv3plus":
            assert report.notes[0] == (
                "made with backbone.contract_dilation False, this model has True"
            )
            assert untold == [
                "the file does not tell backbone.output_stride, 16",
                "the file does not tell decoder.rates, (12, 24, 36)",
            ]
        else:
            assert report.notes[0] == "made with backbone.output_stride 32, this model has 16"
            assert "decoder_interpolation is not told" in report.notes[1]


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_smps_output_stride_is_told_whatever_it_is_here(output_stride: int) -> None:
    with torch.random.fork_rng():
        encoder = {"name": "resnet18_half", "output_stride": output_stride}
        model = build_model(encoder, {"name": "deeplabv3plus", "width": 8}, num_classes=3)
    backbone, head = parts(model)
    theirs = under("encoder.", backbone) | smp_deeplab(head)
    report = load_state(model, theirs, source="theirs")
    assert (
        f"the file does not tell backbone.output_stride, {output_stride} in this model: "
        "segmentation_models.pytorch has 16 unless told 8"
    ) in report.notes


def test_smps_other_models_give_their_encoder() -> None:
    with torch.random.fork_rng():
        model = build_model("resnet18_half", "unet", num_classes=3)
    backbone, _ = parts(model)
    other = {"decoder.blocks.0.conv1.0.weight": torch.zeros(1)}
    other["segmentation_head.0.weight"] = torch.zeros(2, 16, 3, 3)
    report = load_state(model, under("encoder.", backbone) | other, source="theirs")
    same(model.backbone, backbone)
    assert set(report.initialized.values()) == {"segkit has no decoder of its structure"}


# ---- EfficientNet and ConvNeXt: tests/test_parity.py compares outputs as well

EFFICIENTNET = {
    "timm": (
        "conv_dw bn1 se.conv_reduce se.conv_expand conv_pw bn2",
        "conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3",
    ),
    "lukemelas": (
        "_depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2",
        "_expand_conv _bn0 _depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2",
    ),
}


@pytest.mark.parametrize("project", EFFICIENTNET)
def test_efficientnet(project: str) -> None:
    with torch.random.fork_rng():
        model = build_model("efficientnet_b0", "fcn", num_classes=3)
    state = random_state(model.backbone)
    before = [0, 1, 3, 5, 8, 11, 15]  # blocks of B0 before each stage
    rules: list = []
    for stage in range(7):
        places = ["0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"]
        if stage == 0:  # without an expansion
            places = ["0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"]
        for ours, theirs in zip(places, EFFICIENTNET[project][stage > 0].split(), strict=True):

            def name(m: re.Match, stage: int = stage, theirs: str = theirs) -> str:
                if project == "timm":
                    return f"blocks.{stage}.{m[1]}.{theirs}."
                return f"_blocks.{before[stage] + int(m[1])}.{theirs}."

            rules.append((rf"^features\.{stage + 1}\.(\d+)\.block\.{re.escape(ours)}\.", name))
    stem = ("conv_stem", "bn1") if project == "timm" else ("_conv_stem", "_bn0")
    rules += [(rf"^features\.0\.{i}", stem[i]) for i in (0, 1)]
    theirs = renamed(state, *rules)
    head = "conv_head" if project == "timm" else "_conv_head"
    theirs[f"{head}.weight"] = torch.zeros(1280, 320, 1, 1)
    report = load_state(model, theirs, source="theirs")
    same(model.backbone, state)
    assert set(report.skipped) == {f"{head}.weight"}
    doubt = "normalized by a mean and a deviation of 0.5"
    *told, doubts = report.notes
    assert doubts.endswith(doubt)
    if project == "lukemelas":
        assert told == ["made with backbone.like 'smp', this model has 'torchvision'"]
    else:
        assert told == [
            "the file does not tell backbone.like, 'torchvision' in this model: timm's tf_ models "
            "need 'tensorflow' (which is right for sides that 32 divides), its others and "
            "segmentation_models.pytorch's 'timm'"
        ]


CONVNEXT = {  # a block, its parts, the patches, the downsampling
    "timm": ("stages.{}.blocks.{}.", "conv_dw norm mlp.fc1 mlp.fc2 gamma", "stem.0", "stem.1"),
    "authors": (
        "stages.{}.{}.",
        "dwconv norm pwconv1 pwconv2 gamma",
        "downsample_layers.0.0",
        "downsample_layers.0.1",
    ),
    "mmsegmentation": (
        "stages.{}.{}.",
        "depthwise_conv norm pointwise_conv1 pointwise_conv2 gamma",
        "downsample_layers.0.0",
        "downsample_layers.0.1",
    ),
    "hugging face": (
        "encoder.stages.{}.layers.{}.",
        "dwconv layernorm pwconv1 pwconv2 layer_scale_parameter",
        "embeddings.patch_embeddings",
        "embeddings.layernorm",
    ),
}
DOWNSAMPLING = {
    "timm": "stages.{}.downsample.",
    "authors": "downsample_layers.{}.",
    "mmsegmentation": "downsample_layers.{}.",
    "hugging face": "encoder.stages.{}.downsampling_layer.",
}


def convnext_names(project: str, state: State) -> State:
    """A ConvNeXt of ours as another project's file."""
    block, names, patches, norm = CONVNEXT[project]
    places = ("block.0", "block.2", "block.3", "block.5", "layer_scale")

    def of(theirs: str) -> Callable[[re.Match], str]:
        return lambda m: block.format((int(m[1]) - 1) // 2, m[2]) + theirs

    rules: list = [
        (rf"^features\.([1357])\.(\d+)\.{re.escape(place)}", of(name))
        for place, name in zip(places, names.split(), strict=True)
    ]
    rules += [(r"^features\.0\.0", patches), (r"^features\.0\.1", norm)]
    rules += [
        (r"^features\.([246])\.", lambda m: DOWNSAMPLING[project].format(int(m[1]) // 2)),
    ]
    if project == "hugging face":
        rules += [(r"^norm(\d)", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}")]
    theirs = renamed(state, *rules)
    return {k: v.flatten() if k.endswith(("gamma", "parameter")) else v for k, v in theirs.items()}


def small_convnext(**options: Any) -> nn.Module:
    """ConvNeXt with its four stages of one narrow block each."""

    def network(**more: Any) -> nn.Module:
        widths = [CNBlockConfig(8 * 2**i, 8 * 2 ** (i + 1), 1) for i in range(3)]
        return ConvNeXt([*widths, CNBlockConfig(64, None, 1)], **more)

    return convnext(network, drop_path=0.0, **options)


@pytest.mark.parametrize("project", CONVNEXT)
def test_convnext(project: str) -> None:
    """As a classifier, and with the norms of its feature maps as a segmentation model has them."""
    with torch.random.fork_rng():
        bare, normed = (
            model_of(small_convnext(output_norms=norms), "fcn") for norms in (False, True)
        )
    state = random_state(normed.backbone)
    classifier = {name: value for name, value in state.items() if not re.match(r"norm\d", name)}
    theirs, whole = (convnext_names(project, values) for values in (classifier, state))
    report = load_state(bare, theirs, source="theirs")
    assert not report.skipped
    same(bare.backbone, state)
    report = load_state(normed, whole, source="theirs")
    assert not [name for name in report.initialized if name.startswith("backbone.")]
    assert not report.skipped
    same(normed.backbone, state)
    report = load_state(normed, theirs, source="theirs")
    initialized = {name for name in report.initialized if name.startswith("backbone.")}
    assert initialized == {
        f"backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    first_norm = "hidden_states_norms.stage1" if project == "hugging face" else "norm0"
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    sentence = (
        f"theirs: '{first_norm}.weight' is of norms of the feature maps, which this backbone does "
        r"not have \(ConvNeXt by .*\); give the backbone output_norms: true"
    )
    with pytest.raises(CheckpointError, match=sentence):
        load_state(bare, whole, source="theirs")
    same(bare, before)
    missing = without(whole, f"{first_norm}.bias")
    sentence = r"'norm0.bias' is missing .*; no backbone of segkit has its structure"
    with pytest.raises(CheckpointError, match=sentence):
        load_state(normed, missing, source="theirs")


def test_upernet_on_convnext_whole() -> None:
    with torch.random.fork_rng():
        model = model_of(small_convnext(output_norms=True), "upernet", width=4, aux_width=4)
    backbone, head = parts(model)
    for project in ("authors", "mmsegmentation", "hugging face"):
        theirs = under("backbone.", convnext_names(project, backbone))
        theirs |= openmmlab_head(head, spelled=project == "hugging face")
        report = load_state(model, theirs, source="theirs")
        assert not report.initialized
        assert not report.skipped
        same(model, under("backbone.", backbone) | head)


# ---- segkit's own


def test_a_runs_checkpoint_starts_another_run(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = build_model("resnet18_half", "fcn", num_classes=3)
    path = tmp_path / "best.pt"
    checkpoint.save({"model": model.state_dict(), "classes": ["a", "b", "c"]}, path)
    again = build_model("resnet18_half", "fcn", num_classes=3, weights=str(path), seed=1)
    assert again.report is not None
    assert not again.report.initialized
    same(again, model.state_dict())
    other = build_model("resnet18_half", "fcn", num_classes=4, weights=str(path))
    assert other.report is not None
    assert set(other.report.initialized.values()) == {"3 classes in the file, 4 here"}
    assert again.report.notes == (
        "the file does not tell the settings of the model that it was trained with",
    )
    unet = build_model("resnet18_half", "unet", num_classes=3, weights=str(path))
    assert unet.report is not None
    assert first(unet.report.initialized).startswith("it differs: ")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"best\.pt: is damaged"):
        load_file(model, path)


def test_a_runs_checkpoint_tells_its_settings(tmp_path: Path) -> None:
    spec = {"name": "resnet18_half", "output_stride": 16}
    decoder = {"name": "deeplabv3plus", "width": 8, "rates": [2, 4, 6]}
    with torch.random.fork_rng():
        model = build_model(spec, decoder, num_classes=3)
    settings = {"model": {"backbone": spec, "decoder": decoder}}
    path = tmp_path / "best.pt"
    for config, notes in (
        (settings, ()),
        ({"unknown": 1}, ("the file does not tell the settings of the model that it was ",)),
        (
            {"model": {"backbone": 3}},
            ("the file does not tell the settings of the model that it was ",),
        ),
    ):
        checkpoint.save({"model": model.state_dict(), "config": config}, path)
        report = build_model(spec, decoder, num_classes=3, weights=str(path)).report
        assert report is not None
        assert [n[: len(m)] for n, m in zip(report.notes, notes, strict=True)] == list(notes)
    checkpoint.save({"model": model.state_dict(), "config": settings}, path)
    decoder |= {"rates": [12, 24, 36], "align_corners": False}
    other = build_model("resnet18_half", decoder, num_classes=3, weights=str(path))
    assert other.report is not None
    assert sorted(other.report.notes) == [
        "made with backbone.output_stride 16, this model has 32",
        "made with decoder.align_corners True, this model has False",
        "made with decoder.rates (2, 4, 6), this model has (12, 24, 36)",
    ]


RESNET = ("conv1.", "layer1.0.conv1.")
NAMES: list[tuple[str | None, str, tuple[str, ...]]] = [
    (None, "", ("conv_stem.", "blocks.0.0.conv_dw.", "blocks.1.0.conv_pwl.")),
    (None, "", ("_conv_stem.", "_blocks.0._depthwise_conv.")),
    (None, "", ("features.0.0.",)),
    (None, "", ("0.0.", "1.block.0.0.")),
    (None, "", ("transition1.", "stage4.0.branches.")),
    (None, "", ("transition1.", "stage4.0.branches.", "incre_modules.")),
    ("ocrnet", "", ("transition1.", "stage4.0.branches.", "conv3x3_ocr.", "ocr_distri_head.")),
    ("ocrnet", "backbone.", ("decode_head.0.convs.0.", "decode_head.1.object_context_block.")),
    ("upernet", "backbone.", ("decode_head.lateral_convs.0.batch_norm.",)),
    ("upernet", "backbone.", ("decode_head.lateral_convs.0.bn.",)),
    ("segformer", "backbone.", ("decode_head.fusion_conv.",)),
    ("pspnet", "backbone.", ("decode_head.psp_modules.0.",)),
    ("deeplabv3plus", "backbone.", ("decode_head.sep_bottleneck.0.",)),
    ("fcn", "backbone.", ("decode_head.convs.1.", "decode_head.conv_cat.")),
    (None, "backbone.", ("decode_head.",)),
    ("deeplabv3", "backbone.", ("classifier.0.convs.",)),
    ("fcn", "backbone.", ("classifier.0.", "classifier.4.")),
    ("unetplusplus", "encoder.", ("decoder.blocks.x_0_0.", "segmentation_head.")),
    ("deeplabv3plus", "encoder.", ("decoder.aspp.0.", "decoder.block2.", "segmentation_head.")),
    (None, "encoder.", ("decoder.", "segmentation_head.")),
]
"""A decoder, the prefix of the backbone's names, and beginnings of a project's names."""


@pytest.mark.parametrize(("decoder", "prefix", "names"), NAMES)
def test_every_setting_of_a_project_is_one_of_a_model(
    decoder: str | None, prefix: str, names: tuple[str, ...]
) -> None:
    """No note is lost by a misspelt or renamed attribute."""
    if prefix:
        names += tuple(prefix + name for name in RESNET)
    weights = recognize({f"{name}weight": torch.zeros(1) for name in names}, source="theirs")
    assert weights.decoder == decoder
    with torch.device("meta"):
        backbones = [
            BACKBONES[name]() for name in ("resnet18_half", "efficientnet_b0", "hrnet_w18")
        ]
        model = build_model("resnet18_half", decoder or "fcn", num_classes=2)
    paths = [*weights.settings, *weights.unrecorded]
    assert paths
    for path in paths:
        part, _, name = path.rpartition(".")
        owners = backbones if part == "backbone" else [model.get_submodule(part)]
        assert any(hasattr(owner, name) for owner in owners), path


# ---- transformers


def in_proj(state: State, prefix: str, parts: tuple[str, ...]) -> State:
    """Linear layers as nn.MultiheadAttention joins them, with the names of their parts removed."""
    joined: State = {}
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"(.*{prefix})\.({'|'.join(parts)})\.(weight|bias)", name)
        if match:
            groups.setdefault(f"{match[1]}.in_proj_{match[3]}", []).append(tensor)
        else:
            joined[name] = tensor
    return joined | {name: torch.cat(tensors) for name, tensors in groups.items()}


def openmmlab_segformer(model: Segmenter, state: State) -> State:
    """A SegFormer by mmsegmentation's names; ``state`` is that of the model."""
    named = renamed(
        in_proj(state, r"\.attn", ("q", "kv")),
        (r"^(backbone)\.levels\.(\d)\.embed\.", r"\1.layers.\2.0.projection."),
        (r"^(backbone)\.levels\.(\d)\.embed_norm\.", r"\1.layers.\2.0.norm."),
        (r"^(backbone)\.levels\.(\d)\.norm\.", r"\1.layers.\2.2.norm."),
        (r"^(backbone)\.levels\.(\d)\.blocks\.", r"\1.layers.\2.1."),
        (r"^decoder\.projections\.(\d)\.0\.", r"decode_head.convs.\1.conv."),
        (r"^decoder\.projections\.(\d)\.1\.", r"decode_head.convs.\1.bn."),
        (r"^decoder\.fuse\.0\.", "decode_head.fusion_conv.conv."),
        (r"^decoder\.fuse\.1\.", "decode_head.fusion_conv.bn."),
        (r"^decoder\.classifier\.", "decode_head.conv_seg."),
    )
    named = renamed(
        named,
        (r"\.2\.norm\.", ".2."),
        (r"\.attn\.(in_proj_|proj)", r".attn.attn.\1"),
        (r"\.attn\.reduce\.", ".attn.sr."),
        (r"\.attn\.reduce_norm\.", ".attn.norm."),
        (
            r"\.mlp\.(fc1|dwconv|fc2)\.",
            lambda m: f".ffn.layers.{ {'fc1': 0, 'dwconv': 1, 'fc2': 4}[m[1]] }.",
        ),
    )
    named = renamed(named, (r"\.attn\.attn\.proj\.", ".attn.attn.out_proj."))
    return {
        name: x[..., None, None]
        if re.search(r"ffn\.layers\.[0-9]\.weight", name) and x.ndim == 2
        else x
        for name, x in named.items()
    }


def test_mmsegmentations_segformer_whole() -> None:
    decoder = {"name": "segformer", "width": 16, "level_norms": True}
    model = build_model("mit_b0", decoder, num_classes=3)
    state = random_state(model)
    theirs = openmmlab_segformer(model, state)
    assert theirs["backbone.layers.1.1.0.ffn.layers.4.weight"].shape == (64, 256, 1, 1)
    assert theirs["backbone.layers.0.1.1.attn.attn.in_proj_bias"].shape == (96,)
    assert {"decode_head.convs.3.bn.running_var", "backbone.layers.3.2.bias"} < set(theirs)
    report = load_state(model, theirs, source="theirs")
    same(model, state)
    assert not report.initialized
    assert not report.skipped
    assert report.notes[0].startswith("mmsegmentation's norms of embeddings")
    features = [
        torch.randn(2, width, 16 >> i, 24 >> i) for i, width in enumerate((32, 64, 160, 256))
    ]
    norm = lambda x, name: F.batch_norm(  # noqa: E731
        x,
        *(
            theirs[f"decode_head.{name}.{key}"]
            for key in ("running_mean", "running_var", "weight", "bias")
        ),
    ).relu()
    levels = [
        norm(F.conv2d(x, theirs[f"decode_head.convs.{i}.conv.weight"]), f"convs.{i}.bn")
        for i, x in enumerate(features)
    ]
    joined = torch.cat([F.interpolate(x, (16, 24), mode="bilinear") for x in levels], 1)
    fused = norm(F.conv2d(joined, theirs["decode_head.fusion_conv.conv.weight"]), "fusion_conv.bn")
    weight, bias = (theirs[f"decode_head.conv_seg.{part}"] for part in ("weight", "bias"))
    expected = F.conv2d(fused, weight, bias)
    torch.testing.assert_close(
        model.eval().decoder(features)["out"], expected, rtol=1e-4, atol=1e-3
    )
    plain = build_model("mit_b0", {"name": "segformer", "width": 16}, num_classes=3)
    report = load_state(plain, theirs, source="theirs")
    same(plain.backbone, {name.removeprefix("backbone."): x for name, x in state.items()})
    assert "the file's decoder, segformer, differs" in first(report.initialized)


def test_attention_of_mmsegmentations_segformer_is_pytorchs() -> None:
    """nn.MultiheadAttention has query, key and value in this order in ``in_proj``."""
    state = {"layers.0.1.0.attn.attn.in_proj_weight": torch.arange(12.0).reshape(6, 2)}
    project = first_project(MIT, state)
    assert project is not None
    tensors = project.rename(state).tensors
    assert tensors["levels.0.blocks.0.attn.q.weight"].tolist() == [[0, 1], [2, 3]]
    assert tensors["levels.0.blocks.0.attn.kv.weight"].flatten().tolist() == [*range(4, 12)]


def meta_mask2former(state: State) -> State:
    """A Mask2Former by Meta's names, on a ResNet by detectron2's."""
    parts = ("q_proj", "k_proj", "v_proj")
    pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    kinds = {"cross_attn": "cross_attention", "self_attn": "self_attention", "mlp": "ffn"}
    norms = ("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")
    layer = lambda kind, rest: f"{predictor}.transformer_{kind}_layers.{rest}."  # noqa: E731
    mask_head = lambda m: f"{predictor}.mask_embed.layers.{int(m[1]) // 2}."  # noqa: E731
    linear = lambda m: f"{m[1]}.linear{int(m[2]) // 2 + 1}."  # noqa: E731
    rules: list = [
        (r"^decoder\.pixel_decoder\.projections", f"{pixels}.input_proj"),
        (r"^decoder\.pixel_decoder\.level_embed", f"{pixels}.transformer.level_embed"),
        (r"^decoder\.pixel_decoder\.embed", f"{pixels}.mask_features"),
        *(
            (rf"^decoder\.pixel_decoder\.{ours}\.{i}\.", f"{pixels}.{theirs}.{'norm.' * i}")
            for ours, theirs in (("lateral", "adapter_1"), ("smooth", "layer_1"))
            for i in (0, 1)
        ),
        (r"^decoder\.pixel_decoder\.layers", f"{pixels}.transformer.encoder.layers"),
        *(
            (rf"^decoder\.layers\.(\d)\.{ours}\.", layer(kind, rf"\1.{ours}"))
            for ours, kind in kinds.items()
        ),
        *(
            (rf"^decoder\.layers\.(\d)\.{norm}\.", layer(kind, r"\1.norm"))
            for norm, kind in zip(norms, kinds.values(), strict=True)
        ),
        (r"^decoder\.mask_head\.(\d)\.", mask_head),
        (r"^decoder\.norm\.", f"{predictor}.decoder_norm."),
        (r"^decoder\.query_features\.", f"{predictor}.query_feat."),
        (r"^decoder\.query_positions\.", f"{predictor}.query_embed."),
        (r"^decoder\.class_head\.", f"{predictor}.class_embed."),
        (r"^decoder\.level_embed\.", f"{predictor}.level_embed."),
        (r"^backbone\.(conv1)", r"backbone.stem.\1"),
        (r"^backbone\.(bn1)", r"backbone.stem.conv1.norm"),
        (r"^backbone\.layer(\d)", lambda m: f"backbone.res{int(m[1]) + 1}"),
    ]  # fmt: skip
    named = in_proj(in_proj(state, r"\.cross_attn", parts), r"layers\.\d\.self_attn", parts)
    named = renamed(named, *rules)
    named = renamed(
        named,
        (r"\.cross_attn\.", ".multihead_attn."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"\.final_layer_norm\.", ".norm2."),
        (r"^(sem.*ffn_layers\.\d)\.mlp\.(\d)\.", linear),
        (r"^(sem.*layers\.\d)\.mlp\.(\d)\.", linear),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
    )
    return named | {"criterion.empty_weight": torch.ones(4)}


MASK2FORMER = {
    "name": "mask2former", "width": 32, "queries": 5, "layers": 2, "heads": 4, "feedforward": 40,
    "pixel_layers": 2, "pixel_feedforward": 48,
}  # fmt: skip


def test_metas_mask2former_whole() -> None:
    model = build_model("resnet50", MASK2FORMER, num_classes=3)
    state = random_state(model)
    theirs = meta_mask2former(state)
    for name, shape in META_MASK2FORMER.items():
        assert theirs[name].shape == shape, name
    assert not [name for name in theirs if name.startswith("decoder.")]
    report = load_state(model, theirs, source="theirs")
    same(model, state)
    assert report.title == "Mask2Former of Meta, ResNet by detectron2's names"
    assert not report.initialized
    assert set(report.skipped) == {"criterion.empty_weight"}
    other = build_model("resnet50", MASK2FORMER, num_classes=7)
    report = load_state(other, theirs, source="theirs")
    assert set(report.initialized) == {"decoder.class_head.weight", "decoder.class_head.bias"}


def test_metas_pickles_are_converted_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    (program,) = re.findall(r"<!-- test: convert a pickle -->\n  ```python\n(.*?)  ```", page, re.S)
    model = build_model("resnet50", MASK2FORMER, num_classes=3)
    state = random_state(model)
    arrays = {name: value.numpy() for name, value in meta_mask2former(state).items()}
    monkeypatch.chdir(tmp_path)
    pickled = {"model": arrays, "__author__": "Meta", "matching_heuristics": True}
    Path("model_final.pkl").write_bytes(pickle.dumps(pickled))
    with pytest.raises(CheckpointError, match="holds objects whose code would have to run"):
        load_file(model, "model_final.pkl")
    exec(textwrap.dedent(program), {})
    report = load_file(model, "model_final.pth")
    same(model, state)
    assert not report.initialized


META_MASK2FORMER = {
    "backbone.stem.conv1.norm.running_mean": (64,),
    "backbone.res2.0.shortcut.norm.weight": (256,),
    "backbone.res5.2.conv3.norm.bias": (2048,),
    "sem_seg_head.pixel_decoder.input_proj.2.1.weight": (32,),
    "sem_seg_head.pixel_decoder.transformer.level_embed": (3, 32),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.sampling_offsets.bias": (
        96,
    ),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.output_proj.bias": (32,),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.norm2.bias": (32,),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.linear1.bias": (48,),
    "sem_seg_head.pixel_decoder.mask_features.weight": (32, 32, 1, 1),
    "sem_seg_head.pixel_decoder.adapter_1.weight": (32, 256, 1, 1),
    "sem_seg_head.pixel_decoder.layer_1.norm.weight": (32,),
    "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight": (96, 32),
    "sem_seg_head.predictor.transformer_cross_attention_layers.1.multihead_attn.in_proj_bias": (
        96,
    ),
    "sem_seg_head.predictor.transformer_cross_attention_layers.1.multihead_attn.out_proj.bias": (
        32,
    ),
    "sem_seg_head.predictor.transformer_cross_attention_layers.1.norm.weight": (32,),
    "sem_seg_head.predictor.transformer_ffn_layers.1.linear2.weight": (32, 40),
    "sem_seg_head.predictor.transformer_ffn_layers.1.norm.weight": (32,),
    "sem_seg_head.predictor.query_feat.weight": (5, 32),
    "sem_seg_head.predictor.query_embed.weight": (5, 32),
    "sem_seg_head.predictor.level_embed.weight": (3, 32),
    "sem_seg_head.predictor.class_embed.weight": (4, 32),
    "sem_seg_head.predictor.mask_embed.layers.2.weight": (32, 32),
    "sem_seg_head.predictor.decoder_norm.weight": (32,),
}
"""Some of the names in Meta's files, of the modules in its public code."""


# ---- the command


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def test_the_command_tells_what_a_file_is(
    tmp_path: Path, resnet18: State, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pth"
    torch.save(resnet18, path)
    shown = run(str(path), capsys=capsys)
    assert shown.splitlines() == [
        f"{path}: ResNet",
        "  backbone  resnet18",
        "  decoder   the file has no decoder",
        "  classes   1000",
        "  entries   122, 11,699,132 values",
    ]
    shown = run(str(path), "--backbone", "resnet18", "--decoder", "unet", capsys=capsys)
    assert "would load 120 entries of this model" in shown
    assert "newly initialized, the file has no decoder: decoder.blocks.0.0.0.weight, " in shown
    assert "skipped, not of a backbone: fc.weight, fc.bias" in shown
    about = json.loads(
        run(str(path), "--backbone", '{"name": "resnet18"}', "--json", capsys=capsys)
    )
    assert about["backbones"] == ["resnet18"]
    assert len(about["report"]["loaded"]) == 120
    with pytest.raises(CheckpointError, match="choose the backbone it fits: resnet18"):
        main([str(path), "--backbone", "resnet34"])
    with pytest.raises(SystemExit) as caught:
        main([str(path), "--backbone", "{"])
    assert caught.value.code == 2


def test_the_command_tells_the_window_of_a_swin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.random.fork_rng():
        state = BACKBONES["swin_t"](window=12).state_dict()
    torch.save({"model": swin_names("microsoft", state)}, tmp_path / "swin.pth")
    assert "  backbone  swin_t (window 12)\n" in run(str(tmp_path / "swin.pth"), capsys=capsys)


def test_the_command_tells_that_a_convnext_has_output_norms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.random.fork_rng():
        state = BACKBONES["convnext_tiny"](output_norms=True).state_dict()
    torch.save({"model": convnext_names("authors", state)}, tmp_path / "convnext.pth")
    shown = run(str(tmp_path / "convnext.pth"), capsys=capsys)
    assert "  backbone  convnext_tiny (output_norms true)\n" in shown
    partly = without(convnext_names("authors", state), "norm1.bias")
    torch.save({"model": partly}, tmp_path / "convnext.pth")
    shown = run(str(tmp_path / "convnext.pth"), capsys=capsys)
    assert "  backbone  none of segkit has its structure\n" in shown


def test_reports_are_plain() -> None:
    report = Report("x", "t", ("a",), {"b": "why", "c": "why"}, {}, ("one", "two"))
    assert report.summary() == "x: t; 1 entries loaded, 2 skipped (why: 2); note: one; note: two"
