"""Trackers, with the real packages where they are installed."""

import csv
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_run import begin_run
from PIL import Image

from segkit.core import config
from segkit.core.errors import ConfigError
from segkit.core.run import Run
from segkit.training import tracking

CLASSES = ["ground", "can"]


def a_run(folder: Path) -> Run:
    run = begin_run(folder, config.to_dict(config.Config()))
    run.write("classes.json", {"classes": CLASSES, "category_ids": None})
    run.fold(0).mkdir()
    return run


def train(run: Run, specs: list, first: int, last: int, event: str) -> None:
    """The events of steps ``first`` to ``last``, an evaluation every second."""
    with tracking.Trackers(run, specs) as trackers:
        run.log(event=event, fold=0, step=first - 1)
        for step in range(first, last + 1):
            run.log(
                event="step", fold=0, epoch=1, step=step, loss=1 / step, parts={"dice": 0.25},
                lr=0.1, gradient_norm=2.0, images_per_s=9.0,
            )  # fmt: skip
            if step % 2 == 0:
                run.log(
                    event="evaluate", fold=0, epoch=1, step=step, miou=step / 10, mean_dice=0.5,
                    pixel_accuracy=0.5, iou=[0.75, None], dice=[0.5, None], interval=[0.1, 0.9],
                )  # fmt: skip
                trackers.pictures(step, [("a.jpg", Image.new("RGB", (8, 6), "red"))])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "tensorbord"}, "track.trackers[0].name: unknown 'tensorbord'; did you mean"),
        ({"name": "wandb", "projct": "a"}, "track.trackers[0].projct"),
        ({"name": "wandb", "mode": "off"}, "track.trackers[0].mode"),
        ({"name": "csv", "run": "a"}, "track.trackers[0].run"),
    ],
)
def test_mistakes_are_named(spec: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tracking.check([spec])
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    tracking.check([{"name": "csv"}])
    with pytest.raises(ConfigError) as caught:
        tracking.check([{"name": "csv"}, {"name": name}])
    expected = f"track.trackers[1]: needs the package {name}; pip install {name}"
    assert str(caught.value) == expected


def test_a_resumed_table_has_each_step_once(tmp_path: Path) -> None:
    run, specs = a_run(tmp_path / "run"), [{"name": "csv"}]
    train(run, specs, 1, 5, "start")
    train(run, specs, 4, 8, "resume")
    with (tmp_path / "run/fold0/steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert float(rows[3]["loss"]) == 0.25
    assert float(rows[3]["loss/dice"]) == 0.25
    with (tmp_path / "run/fold0/evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["miou"] for row in rows] == ["0.2", "0.4", "0.6", "0.8"]
    assert rows[0]["iou/ground"] == "0.75"


def test_a_class_that_appears_later_has_its_column(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with tracking.Trackers(run, [{"name": "csv"}]):
        run.log(event="start", fold=0, step=0)
        for step, iou in ((1, [0.5, None]), (2, [0.5, 0.25])):
            run.log(
                event="evaluate", fold=0, epoch=1, step=step, miou=0.5, mean_dice=0.5,
                pixel_accuracy=0.5, iou=iou, dice=iou, interval=[0.1, 0.9],
            )  # fmt: skip
    with (tmp_path / "run/fold0/evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iou/can"] for row in rows] == ["", "0.25"]


def test_trackers_of_other_folds_hear_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with tracking.Trackers(run, [{"name": "csv"}]) as trackers:
        run.log(event="step", fold=1, step=1)
        assert run.listeners == [trackers.event]
    assert run.listeners == []
    assert not list((tmp_path / "run/fold0").iterdir())


def test_tensorboard_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, specs = a_run(tmp_path / "run"), [{"name": "tensorboard"}, {"name": "csv"}]
    train(run, specs, 1, 5, "start")
    train(run, specs, 4, 8, "resume")
    read = EventAccumulator(str(tmp_path / "run/tensorboard/fold0")).Reload()
    tags = read.Tags()
    assert {"loss", "loss/dice", "lr", "miou", "iou/ground"} <= set(tags["scalars"])
    assert "iou/can" not in tags["scalars"]
    loss = read.Scalars("loss")
    assert [scalar.step for scalar in loss] == list(range(1, 9))
    assert loss[3].value == 0.25
    assert tags["images"] == ["a.jpg"]
    assert {"config/text_summary", "classes/text_summary"} <= set(tags["tensors"])
    [text] = read.Tensors("config/text_summary")
    assert '"backbone"' in text.tensor_proto.string_val[0].decode()
    assert (tmp_path / "run/fold0/steps.csv").exists()


def records(folder: Path) -> list[list[Any]]:
    """Return the content of each offline file of Weights & Biases, in the order of their names.

    A file is 7 bytes, then LevelDB's log: blocks of 32 KiB of chunks, each with its checksum,
    length and kind (https://github.com/google/leveldb/blob/main/doc/log_format.md).
    """
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole, lines = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last chunk
                lines.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
        records.append(lines)
    return records


def test_wandb_goes_on_with_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install '.[track]'")
    specs = [{"name": "wandb", "mode": "offline", "project": "tests"}]
    run = a_run(tmp_path / "run")
    tracking.check(specs)
    train(run, specs, 1, 4, "start")
    train(run, specs, 3, 6, "resume")
    deadline = time.monotonic() + 30
    while True:  # a process of wandb's writes the files
        files = records(run.folder)
        if len(files) == 2 and all(lines and lines[-1].HasField("exit") for lines in files):
            break
        assert time.monotonic() < deadline, [len(lines) for lines in files]
        time.sleep(0.1)
    ids, steps = set(), []
    for lines in files:
        [about] = [record.run for record in lines if record.HasField("run")][:1]
        ids.add(about.run_id)
        assert about.project == "tests"
        assert about.run_group == "run"
        assert "model" in {item.key for item in about.config.update}
        rows = [
            {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            for items in (record.history.item for record in lines if record.HasField("history"))
        ]
        steps.append([row["_step"] for row in rows])
        assert rows[0]["loss"] == 1 / steps[-1][0]
        for key, kind in (("classes", "table-file"), ("pictures", "images/separated")):
            assert [row[f"{key}._type"] for row in rows if f"{key}._type" in row] == [kind, kind]
    assert ids == {run.read("fold0/wandb.json")["id"]}
    assert steps == [[1, 2, 3, 4], [3, 4, 5, 6]]
