"""The run's page and its pieces, without a browser."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import CLASSES, NASTY, Drawn, evaluated, made_run
from PIL import Image
from ranks import run_ranks
from tqdm import tqdm

from segkit.commands import console
from segkit.commands.report import main
from segkit.core import distributed
from segkit.core.errors import SegkitError
from segkit.core.run import Run
from segkit.data.photos import PhotoSource
from segkit.inference.outputs import ERROR, SAFE
from segkit.report import Gallery, class_table, score_table, write_run_page
from segkit.report.html import document, json_block
from segkit.report.log import RunLog
from segkit.training.evaluate import count, predictions
from segkit.training.metrics import per_image_miou

# ------------------------------------------------------------------------------- the page


def test_the_policy_knows_the_script_by_its_hash() -> None:
    page = document("a < b", {"One": "<p>text</p>", "Two": ""})
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert "<title>a &lt; b</title>" in page
    assert page.count("<section") == 1


def test_no_text_ends_a_block_of_json() -> None:
    value = {"name": "</script><script>alert(1)</script>"}
    assert "<" not in json_block(value)
    assert json.loads(json_block(value)) == value


def test_a_page_of_any_stage_of_a_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    names = ["shares.json", "summary.json", "infer/scores.json", "fold0/evaluation.json"]
    for name in [*names, "log.jsonl"]:
        (run.folder / name).unlink()
        write_run_page(run)
        assert (run.folder / "report.html").stat().st_size > 10_000


def test_a_note_is_text(tmp_path: Path) -> None:
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


def test_the_index_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(SegkitError, match="holds no run"):
        main([str(tmp_path)])


def test_a_run_s_own_page_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = made_run(tmp_path / "run", folds=1)
    (run.folder / "report.html").unlink()
    main([str(run.folder)])
    assert capsys.readouterr().out.strip() == str(run.folder / "report.html")
    assert (run.folder / "report.html").is_file()


@pytest.mark.parametrize("name", ["report.html", "index.html"])
def test_pages_of_others_are_not_overwritten(name: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run = made_run(runs / "run", folds=1)
    for _ in range(2):
        main([str(runs)])  # its own pages are replaced
    page = (run.folder if name == "report.html" else runs) / name
    page.write_text("<p>mine</p>")
    with pytest.raises(SegkitError, match=f"{name}: exists already and segkit did not write it"):
        main([str(runs)])
    assert page.read_text() == "<p>mine</p>"


def test_the_mean_of_folds_has_a_narrower_interval(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"track": {}})
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
    assert [record["step"] for record in log.folds[0].records] == [1, 2]


def test_few_images_are_said_to_be_few(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------------------- the gallery


def test_the_gallery_keeps_the_worst_and_a_spread() -> None:
    source, indices = Drawn(40), list(range(3, 40))
    evaluation, gallery = evaluated(source, indices, size=8)
    pictures = gallery.pictures()
    ious = per_image_miou(evaluation.counts).numpy()
    ranked = [source.names[indices[k]] for k in np.lexsort((indices, ious))]
    assert [one.name for one in pictures if one.worst] == ranked[:4]
    others = [one.name for one in pictures if not one.worst]
    assert len(others) == 4
    spread = {source.names[indices[k]] for k in (0, 12, 24, 36)}
    assert len(spread & {one.name for one in pictures}) >= 3
    assert [one.miou for one in pictures] == sorted(one.miou for one in pictures)
    assert pictures[0].miou == pytest.approx(ious.min())


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_gallery_of_any_size(size: int) -> None:
    _, gallery = evaluated(Drawn(5), list(range(5)), size=size)
    assert len(gallery.pictures()) == min(size, 5)


def test_pictures_show_the_masks() -> None:
    source = Drawn(3)
    _, gallery = evaluated(source, [2], size=1)
    [picture] = gallery.pictures()
    shown = gallery.to_json(picture, SAFE)

    def pixels(layer: str) -> np.ndarray:
        data = base64.b64decode(shown[layer].partition(",")[2])
        return np.array(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)

    mask, guess = source.mask(2).numpy(), source.guess(2).numpy()
    truth = pixels("truth")
    assert (truth[..., 3] > 0).tolist() == np.isin(mask, (1, 2, 3)).tolist()
    assert tuple(truth[20, 30, :3]) == SAFE[mask[20, 30]]
    errors = pixels("errors")
    wrong = (mask != guess) & (mask != 255)
    assert (errors[..., :3] == ERROR).all(-1)[wrong].all()
    assert (errors[..., 3] == 0).tolist() == (~wrong & (mask != 255)).tolist()
    assert shown["iou"].keys() == {0, 3}


def test_large_masks_are_sampled_small() -> None:
    source = Drawn(1, size=(600, 900))
    _, gallery = evaluated(source, [0], size=1)
    [picture] = gallery.pictures()
    assert picture.image.size == (256, 171)
    assert picture.truth.shape == (171, 256)
    assert picture.truth[60, 90] == source.mask(0)[211, 318]


def seen_by_a_rank() -> list[str]:
    source, indices = Drawn(20), list(range(20))
    gallery = Gallery(source, indices, size=6)
    found = predictions(
        lambda images: torch.zeros(len(images), *images.shape[2:]), source, indices, labels=True
    )
    count(found, source, indices, device=torch.device("cpu"), callback=gallery.add)
    pictures = gallery.pictures()
    assert bool(pictures) == distributed.is_main()
    return [one.name for one in pictures]


def test_two_ranks_show_what_one_does() -> None:
    assert run_ranks(seen_by_a_rank, 2) == [seen_by_a_rank(), []]


# --------------------------------------------------------------------------- the terminal


def test_tables_fit_80_columns(tmp_path: Path) -> None:
    log = RunLog(made_run(tmp_path / "run"))
    lines = score_table(log).splitlines()
    assert len(lines) == 6
    assert lines[-2].startswith("mean")
    shown = class_table([*CLASSES, *"abcdefgh"], [0.5, None, *[0.25] * 10]).splitlines()
    assert "–" in shown[0]
    assert all(len(line) <= 80 for line in [*lines, *shown])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bars_show_on_a_terminal_unless_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    console.voice()("hello")
    assert capsys.readouterr().out == "hello\n"
    assert list(distributed.Progress("abc", "counting")) == list("abc")
    assert terminal.getvalue() == ""  # nothing took two seconds
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(distributed, "tqdm", lambda **options: tqdm(**{**options, **at_once}))
    progress = distributed.Progress(None, "counting", total=4)
    for _ in range(2):
        progress.update(1, lambda: "loss 0.5")
    progress.close()
    assert "counting:  50%" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    console.voice(verbose=True)
    assert console.is_verbose()


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    console.voice(quiet=True)("hello")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        assert list(distributed.Progress("abc", "counting", delay=0)) == list("abc")
        assert stream.getvalue() == capsys.readouterr().out == ""
    console.voice()


def test_lines_tell_the_progress_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture,
) -> None:
    clock = Clock()
    images = distributed.Progress(range(200), "predict", unit="image", delay=0, clock=clock)
    for _ in images:
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10  # a tenth takes 20 seconds
    assert lines[0] == "predict: 20 of 200 images, 1 images/s, 0:03:00 left"
    assert lines[-1] == "predict: 200 of 200 images, 1 images/s, done in 0:03:20"
    for _ in distributed.Progress(range(10), "predict", unit="image", delay=0, clock=clock):
        clock.now += 0.1
    *others, last = capsys.readouterr().err.splitlines()
    assert all("0:00:0" in line and "left" in line for line in others)  # not done before the end
    assert last.endswith("done in 0:00:01")
    for _ in distributed.Progress(range(30), "evaluate", unit="image", clock=clock):
        clock.now += 45
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 + 10  # and one a minute between the tenths
    for _ in distributed.Progress(range(30), "write", unit="image", clock=clock):
        clock.now += 0.3
    for _ in distributed.Progress(iter(range(20)), "search", clock=clock):
        clock.now += 5
    assert capsys.readouterr().err == "search: 12 items, 0.2 items/s\n"


def test_each_epoch_has_a_line_with_loss_and_learning_rate(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    progress = distributed.Progress(
        None, "fold 1", total=1200, initial=600, unit="image", parts=4, delay=0, clock=clock
    )
    for step in range(51, 101):
        clock.now += 3
        progress.update(12, lambda: f"step {step}, loss 0.5")  # noqa: B023
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fold 1: 840 of 1,200 images, 4 images/s, 0:01:30 left, step 70, loss 0.5"
    assert [line.split(",")[-2] for line in lines] == [
        " step 70",
        " step 75",
        " step 95",
        " step 100",
    ]


def test_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.voice()("hello")
    assert capsys.readouterr().out == ""


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.bold("a") == "\033[1ma\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.bold("a") == "a"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert console.bold("a") == "a"
