"""Write a page about labelled images, to inspect before training.

    segkit explore --cfg demo [--out explore.html] [--json]

It shows counts, sizes and positions of the objects per class, mean and standard deviation for
normalization, near-duplicates that the split separates, suspicious labels, and examples per class.
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
    """Read the parts ``train``, ``val`` and ``test`` of the data, those that are configured."""
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
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(prog="segkit explore", description=__doc__)
    console.add_config_options(parser)
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="the page to write")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print suspicious labels and near-duplicates as JSON",
    )
    args = parser.parse_args(argv)
    cfg = config.load(args.cfg, args.set)
    refuse_foreign(args.out, MARK.encode())
    parts = open_parts(cfg)
    result = findings(cfg, parts)
    write_text(args.out, explore_page(cfg, parts, result, title=Path(args.cfg).stem))
    if args.json:
        for line in result.lines():
            print(json.dumps(line))
    else:
        print(args.out)


if __name__ == "__main__":
    console.run(main)
