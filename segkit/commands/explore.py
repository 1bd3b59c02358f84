"""Write a page about labelled images, to inspect before training.

    segkit explore --cfg demo [--out explore.html] [--json]

It shows counts, sizes and positions of the objects per class, mean and standard deviation for
normalization, near-duplicates that the split separates, suspicious labels, and examples per class.
"""

import json
from pathlib import Path

from segkit.commands import console
from segkit.core import config
from segkit.core.errors import ConfigError, DataError
from segkit.core.files import write_text
from segkit.data import open_source
from segkit.inference.origin import check_written_by_segkit
from segkit.report.data_page import data_page
from segkit.report.html import MARK
from segkit.report.survey import Part, find_problems


def main(argv: list[str]) -> None:
    """Write the page and print its path."""
    parser = console.parser("explore", __doc__)
    console.add_config_options(parser)
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="the page to write")
    parser.add_argument(
        "--json", action="store_true", help="print suspicious labels and near-duplicates as JSON"
    )
    args = parser.parse_args(argv)
    cfg = config.load(args.cfg, args.set)
    check_written_by_segkit(args.out, MARK.encode())
    parts = open_parts(cfg)
    findings = find_problems(cfg, parts)
    write_text(args.out, data_page(cfg, parts, findings, title=Path(args.cfg).stem))
    if args.json:
        for finding in findings.to_json():
            print(json.dumps(finding))
    else:
        print(args.out)


def open_parts(cfg: config.Config) -> list[Part]:
    """Read the parts ``train``, ``val`` and ``test`` of the data, those that are configured."""
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to look at")
    titles = [title for title in ("train", "val", "test") if getattr(cfg.data, title) is not None]
    parts = [Part(title, open_source(cfg, title, cached=False)) for title in titles]
    if not parts[0].source.labelled:
        raise DataError("data.train: has no labels; expected labelled images to look at")
    return parts


if __name__ == "__main__":
    console.run(main)
