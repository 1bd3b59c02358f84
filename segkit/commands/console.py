"""Code that all commands share: options, output, error messages and exit codes.

A command ends only in this file. After an error it does not wait for anything: data-loader workers
are killed, threads and ranks that wait in a collective are abandoned, and the message is the last
line on stderr.
"""

import argparse
import functools
import io
import json
import logging
import multiprocessing.util
import os
import signal
import sys
import textwrap
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
    ArgumentError,
    SegkitError,
    explain,
    is_out_of_memory,
    memory_summary,
    summary,
)

MEMORY_TO_PREDICT = "lower infer.batch_size, or set infer.tile to a smaller side"
"""Advice for evaluation or prediction that runs out of memory."""


def run(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit: code 0 done, 1 error, 2 wrong usage (argparse), 130 interrupted.

    For an error that a user can fix, one sentence is printed on stderr, after the traceback with
    ``--debug``. Any other error is a bug: its traceback is printed, and a last line that says so.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _show
    sys.stdout, sys.stderr = _open_output(sys.stdout), _open_output(sys.stderr)
    try:
        main(arguments)
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as error:
        _ignore_ends_of_workers()
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

    Python's normal exit is not used: it joins threads and child processes, and the process group
    waits for other ranks. Any of these can block forever.
    """
    try:
        _ignore_ends_of_workers()
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()  # data-loader workers ignore SIGTERM
        for worker in workers:
            worker.join(1)
        # Workers that are not forked have queues with names in the system; this releases them.
        release = multiprocessing.util._exit_function  # type: ignore[attr-defined]
        cleaning = threading.Thread(target=release, daemon=True)
        cleaning.start()
        cleaning.join(2)
        with suppress(OSError, ValueError, RuntimeError):
            sys.stdout.flush()
        prefix = "" if os.environ.get("RANK", "0") == "0" else f"[rank {os.environ['RANK']}] "
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # erase the rest of a progress bar
        with suppress(OSError, ValueError, RuntimeError):
            print(f"{clear}{prefix}{sentence}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _ignore_ends_of_workers() -> None:
    """Turn off torch's handler, which raises an error when a worker was killed."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_without_peer() -> NoReturn:
    """End this rank because the process of another rank ended; called by a thread.

    The main thread usually detects this too, or has an error of its own: it gets two seconds to
    report it.
    """
    time.sleep(2)
    end(LOST_RANK, 1)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Convert an out-of-memory error in the block to a SegkitError that ends with ``advice``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SegkitError(f"{memory_summary(error)}: {advice}") from error


@contextmanager
def naming_options(**options: str) -> Iterator[None]:
    """Name options, such as ``resume="--resume"``, in errors, which name arguments."""

    def write(name: str, value: object) -> str:
        return options[name] if value is True else f"{options[name]} {value}"

    try:
        yield
    except ArgumentError as error:
        raise SegkitError(error.sentence(write)) from error


class _Parser(argparse.ArgumentParser):
    """A parser that says what to type for missing options and words without an option."""

    bare = ""

    def error(self, message: str) -> NoReturn:
        known = message.startswith(("unrecognized", "the following"))
        super().error(f"{message}; {self.bare}" if self.bare and known else message)


def parser(
    command: str, doc: str | None, *, bare: str = "", **options: Any
) -> argparse.ArgumentParser:
    """Return a parser with ``--debug``, whose help fits 80 columns.

    Paragraphs of ``doc`` with indented lines, such as examples, are kept as they are; ``bare`` is
    said where an option is missing.
    """
    paragraphs = (doc or "").replace("``", "").strip().split("\n\n")
    made = _Parser(
        prog=f"segkit {command}",
        description="\n\n".join(
            text if text.startswith("    ") else textwrap.fill(" ".join(text.split()), 80)
            for text in paragraphs
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    made.bare = bare
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that read a configuration."""
    parser.add_argument(
        "--cfg", required=True, metavar="NAME", help="a path, or a name in configs/"
    )
    add_set_option(parser)


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that run a model."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="device: cpu, cuda, cuda:1, mps, xpu; default: cuda if available, else cpu",
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print errors only")
    volume.add_argument("--verbose", action="store_true", help="also print the IoU of every class")


def printer(*, quiet: bool = False, verbose: bool = False) -> Callable[[str], None]:
    """Set the verbosity of this process, of progress bars too, and return a function that prints.

    Verbosity is the level of the logger ``segkit``. The function prints a line and flushes it, so
    that it keeps its order among lines of stderr; if quiet, and on ranks other than 0, it does
    nothing.
    """
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("segkit").setLevel(level)
    hidden = quiet or os.environ.get("RANK", "0") != "0"
    return (lambda _: None) if hidden else functools.partial(print, flush=True)


def is_verbose() -> bool:
    """Return True if ``--verbose`` was given."""
    return logging.getLogger("segkit").level == logging.DEBUG


_shown: set[str] = set()
"""Warnings that were printed."""


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning once, without the line of code that issued it."""
    if str(message) not in _shown:
        _shown.add(str(message))
        sys.stderr.write(f"warning: {message}\n")  # print writes the line break later: threads


class Stop:
    """Context in which SIGTERM or SIGINT stops and saves the run after the current step.

    A second signal ends it at once. torchrun forwards signals, so a rank in torchrun's process
    group receives each signal twice: two signals within two seconds count as one.
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
        """Return True if any rank received a signal; all ranks call this after the same step."""
        if distributed.world_size() == 1:
            self.signal = self.pending
        else:
            pending = torch.tensor([self.pending], device=device)
            self.signal = int(distributed.all_reduce(pending, maximum=True))
        return self.signal > 0


def _report_to_torchrun(sentence: str) -> None:
    """Write the sentence to the file from which torchrun makes its report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not sentence.startswith(LOST_RANK):  # torchrun reports the earliest failure
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))


class _Output(io.FileIO):
    """A standard stream that discards output after its reader has closed (``| head``).

    The command runs to its end, so that closing a pager does not end a training run.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _open_output(stream: Any) -> Any:
    """Return a standard stream as an :class:`_Output`."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # none, or replaced by a program that embeds segkit
    stream.flush()
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
