"""CUDA graphs: when a shape is captured, or dropped; tests/test_gpu.py captures real ones."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.models.kernels import graphs
from segkit.models.kernels.graphs import Graphs


class Recorder:
    """In place of a CUDA graph: it computes, and counts."""

    captured: list[tuple[int, ...]]
    replayed: list[tuple[int, ...]]
    pools: list[Any]

    def __init__(self, forward: graphs.Forward, image: Tensor, pool: Any) -> None:
        self.forward, self.used, self.pool = forward, 0, pool or "pool"
        self.captured.append(tuple(image.shape))
        self.pools.append(pool)

    def replay(self, image: Tensor) -> Tensor:
        self.replayed.append(tuple(image.shape))
        return self.forward(image)


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "captured", [], raising=False)
    monkeypatch.setattr(Recorder, "replayed", [], raising=False)
    monkeypatch.setattr(Recorder, "pools", [], raising=False)
    monkeypatch.setattr(graphs, "Graph", Recorder)
    monkeypatch.setattr(graphs, "capturable", lambda image: True)


def graphed() -> tuple[nn.Module, Graphs]:
    model = nn.Conv2d(3, 2, 1)
    return model, Graphs(model, model)


def image(side: int) -> Tensor:
    return torch.zeros(1, 3, side, side)


def test_a_shape_is_captured_when_it_comes_for_the_third_time() -> None:
    model, forward = graphed()
    for side in (4, 5, 4, 6, 4, 4, 5):
        assert torch.equal(forward(image(side)), model(image(side)))
    assert [shape[-1] for shape in Recorder.captured] == [4]
    assert [shape[-1] for shape in Recorder.replayed] == [4, 4]
    forward(image(5))
    assert [shape[-1] for shape in Recorder.captured] == [4, 5]
    assert Recorder.pools == [None, "pool"]


def test_precision_layout_and_shape_have_their_own_graphs() -> None:
    _, forward = graphed()
    for _ in range(3):
        forward(image(4))
        with torch.autocast("cpu", torch.bfloat16):
            forward(image(4))
        forward(torch.zeros(1, 4, 4, 3).permute(0, 3, 1, 2))
    assert len(Recorder.captured) == 3


def test_weights_changed_in_place_are_read_and_other_memory_is_captured_anew() -> None:
    model, forward = graphed()
    for _ in range(3):
        forward(image(4))
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})
    assert torch.equal(forward(image(4)), model(image(4)))
    assert len(Recorder.captured) == 1
    model.bias = nn.Parameter(torch.tensor([7.0, 8.0]))
    for _ in range(3):
        assert torch.equal(forward(image(4)), model(image(4)))
    assert len(Recorder.captured) == 2


def test_the_number_of_graphs_is_bounded_and_an_idle_one_is_replaced() -> None:
    _, forward = graphed()
    sides = range(1, graphs.SHAPES + 1)
    for side in sides:
        for _ in range(3):
            forward(image(side))
    assert len(Recorder.captured) == graphs.SHAPES
    for _ in range(5):  # no graph is idle yet
        forward(image(99))
    assert len(Recorder.captured) == graphs.SHAPES
    for _ in range(graphs.IDLE_CALLS):
        for side in sides[1:]:
            forward(image(side))
    forward(image(99))
    assert Recorder.captured[-1][-1] == 99
    Recorder.replayed.clear()
    forward(image(1))  # the idle one
    forward(image(2))
    assert [shape[-1] for shape in Recorder.replayed] == [2]


def test_a_model_that_cannot_be_captured_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Graph", refuse)
    model, forward = graphed()
    forward(image(4))
    forward(image(4))
    with pytest.warns(UserWarning, match="no CUDA graph of this model: operation not permitted"):
        assert torch.equal(forward(image(4)), model(image(4)))
    for _ in range(3):
        forward(image(4))  # without another warning


def test_threads_take_turns_with_a_graph() -> None:
    _, forward = graphed()
    for _ in range(3):
        forward(image(4))
    inside, most = 0, 0

    def replay(self: Recorder, image: Tensor) -> Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.01)
        inside -= 1
        return image

    Recorder.replay, kept = replay, Recorder.replay
    try:
        threads = [threading.Thread(target=forward, args=(image(4),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        Recorder.replay = kept
    assert most == 1


def test_only_tensors_from_outside_are_kept() -> None:
    weight, cached = torch.ones(3, 3), torch.ones(3)
    reads = graphs._Reads()
    x = torch.zeros(2, 3)
    with torch.inference_mode(), reads:
        y = (x @ weight + cached).relu()
        y.mul_(2)
        y.view(-1).add_(1)
    kept = {tensor.data_ptr() for tensor in reads.external.values()}
    assert kept == {x.data_ptr(), weight.data_ptr(), cached.data_ptr()}
