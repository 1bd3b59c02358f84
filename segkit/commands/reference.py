"""Describe every setting and component from its annotations and docstring: ``segkit list``.

    segkit list                 # the kinds of components
    segkit list losses          # the losses
    segkit list losses dice     # its arguments

``--help SECTION`` of other commands and docs/configuration.md have the same source.
"""

import argparse
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from segkit.augment.pipeline import DEFAULT_P, GIVEN, OPERATIONS
from segkit.commands import console
from segkit.core import config
from segkit.core.errors import ConfigError, closest, quoted
from segkit.data import SOURCES
from segkit.inference.tta import SETS, SYMMETRIES
from segkit.models.backbones import BACKBONES
from segkit.models.decoders import DECODERS
from segkit.training.losses import LOSSES
from segkit.training.optim import OPTIMIZERS, SCHEDULES
from segkit.training.tracking import TRACKERS

WIDTH = 80


class Setting(NamedTuple):
    """A key of a section, or an argument of a component.

    Attributes:
        default: JSON text; ``None`` if the argument is required.
    """

    name: str
    type: str
    default: str | None
    help: str

    @property
    def kind(self) -> str:
        """Type and default in words."""
        return f"{self.type}, {'required' if self.default is None else f'default {self.default}'}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a required argument has no default."""
        default = {} if self.default is None else {"default": json.loads(self.default)}
        return {"name": self.name, "type": self.type, "help": self.help, **default}


class ComponentKind(NamedTuple):
    """Components of one kind: their registry, their key, and the arguments that segkit passes."""

    registry: Mapping[str, Callable[..., Any]]
    key: str
    given: tuple[str, ...] = ()


KINDS = {
    "backbones": ComponentKind(BACKBONES, "model.backbone"),
    "decoders": ComponentKind(
        DECODERS, "model.decoder", given=("channels", "strides", "num_classes")
    ),
    "losses": ComponentKind(LOSSES, "loss.terms"),
    "augmentations": ComponentKind(OPERATIONS, "augment.train", GIVEN),
    "optimizers": ComponentKind(OPTIMIZERS, "optim.optimizer", given=("groups", "lr")),
    "schedules": ComponentKind(SCHEDULES, "optim.schedule", given=("progress",)),
    "sources": ComponentKind(SOURCES, "data.train"),
    "trackers": ComponentKind(TRACKERS, "track.trackers", given=("run", "fold", "step")),
}

KEYS = {kind: group.key for kind, group in KINDS.items()} | {
    "views": "infer.tta",
    "configs": "--cfg",
}
"""Kinds of components, and the key or option that takes them."""

VIEWS = {
    **dict.fromkeys(SYMMETRIES, "flip or quarter turn"),
    "identity": "the image unchanged",
    "scaleX": "resized by the factor X, 0.05 to 20, such as scale1.5",
    "rotateX": "rotated by X degrees, -45 to 45, such as rotate5",
    "A*B": "product of views, such as hflip*scale1.5",
    "flips": f"set of {', '.join(SETS['flips'])}",
    "square": "set of all flips and quarter turns",
    "flip_rotate_scale": "set of hflip or not, rot90 or not, and scales 1, 0.75, 1.25 and 1.5",
}


def sections() -> dict[str, list[Setting]]:
    """Return the settings of each section of a configuration."""
    own = [Setting("base", "a string or null", "null", "configuration that this one builds on")]
    parts: dict[str, list[Setting]] = {"": own}
    for field in dataclasses.fields(config.Config):
        if dataclasses.is_dataclass(field.type):
            keys = dataclasses.fields(field.type)  # type: ignore[arg-type]
            parts[field.name] = [_setting(key) for key in keys]
        else:
            own.append(_setting(field))
    return parts


def _setting(field: dataclasses.Field) -> Setting:
    make = field.default_factory
    default = make() if callable(make) else field.default
    low, high = (field.metadata[end] for end in ("low", "high"))
    kind = config.type_description(field.type)
    if high is not None:
        kind += f", {low:.10g} to {high:.10g}"
    elif low is not None:
        kind += f", {low:.10g} or more"
    return Setting(field.name, kind, json.dumps(default), field.metadata["help"])


