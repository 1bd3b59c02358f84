"""Soups: arithmetic by hand, equal bits from equal models, leaks of the selection set."""

import json
import math
import struct
import warnings
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from segkit.core import checkpoint, distributed
from segkit.core.errors import CheckpointError
from segkit.inference import mixture, soup

State = dict[str, Tensor]


def _save(path: Path, state: State, **entries: object) -> Path:
    known = {"classes": ["ground", "litter"], "config": {"note": path.stem}, "init": "start"}
    checkpoint.save({"model": state, **known, "trained_on": [path.stem], **entries}, path)
    return path


def _points(folder: Path, *points: float) -> list[Path]:
    """Return checkpoints of models with a single weight."""
    return [
        _save(folder / f"{index}.pt", {"weight": torch.tensor([float(point)])})
        for index, point in enumerate(points)
    ]


def _near(target: float) -> soup.Score:
    """Return a score that is higher the nearer the weight is to the target."""
    return lambda state: -abs(float(state["weight"]) - target)


def _awkward(seed: int) -> State:
    """Values that averaging in a careless way would change."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(33, 7, generator=generator) * 1e3,
        "tiny": torch.tensor([1e-45, 1e-38, -0.0, 0.0, 1 / 3, 16777217.0]),
        "half": torch.randn(999, generator=generator).half(),
        "bf16": torch.randn(999, generator=generator).bfloat16(),
        "double": torch.randn(9, generator=generator).double(),
        "scalar": torch.tensor(0.1),
        "last": torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last),
        "relative_position_index": torch.arange(169),
        "num_batches_tracked": torch.tensor(2**53 + 1),
        "flag": torch.tensor([True, False]),
    }


def _bits(state: State) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        key: (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for key, tensor in state.items()
    }


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("kind", ["uniform", "greedy", "learned"])
def test_identical_models_give_the_same_bits(tmp_path: Path, kind: str, count: int) -> None:
    paths = [_save(tmp_path / f"{index}.pt", _awkward(0)) for index in range(count)]
    if kind == "uniform":
        made = soup.uniform(paths)
    else:
        made = getattr(soup, kind)(paths, lambda state: 0.5)
    assert _bits(made.weights) == _bits(_awkward(0))
    assert len(made.members) == (1 if kind == "learned" else count)


def test_uniform_is_the_mean_and_leaves_the_files_alone(tmp_path: Path) -> None:
    paths = [_save(tmp_path / f"{seed}.pt", _awkward(seed)) for seed in range(5)]
    before = [path.read_bytes() for path in paths]
    made = soup.uniform(paths)
    for key in ("weight", "half", "bf16", "double", "last"):
        values = torch.stack([_awkward(seed)[key].double() for seed in range(5)])
        mean = values.mean(0)
        rounding = 4 * torch.finfo(made.weights[key].dtype).eps * mean.abs().max()
        assert (made.weights[key].double() - mean).abs().max() < rounding
        if key in ("half", "bf16"):  # averaged in float32 and rounded once
            assert (made.weights[key] == mean.to(made.weights[key].dtype)).float().mean() > 0.99
    assert [path.read_bytes() for path in paths] == before


def test_integers_are_the_first_ones_and_not_averaged(tmp_path: Path) -> None:
    states = [{"weight": torch.tensor([1.0]), "count": torch.tensor([n, 7])} for n in (3, 4, 9)]
    paths = [_save(tmp_path / f"{n}.pt", state) for n, state in enumerate(states)]
    assert soup.uniform(paths).weights["count"].tolist() == [3, 7]
    best_is_last = soup.greedy(paths, lambda state: 0, scores=[0.0, 0.1, 0.2])
    assert best_is_last.weights["count"].tolist() == [9, 7]


def test_greedy_by_hand(tmp_path: Path) -> None:
    # Alone: 4 -> -1, 7 -> -2, 1 -> -4, 20 -> -15, against a target of 5.
    paths = _points(tmp_path, 20, 1, 7, 4)
    made = soup.greedy(paths, _near(5))
    # 4; (4+7)/2 = 5.5 is kept; (4+7+1)/3 = 4 is refused; (4+7+20)/3 is refused.
    assert made.weights["weight"].item() == 5.5
    assert made.members == [str(paths[2]), str(paths[3])]
    steps = [
        (Path(entry["file"]).stem, entry["score"], entry["kept"]) for entry in made.recipe["steps"]
    ]
    assert steps[0] == ("2", -0.5, True)
    assert steps[1] == ("1", -1.0, False)
    assert steps[2][0] == "0"
    assert not steps[2][2]
    assert made.recipe["refused"] == [str(paths[0]), str(paths[1])]
    assert made.recipe["score"] == -0.5
    assert [entry["weight"] for entry in made.recipe["ingredients"]] == [0, 0, 0.5, 0.5]
    assert [entry["score"] for entry in made.recipe["ingredients"]] == [-15, -4, -2, -1]
    assert made.recipe["ingredients"][0]["sha256"] == checkpoint.digest(paths[0])


def test_greedy_members_weigh_the_same_in_any_order(tmp_path: Path) -> None:
    values = [1.0, 2.0, 4.0, 10.0]
    paths = _points(tmp_path, *values)
    for scores in ([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [3.0, 1.0, 4.0, 2.0]):
        made = soup.greedy(paths, lambda state: 9.0, scores=scores)
        assert made.weights["weight"].item() == pytest.approx(
            4.25, abs=1e-6
        )  # not 10/2 + 4/4 + ...
        assert [entry["weight"] for entry in made.recipe["ingredients"]] == [0.25] * 4


def test_greedy_adds_what_is_not_worse_and_starts_with_the_best(tmp_path: Path) -> None:
    paths = _points(tmp_path, 0, 8)
    assert soup.greedy(paths, lambda state: 1.0, scores=[0.0, 1.0]).weights["weight"].item() == 4
    assert soup.greedy(paths, lambda state: 0.99, scores=[0.0, 1.0]).weights["weight"].item() == 8


def test_a_diverged_ingredient_is_last_and_refused(tmp_path: Path) -> None:
    paths = _points(tmp_path, math.nan, 4, 6)
    made = soup.greedy(paths, _near(5))
    assert made.weights["weight"].item() == 5
    assert made.recipe["refused"] == [str(paths[0])]


def test_learned_weights_find_what_equal_weights_cannot(tmp_path: Path) -> None:
    paths = _points(tmp_path, 0, 10, 50)
    target = 2.4
    greedy = soup.greedy(paths, _near(target))
    learned = soup.learned(paths, _near(target), shares=(0.5, 0.25, 0.1), rounds=8)
    assert greedy.recipe["score"] == pytest.approx(-2.4)
    assert learned.recipe["score"] > -0.2
    weights = [entry["weight"] for entry in learned.recipe["ingredients"]]
    assert sum(weights) == pytest.approx(1)
    mixed = sum(w * v for w, v in zip(weights, (0, 10, 50), strict=True))
    assert learned.weights["weight"].item() == pytest.approx(mixed, rel=1e-5)


def test_learned_stops_when_a_round_changes_nothing(tmp_path: Path) -> None:
    paths = _points(tmp_path, 5, 0)
    made = soup.learned(paths, _near(5), rounds=50)
    assert made.members == [str(paths[0])]
    assert len(made.recipe["steps"]) == 3


def _vectors(*values: list[float]) -> list[State]:
    return [{"weight": torch.tensor(value, dtype=torch.float64)} for value in values]


def test_stock_of_two_by_hand() -> None:
    """Differences of length 2 and 4 with an angle of 60 degrees: 2/3 of the way to their mean."""
    root = math.sqrt(3)
    anchor, *states = _vectors([10, -20], [12, -20], [12, 2 * root - 20])
    made = soup.stock(states, anchor)
    expected = [10 + 2 / 3 * 2, -20 + 2 / 3 * root]
    assert made.weights["weight"].tolist() == pytest.approx(expected)
    assert made.recipe["ratio"] == pytest.approx(2 / 3)
    assert made.recipe["anchor"] == checkpoint.digest_tensors(anchor)
    assert [entry["weight"] for entry in made.recipe["ingredients"]] == [0.5, 0.5]


def test_stock_of_three_by_hand() -> None:
    """Three differences with 60 degrees between any two: 3 * 0.5 / (1 + 2 * 0.5) = 3/4."""
    anchor, *states = _vectors([0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1])
    made = soup.stock(states, anchor)
    assert made.weights["weight"].tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_stock_has_a_ratio_for_each_tensor() -> None:
    anchor = {name: torch.ones(2) for name in ("same", "apart", "opposite", "frozen", "half")}
    moves = {"same": (1, 1), "apart": (1, 0), "opposite": (1, -1), "frozen": (0, 0), "half": (0, 2)}
    states: list[State] = [{}, {}]
    for name, (first, second) in moves.items():
        states[0][name] = 1 + torch.tensor([float(first), 0.0])
        states[1][name] = 1 + torch.tensor([float(second), float(name == "apart")])
    made = soup.stock([{**state, "count": torch.tensor([7])} for state in states],
                      {**anchor, "count": torch.tensor([0])})  # fmt: skip
    values = {name: value.tolist() for name, value in made.weights.items()}
    assert values == {
        "same": [2, 1],
        "apart": [1, 1],  # 90 degrees: the anchor
        "opposite": [1, 1],
        "frozen": [1, 1],
        "half": [2, 1],  # a single difference has no angle: the mean
        "count": [7],
    }


def test_stock_of_equal_models_gives_the_same_bits() -> None:
    assert _bits(soup.stock([_awkward(0)] * 3, _awkward(0)).weights) == _bits(_awkward(0))


def test_stock_reads_the_anchor_from_a_file_and_needs_two(tmp_path: Path) -> None:
    paths = _points(tmp_path, 2, 4, 0)
    assert soup.stock(paths[:2], paths[2]).weights["weight"].item() == 3
    with pytest.raises(CheckpointError, match="at least two checkpoints"):
        soup.stock(paths[:1], paths[2])
    with pytest.raises(CheckpointError, match="anchor: is another architecture"):
        soup.stock(paths[:2], {"weight": torch.zeros(3)})


def test_pruned_by_hand(tmp_path: Path) -> None:
    # All: 8 -> -3. Without 20: 4 -> -1; without 1, too: 5.5 -> -0.5; 4 and 7 alone are worse.
    paths = _points(tmp_path, 20, 1, 7, 4)
    made = soup.pruned(paths, _near(5))
    assert made.weights["weight"].item() == 5.5
    assert made.members == [str(paths[2]), str(paths[3])]
    assert made.recipe["score"] == -0.5
    steps = [
        (Path(entry["file"]).stem, entry["score"], entry["kept"]) for entry in made.recipe["steps"]
    ]
    assert steps[:2] == [("0", -1, True), ("1", -0.5, True)]
    assert steps[2:] == [("2", -1, False), ("3", -2, False)] * 2


def test_pruned_removes_a_diverged_ingredient_without_trace(tmp_path: Path) -> None:
    paths = _points(tmp_path, 4, math.nan, 6)
    made = soup.pruned(paths, _near(5))
    assert made.weights["weight"].item() == 5
    assert made.recipe["refused"] == [str(paths[1])]


def test_pruned_keeps_one_at_least_and_all_that_do_not_hurt(tmp_path: Path) -> None:
    paths = _points(tmp_path, 1, 2, 3)
    assert len(soup.pruned(paths, lambda state: 0.5).members) == 3
    assert soup.pruned(paths, lambda state: float(state["weight"])).members == [str(paths[2])]


def _images_counts(right: list[float]) -> Tensor:
    """Counts of images of 200 pixels, half of them of each class, with this many correct ones."""
    correct = torch.tensor(right).round().long()
    half = torch.full_like(correct, 100)
    return torch.stack([torch.stack([correct, half, half], 1)] * 2, 1)


_NOISE = [(-9.0, 8.0, 2.0)[i % 3] for i in range(30)]
"""The effect of a useless part on each image: it cancels out, except for 1/3 of a pixel."""


def _planted(state: State) -> Tensor:
    """Counts for which a decoder near 1 and a stage near 0 are right; the neck has no effect."""
    stage, neck, decoder = (float(state[f"{part}.weight"]) for part in ("stage", "neck", "decoder"))
    return _images_counts([20 + 40 * decoder + 30 * (1 - stage) + neck * x for x in _NOISE])


_PARTS = {"stage": ["stage"], "neck": ["neck"], "decoder": ["decoder"]}


def _constant(value: float, parts: Iterable[str] = _PARTS) -> State:
    return {f"{part}.weight": torch.tensor([float(value)]) for part in parts}


def test_partwise_mends_one_part_and_leaves_a_useless_one() -> None:
    made = soup.partwise([_constant(0), _constant(1)], _planted, parts=_PARTS)
    assert {key: value.item() for key, value in made.weights.items()} == {
        "stage.weight": 0.5,  # half of the ingredient whose stage is better
        "neck.weight": 1,
        "decoder.weight": 1,
    }
    assert made.recipe["parts"] == {"stage": [0.5, 0.5], "neck": [0, 1], "decoder": [0, 1]}
    assert [entry["weight"] for entry in made.recipe["ingredients"]] == [0.5 / 3, 2.5 / 3]
    trials = {
        (entry["part"], entry["file"]): entry
        for entry in made.recipe["steps"]
        if "part" in entry
    }  # fmt: skip
    assert len(trials) == 6
    assert [key for key, entry in trials.items() if entry["kept"]] == [("stage", "ingredients[0]")]


def test_partwise_keeps_no_gain_within_noise() -> None:
    better = {**_constant(1), "neck.weight": torch.tensor([3.0])}
    made = soup.partwise([_constant(1), better], _planted, parts=_PARTS, scores=[1.0, 0.0])
    (trial,) = [
        entry
        for entry in made.recipe["steps"]
        if entry.get("part") == "neck" and entry["file"] == "ingredients[1]"
    ]
    alone = float(_miou(_planted(_constant(1))))
    assert trial["score"] > alone  # better, but on few images
    assert not trial["kept"]
    assert made.weights["neck.weight"].item() == 1


def _miou(counts: Tensor) -> Tensor:
    right, true, predicted = counts.sum(0).double().unbind(-1)
    return (right / (true + predicted - right)).mean()


def test_partwise_begins_as_the_greedy_soup_and_ignores_a_diverged_one() -> None:
    states = [_constant(1), {**_constant(1), "stage.weight": torch.tensor([-1.0])}]
    diverged = _constant(math.nan)

    def counts(state: State) -> Tensor:
        known = all(value.isfinite() for value in state.values())
        return _planted(state) if known else _images_counts([0] * len(_NOISE))

    made = soup.partwise([*states, diverged], counts, parts={"decoder": ["decoder"]})
    assert made.weights["stage.weight"].item() == -1
    assert all(value.isfinite() for value in made.weights.values())
    assert made.recipe["ingredients"][2]["weight"] == 0


def test_a_part_is_a_module_and_not_the_start_of_a_name() -> None:
    parts = ("stage", "stage1", "neck", "decoder")
    states = [_constant(0, parts), _constant(1, parts)]
    made = soup.partwise(states, _planted, parts={"stage": ["stage"]})
    assert made.weights["stage.weight"].item() == 0.5
    assert made.weights["stage1.weight"].item() == 1
    parameter = soup.partwise(states, _planted, parts={"stage": ["stage.weight"]})
    assert parameter.weights["stage.weight"].item() == 0.5


def test_barrier_by_hand() -> None:
    ends = [{"weight": torch.tensor([value])} for value in (-1.0, 1.0)]
    with pytest.warns(UserWarning, match=r"ingredients\[0\] and ingredients\[1\] are not linearly"):
        (pair,) = soup.check_barriers(
            ends, lambda state: abs(float(state["weight"])), scores=[1.0, 1.0]
        )
    assert pair == {"files": ["ingredients[0]", "ingredients[1]"], "barrier": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (pair,) = soup.check_barriers(
            ends, lambda state: 1 - abs(float(state["weight"])), scores=[0.0, 0.0]
        )
    assert pair["barrier"] == -1


def test_barriers_are_those_of_the_best_with_each(tmp_path: Path) -> None:
    paths = _points(tmp_path, 4, -6, 8)
    own = [0.9, 0.5, 0.7]
    heights = {-1.0: 0.3, 6.0: 0.75}  # the score at the midpoints of 4 with -6 and with 8
    with pytest.warns(UserWarning, match="not linearly mode-connected") as caught:
        barriers = soup.check_barriers(
            paths, lambda state: heights[float(state["weight"])], scores=own
        )
    assert [entry["files"] for entry in barriers] == [
        [str(paths[0]), str(path)] for path in paths[1:]
    ]
    assert [entry["barrier"] for entry in barriers] == pytest.approx([0.7 - 0.3, 0.8 - 0.75])
    (message,) = [str(warning.message) for warning in caught]
    assert f"{paths[0]} and {paths[1]} " in message  # 0.3 is below both; 0.75 is above 0.7


@pytest.mark.parametrize("kind", ["uniform", "greedy", "learned"])
def test_state_dicts_are_mixed_and_left_alone(kind: str) -> None:
    states = [_awkward(seed) for seed in range(3)]
    before = [_bits(state) for state in states]
    if kind == "uniform":
        made = soup.uniform(states)
        mean = torch.stack([state["weight"].double() for state in states]).mean(0)
        rounding = 4 * torch.finfo(torch.float32).eps * mean.abs().max()  # the terms may cancel
        assert (made.weights["weight"].double() - mean).abs().max() < rounding
    else:
        made = getattr(soup, kind)(states, lambda state: float(state["weight"].mean()))
    assert [_bits(state) for state in states] == before
    assert [entry["file"] for entry in made.recipe["ingredients"]] == [
        f"ingredients[{number}]" for number in range(3)
    ]


def test_parameters_of_a_module_are_mixed() -> None:
    models = [nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)]
    made = soup.uniform([model.state_dict(keep_vars=True) for model in models])
    assert not made.weights["weight"].requires_grad
    models[0].load_state_dict(made.weights)


def _write_safetensors(path: Path, weight: Tensor) -> None:
    shape, size = list(weight.shape), 4 * weight.numel()
    header = {"model.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + weight.numpy().tobytes())


def test_files_of_other_programs_are_mixed_with_their_names_kept(tmp_path: Path) -> None:
    torch.save({"model.weight": torch.tensor([1.0])}, tmp_path / "plain.pth")
    wrapped = {"state_dict": {"model.weight": torch.tensor([3.0])}, "epoch": 4}
    torch.save(wrapped, tmp_path / "wrapped.ckpt")
    old = {"model.weight": torch.tensor([5.0])}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    _write_safetensors(tmp_path / "a.safetensors", torch.tensor([7.0]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    mine = {"model.weight": torch.tensor([9.0])}
    made = soup.uniform([*map(str, sorted(before)), mine])
    assert made.weights == {"model.weight": torch.tensor([5.0])}
    assert {path: path.read_bytes() for path in before} == before
    again = soup.greedy([*sorted(before)], lambda state: float(state["model.weight"]))
    assert again.weights["model.weight"].item() == 7


def test_eight_bit_floats_are_averaged_in_float32() -> None:
    states = [{"weight": torch.tensor([x]).to(torch.float8_e4m3fn)} for x in (1.0, 4.0, 7.0)]
    made = soup.uniform(states)
    assert made.weights["weight"].dtype == torch.float8_e4m3fn
    assert made.weights["weight"].float().item() == 4


def test_segkits_files_and_others_are_mixed_together(tmp_path: Path) -> None:
    torch.save({"weight": torch.tensor([3.0])}, tmp_path / "plain.pth")
    made = soup.uniform([*_points(tmp_path, 1), tmp_path / "plain.pth"])
    assert made.weights["weight"].item() == 2


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(1), "extra": _Code()}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match=r"code\.pth: is not a file of weights alone"):
        soup.uniform([tmp_path / "code.pth", {"weight": torch.zeros(1)}])
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ingredient", "message"),
    [
        ("missing.pt", r"missing\.pt: no such checkpoint"),
        (Path(__file__).parent, r"inference: cannot be read \(Is a directory\)"),
        ({}, r"ingredients\[1\]: is another architecture"),
        ({"weight": 3.0}, r"ingredients\[1\]: 'weight' is no tensor"),
        (nn.Conv2d(1, 1, 1), r"ingredients\[1\]: expected a path or a state dict, got Conv2d"),
    ],
)
def test_what_is_no_ingredient_is_named(ingredient: soup.Ingredient, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        soup.uniform([{"weight": torch.zeros(1)}, ingredient])


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    for name, average in (("a", 1.0), ("b", 3.0)):
        ema = {"updates": 9, "model": {"weight": torch.tensor([average])}}
        _save(tmp_path / f"{name}.pt", {"weight": torch.tensor([100.0])}, ema=ema)
    _save(tmp_path / "c.pt", {"weight": torch.tensor([5.0])}, ema=None)
    made = soup.uniform([tmp_path / f"{name}.pt" for name in "abc"])
    assert made.weights["weight"].item() == 3


def test_a_soup_verifies_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, verified = _points(tmp_path, 0, 1, 2), []
    digest = checkpoint.digest

    def noted(path: Path) -> str:
        verified.append(path)
        return digest(path)

    monkeypatch.setattr(checkpoint, "digest", noted)
    soup.uniform(paths)
    assert verified == paths


@pytest.mark.parametrize(
    ("state", "entries", "message"),
    [
        ({"weight": torch.zeros(2)}, {}, "'weight'.*another|another.*'weight'"),
        ({"weight": torch.zeros(1), "bias": torch.zeros(1)}, {}, "'bias'"),
        ({"weight": torch.zeros(1, dtype=torch.int64)}, {}, "another architecture"),
        ({"weight": torch.zeros(1)}, {"classes": ["ground", "paper"]}, "other classes"),
    ],
)
def test_different_models_are_refused(
    tmp_path: Path, state: State, entries: dict[str, object], message: str
) -> None:
    good = _points(tmp_path, 0)
    bad = _save(tmp_path / "bad.pt", state, **entries)
    with pytest.raises(CheckpointError, match=message) as error:
        soup.uniform([*good, bad])
    assert str(bad) in str(error.value)


def test_no_ingredients() -> None:
    with pytest.raises(CheckpointError, match="at least one"):
        soup.uniform([])


def test_a_damaged_ingredient_is_refused(tmp_path: Path) -> None:
    paths = _points(tmp_path, 0, 1)
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        soup.uniform(paths)


def test_different_starts_warn_and_name_the_pairs(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(1)}
    starts = {"a": "one", "b": "two", "c": "one"}
    paths = [_save(tmp_path / f"{name}.pt", state, init=init) for name, init in starts.items()]
    with pytest.warns(UserWarning, match="different weights") as caught:
        soup.uniform(paths)
    (message,) = [str(warning.message) for warning in caught]
    assert f"{paths[0]} and {paths[1]}" in message
    assert f"{paths[1]} and {paths[2]}" in message
    assert f"{paths[0]} and {paths[2]}" not in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soup.uniform([paths[0], paths[2]])


def test_a_selection_that_leaks_is_refused_with_its_number(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(1)}
    folds = {"a": ["1", "2", "3"], "b": ["3", "4"], "c": ["5"]}
    paths = [_save(tmp_path / f"{name}.pt", state, trained_on=on) for name, on in folds.items()]
    assert soup.check_selection(paths, ["6", "7"]) == 0
    with pytest.raises(soup.LeakError, match=r"3 of the 4 images.*pass allow_leak=True") as error:
        soup.check_selection(paths, ["2", "3", "4", "6"])
    assert str(paths[0]) in str(error.value)
    assert str(paths[2]) not in str(error.value)
    assert soup.check_selection(paths, ["2", "3", "4", "6"], allow_leak=True) == 3


def test_a_checkpoint_that_hides_what_it_trained_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    checkpoint.save({"model": {}, "classes": []}, path)
    with pytest.raises(CheckpointError, match="does not record"):
        soup.check_selection([path], ["1"])
    assert soup.check_selection([path], ["1"], allow_leak=True) == 0


def test_a_soup_is_a_checkpoint_and_an_ingredient(tmp_path: Path) -> None:
    paths = _points(tmp_path, 4, 7, 100)
    made = soup.greedy(paths, _near(5))
    checkpoint.save(soup.as_checkpoint(made), tmp_path / "soup.pt")
    state = checkpoint.load(tmp_path / "soup.pt")
    assert state["model"]["weight"].item() == 5.5
    assert state["soup"] == made.recipe
    assert state["trained_on"] == ["0", "1"]  # of the members, not of the refused one
    assert state["classes"] == ["ground", "litter"]
    assert state["score"] == -0.5
    with pytest.raises(CheckpointError, match="1 of the 1"):
        soup.check_selection([tmp_path / "soup.pt"], ["1"])
    again = soup.uniform([tmp_path / "soup.pt", paths[1]])
    assert again.weights["weight"].item() == 6.25


def test_a_soup_keeps_the_statistics_of_images_with_other_channels(tmp_path: Path) -> None:
    state, statistics = {"weight": torch.zeros(1)}, {"mean": [0.1] * 4, "std": [0.2] * 4}
    paths = [_save(tmp_path / f"{name}.pt", state, **statistics) for name in "ab"]
    made = soup.as_checkpoint(soup.uniform(paths))
    assert (made["mean"], made["std"]) == ([0.1] * 4, [0.2] * 4)


class _TwoNorms(nn.Sequential):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        super().__init__(
            nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(5)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


def _images(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 9, 7, generator=generator) * (n + 1) + n for n in counts]


def test_batchnorm_statistics_are_those_of_the_whole_pass() -> None:
    model = nn.BatchNorm2d(3)
    batches = _images(4, 4, 1)  # a short last batch, far from the others
    assert soup.reestimate_batchnorm(model, batches) == 1
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.running_var.double(), values.var(1), rtol=1e-5, atol=1e-5)


def test_batchnorm_of_one_batch_equals_torchs_in_every_layer() -> None:
    (batch,) = _images(6)
    ours, theirs = _TwoNorms().eval(), _TwoNorms().eval()
    assert soup.reestimate_batchnorm(ours, [batch]) == 2
    for layer in (theirs[0], theirs[3]):
        layer.train().momentum = 1.0
    theirs(batch)
    for index in (0, 3):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(
                getattr(ours[index], name), getattr(theirs[index], name), rtol=1e-5, atol=1e-5
            )
    assert not ours.training


def test_batchnorm_reestimation_repeats_and_restores() -> None:
    model = _TwoNorms().train()
    soup.reestimate_batchnorm(model, _images(4, 3))
    first = {key: value.clone() for key, value in model.state_dict().items()}
    soup.reestimate_batchnorm(model, _images(4, 3))
    assert all(
        torch.equal(value, first[key])
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    assert all(layer.training for layer in model.modules())
    assert not model[0]._forward_pre_hooks


class _Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(False)


def test_frozen_batchnorm_is_left_alone() -> None:
    frozen = _Frozen(3)
    model = nn.Sequential(frozen, nn.BatchNorm2d(3)).train()
    assert soup.reestimate_batchnorm(model, _images(4)) == 1
    assert frozen.running_mean.tolist() == [0, 0, 0]
    assert model[1].running_mean.abs().min() > 0.1


class _WithAuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.auxiliary(x) if self.training else self.main(x)


def test_batchnorm_that_only_training_runs_stays_as_it_is() -> None:
    model = _WithAuxiliaryHead()
    assert soup.reestimate_batchnorm(model, _images(4)) == 1
    assert model.auxiliary.running_mean.tolist() == [0, 0, 0]
    assert model.main.running_mean.abs().min() > 0.1


def test_no_batchnorm_reads_no_batches() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError
        yield

    assert soup.reestimate_batchnorm(nn.Conv2d(3, 3, 1), batches()) == 0


def test_batchnorm_without_batches() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        soup.reestimate_batchnorm(nn.BatchNorm2d(3), [])


def test_the_norm_of_a_soup_is_wrong_until_it_is_reestimated(tmp_path: Path) -> None:
    """Two sharp models whose features are each other's negatives: the mean has no spread left."""
    images = _images(8)[0]
    paths = []
    for name, sign in (("a", 1.0), ("b", -0.9)):
        model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
        nn.init.constant_(model[0].weight, sign)
        soup.reestimate_batchnorm(model, [images])
        paths.append(_save(tmp_path / f"{name}.pt", model.state_dict()))
    model.load_state_dict(soup.uniform(paths).weights)
    model.eval()
    assert model(images).std() < 0.1
    soup.reestimate_batchnorm(model, [images])
    assert model(images).std() > 0.9


