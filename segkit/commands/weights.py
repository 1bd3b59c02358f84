"""Show the model of a weights file and which entries would be loaded: ``segkit weights FILE``."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from segkit.commands import console
from segkit.models.pretrained.loading import Report, fit, fitting, identify, output_norms, windows
from segkit.models.pretrained.reading import read_file
from segkit.models.segmenter import build_model


def main(argv: list[str]) -> None:
    """Describe the file; raise a CheckpointError if no entry would be loaded."""
    parser = console.parser("weights", __doc__)
    parser.add_argument("file", type=Path, help="a .pth, .pt or .safetensors file")
    parser.add_argument(
        "--backbone",
        type=_component,
        help="show which entries it would load: a name, or a JSON object",
    )
    parser.add_argument(
        "--decoder",
        type=_component,
        default="fcn",
        help="decoder of the model, with --backbone; default: fcn",
    )
    parser.add_argument(
        "--classes", type=int, help="number of classes of the decoder; default: the file's, or 2"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args = parser.parse_args(argv)
    source = str(args.file)
    state = read_file(args.file)
    checkpoint = identify(state, args.file, source=source)
    backbones = fitting(checkpoint)
    about: dict[str, Any] = {
        "file": source,
        "title": checkpoint.title,
        "backbones": [name.partition(" ")[0] for name in backbones],
        "windows": windows(checkpoint),
        "output_norms": bool(output_norms(checkpoint)),
        "decoder": checkpoint.decoder,
        "classes": checkpoint.classes,
        "entries": len(state),
        "values": sum(tensor.numel() for tensor in state.values()),
    }
    report = None
    if args.backbone is not None:
        classes = args.classes or checkpoint.classes or 2
        with torch.device("meta"):
            model = build_model(args.backbone, args.decoder, num_classes=classes)
        _, report = fit(model, checkpoint, source=source)
    if args.json:
        print(json.dumps(about | {"report": report and dataclasses.asdict(report)}))
        return
    print(f"{source}: {checkpoint.title}")
    print(f"  backbone  {', '.join(backbones) or 'none of segkit has its structure'}")
    decoder = checkpoint.decoder or "of segkit"
    print(f"  decoder   {checkpoint.reason if checkpoint.decoder is None else decoder}")
    print(f"  classes   {checkpoint.classes or 'unknown'}")
    print(f"  entries   {about['entries']:,}, {about['values']:,} values")
    if report:
        _show(report)


def _show(report: Report) -> None:
    print(f"would load {len(report.loaded):,} entries of this model")
    for word, reasons in (("newly initialized", report.initialized), ("skipped", report.skipped)):
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
