"""What a file of weights is, and what would load: ``python -m segkit.weights FILE``.

As a command, this file stands above its package: it builds models.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from segkit import command
from segkit.model import build_model
from segkit.weights.loading import Report, fit, fitting, recognize, windows
from segkit.weights.reading import read_file


def main(argv: list[str]) -> None:
    """Print it; raise a CheckpointError where nothing would load."""
    parser = argparse.ArgumentParser(prog="python -m segkit.weights", description=__doc__)
    parser.add_argument("file", type=Path, help="a .pth, .pt or .safetensors file")
    parser.add_argument(
        "--backbone", type=_component, help="show what loads into it: a name, or a JSON object"
    )
    parser.add_argument(
        "--decoder", type=_component, default="fcn", help="beside --backbone; default: fcn"
    )
    parser.add_argument("--classes", type=int, help="of the decoder; default: the file's, or 2")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    source = str(args.file)
    state = read_file(args.file)
    found = recognize(state, source=source)
    about = {
        "file": source,
        "title": found.title,
        "backbones": fitting(found),
        "windows": windows(found),
        "decoder": found.decoder or found.instead or None,
        "classes": found.classes,
        "entries": len(state),
        "values": sum(tensor.numel() for tensor in state.values()),
    }
    report = None
    if args.backbone is not None:
        with torch.device("meta"):
            classes = args.classes or found.classes or 2
            model = build_model(args.backbone, args.decoder, num_classes=classes)
        _, report = fit(model, found, source=source)
    if args.json:
        print(json.dumps(about | {"report": report.to_dict() if report else None}))
        return
    print(f"{source}: {found.title}")
    print(f"  backbone  {', '.join(found_names(about)) or 'none of segkit has its structure'}")
    print(f"  decoder   {about['decoder'] or 'of segkit'}")
    print(f"  classes   {'unknown' if found.classes is None else found.classes}")
    print(f"  entries   {about['entries']:,}, {about['values']:,} values")
    if report:
        _show(report)


def found_names(about: dict[str, Any]) -> list[str]:
    """Backbones that fit, as they are to be configured."""
    window = f" (window {about['windows'][0]})" if about["windows"] else ""
    return [f"{name}{window}" for name in about["backbones"]]


def _show(report: Report) -> None:
    print(f"would load {len(report.loaded):,} entries of this model")
    for word, reasons in (("left fresh", report.fresh), ("skipped", report.skipped)):
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            print(f"  {word}, {reason}: {', '.join(names[:3])}{more}")
    for note in report.notes:
        print(f"  note: {note}")


def _component(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not a JSON object: {error}") from error


if __name__ == "__main__":
    command.run(main)