def arguments(target: Callable[..., Any], given: Sequence[str] = ()) -> list[Setting]:
    """Return the arguments of a component, in the order of its signature, without those ``given``.

    Their meaning is taken from its docstring, and from that of the class that it builds.
    """
    hints = config.hints(target)
    make = config.constructor(target)
    made = make if inspect.isclass(make) else hints.get("return", object)
    texts: dict[str, str] = {}
    for documented in reversed(made.__mro__):
        texts |= _documented(documented)
    if hints.get("output_stride") is int:  # not a choice
        texts["output_stride"] = "Must be 32: this backbone has no dilated form."
    texts |= _documented(make)
    return [
        Setting(
            name,
            config.type_description(hints[name]),
            None if parameter.default is parameter.empty else json.dumps(parameter.default),
            texts.get(name, ""),
        )
        for name, parameter in config.settable(target, given).items()
    ]


def settings_of(kind: str, name: str) -> list[Setting]:
    """Return the arguments of a component, with those that all of its kind have."""
    target = KINDS[kind].registry[name]
    settings = arguments(target, KINDS[kind].given)
    if kind == "losses":
        settings.append(Setting("weight", "a number", "1.0", "Coefficient of the loss in the sum."))
    if kind == "augmentations":
        chance = json.dumps(DEFAULT_P.get(name, 1.0))
        settings.append(Setting("p", "a number", chance, "Probability of the operation."))
    return settings


def _documented(target: Any) -> dict[str, str]:
    """Return the text of each argument in the ``Args`` section of a docstring."""
    section = re.search(r"^Args:\n((?: +.*\n?|\n)*)", _plain(target.__doc__), re.MULTILINE)
    items = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in items}


def _plain(docstring: str | None) -> str:
    """Return a docstring without the markup of roles and literals, and with JSON's null."""
    text = re.sub(r"(?::\w+:)?`+([^`]*)`+", r"\1", inspect.cleandoc(docstring or ""))
    return re.sub(r"\bNone\b", "null", text)


def summary(target: Callable[..., Any]) -> str:
    """Return the first line of a component's docstring."""
    return _plain(config.constructor(target).__doc__).partition("\n")[0]


# ---- text of at most 80 columns


def _wrap(text: str, indent: str, first: str | None = None) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent if first is None else first, subsequent_indent=indent,
        break_on_hyphens=False,
    )  # fmt: skip


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and their texts in two columns."""
    rows = list(rows)
    width = min(24, max(len(name) for name, _ in rows)) + 4
    return "\n".join(
        _wrap(text, " " * width, first=f"  {name}".ljust(width - 1) + " ") if text else f"  {name}"
        for name, text in rows
    )


def _details(settings: Iterable[Setting], prefix: str = "") -> str:
    return "\n".join(
        _wrap(each.kind, "    ", first=f"  {prefix}{each.name}: ")
        + "\n"
        + _wrap(each.help, "      ")
        for each in settings
    )


def overview() -> str:
    """Return all sections, and what each of their keys is, for ``--help``."""
    lines = ["settings, in the configuration or by --set SECTION.KEY=VALUE:"]
    for section, settings in sections().items():
        if section:
            lines.append(f"\n{section}: {_about(section)}")
        lines.append(_table((each.name, each.help.partition(";")[0]) for each in settings))
    lines.append("\n--help SECTION shows types and defaults; 'segkit list' shows the components")
    return "\n".join(lines)


def _about(section: str) -> str:
    kind = next(f.type for f in dataclasses.fields(config.Config) if f.name == section)
    return (kind.__doc__ or "").strip()


def section_text(section: str) -> str:
    """Return the keys of a section with type, default and meaning."""
    return f"{section}: {_about(section)}\n\n" + _details(sections()[section], f"{section}.")


class _Help(argparse.Action):
    """``--help`` prints a command's help, ``--help SECTION`` a section's keys."""

    def __call__(self, parser: Any, _: Any, section: Any, option_string: Any = None) -> None:
        known = [name for name in sections() if name]
        if section is None:
            parser.print_help()
        elif section in known:
            print(section_text(section))
        else:
            parser.error(f"--help: unknown section {quoted(section)}{closest(section, known)}")
        parser.exit()


def parser(command: str, doc: str | None, *, bare: str) -> argparse.ArgumentParser:
    """Return a parser for a command with settings; its ``--help`` takes a section."""
    made = console.parser(command, doc, bare=bare, epilog=overview(), add_help=False)
    text = "show this help, or the keys of a section of the configuration"
    made.add_argument("-h", "--help", action=_Help, nargs="?", metavar="SECTION", help=text)
    return made


# ---- segkit list


def names(kind: str) -> dict[str, str]:
    """Return the names of a kind of components, each with one sentence."""
    if kind == "configs":
        return {name: config.load(name).note for name in config.shipped()}
    if kind == "views":
        return VIEWS
    return {name: summary(target) for name, target in KINDS[kind].registry.items()}


def component_text(kind: str, name: str) -> str:
    """Return a component's docstring and arguments."""
    group = KINDS[kind]
    doc = config.constructor(group.registry[name]).__doc__
    text = re.split(r"^(?:Args|Shape|Raises|Attributes):", _plain(doc), flags=re.M)[0]
    paragraphs = [_wrap(" ".join(part.split()), "") for part in text.strip().split("\n\n")]
    settings = settings_of(kind, name)
    shown = _details(settings) if settings else "It has no arguments."
    return "\n\n".join([f"{name}, for {group.key}", *filter(None, paragraphs), shown])


