"""Test scores of planned and hand-made configurations after trainings of equal processor time.

    python -m benchmarks.plan --data FOLDER [--minutes 2.5] [NAME ...]

FOLDER holds ``trashnet``, ``trashbags``, ``camvid`` and ``weights/mobilenet_v2_imagenet.pth``, from
which both start. The hand-made configurations are the shipped ones with the backbone's rate that
their notes give for pretrained weights; trashnet has camvid's. Both train on the same images, the
first fold where there are no validation images, for as many epochs as the time allows by the
measured cost of a step. The image predicted is the test image as it is: no views.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import segkit
from segkit import train
from segkit.augment.pipeline import build_pipeline
from segkit.commands import console
from segkit.commands.plan import plan
from segkit.core import config
from segkit.core.config import Config
from segkit.data import open_source
from segkit.data.loader import TrainImages
from segkit.training.defaults import settle
from segkit.training.evaluate import evaluate, validation_batches
from segkit.training.metrics import bootstrap_interval, scores
from segkit.training.preparation import check_memory
from segkit.training.rules import steps_per_epoch

HAND_MADE = {"trashnet": "camvid", "trashbags": "trashbags", "camvid": "camvid"}
CPU = torch.device("cpu")
HEADINGS = ("data", "configuration", "epochs", "steps", "seconds", "test mIoU")


def configurations(name: str, data: Path, minutes: float) -> dict[str, Config]:
    """Return the planned and the hand-made configuration of a data set, on the same images."""
    weights = data / "weights" / "mobilenet_v2_imagenet.pth"
    made = plan(data / name, hours=minutes / 60, weights=weights, device="cpu")
    made.save(Path(f"{name}.json"))
    planned = config.load(f"{name}.json")
    known = config.to_dict(config.load(HAND_MADE[name]))
    known["data"] = config.to_dict(planned)["data"]
    known["model"]["weights"] = str(weights)
    known["optim"]["backbone_lr_factor"] = 0.2
    return {"planned": planned, "hand-made": config.parse(known, HAND_MADE[name])}


def seconds_per_step(cfg: Config) -> float:
    """Return the processor time of a step and of the reading of its images."""
    source = open_source(cfg, "train")
    cfg, _ = settle(cfg, source)
    ends = [time.process_time()]
    for steps in (1, 4):
        check_memory(cfg, source, range(len(source)), CPU, steps=steps)
        ends.append(time.process_time())
    images = TrainImages(source, range(len(source)), build_pipeline(cfg), seed=cfg.train.seed)
    for index in range(8):
        images[0, index]
    loading = cfg.train.batch_size * (time.process_time() - ends[2]) / 8
    return (ends[2] - 2 * ends[1] + ends[0]) / 3 + loading


def trained(cfg: Config, name: str, minutes: float) -> dict[str, Any]:
    """Train as many epochs as the time allows, and return the scores on the test images."""
    source = open_source(cfg, "train")
    divided = {} if cfg.data.val else {"folds": cfg.data.folds, "selection": cfg.data.selection}
    steps = steps_per_epoch(len(source), cfg.train.batch_size, **divided)
    epochs = max(1, round(60 * minutes / (steps * seconds_per_step(cfg))))
    times = [f"train.epochs={epochs}", f"train.evaluate_every={epochs}"]
    cfg = config.override(cfg, [*times, "train.sync_batch_norm=false"])
    path = Path(f"{name}.json")
    path.write_text(json.dumps(config.to_dict(cfg)))
    start = time.process_time()
    arguments = ["--cfg", str(path), "--run-dir", name, "--folds", "0", "--device", "cpu"]
    train.main([*arguments, "--quiet"])
    seconds = time.process_time() - start
    summary: Mapping[str, Any] = json.loads(Path(name, "summary.json").read_text())["fold0"]
    predictor = segkit.load(Path(name, "fold0", "best.pt"), device="cpu")
    test = open_source(cfg, "test")
    batches = validation_batches(cfg, test, range(len(test)), CPU)
    result = evaluate(predictor.mask, batches, device=CPU)
    return {
        "epochs": epochs, "steps": summary["steps"], "seconds": round(seconds),
        "miou": scores(result.matrix).miou, "interval": bootstrap_interval(result.counts),
    }  # fmt: skip


def main() -> None:
    """Train both configurations of each data set, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(HAND_MADE), metavar="NAME")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--minutes", type=float, default=2.5, help="processor time of a training")
    parser.add_argument("--kinds", nargs="+", default=["planned", "hand-made"], metavar="KIND")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a new one")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, out = args.data.resolve(), args.out or Path(tempfile.mkdtemp(prefix="plan-"))
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    if not args.json:
        print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS), flush=True)
    for name in args.names:
        made = configurations(name, data, args.minutes)
        for kind in args.kinds:
            row = trained(made[kind], f"{name}-{kind}", args.minutes)
            low, high = row["interval"]
            score = f"{row['miou']:.3f} [{low:.3f}, {high:.3f}]"
            cells = (name, kind, row["epochs"], row["steps"], row["seconds"], score)
            line = json.dumps({"data": name, "configuration": kind, **row})
            print(line if args.json else "| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    console.run(lambda _: main())
