"""The contact sheet: a row for each operation, and a row for the whole list."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from segkit.commands.augment import main
from segkit.core.errors import SegkitError


def test_contact_sheet_of_png_masks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(3):
        pixels = torch.full((40, 50, 3), 60 * (index + 1), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"images/{index}.png")
        mask = torch.zeros((40, 50), dtype=torch.uint8)
        mask[10:20, 10:30] = 1
        Image.fromarray(mask.numpy()).save(tmp_path / f"masks/{index}.png")
    (tmp_path / "classes.txt").write_text("ground\nbottle\n")
    operations = [{"name": "hflip"}, {"name": "copy_paste", "p": 0.2}, {"name": "blur"}]
    source = {
        "name": "masks",
        "images": str(tmp_path / "images"),
        "masks": str(tmp_path / "masks"),
        "classes": str(tmp_path / "classes.txt"),
    }
    config = {"data": {"train": source}, "augment": {"train": operations, "size": [32, 32]}}
    (tmp_path / "small.json").write_text(json.dumps(config))
    out = tmp_path / "sheet.png"
    command = ["--cfg", str(tmp_path / "small.json"), "--out", str(out)]
    for _ in range(2):  # its own sheet is replaced
        main([*command, "--images", "2"])
        assert str(out) in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.size == (6 + 2 * 198, 5 * 216)
        assert len(sheet.convert("RGB").getcolors(1 << 20) or []) > 5
    Image.new("RGB", (8, 8)).save(out)
    with pytest.raises(SegkitError, match=r"sheet\.png: exists already"):
        main(command)
    with Image.open(out) as mine:
        assert mine.size == (8, 8)