def main(argv: Sequence[str]) -> None:
    """Print the kinds, the names of a kind, or a component's arguments."""
    made = console.parser("list", __doc__)
    made.add_argument("kind", nargs="?", help="kind of components")
    made.add_argument("name", nargs="?", help="a component")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    args = made.parse_args(argv)
    value: Any = KEYS
    if args.markdown:
        text = page().rstrip()
    elif args.kind is None:
        text = _table((kind, f"{len(names(kind))} names for {key}") for kind, key in KEYS.items())
    elif args.kind not in KEYS:
        raise ConfigError(f"unknown kind {quoted(args.kind)}{closest(args.kind, KEYS)}")
    elif args.name is None:
        value = names(args.kind)
        text = _table(value.items())
    elif args.name not in (known := names(args.kind)):
        raise ConfigError(f"{args.kind}: unknown {quoted(args.name)}{closest(args.name, known)}")
    elif args.kind in KINDS:
        value = [setting.to_dict() for setting in settings_of(args.kind, args.name)]
        text = component_text(args.kind, args.name)
    else:
        value = known[args.name]
        text = _wrap(value, "")
    print(json.dumps(value) if args.json else text)


# ---- docs/configuration.md


def page() -> str:
    """Return docs/configuration.md, the reference of all settings and components."""
    return "".join(_page())


def _page() -> Iterator[str]:
    yield PREFACE
    for section, settings in sections().items():
        yield f"\n## {section}\n\n{_about(section)}\n\n" if section else "\n"
        yield _markdown(settings)
    yield COMPONENTS
    for kind, group in KINDS.items():
        yield f"\n## {kind.capitalize()}\n\nFor `{group.key}`.\n"
        described = [
            (name, summary(target), settings_of(kind, name))
            for name, target in group.registry.items()
        ]
        for (text, settings), same in groupby(described, key=lambda each: each[1:]):
            title = ", ".join(f"`{name}`" for name, *_ in same)
            yield f"\n{title}{': ' if text else ''}{text}\n"
            yield "\n" + _markdown(settings) if settings else ""
    yield "\n## Views\n\nFor `infer.tta` and `--tta`.\n\n"
    for name, text in VIEWS.items():
        yield f"- `{name}`: {text}\n"
    yield "\n## Shipped configurations\n\nFor `--cfg` and `base`.\n\n"
    for name, text in names("configs").items():
        yield f"- `{name}`: {text}\n"


def _markdown(settings: Iterable[Setting]) -> str:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, kind, default, text in settings:
        shown = "required" if default is None else f"`{default}`"
        lines.append(f"| `{name}` | {kind} | {shown} | {text} |")
    return "\n".join(lines) + "\n"


PREFACE = """# Configuration

<!-- Generated by `segkit list --markdown > docs/configuration.md`. Do not edit. -->

A configuration is a JSON object of sections. Every key has a default, so a file holds only what
differs. `--set SECTION.KEY=VALUE` changes a key for one run; the value is JSON, or a string.
`segkit train --help SECTION` and `segkit list KIND NAME` print this page's tables.

`base` names the configuration that a file builds on: a path relative to the file, or a name of
`configs/`. Sections are merged key by key, and the file's own values win. Lists, and components of
another name, are replaced whole. A run folder holds the merged configuration.

    {"base": "swin", "train": {"epochs": 30}, "optim": {"optimizer": {"weight_decay": 0.05}}}
"""

COMPONENTS = """
# Components

A component is an object of a `name` and arguments, `{"name": "dice", "smooth": 1.0}`, or the name
alone.
"""
