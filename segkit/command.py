"""How every command speaks and ends: how much it says, exit codes, errors in one sentence."""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from segkit.errors import LONGEST, SegkitError, reason, shorten


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command: 0 done, 1 a clear error, 2 bad usage (argparse), 130 interrupted.

    A clear error is one sentence on stderr; with ``--debug`` its traceback comes before it.
    """
    arguments = sys.argv[1:]
    warnings.showwarning = _show
    try:
        main(arguments)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except (SegkitError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # not about a file: a fault of ours, to be seen whole
        if "--debug" in arguments:
            traceback.print_exc()
        _end(_sentence(error), 1)
    sys.exit(0)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes that looks at a configuration's data."""
    parser.add_argument("--cfg", required=True, help="a path, or a name in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a model takes."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print errors only")
    volume.add_argument("--verbose", action="store_true", help="print every class's IoU too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def voice(*, quiet: bool = False, verbose: bool = False) -> Callable[[str], None]:
    """Set how much this process says, which is the level of the logger ``segkit``.

    Progress bars go by it too.

    Returns:
        A function that prints a line; nothing when quiet, and on ranks other than 0.
    """
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("segkit").setLevel(level)
    return _silent if quiet or os.environ.get("RANK", "0") != "0" else _say


def is_verbose() -> bool:
    """Whether ``--verbose`` was given."""
    return logging.getLogger("segkit").level == logging.DEBUG


def bold(text: str) -> str:
    """Text that stands out on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else f"\033[1m{text}\033[0m"


def _say(text: str) -> None:
    """Print a line at once: in a file it would come minutes after the lines on stderr."""
    print(text, flush=True)


def _silent(_: str) -> None:
    pass


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as people read it, without the line of code that gave it."""
    print(f"warning: {message}", file=sys.stderr)


def _sentence(error: SegkitError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{shorten(str(error.filename), LONGEST)}: {reason(error)}"
    return str(error)


def _end(sentence: str, code: int) -> NoReturn:
    """Exit at once: a peer that waits in a collective must not hold this rank's error back."""
    where = "" if os.environ.get("RANK", "0") == "0" else f"[rank {os.environ['RANK']}] "
    print(f"{where}{sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)
    sys.exit(code)
