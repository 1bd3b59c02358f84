"""Work beside the training: jobs in order, their errors, and copies of the state."""

import gc
import threading
import weakref
from collections import OrderedDict

import pytest
import torch

from segkit.core.background import Background, HostCopy


def test_jobs_run_one_after_another_and_end_before_the_context() -> None:
    done: list[int] = []
    release = threading.Event()
    with Background() as background:
        background.start(lambda: (release.wait(30), done.append(1))[1])
        background.check()  # does not wait
        assert done == []
        release.set()
        background.start(lambda: done.append(2))
        assert done[0] == 1
    assert done == [1, 2]


@pytest.mark.parametrize("call", ["check", "wait", "start", "exit"])
def test_the_error_of_a_job_is_raised_once(call: str) -> None:
    ran: list[int] = []

    def fail() -> None:
        raise OSError("disk is full")

    def use(background: Background) -> None:
        failed = threading.Event()
        background.start(fail)
        background._job.add_done_callback(lambda _: failed.set())  # type: ignore[union-attr]
        failed.wait(30)
        if call == "start":
            background.start(lambda: ran.append(1))
        elif call != "exit":
            getattr(background, call)()

    with pytest.raises(OSError, match="disk is full"), Background() as background:
        use(background)
    background.wait()
    assert ran == []


def test_an_error_elsewhere_is_the_one_raised() -> None:
    def fail() -> None:
        raise OSError("disk is full")

    def use() -> None:
        with Background() as background:
            background.start(fail)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        use()


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_a_job_finishes_after_an_error_elsewhere(error: type[BaseException]) -> None:
    done: list[int] = []
    release = threading.Event()

    def use() -> None:
        with Background() as background:
            background.start(lambda: (release.wait(0.2), done.append(1))[1])
            raise error

    with pytest.raises(error):
        use()
    assert done == [1]


def test_the_error_of_a_job_is_in_no_cycle() -> None:
    """A cycle would keep the frames around it, and so their loaders and workers."""

    class Held:
        pass

    def fail() -> None:
        raise OSError("disk is full")

    def run() -> weakref.ref:
        held = Held()
        with pytest.raises(OSError, match="disk is full"), Background() as background:
            background.start(fail)
        return weakref.ref(held)

    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


def test_a_copy_has_all_values_and_does_not_change() -> None:
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    model = OrderedDict(weight=weight)
    model._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    state = {"model": model, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": [0.1]}}
    expected = weight.clone()
    copied = HostCopy().take(state)()
    weight.zero_()
    assert torch.equal(copied["model"]["weight"], expected)
    assert copied["model"]["weight"].stride() == weight.stride()
    assert copied["model"]._metadata == model._metadata  # type: ignore[attr-defined]
    assert copied["optimizer"] == state["optimizer"]
    assert copied["optimizer"]["state"][0]["step"] is not state["optimizer"]["state"][0]["step"]
