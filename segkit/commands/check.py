"""Read a whole data set and report every fault at once: ``segkit check``."""

import functools
import inspect
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any

from segkit.commands import console
from segkit.core import config
from segkit.core.errors import ConfigError, DataError
from segkit.data import SOURCES, part_spec
from segkit.data.doubts import describe, label_doubts, seen
from segkit.data.folds import class_pixels, read_groups
from segkit.data.source import Fault, Source, unreadable
from segkit.report.survey import shared_images

PARTS = ("train", "val", "test", "test_labels")


def faults(data: config.DataConfig, sources: dict[str, Source] | None = None) -> Iterator[Fault]:
    """Yield every fault of the data that a configuration names, part by part.

    Every image and mask is read. A part that cannot be opened at all is one fault. ``sources`` is
    filled with the sources that could be opened, without faulty images.

    Raises:
        ConfigError: There is no part, or a part has no source or invalid arguments.
    """
    makers = {
        part: config.bind(SOURCES, spec, f"data.{part}")
        for part in PARTS
        if (spec := part_spec(data, part)) is not None
    }
    if not makers:
        raise ConfigError(f"data: names no images; expected one of {', '.join(PARTS)}")
    classes: tuple[str, ...] | None = None
    for part, make in makers.items():
        where = f"data.{part}"
        try:
            source, source_faults = _inspect(make)
            if part == "train":
                read_groups(data.groups, data.group_pattern, source.names)
        except DataError as error:
            yield Fault(f"{where}: {error}", file=where)
            continue
        if sources is not None:
            sources[where] = source
        for fault in source_faults:
            yield Fault(f"{where}: {fault.sentence}", fault.file, fault.annotation)
        if source.labelled and classes not in (None, source.classes):
            yield Fault(
                f"{where} has the classes {', '.join(source.classes)}, but the parts before it "
                f"{', '.join(classes or ())}; expected the same everywhere",
                file=where,
            )
        elif source.labelled:
            classes = source.classes


def _inspect(make: functools.partial[Any]) -> tuple[Source, Collection[Fault]]:
    """Return the source without its faulty images, and all its faults."""
    if "on_error" in inspect.signature(make).parameters:
        source = make(on_error="skip")
        return source, source.faults
    source = make()
    return source, unreadable(source).values()


def main(argv: list[str]) -> None:
    """Print every fault and what training would see; raise a DataError if there is any fault."""
    parser = console.parser("check", __doc__)
    console.add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="print each fault as a JSON object")
    args = parser.parse_args(argv)
    count = 0
    sources: dict[str, Source] = {}
    for fault in faults(config.load(args.cfg, args.set).data, sources):
        print(json.dumps(asdict(fault)) if args.json else fault.sentence, flush=True)
        count += 1
    begin = "" if count else "no faults found"
    for line in _labels(sources, begin, as_json=args.json):
        print(line, flush=True)
    if count:
        raise DataError(f"faults found: {count}; correct them, or set on_error to 'skip'")


def _labels(sources: dict[str, Source], begin: str, *, as_json: bool) -> Iterator[str]:
    """Yield what is read from each part, doubts about its labels, and what training would see."""
    last = [begin] if begin else []
    for where, source in sources.items():
        pixels = class_pixels(source, os.cpu_count() or 1) if source.labelled else None
        if not as_json:
            yield f"{where}: {describe(source)}"
        for sentence in label_doubts(source, pixels) if pixels is not None else ():
            doubt = {"doubt": sentence, "file": where}
            yield json.dumps(doubt) if as_json else f"{where}: warning: {sentence}"
        if where == "data.train" and pixels is not None:
            last.append(f"training would see {seen(source, pixels)}")
    compared = {where: source for where, source in sources.items() if where != "data.test_labels"}
    for sentence in shared_images(compared) if len(compared) > 1 else ():
        yield json.dumps({"doubt": sentence}) if as_json else f"warning: {sentence}"
    if last and not as_json:
        yield "; ".join(last)
