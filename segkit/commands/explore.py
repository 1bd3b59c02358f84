"""Write a page about labelled images, to inspect before and after training.

    segkit explore --cfg demo [--out explore.html] [--json]
    segkit explore --run runs/demo-1 [--seen] [--device cpu]

It shows counts, sizes and positions of the objects per class, mean and standard deviation for
normalization, near-duplicates that the split separates, suspicious labels, and examples per class.

With ``--run`` each image is predicted by a fold that has not seen it. The page then also shows the
images whose annotation the models contradict, and lists of the contradicted regions are written
beside it, for annotators: explore.csv and explore.json.
"""

import argparse
import json
from pathlib import Path

from segkit.commands import console
from segkit.core import config, distributed
from segkit.core.errors import ConfigError, DataError
from segkit.core.files import write_text
from segkit.core.run import Run
from segkit.data import open_source
from segkit.inference.label_errors import (
    COLUMNS,
    region_rows,
    score_labels,
    unseen_images,
    write_region_lists,
)
from segkit.inference.origin import check_written_by_segkit
from segkit.inference.outputs import PALETTES
from segkit.inference.trained_run import TrainedRun
from segkit.report.contradictions import ContradictedImages
from segkit.report.data_page import data_page
from segkit.report.html import MARK
from segkit.report.survey import Part, find_problems

LIST_MARKS = {".csv": ",".join(COLUMNS), ".json": f'{{"columns": {json.dumps(COLUMNS)}'}
"""Text at the beginning of the lists, by which segkit recognizes those that it wrote."""


def main(argv: list[str]) -> None:
    """Write the page and print its path."""
    args = parse_arguments(argv)
    run = TrainedRun(Run.open(args.run), args.set) if args.run else None
    cfg = run.config if run else config.load(args.cfg, args.set)
    title = run.folder.name if run else Path(args.cfg).stem
    check_written_by_segkit(args.out, MARK.encode())
    contradicted = "" if run is None else find_contradictions(run, args)
    parts = open_parts(cfg)
    findings = find_problems(cfg, parts)
    page = data_page(cfg, parts, findings, title=title, contradicted=contradicted)
    write_text(args.out, page)
    if args.json:
        for finding in findings.to_json():
            print(json.dumps(finding))
    else:
        print(args.out)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = console.parser("explore", __doc__)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--cfg", metavar="NAME", help="a path, or a name in configs/")
    origin.add_argument("--run", metavar="DIR", help="a run, whose folds look for label errors")
    console.add_set_option(parser)
    parser.add_argument(
        "--seen", action="store_true",
        help="with --run: also score images that every fold trained on; their errors stay hidden",
    )  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="with --run: cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="the page to write")
    parser.add_argument(
        "--json", action="store_true", help="print suspicious labels and near-duplicates as JSON"
    )
    return parser.parse_args(argv)


def find_contradictions(run: TrainedRun, args: argparse.Namespace) -> str:
    """Write the lists of contradicted regions, and return their section of the page."""
    for suffix, mark in LIST_MARKS.items():
        check_written_by_segkit(args.out.with_suffix(suffix), mark.encode())
    _, rest = unseen_images(run)
    shown, scores = ContradictedImages(), []
    with (
        distributed.session(args.device) as device,
        console.memory_advice(console.MEMORY_TO_PREDICT),
        console.naming_options(seen="--seen"),
    ):
        for labels, predicted in score_labels(run, device=device, seen=args.seen):
            shown.add(labels, predicted)
            scores.append(labels)
    sources = {labels.part: run.source(labels.part) for labels in scores}
    rows = region_rows(scores, next(iter(sources.values())).classes)
    write_region_lists(rows, args.out)
    count = sum(len(images.indices) for images in rest)
    unseen = len(scores) - count * args.seen
    note = f"{unseen:,} images were predicted by a fold that has not seen them"
    if count and args.seen:
        note += f", {count:,} by a fold that has"
    elif count:
        note += (
            f"; {count:,} are not scored, because every fold trained on them (--seen scores them)"
        )
    if not args.json:
        print(f"{note}; {len(rows):,} regions: {args.out.with_suffix('.csv')}")
    return shown.section(
        sources, PALETTES[run.config.infer.palette],
        f"{note}. A score near 0 means that the model is sure of another class; the lists beside "
        "this page have the box of every region.",
    )  # fmt: skip


def open_parts(cfg: config.Config) -> list[Part]:
    """Read the parts ``train``, ``val`` and ``test`` of the data, those that are configured."""
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to look at")
    titles = [title for title in ("train", "val", "test") if getattr(cfg.data, title) is not None]
    parts = [Part(title, open_source(cfg, title, cached=False)) for title in titles]
    if not parts[0].source.labelled:
        raise DataError("data.train: has no labels; expected labelled images to look at")
    return parts
