"""Predict with trained runs: checkpoints → soup → views → vote → masks, submission, scores.

python infer.py
python infer.py --soup --tta
python infer.py --run-dir a --run-dir b --vote hard --images photographs/
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segkit.commands import console, reference
from segkit.core import checkpoint, distributed
from segkit.core.config import Config
from segkit.core.errors import ConfigError, DataError, SegkitError
from segkit.core.files import write_json
from segkit.core.run import Run
from segkit.data import open_source, reading
from segkit.data.photos import PhotoSource
from segkit.data.source import Source, background_of, positions
from segkit.inference.calibration import sharpened
from segkit.inference.candidate_predictor import CandidatePredictor
from segkit.inference.candidates import (
    SOUPS,
    VOTES,
    Candidate,
    comparison_candidates,
    final_candidate,
)
from segkit.inference.origin import mark_folders, update_origin
from segkit.inference.outputs import PALETTES
from segkit.inference.prediction import predicted_classes
from segkit.inference.pseudo import label_confident
from segkit.inference.results import NEED_PROBABILITIES, Results
from segkit.inference.run_soups import RunSoups
from segkit.inference.scoring import Scorer
from segkit.inference.trained_run import Images, TrainedRun, common_selection
from segkit.inference.tta import parse_views
from segkit.report import candidate_table, details_table, write_run_page

SCORES = "scores.json"


def main(argv: Sequence[str]) -> None:
    """Predict as given on the command line."""
    args = parse_arguments(argv)
    runs = [TrainedRun(Run.open(name), args.set) for name in args.run_dir or [None]]
    cfg = runs[0].config
    views = parse_views(args.tta or cfg.infer.tta) if args.tta is not None else ()
    say = console.printer(quiet=args.quiet, verbose=args.verbose)
    if args.weigh_views and cfg.infer.merge != "mean":
        raise ConfigError("infer.merge: --weigh-views needs the mean of probabilities; use 'mean'")
    left_out: list[str] = []
    lost = console.end_without_peer
    with (
        distributed.session(args.device, cfg.train.timeout, on_lost=lost) as device,
        console.memory_advice(console.MEMORY_TO_PREDICT),
        console.naming_options(allow_leak="--allow-leak", kind="--soup", vote="--vote"),
    ):
        photos = open_photos(args, runs)
        out, folder = prepare_folders(args, runs[0], photos.source if photos else None)
        predictor = CandidatePredictor(runs, device, folder=folder, allow_leak=args.allow_leak)
        votes = VOTES if args.compare else (args.vote,)
        scorer = Scorer(predictor, votes=votes, details=cfg.infer.details != "off")
        soups = RunSoups(scorer, folder, allow_leak=args.allow_leak)
        final = final_candidate(
            runs, kind=args.soup, views=views, fitted=args.weigh_views, vote=args.vote,
            soup_of=soups.soup,
        )  # fmt: skip
        if args.calibrate == "voters" and len(final.paths) > 1:
            final = replace(final, name=f"{final.name} calibrated", calibrated=True)
        temperature = predictor.temperature(final) if args.calibrate else 1.0

        # ---- the results
        results = None
        if photos is not None:
            results, photos = write_results(predictor, final, photos, out, temperature)
        elif distributed.is_main():
            update_origin(out, predictor.origin(final), [SCORES])
            say("data.test: is missing, so the models are only scored, on the selection set")
        if args.pseudo and photos is not None:
            given = args.quantile or args.confidence
            sentence = label_confident(
                args.pseudo, predictor, final, photos, given,
                quantiles=args.quantile is not None, temperature=temperature,
            )  # fmt: skip
            if distributed.is_main():
                print(sentence)

        # ---- scores of the final candidate and of those compared with it, if there are labels
        truth = open_truth(args, cfg, photos)
        if results is not None and truth is not None:
            names, true_mask = truth.source.names, truth.source.mask
            masks = ((i, results.mask(names[i]), true_mask(i)) for i in truth.rank_indices())
            scorer.count(masks, truth, record=final)
        # photographs have no labels, and the selection set is scored only if that is asked for
        selection = common_selection(runs) if args.compare or not args.images else None
        eval_sets = [images for images in (selection, truth) if images is not None]
        candidates = [final] if eval_sets else []
        known = truth is not None or photos is None
        if eval_sets and (args.compare or (known and not args.brief)):
            few = dict.fromkeys(["uniform", "greedy", args.soup or "greedy"])
            others = comparison_candidates(
                runs, final, kinds=SOUPS if args.compare else few, votes=votes,
                views_for_all=args.compare, soup_of=soups.soup,
            )  # fmt: skip
            candidates = [*others, final]
        calibrate = args.calibrate is not None
        rows = [scorer.row(each, final, eval_sets, calibrate=calibrate) for each in candidates]

        # ---- scores.json, the page, the table
        if distributed.is_main():
            write_json(out / SCORES, rows)
            if out.resolve() == (runs[0].folder / "infer").resolve():
                write_run_page(runs[0].run)  # the page shows only these results
            if rows:
                say(candidate_table(rows, eval_sets))
                say(details_table(rows, eval_sets[-1].title))
            say(f"written: {out}")
            if photos is not None:
                left_out += [fault.sentence for fault in photos.source.faults]
                left_out += (photos.left_out or {}).values()
            for sentence in left_out:
                print(f"left out: {sentence}", file=sys.stderr)
    if photos is not None and args.images and left_out:  # not in the session: only rank 0 raises
        count = len(left_out) + len(photos.indices)
        raise DataError(f"{len(left_out)} of {count} images cannot be read and have no results")


def open_photos(args: argparse.Namespace, runs: Sequence[TrainedRun]) -> Images | None:
    """Return the images to predict; ``None`` if there are none but a selection set to score on."""
    if args.images:
        given = PhotoSource(paths=tuple(args.images), **reading(runs[0].config.data))
        if given.notes and distributed.is_main():
            print("; ".join(given.notes), file=sys.stderr)
        source: Source = given
    elif runs[0].config.data.test is not None:
        source = open_source(runs[0].config, "test")
    elif args.pseudo or common_selection(runs) is None:
        raise ConfigError(
            "data.test: is missing, so there is nothing to predict; name photographs, or a folder "
            "of them: --images PHOTO.jpg"
        )
    else:
        return None
    # Every test image needs a result; unreadable files among --images are left out.
    return Images("test", source, list(range(len(source))), left_out={} if args.images else None)


def prepare_folders(
    args: argparse.Namespace, run: TrainedRun, source: Source | None
) -> tuple[Path, Path]:
    """Mark the folders of results, of soups and of --pseudo as segkit's; return the first two."""
    test = args.out or run.folder / "infer"
    out = run.folder / "infer-images" if args.images and not args.out else test
    if args.pseudo and args.pseudo.resolve() in (out.resolve(), test.resolve()):
        raise SegkitError(f"--pseudo {args.pseudo}: is the folder of the results; name another")
    if distributed.is_main():
        folders = dict.fromkeys([test, out, *([args.pseudo] if args.pseudo else [])])
        reads = [source.path(index) for index in range(len(source))] if source else []
        mark_folders(folders, reads=reads)
    distributed.barrier()
    return out, test


