"""Page of a run, comparison of runs, and tables for the terminal."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_run import CLASSES, NASTY, Drawn, begin_run, evaluated, made_run

from segkit.commands.report import main
from segkit.core.errors import SegkitError
from segkit.data.photos import PhotoSource
from segkit.inference.outputs import SAFE
from segkit.report import class_table, score_table, write_run_page
from segkit.report.html import document, heat_map, json_block
from segkit.report.log import RunLog


def test_policy_has_the_digest_of_the_script() -> None:
    page = document("a < b", {"One": "<p>text</p>", "Two": ""})
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert "<title>a &lt; b</title>" in page
    assert page.count("<section") == 1


def test_text_cannot_end_a_block_of_json() -> None:
    value = {"name": "</script><script>alert(1)</script>"}
    assert "<" not in json_block(value)
    assert json.loads(json_block(value)) == value


def test_page_of_an_incomplete_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    names = ["shares.json", "summary.json", "infer/scores.json", "fold0/evaluation.json"]
    for name in [*names, "log.jsonl"]:
        (run.folder / name).unlink()
        write_run_page(run)
        assert (run.folder / "report.html").stat().st_size > 10_000


def test_pictures_with_invalid_scores_are_left_out(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", folds=1)
    evaluation = run.read("fold0/evaluation.json")
    evaluation["pictures"][0]["miou"] = float("nan")
    evaluation["pictures"][1]["iou"]["0"] = float("inf")
    run.write("fold0/evaluation.json", evaluation)
    write_run_page(run)
    page = (run.folder / "report.html").read_text()
    [content] = re.findall(r'<div id="gallery".*?json">(.*?)</script>', page)
    names = [picture["name"] for picture in json.loads(content)["pictures"]]
    assert sorted(names) == sorted(picture["name"] for picture in evaluation["pictures"][2:])


def test_index_links_to_the_folders_of_runs(tmp_path: Path) -> None:
    made_run(tmp_path / "elsewhere" / "run", folds=1)
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "linked name").symlink_to(tmp_path / "elsewhere" / "run")
    main([str(runs)])
    assert 'href="linked%20name/report.html"' in (runs / "index.html").read_text()


def test_note_is_escaped(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    page = (run.folder / "report.html").read_text()
    assert NASTY not in page
    assert "<i>a note</i>" not in page
    assert "&lt;i&gt;a note&lt;/i&gt;" in page


def test_100_pictures_are_under_5_mb(tmp_path: Path, shared_data: Path) -> None:
    photographs = PhotoSource(paths=(str(shared_data / "trashbags" / "images" / "train"),))

    class Photographs(Drawn):
        def image(self, i: int) -> torch.Tensor:
            return photographs.image(i)

        def mask(self, i: int) -> torch.Tensor:
            height, width = photographs.size(i)
            return (photographs.image(i).float().mean(0) // 64).to(torch.uint8)[:height, :width]

        def guess(self, i: int) -> torch.Tensor:
            return self.mask(i).roll(9, 0)

    run = made_run(tmp_path / "run")
    source = Photographs(100)
    evaluation, gallery = evaluated(source, list(range(100)), size=100)
    pictures = [gallery.to_json(picture, SAFE) for picture in gallery.pictures()]
    content = {"step": 40, "matrix": evaluation.matrix.tolist(), "pictures": pictures}
    run.write("fold0/evaluation.json", content)
    write_run_page(run)
    page = run.folder / "report.html"
    assert page.read_text().count('"photograph":') == 100
    assert page.stat().st_size < 5e6


def test_heat_map_of_255_classes_is_small() -> None:
    names = [f"class {c}" for c in range(255)]
    shares = np.random.default_rng(0).random((255, 255))
    assert len(heat_map("", names, shares.tolist(), corner="")) < 1e6


def test_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SegkitError, match="holds no run"):
        main([str(tmp_path)])


def test_page_of_a_single_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = made_run(tmp_path / "run", folds=1)
    (run.folder / "report.html").unlink()
    main([str(run.folder)])
    assert capsys.readouterr().out.strip() == str(run.folder / "report.html")
    assert (run.folder / "report.html").is_file()


@pytest.mark.parametrize("name", ["report.html", "index.html"])
def test_foreign_files_are_not_overwritten(name: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run = made_run(runs / "run", folds=1)
    for _ in range(2):
        main([str(runs)])  # its own pages are replaced
    page = (run.folder if name == "report.html" else runs) / name
    page.write_text("<p>mine</p>")
    with pytest.raises(SegkitError, match=f"{name}: exists already and segkit did not write it"):
        main([str(runs)])
    assert page.read_text() == "<p>mine</p>"


def test_runs_on_different_data_are_apart(tmp_path: Path) -> None:
    for name, data, lr in (("a", "x", 1), ("b", "y", 2), ("c", "x", 3)):
        train = json.dumps({"name": "coco", "annotations": f"{data}.json"})
        made_run(tmp_path / name, folds=1, data__train=train, optim__lr=str(lr))
    main([str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    sections = dict(re.findall(r'name">(Runs[^<]*)</h2>(.*?)</section>', page, re.DOTALL))
    linked = {
        heading: sorted(re.findall(r'href="(\w)/report.html', content))
        for heading, content in sections.items()
    }
    assert sorted(map(tuple, linked.values())) == [("a", "c"), ("b",)]
    assert all(("x.json" if "a" in runs else "y.json") in title for title, runs in linked.items())
    assert "Best validation" not in page  # scores on different data are not compared
    differing = re.findall(r'name">Settings that differ[^<]*</h2>(.*?)</section>', page, re.DOTALL)
    assert ["optim.lr" in content for content in differing] == [True]


def test_the_state_of_a_run_is_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", folds=1)

    def state() -> str:
        page = (run.folder / "report.html").read_text()
        [shown] = re.findall(r"<dt>State</dt><dd>(.*?)</dd>", page)
        return shown

    assert state() == "done"
    (run.folder / "summary.json").unlink()
    run.write("status.json", {"state": "running", "sentence": ""})
    write_run_page(run)  # by the process that trains
    assert re.fullmatch(
        r"running<small>fold 0, 2 of \d+ epochs done at 20\d\d-\d\d-\d\d \d\d:\d\d</small>", state()
    )
    later = type(run)(run.folder)  # another process, after it was killed
    run._lock.close()
    write_run_page(later)
    assert state().startswith("stopped<small>")
    run.write("status.json", {"state": "failed", "sentence": "the disk <is> full"})
    write_run_page(later)
    assert state().startswith("failed<small>")
    assert state().endswith("<small>the disk &lt;is&gt; full</small>")


def test_scores_of_folds_are_averaged(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", {"track": {}})
    for fold, (miou, low, high) in enumerate(((0.5, 0.4, 0.6), (0.7, 0.6, 0.8))):
        for step, less in ((1, 0.1), (2, 0.0), (3, 0.2)):
            run.log(
                event="evaluate", fold=fold, epoch=step, step=step, miou=miou - less,
                interval=[low - less, high - less], iou=[miou - less],
            )  # fmt: skip
    log = RunLog(run)
    width = (0.1**2 + 0.1**2) ** 0.5 / 2
    assert log.score == pytest.approx((0.6, 0.6 - width, 0.6 + width))
    assert log.class_iou == pytest.approx([0.6])
    assert log.class_change(0) == pytest.approx(0.1)  # from step 1 to step 2


def test_few_images_are_marked(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    few, enough = (made_run(runs / str(images), images=images) for images in (12, 30))
    assert "few images (a fold validates on 12)" in score_table(RunLog(few))
    assert "few images" not in score_table(RunLog(enough))
    page = (few.folder / "report.html").read_text()
    assert "best epochs, few images (12)" in page
    assert "test (9 images, few)" in page
    assert "few images (" not in (enough.folder / "report.html").read_text()
    main([str(runs)])
    # Both test sets have 9 images, and one validation set 12.
    assert (runs / "index.html").read_text().count("few images") == 3


def test_tables_fit_80_columns(tmp_path: Path) -> None:
    log = RunLog(made_run(tmp_path / "run"))
    lines = score_table(log).splitlines()
    assert len(lines) == 6
    assert lines[-2].startswith("mean")
    shown = class_table([*CLASSES, *"abcdefgh"], [0.5, None, *[0.25] * 10]).splitlines()
    assert "–" in shown[0]
    assert all(len(line) <= 80 for line in [*lines, *shown])


def _scores(classes: int) -> list[dict[str, Any]]:
    values = {"per_class": [0.25] + [None] * (classes - 1)}
    values["per_class_intervals"] = [[0.125, 0.5]] + [None] * (classes - 1)
    details = {"boundary_iou": {"mean": 0.25, "interval": [0.125, 0.5], **values}}
    score = {"miou": 0.5, "interval": [0.4, 0.6], "images": 9, "details": details}
    return [{"name": name, "test": score} for name in ("<b>fold0", "vote")]


def test_boundary_scores_are_shown_for_candidates_and_classes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    assert "boundary iou" not in write_run_page(run).run.folder.joinpath("report.html").read_text()
    run.write("infer/scores.json", _scores(4))
    write_run_page(run)
    page = (run.folder / "report.html").read_text()
    assert page.count("boundary iou") == 2
    assert page.count("0.250 <small>[0.125, 0.500]</small>") == 3
    assert "<b>fold0" not in page


@pytest.mark.parametrize("classes", [3, 5])
def test_scores_of_other_classes_are_left_out(tmp_path: Path, classes: int) -> None:
    run = made_run(tmp_path / "run")
    run.write("infer/scores.json", _scores(classes))
    write_run_page(run)
    page = (run.folder / "report.html").read_text()
    assert "boundary iou" not in page
    assert "fold0" in page
