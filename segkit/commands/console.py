"""What all commands share: their options, their output, and how each of them ends.

A command ends here and nowhere else. An error is never waited on: data-loader workers are killed,
threads and ranks that wait in a collective are left, and the message is the last line on stderr.
"""

import argparse
import io
import json
import logging
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from segkit.core import distributed
from segkit.core.errors import (
    LOST_RANK,
    SegkitError,
    explain,
    is_out_of_memory,
    memory_summary,
    summary,
)

MEMORY_TO_PREDICT = "lower infer.batch_size, or set infer.tile to a smaller side"
"""What to do where an evaluation or a prediction needs more memory than there is."""


def run(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> NoReturn:
    """Run a command: exit code 0 done, 1 an error, 2 wrong usage (argparse), 130 interrupted.

    An error that a user can mend is one sentence on stderr; with ``--debug`` its traceback comes
    before it. Any other is a bug: its traceback is printed, and a last line that says so.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _show
    sys.stdout, sys.stderr = _open_output(sys.stdout), _open_output(sys.stderr)
    try:
        main(arguments)
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or "--debug" in arguments:
            traceback.print_exc()
        if sentence is None:
            sentence = f"this is a bug, of segkit or of a package: {summary(error)}"
        _report_to_torchrun(sentence)
        end(sentence, 1)
    sys.exit(0)


def end(sentence: str, code: int) -> NoReturn:
    """Print ``sentence`` on stderr as the last line and end this process and its workers at once.

    Python's own exit is not used: it joins threads and child processes, and the process group waits
    for other ranks. Any of them may never come.
    """
    try:
        with suppress(ValueError):  # another thread than the main one
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for the killed
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()  # data-loader workers ignore SIGTERM
        for worker in workers:
            worker.join(1)
        # Where workers are not forked, their queues have names in the system, which this gives up.
        give_up = multiprocessing.util._exit_function  # type: ignore[attr-defined]
        cleaning = threading.Thread(target=give_up, daemon=True)
        cleaning.start()
        cleaning.join(2)
        with suppress(OSError, ValueError, RuntimeError):
            sys.stdout.flush()
        prefix = "" if os.environ.get("RANK", "0") == "0" else f"[rank {os.environ['RANK']}] "
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # what is left of a progress bar
        with suppress(OSError, ValueError, RuntimeError):
            print(f"{clear}{prefix}{sentence}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def end_without_peer() -> NoReturn:
    """End this rank because the process of another one ended; called by another thread.

    Most often the main thread notices too, or has an error of its own: it has two seconds to say.
    """
    time.sleep(2)
    end(LOST_RANK, 1)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn running out of memory within the block into one sentence, which ends with ``advice``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SegkitError(f"{memory_summary(error)}: {advice}") from error


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
        "--device",
        metavar="NAME",
        help="as torch names it: cpu, cuda, cuda:1, mps, xpu; default: cuda where there is one",
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


class Stop:
    """Within its block, SIGTERM or SIGINT ends the run, saved, after the step under way.

    A second one ends it at once. torchrun passes on what it gets, so a rank that is in a process
    group with it gets each signal twice: within two seconds they count once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.pending = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.pending:
            self.pending, self._time = number, now
        elif not dist.is_torchelastic_launched() or now - self._time > 2:
            end("interrupted", 130)

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name

    def asked(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; all ranks call it after the same step."""
        if distributed.world_size() == 1:
            self.signal = self.pending
        else:
            asked = torch.tensor([self.pending], device=device)
            self.signal = int(distributed.maximum(asked))
        return self.signal > 0


def _report_to_torchrun(sentence: str) -> None:
    """Give torchrun the sentence for its own report, which comes after it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not sentence.startswith(LOST_RANK):  # the report begins with the first cause
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))


class _Output(io.FileIO):
    """A standard stream that drops what is written once its reader is gone (``| head``).

    The command goes on to its end, so that a training is not lost with the pager that showed it.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _open_output(stream: Any) -> Any:
    """The same standard stream, as an :class:`_Output`."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # none, or one of whoever embeds this process
    stream.flush()
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
