"""Damaged and malicious files of weights are read, or refused in one sentence."""

import json
import math
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import load_state as load_foreign
from torch import Tensor, nn

from segkit import train
from segkit.core import checkpoint, untrusted
from segkit.core.config import Config, override, to_dict
from segkit.core.errors import CheckpointError, SegkitError
from segkit.core.run import Run
from segkit.inference import soup
from segkit.inference.candidates import best_first
from segkit.models.pretrained.reading import read_file
from segkit.models.segmenter import Segmenter, build_model, load_model
from segkit.training.optim import EMA, build_optimizer
from segkit.training.state import TrainState

State = dict[str, Any]
BACKBONE, DECODER = "resnet18_half", {"name": "fcn", "width": 8, "aux": False}


def model(num_classes: int = 3, **options: Any) -> Segmenter:
    return build_model(BACKBONE, {**DECODER, **options}, num_classes=num_classes)


@pytest.fixture(scope="module")
def sound() -> State:
    """The entries of a run's best checkpoint."""
    config = override(
        Config(), [f"model.backbone={BACKBONE}", f"model.decoder={json.dumps(DECODER)}"]
    )
    return {
        "model": model().state_dict(),
        "config": to_dict(config),
        "classes": ["a", "b", "c"],
        "trained_on": ["0", "1"],
        "init": "0",
        "score": 0.5,
        "iou": [0.5, None, 0.5],
        "step": 3,
    }


def saved(state: State, folder: Path) -> Path:
    """A file of ``state`` with a digest that fits it."""
    path = folder / "a.pt"
    checkpoint.save(state, path)
    return path


def refused(read: Callable[[Path], Any], path: Path, words: str = ".") -> str:
    with pytest.raises(SegkitError, match=words) as caught:
        read(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    assert len(sentence) < 1000
    return sentence


def holds_itself() -> Any:
    state: State = {}
    state["model"] = state["state_dict"] = state
    return state


def deep() -> Any:
    state: Any = {}
    for _ in range(untrusted.DEPTH + 1):
        state = {"model": state}
    return state


def shared() -> Any:
    """A few hundred bytes that whoever walks over them takes for a billion values."""
    value: Any = [0] * 10
    for _ in range(30):
        value = [value] * 10
    return {"model": value}


# ---- what does not end


@pytest.mark.parametrize("make", [holds_itself, deep, shared])
@pytest.mark.parametrize("read", [read_file, checkpoint.load, load_model])
def test_lists_and_dicts_without_end(
    make: Callable[[], Any],
    read: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(untrusted, "VALUES", 100_000)
    words = "it is not a checkpoint"
    refused(read, saved({"model": {}, "config": make(), "classes": []}, tmp_path), words)
    if read is read_file:
        torch.save(make(), tmp_path / "foreign.pth")
        refused(read, tmp_path / "foreign.pth", words)


def safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], first: int, last: int) -> State:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_a_safetensors_header_of_a_million_names_is_not_read(tmp_path: Path) -> None:
    names = b"{" + b",".join(
        b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number
        for number in range(160_000)
    )
    path = safetensors(tmp_path / "a.safetensors", names + b"}")
    refused(read_file, path, "has a header of .* bytes; expected at most 8,388,608")


@pytest.mark.parametrize(
    "shape", [[2**62, 2**62, 0], [0, 2**63], [0, 10**100], [0] * 65, [1] * 100_000]
)
def test_safetensors_shapes_that_no_tensor_has(shape: list[int], tmp_path: Path) -> None:
    size = math.prod(shape)
    path = safetensors(tmp_path / "a.safetensors", {"a": entry("U8", shape, 0, size)}, b"x" * size)
    refused(read_file, path, "'a' has")


@pytest.mark.parametrize("verify", [True, False])
def test_compressed_archives_are_refused_and_not_mapped_as_they_are(
    verify: bool, tmp_path: Path
) -> None:
    state = {"format": checkpoint.FORMAT, "model": {"a": torch.ones(4)}}
    torch.save(state, tmp_path / "a.pth")
    path = tmp_path / "b.pth"
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    if verify:
        refused(read_file, path, "is compressed")
    else:
        refused(lambda path: checkpoint.load(path, verify=False), path, "is compressed")


