"""Checkpoints of a fold: which are kept."""

from pathlib import Path

from segkit.training.fold_checkpoints import keep_best


def test_only_checkpoints_leave_with_the_best_epochs(tmp_path: Path) -> None:
    keep_best(tmp_path, {"epoch": 1}, [(0.5, 1)], 1)
    (tmp_path / "epoch0002.pt").write_text("a note")
    keep_best(tmp_path, {"epoch": 2}, [(0.5, 1), (0.4, 2)], 1)
    keep_best(tmp_path, {"epoch": 3}, [(0.6, 3), (0.5, 1)], 1)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "epoch0002.pt", "epoch0003.pt"}
