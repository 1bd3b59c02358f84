"""Counts of the benchmarks equal those worked out by hand."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks
from benchmarks import alternate, bf16, claims, gpu, input, ratio_of, step, take_turns, version_of
from benchmarks.models import NAMES, cost, kept_for_backward
from segkit.core import config


class Features(nn.Module):
    """Two 1x1 convolutions; the outputs as a model gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.layers(image)}


def test_each_activation_is_counted_once() -> None:
    with torch.device("meta"):
        model, image = Features(), torch.empty(2, 3, 8, 8)
    # the image and what ReLU made of it, which ReLU and the next convolution both keep
    assert kept_for_backward(model, image) == 4 * 2 * 8 * 8 * (3 + 4)


def test_costs_worked_by_hand() -> None:
    with torch.device("meta"):
        costs = cost(Features(), "two", 8)
    assert costs.parameters == 3 * 4 + 4 + 4 * 2 + 2
    assert costs.multiply_adds * 1e9 == 8 * 8 * (3 * 4 + 4 * 2)
    assert costs.state * 2**30 == 16 * costs.parameters
    assert costs.activations * 2**30 == 4 * 8 * 8 * (3 + 4)


def test_the_table_is_of_shipped_configurations() -> None:
    for name in NAMES:
        assert config.find(name).parent.name == "configs"


def test_turns_are_compared_round_by_round() -> None:
    now = 0.0

    def taking(seconds: list[float]):
        left = iter(seconds)

        def side() -> None:
            nonlocal now
            now += next(left)

        return side

    ours, theirs = taking([9.0, 1.0, 2.0, 4.0]), taking([9.0, 2.0, 8.0, 12.0])
    turns = take_turns(ours, theirs, rounds=3, warm_up=1, clock=lambda: now)
    assert turns.ratio == 3  # of 2, 4 and 3
    assert turns.spread == (2, 4)
    assert (turns.ours, turns.theirs) == (2, 8)


@pytest.mark.parametrize("path", sorted(Path(benchmarks.__file__).parent.glob("*.py")))
def test_every_script_starts_without_its_peers(path: Path) -> None:
    importlib.import_module(f"benchmarks.{path.stem}")


def test_a_peer_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert version_of("torch") is not None
    assert version_of("no-such-package") is None
    assert "missing: no-such-package" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_benchmark_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "benchmarks.gpu needs a CUDA device, and PyTorch finds none here.\n"


# ---- benchmarks.gpu, on the CPU with a small model


class Peer(nn.Module):
    """A model of another library: it returns logits of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 11, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def rows_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Run the script with a small model; return its exit code, its rows, and stderr."""
    small = step.Case("resnet18_half", {"name": "fcn", "width": 8}, "torch", Peer)
    monkeypatch.setitem(step.CASES, "small", small)
    monkeypatch.setattr(gpu, "copy_rate", lambda device: 1.0)
    monkeypatch.setattr(gpu, "matmul_rate", lambda amp, device: 100.0)
    monkeypatch.setattr(gpu, "bf16", lambda device: None)
    words = ["--device", "cpu", "--size", "32", "--rounds", "3", "--batch", "2", "--json", *more]
    code = gpu.main(words)
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_rows_of_steps_and_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--case", "small", "--documented", "--part", "step", "inference")
    code, (about, trained, *passes), _ = rows_on_the_cpu(monkeypatch, capsys, *more)
    assert code == 0
    assert about["torch"] == torch.__version__
    assert trained["model"] == "small"
    for side in ("off", "peer"):
        assert trained[f"images/s {side}"] == pytest.approx(2000 / trained[f"ms {side}"])
        assert trained[f"launches {side}"] is None
        # forward, and twice that in backward, of two images; the machine reaches 100 GFLOP/s
        products = 2 * 3 * 2 * 32 * 32 * (27 * 8 + 8 * 11)
        share = products / 1e9 / (trained[f"ms {side}"] / 1e3) / 100
        assert trained[f"of matrix rate {side}"] == pytest.approx(share)
    low, high = trained["peer / off"][1:]
    assert 0 < low <= trained["peer / off"][0] <= high
    assert [row["batch"] for row in passes] == [1, 2]
    assert all(row["ms documented"] > 0 for row in passes)


def test_a_row_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no such step")

    monkeypatch.setattr(gpu, "our_step", broken)
    more = ("--case", "small", "--part", "step", "inference")
    code, rows, errors = rows_on_the_cpu(monkeypatch, capsys, *more)
    assert code == 1
    assert [row["part"] for row in rows] == ["machine", "inference", "inference"]
    assert "step, small: failed" in errors
    assert "no such step" in errors


def test_rows_of_losses_and_matrices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr("benchmarks.evaluation.peak_memory", lambda *_, device: next(used))
    monkeypatch.setattr("benchmarks.evaluation.copy_rate", lambda device: 1.0)
    code, rows, _ = rows_on_the_cpu(monkeypatch, capsys, "--part", "matrix")
    assert code == 0
    assert "argmax and bincount" in [row.get("peer") for row in rows]


