"""Draw the demo data set, scenes of litter with COCO labels: ``segkit demo DIR``.

It has photographs, train.json, test.json without labels, and test_labels.json for scoring.
"""

import inspect
from pathlib import Path

from segkit.commands import console
from segkit.data.demo import draw_demo


def main(arguments: list[str]) -> None:
    """Draw the demo data set into a new folder."""
    defaults = inspect.signature(draw_demo).parameters
    parser = console.parser("demo", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    for name, text in (
        ("train", "number of training images"),
        ("test", "number of test images"),
        ("size", "side of an image in pixels"),
        ("seed", "random seed of the drawings"),
    ):
        default = defaults[name].default
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    given = vars(parser.parse_args(arguments))
    del given["debug"]
    drawn = draw_demo(**given)
    print(f"{given['folder']}: {'drawn' if drawn else 'is there already'}")
