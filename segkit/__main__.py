"""Command ``segkit``: ``segkit train --cfg demo``, or ``python -m segkit train --cfg demo``."""

import sys
from typing import NoReturn

from segkit import infer, train
from segkit.commands import augment, check, console, demo, explore, plan, reference, report, weights
from segkit.core.errors import closest, quoted

COMMANDS = {
    "plan": (plan.main, "write a configuration for a folder of labelled photographs"),
    "train": (train.main, "train the folds of a configuration"),
    "infer": (infer.main, "predict with trained runs: soups, test-time augmentation, votes"),
    "check": (check.main, "read a data set and list all faults"),
    "explore": (explore.main, "write a page about labelled images"),
    "report": (report.main, "write the pages of runs"),
    "weights": (weights.main, "show the model of a weights file and what would be loaded"),
    "augment": (augment.main, "draw augmented training images"),
    "list": (reference.main, "print components, their arguments and defaults"),
    "demo": (demo.main, "draw the demo data set"),
}


def main() -> NoReturn:
    """Run the subcommand given on the command line."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: segkit COMMAND [options]\n\ncommands:")
        for command, (_, text) in COMMANDS.items():
            print(f"  {command:<10}{text}")
        print("\nsegkit COMMAND --help lists a command's options")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"segkit: unknown command {quoted(name)}{closest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    console.run(COMMANDS[name][0], arguments)


if __name__ == "__main__":
    main()