@pytest.mark.parametrize("kind", ["greedy", "learned", "pruned", "partwise", "stock"])
def test_two_sets_of_weights_at_most(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _points(tmp_path, 0, 1, 2, 3, 4, 5)
    read, made, alive = mixture.read_weights, [], []

    def tracked(path: Path) -> State:
        state = read(path)
        made.append(weakref.ref(state["weight"]))
        alive.append(sum(reference() is not None for reference in made))
        return state

    for module in (mixture, soup):
        monkeypatch.setattr(module, "read_weights", tracked)
    if kind == "stock":
        soup.stock(paths[1:], paths[0])
    elif kind == "partwise":
        gains = _images_counts([float(len(made) % 3) for _ in range(9)])
        parts = {"all": ["weight"], "none": ["decoder"]}
        soup.partwise(paths, lambda state: gains, parts=parts, scores=[0.0] * 6, shares=(0.5, 0.1))
    else:
        getattr(soup, kind)(paths, lambda state: float(len(made) % 3), scores=[0.0] * 6)
    assert len(made) >= 6
    assert max(alive) == 2


def _statistics_of_a_share() -> list[list[float]]:
    model = nn.BatchNorm2d(3)
    soup.reestimate_batchnorm(model, _images(4, 4, 1)[distributed.rank() :: 2])
    assert model.running_mean is not None
    assert model.running_var is not None
    return [model.running_mean.tolist(), model.running_var.tolist()]


@pytest.mark.slow
def test_ranks_share_the_pass_over_the_images() -> None:
    first, second = run_ranks(_statistics_of_a_share, 2)
    values = torch.cat(_images(4, 4, 1)).transpose(0, 1).flatten(1)
    assert first == second
    torch.testing.assert_close(torch.tensor(first[0]), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(first[1]), values.var(1), rtol=1e-5, atol=1e-5)