def test_a_table_has_a_head_and_quartiles(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"model": "a", "images/s": 123.456, "ratio": (1.2, 1.1, 1.3), "launches": None}
    gpu.show_row("step", row, first=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "| model | images/s | ratio | launches |",
        "| --- | --- | --- | --- |",
        "| a | 123 | 1.20 [1.10, 1.30] |  |",
    ]


def test_sides_alternate_and_ratios_are_of_rounds() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = alternate(sides, rounds=2, warm_up=1)
    assert "".join(order) == "abccbaabc"
    assert [len(seconds[name]) for name in "abc"] == [2, 2, 2]
    assert ratio_of([2.0, 8.0, 12.0], [1.0, 2.0, 4.0]) == (3, 2, 4)


def test_without_bf16_arithmetic_its_rows_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = step.model_arguments("").parse_args(["--amp"])
    monkeypatch.setattr(benchmarks, "autocast_dtype", lambda amp, device: torch.bfloat16)
    assert bf16() is torch.bfloat16
    assert step.chosen(options)["names"] == list(step.ON_CPU)
    monkeypatch.setattr(benchmarks, "autocast_dtype", lambda amp, device: None)
    assert bf16() is None
    assert "cpu has no bf16 arithmetic" in capsys.readouterr().err
    assert step.chosen(options)["names"] == []


def test_steps_fed_by_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    small = step.Case("resnet18_half", {"name": "fcn", "width": 8}, "torch", Peer)
    monkeypatch.setitem(step.CASES, "small", small)
    monkeypatch.setattr(input, "IMAGES", 4)
    figures = [*input.fed_steps("cpu", 32, case="small", batch=2, workers=0, steps=1, rounds=2)]
    assert [figure.name.rsplit("=")[-1] for figure in figures] == ["cpu", "model"]
    assert all(figure.ours > 0 and figure.limit > 0 for figure in figures)


def test_the_interval_of_a_claim_is_students_t() -> None:
    low, high = claims.interval([0.01, 0.02, 0.03])  # mean 0.02, deviation 0.01, t(2) = 4.303
    assert (low, high) == pytest.approx((0.02 - 0.04303 / 3**0.5, 0.02 + 0.04303 / 3**0.5))
    assert claims.evidence(claims.CLAIMS[0], [(0.5, 0.4), (0.8, 0.5)]).verdict == "within noise"
    assert claims.evidence(claims.CLAIMS[0], [(0.5, 0.4), (0.61, 0.5)]).verdict == "holds"
    assert claims.evidence(claims.CLAIMS[0], [(0.4, 0.5), (0.5, 0.61)]).verdict == "contradicted"


def test_the_best_fold_is_chosen_on_the_selection_set() -> None:
    rows = [
        {"name": "fold0", "views": [], "test": {"miou": 0.5}, "selection": {"miou": 0.6}},
        {"name": "fold1", "views": [], "test": {"miou": 0.4}, "selection": {"miou": 0.7}},
        {"name": "fold1, views", "views": ["hflip"], "test": {"miou": 0.9}},
    ]
    assert claims.score(rows, "best fold") == 0.4
    assert claims.score(rows, "fold1, views") == 0.9
    assert claims.score(rows, "greedy soup") is None


def test_a_training_that_uses_another_is_made_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(claims.Trainings, "make", lambda _, *pair: made.append(pair))
    chosen = [claim for claim in claims.CLAIMS if claim.topic in ("rates", "distillation")]
    both = [claim for claim in claims.CLAIMS if claim.sentence == "vote over its student"]
    for some in (chosen, both):
        made.clear()
        trainings = claims.Trainings("demo", (), tmp_path, threads=1)
        assert not [*claims.measure(some, trainings, seeds=2, jobs=1, minutes=1)]
        assert made[-2:] == [("student", 0), ("student", 1)]
        assert {("base", 0), ("base", 1)} <= {*made[:-2]}
    monkeypatch.undo()
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(claims.Trainings, "_run", lambda _, command: commands.append(command))
    trainings.make("student", 0)
    folders = [command[command.index("--run-dir") + 1] for command in commands]
    assert [command[0] for command in commands] == ["train.py", "train.py", "infer.py"]
    assert folders == [str(tmp_path / f"demo-{name}-0") for name in ("base", "student", "student")]
    assert trainings._own("student", 1) == (f"data.teacher={tmp_path / 'demo-base-1'}",)


def test_finished_trainings_are_not_repeated(tmp_path: Path) -> None:
    """Neither while their folders are there, nor later, by the file of their scores."""
    runs, scores = tmp_path / "runs", tmp_path / "scores.json"
    trainings = claims.Trainings("demo", (), runs, threads=1, scores=scores)
    for training, miou in (("base", 0.5), ("dice", 0.4)):
        folder = trainings.folder(training, 0) / "infer"
        folder.mkdir(parents=True)
        row = {"name": "fold0", "views": [], "test": {"miou": miou, "interval": [0, 1]}}
        (folder / "scores.json").write_text(json.dumps([row]))
    (claim,) = [claim for claim in claims.CLAIMS if claim.sentence == "CE + Dice over Dice"]
    for _ in range(2):
        (result,) = claims.measure([claim], trainings, seeds=1, jobs=2, minutes=1)
        assert result.effect == pytest.approx(0.1)
        shutil.rmtree(runs, ignore_errors=True)
    assert result.verdict == "within noise"  # one seed shows nothing