# ---- tensors that are not plain values


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


ODD: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "meta": ("has no values", lambda: torch.ones(2, device="meta")),
    "coo": ("is a sparse tensor", lambda: torch.eye(2).to_sparse()),
    "csr": ("is a sparse tensor", lambda: torch.eye(2).to_sparse_csr()),
    "nested": ("nested|NestedTensor", lambda: torch.nested.nested_tensor([torch.ones(2)])),
    "quantized": ("is a quantized tensor", quantized),
    "complex": ("is a complex tensor", lambda: torch.ones(2, dtype=torch.complex64)),
    "expanded": ("is larger than its data in the file", lambda: torch.ones(1).expand(2**40)),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of prototypes
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_plain_values(kind: str, tmp_path: Path) -> None:
    words, make = ODD[kind]
    state = {**model().state_dict(), "backbone.conv1.weight": make()}
    torch.save(state, tmp_path / "foreign.pth")
    for read, path in (
        (read_file, tmp_path / "foreign.pth"),
        (checkpoint.load, saved({"model": state}, tmp_path)),
    ):
        sentence = refused(read, path)
        assert re.search(f"cannot be read|is not a file|{words}", sentence)
    with pytest.raises(CheckpointError, match=f"here: 'backbone.conv1.weight' .*({words})"):
        load_foreign(model(), state, source="here")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value: float, sound: State, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in sound["model"].items()}
    state["backbone.layer1.0.conv1.weight"][1, 2, 0, 0] = value
    with pytest.raises(
        CheckpointError, match=r"x\.pth: 'backbone.layer1.0.conv1.weight' holds NaN or infinity"
    ):
        load_foreign(model(), state, source="x.pth")
    words = "'backbone.layer1.0.conv1.weight' holds NaN or infinity"
    refused(load_model, saved({**sound, "model": state}, tmp_path), words)


def test_integers_are_no_weights(sound: State) -> None:
    state = {**sound["model"], "backbone.conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"'backbone.conv1.weight' has type torch.int8"):
        load_foreign(model(), state, source="x.pth")


# ---- checkpoints with a right digest


@pytest.mark.parametrize("name", checkpoint.MODEL)
@pytest.mark.parametrize("read", [load_model, checkpoint.entries, lambda path: best_first([path])])
def test_entries_that_a_model_needs(
    read: Callable[[Path], Any], name: str, sound: State, tmp_path: Path
) -> None:
    assert read(saved(sound, tmp_path))
    del (state := {**sound})[name]
    refused(read, saved(state, tmp_path), f"has no '{name}'")
    for value in (None, 3, "x", [None], {3: 3}, {"x": {"y": torch.ones(2)}}):
        refused(read, saved({**sound, name: value}, tmp_path), f"its '{name}' is not a")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("classes", ["a", "b", 3]), ("trained_on", "abc"), ("iou", [0.5, 0.5]), ("score", "1")),
        *(("iou", "abc"), ("soup", [3]), ("step", -1), ("init", 3), ("pseudo_round", "x")),
        *(("ema", {"model": {}}), ("ema", {"updates": 3, "model": None}), ("top", [3])),
    ],
)
def test_entries_of_another_kind(name: str, value: Any, sound: State, tmp_path: Path) -> None:
    refused(checkpoint.load, saved({**sound, name: value}, tmp_path), f"its '{name}' is not")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["a", "b"], "iou": []}, "has shape .* of another number of classes"),
        ({"classes": [], "iou": []}, r"model\.decoder: a size is 0, so its '.*' is empty"),
        ({"model": {}}, "lack 'backbone.conv1.weight'"),
        ({"model": {**model().state_dict(), "more": torch.ones(1)}}, "have 'more'"),
        ({"model": model(width=16).state_dict()}, "has shape .* of another model"),
        ({"model": {k: v.int() for k, v in model().state_dict().items()}}, "has type torch.int32"),
    ],
)
def test_weights_of_another_model(change: State, words: str, sound: State, tmp_path: Path) -> None:
    refused(load_model, saved({**sound, **change}, tmp_path), words)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("decoder", "unheard_of"),
        ("decoder", {"name": "fcn", "width": 2**24}),  # no such memory is asked for
        ("decoder", {"name": "fcn", "width": 10**30}),
        ("decoder", {"name": "fcn", "width": -8}),
        ("decoder", {"name": "fcn", "wide": True}),
        ("decoder", {"name": ["fcn"]}),
        ("decoder", ["fcn"]),
        ("backbone", {"name": "swin_t", "depths": [10**9, 1, 1, 1]}),
        ("backbone", "resnet34"),
        ("weights", 3),
    ],
)
def test_configurations_that_are_not_the_models(
    part: str, value: Any, sound: State, tmp_path: Path
) -> None:
    config = json.loads(json.dumps(sound["config"]))
    config["model"][part] = value
    refused(load_model, saved({**sound, "config": config}, tmp_path))


