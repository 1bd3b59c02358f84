"""Distillation: the soft labels of a vote, and the training of a student with them."""

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segkit
from segkit import train as train_module
from segkit.core import checkpoint
from segkit.core.errors import ConfigError, DataError, SegkitError
from segkit.inference.teacher import Teacher, teacher_checkpoints
from segkit.train import main as train
from segkit.training.step import train_step

CPU = torch.device("cpu")
STUDENT = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def saved(path: Path, *, seed: int, planes: int = 3, **statistics: Any) -> Path:
    """A file of a model with weights that depend on the seed."""
    model = segkit.create_model("fcn", "resnet18_half", num_classes=planes).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    classes = [f"class {i}" for i in range(planes)]
    segkit.save(model, path, classes=classes, **statistics)
    return path


def photographs(height: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, height, width), generator=rng, dtype=torch.uint8)


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(STUDENT[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("planes", [1, 3])
def test_soft_labels_are_the_mean_over_models_of_their_own_normalization(
    tmp_path: Path, planes: int
) -> None:
    paths = [
        saved(tmp_path / "a.pt", seed=1, planes=planes),
        saved(tmp_path / "b.pt", seed=2, planes=planes, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
    ]
    images = photographs(65, 97)
    expected = sum(segkit.load(path).probabilities(images) for path in paths) / 2
    state = torch.get_rng_state()
    soft = Teacher(paths, **STUDENT, device=CPU)(normalized(images))
    assert torch.equal(torch.get_rng_state(), state)
    assert soft.shape == (2, max(2, planes), 65, 97)
    torch.testing.assert_close(soft, expected.clone(), rtol=1e-4, atol=1e-5)
    assert soft.std() > 0.01  # or equal results would show nothing


@pytest.mark.parametrize("planes", [1, 3])
def test_a_student_approaches_its_teacher(tmp_path: Path, planes: int) -> None:
    teacher = Teacher([saved(tmp_path / "a.pt", seed=1, planes=planes)], **STUDENT, device=CPU)
    images, masks = normalized(photographs(32, 32)), torch.zeros(2, 32, 32, dtype=torch.uint8)
    soft = teacher(images)
    entropy = -(soft * soft.log()).sum(1).mean()
    student = segkit.create_model("fcn", "resnet18_half", num_classes=planes)
    criterion = segkit.build_loss([{"name": "soft_cross_entropy"}, "jaccard_metric"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    values = []
    for _ in range(25):
        done = train_step(student, criterion, optimizer, (images, masks), teacher=teacher)
        values.append((done.terms["soft_cross_entropy"] - entropy).item())
    assert 0 < values[-1] < 0.2 * values[0]


# ---- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two folds, ``runs/vote``."""
    home = tmp_path_factory.mktemp("home")
    demo = {"name": "demo", "root": "demo", "train": 20, "test": 2, "size": 64}
    cfg = {
        "data": {"train": {**demo, "part": "train"}, "folds": 2, "selection": 0.2, "workers": 0},
        "model": {"weights": None, "backbone": "resnet18_half", "decoder": "fcn"},
        "augment": {"train": [{"name": "crop", "size": [32, 32]}, "hflip"]},
        "loss": {"terms": ["cross_entropy", "dice"]},
        "optim": {"lr": 0.003, "warmup_steps": 0},
        "train": {"epochs": 1, "batch_size": 4, "log_every": 1, "amp": "off"},
        "track": {"images": 0},
    }
    (home / "tiny.json").write_text(json.dumps(cfg))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(["--cfg", "tiny.json", "--run-dir", "runs/vote", "--quiet"])
    return home


@pytest.fixture
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the commands there, and take back what they do to signals."""
    monkeypatch.chdir(home)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


at_home = pytest.mark.usefixtures("_at_home")


def student(run: str, settings: Mapping[str, Any], *options: str) -> dict[str, Any]:
    """Train fold 0 of a student and return its last state."""
    settings = {"data.teacher": "runs/vote", **settings}
    pairs = (f"{key}={json.dumps(value)}" for key, value in settings.items())
    words = [part for pair in pairs for part in ("--set", pair)]
    train(["--cfg", "tiny.json", "--run-dir", run, "--folds", "0", *words, *options])
    return checkpoint.load(Path(run) / "fold0" / "last.pt")


@at_home
def test_a_student_says_what_its_teacher_saw(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "CHECKED_FOR_MEMORY", ("cpu",))
    state = student("runs/student", {})
    said = capsys.readouterr().out
    assert "data.teacher: runs/vote/fold0/best.pt, runs/vote/fold1/best.pt\n" in said
    assert "trained on validation images of fold 0, so the student's scores on them" in said
    best = [checkpoint.load(Path(f"runs/vote/fold{n}/best.pt")) for n in (0, 1)]
    assert state["teacher"] == [
        checkpoint.digest(Path(f"runs/vote/fold{n}/best.pt")) for n in (0, 1)
    ]
    assert {*state["trained_on"]} == {*best[0]["trained_on"], *best[1]["trained_on"]}
    events = [json.loads(line) for line in Path("runs/student/log.jsonl").read_text().splitlines()]
    terms = next(event["parts"] for event in events if event["event"] == "step")
    assert [*terms] == ["cross_entropy", "dice", "soft_cross_entropy", "jaccard_metric", "aux"]
    # The teacher of the same fold has not seen its validation images.
    student("runs/alone", {"data.teacher": ["runs/vote/fold0/best.pt"], "loss.teacher_weight": 1})
    said = capsys.readouterr().out
    assert "data.teacher: runs/vote/fold0/best.pt\n" in said
    assert "trained on validation images" not in said


@at_home
def test_a_student_is_resumed_to_the_bit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "augment.device": "model",
        "train.accumulate": 2,
        "train.accumulate_exact": True,
        "train.epochs": 2,
        "train.save_every": 1,
    }
    whole = student("runs/whole", settings)
    steps = []

    def step(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return train_step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            student("runs/cut", settings)
    assert checkpoint.load(Path("runs/cut/fold0/last.pt"))["step"] == 2
    shutil.copytree("runs/cut", "runs/other")
    resumed = student("runs/cut", settings, "--resume")
    assert resumed["step"] == whole["step"] == 4
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    # Another teacher under the same name is noticed.
    files = [Path(f"runs/vote/fold{n}/best.pt") for n in (0, 1)]
    before = files[0].read_bytes()
    files[0].unlink()
    shutil.copy(files[1], files[0])
    try:
        with pytest.raises(
            SegkitError, match=r"data\.teacher: has other checkpoints than runs/other"
        ):
            student("runs/other", settings, "--resume")
    finally:
        files[0].write_bytes(before)


@at_home
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data.teacher": "runs/vot"}, r"data\.teacher: runs/vot: is not a run folder"),
        ({"data.teacher": []}, r"data\.teacher: is empty"),
        ({"loss.teacher_terms": ["dice"]}, r"teacher_terms\[0\]\.name: 'dice' has no soft labels"),
        (
            {"loss.teacher_terms": ["jaccard"]},
            "expected one of: dice_semimetric, jaccard_metric, s",
        ),
        ({"loss.terms": ["jaccard_metric"]}, "two terms have the same name"),
    ],
)
def test_mistakes_are_named(home: Path, settings: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        student("runs/bad", settings)
    assert not (home / "runs/bad").exists()


@at_home
def test_a_teacher_of_other_classes_or_of_images_that_choose_is_refused(home: Path) -> None:
    other = saved(home / "other.pt", seed=1)
    with pytest.raises(
        DataError, match=r"other\.pt has the classes class 0, class 1, class 2; exp"
    ):
        student("runs/bad", {"data.teacher": str(other)})
    with pytest.raises(DataError, match=r"trained on \d of the \d images that choose in this run"):
        student("runs/bad", {"train.seed": 1})
    assert not (home / "runs/bad").exists()


@at_home
def test_a_teacher_may_be_a_list_of_runs_and_files() -> None:
    vote = [Path(f"runs/vote/fold{n}/best.pt") for n in (0, 1)]
    assert teacher_checkpoints("vote") == vote
    assert teacher_checkpoints([str(vote[1]), "runs/vote"]) == [vote[1], *vote]