def open_truth(args: argparse.Namespace, cfg: Config, photos: Images | None) -> Images | None:
    """Return the predicted images with their labels, if there are labels."""
    if photos is None or args.images:
        return None
    if cfg.data.test_labels is None and not photos.source.labelled:
        return None
    source = open_source(cfg, "test_labels") if cfg.data.test_labels else photos.source
    return Images("test", source, positions(source, photos.source.names))


def write_results(
    predictor: CandidatePredictor,
    candidate: Candidate,
    photos: Images,
    out: Path,
    temperature: float,
) -> tuple[Results, Images]:
    """Predict and write this rank's images that have no result yet.

    ``temperature`` calibrates probabilities; the masks do not depend on it.

    Returns:
        The results, and the images that could be read.
    """
    run = predictor.runs[0]
    infer = run.config.infer
    classes = checkpoint.entries(candidate.paths[0])["classes"]
    category_ids = run.run.category_ids()
    results = Results(
        out, photos.source, classes=classes, outputs=infer.outputs,
        background=background_of(classes, category_ids), colors=PALETTES[infer.palette],
    )  # fmt: skip
    origin = {**predictor.origin(candidate), "temperature": temperature}
    missing = replace(photos, indices=results.start(origin, others=[SCORES]))
    soft = bool(NEED_PROBABILITIES.intersection(infer.outputs))
    predicted = predictor.predict(candidate, missing, soft=soft)
    total = len(missing.rank_indices())
    shown = distributed.Progress(predicted, "predict", total=total, unit="image", delay=0)
    for index, prediction, _ in shown:
        mask = predicted_classes(prediction) if soft else prediction
        results.write(index, mask, sharpened(prediction, temperature) if soft else None)
    if photos.left_out is not None:
        parts = distributed.gather(photos.left_out)
        left_out = distributed.broadcast(
            {key: text for part in parts for key, text in part.items()}
        )
        photos.left_out.update(left_out)
        readable = [index for index in photos.indices if index not in left_out]
        if not readable:
            raise DataError(f"{next(iter(left_out.values()))}; none of the images can be read")
        photos = replace(photos, indices=readable)
    distributed.barrier()
    if distributed.is_main():
        results.finish(photos.indices, category_ids=category_ids)
    return results, photos


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    bare = "give photographs as --images PATH, and a run as --run-dir DIR"
    parser = reference.parser("infer", "Predict with trained runs.", bare=bare)
    add = parser.add_argument
    add("--run-dir", action="append", metavar="DIR", help="a run (repeatable); default the newest")
    add(
        "--soup", nargs="?", const="greedy", choices=SOUPS,
        help="mix each run's folds into one model; default greedy",
    )  # fmt: skip
    add("--tta", nargs="*", metavar="VIEW", help="test-time augmentation; default views: infer.tta")
    add(
        "--weigh-views", action="store_true",
        help="fit a coefficient for each view on the selection set",
    )  # fmt: skip
    add("--vote", default="soft", choices=VOTES, help="how models are combined; default soft")
    add(
        "--calibrate", nargs="?", const="result", choices=("result", "voters"),
        help="fit a temperature of the probabilities on the selection set, for pseudo labels and "
        "the outputs soft and confidence; 'voters': of each model before a vote, too",
    )  # fmt: skip
    add("--images", nargs="+", metavar="PATH", help="images or folders instead of the test set")
    add(
        "--out", type=Path, metavar="DIR",
        help="folder of the results, new or of an earlier infer.py, whose results are replaced; "
        "default infer in the run, or infer-images with --images",
    )  # fmt: skip
    add(
        "--pseudo", type=Path, metavar="DIR",
        help="write confident predictions as labels to train on",
    )  # fmt: skip
    sure = parser.add_mutually_exclusive_group()
    sure.add_argument(
        "--confidence", nargs="+", type=fraction, default=[0.9], metavar="P",
        help="least probability of a pseudo label, one, or one per class; default 0.9",
    )  # fmt: skip
    sure.add_argument(
        "--quantile", nargs="+", type=fraction, metavar="Q",
        help="share of each class's pixels to leave unlabelled, instead of --confidence",
    )  # fmt: skip
    compare = parser.add_mutually_exclusive_group()
    compare.add_argument(
        "--compare", action="store_true",
        help="score every fold, soup and vote, with and without views; by default the most "
        "important of them if the test labels are known, and nothing with --images",
    )  # fmt: skip
    compare.add_argument("--brief", action="store_true", help="score the result only")
    add("--allow-leak", action="store_true", help="allow selection on images that were trained on")
    console.add_set_option(parser)
    console.add_run_options(parser)
    return parser.parse_args(argv)


def fraction(text: str) -> float:
    """Return a command-line argument as a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text}")
    return value


if __name__ == "__main__":
    console.run(main)
