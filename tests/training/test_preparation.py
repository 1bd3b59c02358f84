"""Reports about the data of a run."""

from pathlib import Path

from made_run import Drawn

from segkit.core.run import Run
from segkit.data.source import Fault
from segkit.training.preparation import report_faults


def test_each_fault_is_told_once(tmp_path: Path) -> None:
    data = Drawn(4)
    data.faults = tuple(Fault(f"{name}.jpg is empty", file=f"{name}.jpg") for name in "ab")
    run = Run(tmp_path)
    for _ in range(2):  # a start, and a resumed one: training and validation share the source
        said: list[str] = []
        report_faults((data, data), run, said.append)
        assert said == ["left out: a.jpg is empty", "left out: b.jpg is empty"]
        assert [event["file"] for event in run.events()] == ["a.jpg", "b.jpg"]


def test_an_ignored_object_is_not_told_as_left_out(tmp_path: Path) -> None:
    data, said = Drawn(4), list[str]()
    data.faults = (Fault("annotation 7 has no points", file=data.names[0], annotation=7),)
    report_faults((data,), Run(tmp_path), said.append)
    assert said == ["ignored in its box: annotation 7 has no points"]
