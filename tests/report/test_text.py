"""Tables for the terminal."""

import io
from types import SimpleNamespace

import pytest

from segkit.report.text import _fit, bold, candidate_table


def test_a_long_name_keeps_its_run_and_what_was_done() -> None:
    names = ("bags greedy soup, views", "bags-with-pseudo-labels greedy soup, views")
    assert _fit(names[0], 28) == names[0]
    assert _fit(names[1], 28) == "bags-with…greedy soup, views"


@pytest.mark.parametrize(("images", "few"), [(29, True), (30, False)])
def test_few_images_are_said_to_be_few(images: int, few: bool) -> None:
    row = {"miou": 0.5, "interval": [0.4, 0.6], "trained_on": 0}
    columns = [SimpleNamespace(title="test", indices=range(images))]
    shown = candidate_table([{"name": "fold0", "test": row}], columns)
    assert (f"few test images ({images})" in shown) == few


def test_bold_text_respects_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert bold("a") == "\033[1ma\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("a") == "a"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert bold("a") == "a"
