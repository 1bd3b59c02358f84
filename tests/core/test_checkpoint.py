"""Checkpoints: whole or not at all, verified, and never code."""

import errno
import gc
import hashlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.core import checkpoint
from segkit.core.errors import CheckpointError


def state(value: float = 1.0) -> dict:
    return {"model": {"weight": torch.full((50, 50), value)}, "step": 3, "names": ["a", None]}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(state(), path)
    for mmap in (False, True):
        loaded = checkpoint.load(path, mmap=mmap)
        assert torch.equal(loaded["model"]["weight"], state()["model"]["weight"])
        assert (loaded["step"], loaded["names"]) == (3, ["a", None])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("large", [2, 100, 10_000])
def test_digests_of_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(checkpoint, "_LARGE", large)
    monkeypatch.setattr(checkpoint, "_FLUSHED", large)
    checkpoint.save(state(), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    assert data[-64:] == hashlib.sha256(data[:-73]).hexdigest().encode()
    assert checkpoint.load(tmp_path / "a.pt")["step"] == 3


def test_an_error_of_a_flush_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_FLUSHED", 1000)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error.*a\.pt"):
        checkpoint.save(state(), tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_full_disk_is_in_no_cycle(tmp_path: Path) -> None:
    """A cycle would keep the frames around it, and so their loaders and workers."""

    class Held:
        pass

    def fail() -> weakref.ref:
        held = Held()
        with pytest.raises(OSError, match=r"File too large.*a\.pt"):
            checkpoint.save({"model": torch.zeros(1 << 20)}, tmp_path / "a.pt")
        return weakref.ref(held)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("place", [10, 5_000, -200, -70, -1])
def test_a_changed_byte_is_found(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(state(), path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pt: "):
        checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 1, 100, 5_000, -1, -80])
def test_a_truncated_file_is_found(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(state(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"a\.pt: "):
        checkpoint.load(path)


def test_missing_foreign_and_newer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="segkit did not write it"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of segkit"):
        checkpoint.load(tmp_path / "foreign.pt", verify=False)
    checkpoint.save({"format": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(tmp_path / "newer.pt")


@pytest.mark.parametrize("verify", [True, False])
def test_an_archive_with_a_damaged_directory_is_refused(verify: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(state(), path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x06\x07")  # where the 64-bit directory ends: it is said to be on disk 9
    data[at + 4] = data[at + 16] = 9
    data[-64:] = hashlib.sha256(data[:-73]).hexdigest().encode()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pt: is a damaged archive"):
        checkpoint.load(path, verify=verify)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(tmp_path: Path, zipped: bool) -> None:
    trap, path = tmp_path / "trap", tmp_path / "bad.pt"
    if zipped:
        checkpoint.save({"model": Malicious(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"format": 1, "model": Malicious(trap)}))
    for verify in (True, False):
        with pytest.raises(CheckpointError):
            checkpoint.load(path, verify=verify)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap)))  # the trap itself works
    assert trap.exists()


def test_the_previous_state_is_kept_and_used(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert checkpoint.load_latest(path) is None
    checkpoint.save(state(1), path, keep_previous=True)
    checkpoint.save(state(2), path, keep_previous=True)
    latest = checkpoint.load_latest(path)
    assert latest is not None
    assert latest["model"]["weight"][0, 0] == 2
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"last\.pt: .*going on from last\.previous\.pt"):
        latest = checkpoint.load_latest(path)
    assert latest is not None
    assert latest["model"]["weight"][0, 0] == 1
    checkpoint.previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt.*last\.previous\.pt"):
        checkpoint.load_latest(path)


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from segkit.core import checkpoint
value = 0
while True:
    value += 1
    state = {"model": {"weight": torch.full((400, 400), float(value))}}
    checkpoint.save(state, Path(sys.argv[1]), keep_previous=True)
    print(value, flush=True)
"""
    path = tmp_path / "last.pt"
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.013 * attempt)
        process.kill()
        lines = process.stdout.read().split()
        process.wait()
        latest = checkpoint.load_latest(path)
        assert latest is not None
        # Everything announced as saved is there; one more may have been.
        assert latest["model"]["weight"][0, 0] >= int(lines[-1] if lines else 1)


def test_links_replace_and_share(tmp_path: Path) -> None:
    first, second, name = (tmp_path / file for file in ("1.pt", "2.pt", "best.pt"))
    checkpoint.save(state(1), first)
    checkpoint.save(state(2), second)
    checkpoint.link(first, name)
    checkpoint.link(second, name)
    assert checkpoint.load(name)["model"]["weight"][0, 0] == 2
    second.unlink()
    assert checkpoint.load(name)["model"]["weight"][0, 0] == 2


def test_tensor_digest_depends_on_names_and_bits() -> None:
    digest = checkpoint.digest_tensors({"a": torch.zeros(3), "b": torch.tensor(1)})
    assert digest == checkpoint.digest_tensors({"a": torch.zeros(3), "b": torch.tensor(1)})
    assert digest != checkpoint.digest_tensors({"c": torch.zeros(3), "b": torch.tensor(1)})
    assert digest != checkpoint.digest_tensors(
        {"a": torch.tensor([0, 0, -0.0]), "b": torch.tensor(1)}
    )


@pytest.mark.slow
def test_forged_files_are_read_or_refused(tmp_path: Path) -> None:
    """5,000 files with bytes changed and a digest that fits them all the same."""
    path = tmp_path / "a.pt"
    checkpoint.save(state(), path)
    whole = path.read_bytes()
    pickled = whole.index(b"\x80\x02"), whole.index(b"PK", whole.index(b"\x80\x02"))
    directory = whole.index(b"PK\x01\x02"), len(whole) - 73  # the comment: sha256: and 64 digits
    rng = np.random.default_rng(0)
    warnings.simplefilter("ignore")
    read, sentences = 0, list[str]()
    for number in range(5_000):
        forged = np.frombuffer(whole, np.uint8).copy()
        low, high = (pickled, directory, (0, directory[1]))[number % 3]
        at = rng.integers(low, high, rng.integers(1, 4))
        forged[at] = rng.integers(0, 256, len(at))
        forged[-64:] = bytearray(hashlib.sha256(forged[:-73]).hexdigest().encode())
        path.write_bytes(forged.tobytes())
        for mmap in (False, True):
            try:
                checkpoint.load(path, mmap=mmap)
                read += 1
            except CheckpointError as error:
                sentences.append(str(error))
    assert read > 0
    assert len(sentences) > 0
    assert not [sentence for sentence in sentences if "\n" in sentence]