def test_soups_of_what_is_no_model(sound: State, tmp_path: Path) -> None:
    for name in ("classes", "model"):
        del (state := {**sound})[name]
        refused(lambda path: soup.uniform([path]), saved(state, tmp_path), f"has no '{name}'")


# ---- resuming


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, a demo set and a run of two epochs."""
    folder = tmp_path_factory.mktemp("untrusted")
    demo = {"name": "demo", "root": str(folder / "demo"), "train": 12, "test": 1, "size": 32}
    config = {
        "data": {"train": demo, "folds": 2, "workers": 0, "cache": str(folder / "cache")},
        "model": {"weights": None, "backbone": BACKBONE, "decoder": DECODER},
        "train": {"epochs": 1, "batch_size": 4, "ema": 0.9},
    }
    (folder / "tiny.json").write_text(json.dumps(config))
    train.main(
        [*("--cfg", str(folder / "tiny.json"), "--folds", "0"), "--run-dir", str(folder / "run")]
    )
    return folder


Change = Callable[[State], object]
CHANGES: dict[str, tuple[str, Change]] = {
    "optimizer": ("has no 'optimizer'", lambda state: state.pop("optimizer")),
    "step": ("has no 'step'", lambda state: state.pop("step")),
    "top": ("its 'top' is not", lambda state: state.update(top=[["a", "b"]])),
    "model": ("lack 'backbone.", lambda state: state.update(model={})),
    "classes": (
        "another number of classes",
        lambda state: state.update(model=model(num_classes=2).state_dict()),
    ),
    "infinite": (
        "holds NaN or infinity",
        lambda state: state["model"]["backbone.conv1.weight"].fill_(math.inf),
    ),
    "average": (
        "holds NaN or infinity",
        lambda state: state["ema"]["model"]["backbone.conv1.weight"].fill_(math.nan),
    ),
    "no average": (
        "has no average, which train.ema asks for",
        lambda state: state.update(ema=None),
    ),
    "no groups": ("cannot be read", lambda state: state["optimizer"].pop("param_groups")),
    "fewer groups": ("cannot be read", lambda state: state["optimizer"]["param_groups"].pop()),
    "no group": ("cannot be read", lambda state: state["optimizer"].update(param_groups=[3])),
    "number": ("cannot be read", lambda state: state.update(optimizer=3)),
    "decay": (
        "other settings",
        lambda state: state["optimizer"]["param_groups"][0].update(weight_decay="x"),
    ),
    "rate": (
        "other settings",
        lambda state: state["optimizer"]["param_groups"][0].update(lr=None),
    ),
    "shape": (
        "of another model",
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_from_what_does_not_fit(name: str, run: Path, tmp_path: Path) -> None:
    words, change = CHANGES[name]
    folder = tmp_path / "run"
    shutil.copytree(run / "run", folder)
    path = folder / "fold0" / "last.pt"
    checkpoint.previous(path).unlink(missing_ok=True)
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(state, path)
    with pytest.raises(CheckpointError, match=rf"last\.pt: .*{words}") as caught:
        train.main(
            [
                *("--cfg", str(run / "tiny.json"), "--folds", "0"),
                *("--run-dir", str(folder), "--resume"),
            ]
        )
    assert "\n" not in str(caught.value)


def test_an_older_state_is_used_where_the_newest_lacks_entries(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    path = tmp_path / "run" / "fold0" / "last.pt"
    shutil.copy(path, checkpoint.previous(path))
    del (state := checkpoint.load(path))["step"]
    checkpoint.save(state, path)
    with pytest.warns(UserWarning, match=r"has no 'step'.*going on from last\.previous\.pt"):
        assert Run(tmp_path / "run").load_last_state(0) is not None


# ---- anything at all

SEEDS = pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]
)


def values(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(None, True, 0, -1, 2**80, 1.5, math.nan, "", "x", "resnet50", b"x", 1j),
            *([], {}, (), [1], {"name": "x"}, {3: 4}, {"a": None}, set(), torch.float16),
            *(torch.ones(2), torch.ones(()), torch.ones(0), torch.ones(2, device="meta")),
            *(torch.eye(2).to_sparse(), nn.Parameter(torch.ones(2)), torch.Size([2])),
        ]
    )


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of ``value`` with one entry removed, replaced or renamed, at any depth."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return values(rng)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    key = rng.choice(list(value))
    rest = {name: inner for name, inner in value.items() if name != key}
    action = rng.random()
    if action < 0.15:
        return rest
    if action < 0.3:
        return {**rest, rng.choice(["", "x", 3, "model", "state_dict", "\n"]): value[key]}
    return {**value, key: mutated(value[key], rng)}


@pytest.mark.filterwarnings("ignore")  # PyTorch's
@SEEDS
def test_any_structure_is_read_or_refused(seed: int, sound: State, tmp_path: Path) -> None:
    rng = random.Random(seed)
    foreign = model()
    read = refusals = 0
    for _ in range(10):
        state = mutated(sound, rng)
        path = tmp_path / "a.pt"
        checkpoint.save(state if isinstance(state, dict) else {"model": state}, path)
        torch.save(state.get("model") if isinstance(state, dict) else state, tmp_path / "b.pth")
        for call in (
            lambda path=path: load_model(path),
            lambda path=path: soup.as_checkpoint(soup.uniform([path])),
            lambda: load_foreign(foreign, read_file(tmp_path / "b.pth"), source="b.pth"),
        ):
            try:
                call()
                read += 1
            except SegkitError:
                refusals += 1
    assert read > 0
    assert refusals > 0


@pytest.mark.filterwarnings("ignore")
@SEEDS
def test_any_state_is_resumed_or_refused(seed: int, run: Path) -> None:
    rng = random.Random(seed)
    learner = model(num_classes=11)
    path = run / "run" / "fold0" / "last.pt"
    whole = checkpoint.load(path, needs=checkpoint.RESUME)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    whole["scaler"] = scaler.state_dict()
    settings = json.loads((run / "run" / "config.json").read_text())["optim"]
    changed = run / "changed.pt"
    refusals = 0
    for number in range(8):
        optimizer = build_optimizer(learner, settings["optimizer"], lr=settings["lr"])
        state = whole if number == 0 else {**whole, "optimizer": mutated(whole["optimizer"], rng)}
        if number % 3 == 2:
            state = {**whole, "scaler": mutated(whole["scaler"], rng)}
        checkpoint.save(state, changed)
        try:
            state = checkpoint.load(changed, needs=checkpoint.RESUME)
            training = TrainState(learner, optimizer, scaler, EMA(learner))
            training.load_state_dict(state, changed)
            for parameter in learner.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        except SegkitError:
            refusals += 1
            assert number > 0
    assert 0 < refusals < 8


def test_any_bytes_of_safetensors_are_read_or_refused(tmp_path: Path) -> None:
    header = {"a": entry("F32", [2], 0, 8), "b": entry("I8", [1, 3], 8, 11)}
    path = safetensors(tmp_path / "a.safetensors", header, bytes(range(11)))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    read = refusals = 0
    for _ in range(400):
        changed = whole.copy()
        at = rng.integers(0, len(whole), rng.integers(1, 4))
        changed[at] = rng.choice([rng.integers(0, 256), *b'0123456789[]{}",:'], len(at))
        path.write_bytes(changed[: rng.integers(1, 2 * len(whole))].tobytes())
        try:
            read_file(path)
            read += 1
        except CheckpointError:
            refusals += 1
    assert read > 0
    assert refusals > 0
