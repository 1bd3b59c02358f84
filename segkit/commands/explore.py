"""A page to look at labelled photographs before training.

    segkit explore --cfg demo [--out explore.html] [--json]

Counts, sizes and positions of the objects of each class, the mean and deviation to normalize with,
near-duplicates that the split divides, labels that may be wrong, and examples of each class.
"""

import argparse
import json
from pathlib import Path

from segkit.commands import console
from segkit.core import config
from segkit.core.errors import ConfigError, DataError
from segkit.core.files import write_text
from segkit.data import open_source
from segkit.inference.origin import refuse_foreign
from segkit.report.blocks import MARK
from segkit.report.data_page import explore_page
from segkit.report.findings import Part, findings
from segkit.report.survey import survey


def open_parts(cfg: config.Config) -> list[Part]:
    """The parts to train on, to validate with and to predict, each read once."""
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to look at")
    parts = []
    for title in ("train", "val", "test"):
        if getattr(cfg.data, title) is not None:
            source = open_source(cfg, title, cached=False)
            parts.append(Part(title, source, survey(source, f"reading {title}")))
    if not parts[0].source.labelled:
        raise DataError("data.train: has no labels; expected labelled images to look at")
    return parts


def main(argv: list[str]) -> None:
    """Write the page and tell where."""
    parser = argparse.ArgumentParser(prog="segkit explore", description=__doc__)
    console.add_config_options(parser)
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="the page to write")
    parser.add_argument(
        "--json", action="store_true", help="print each doubt and near-duplicate as a JSON object"
    )
    args = parser.parse_args(argv)
    cfg = config.load(args.cfg, args.set)
    refuse_foreign(args.out, MARK.encode())
    parts = open_parts(cfg)
    found = findings(cfg, parts)
    write_text(args.out, explore_page(cfg, parts, found, title=Path(args.cfg).stem))
    if args.json:
        for line in found.lines():
            print(json.dumps(line))
    else:
        print(args.out)


if __name__ == "__main__":
    console.run(main)
