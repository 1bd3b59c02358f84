"""Safe reading of a data set's files: limited in size, never outside their folder."""

import functools
import json
import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from segkit.core.errors import DataError, reason
from segkit.core.files import require_regular_file

MAX_BYTES = 1 << 31
"""Maximum size of a text or JSON file (the largest of COCO has 0.45 GB, of LVIS 1.1 GB)."""

NO_TEXT = re.compile("[\0-\x1f\x7f\ud800-\udfff]")
"""Characters not allowed in names: control characters, and lone surrogates (invalid in UTF-8)."""


def check_name(name: str) -> None:
    """Raise an error if a file name is invalid or leads out of its folder.

    Raises:
        DataError: The name is empty, absolute, contains ``..`` or control characters.
    """
    if not name or NO_TEXT.search(name):
        raise DataError(f"the file name {name!a:.200} is not valid; rename the file")
    # PureWindowsPath recognizes every kind of absolute path: /a, C:\a, C:a and \\server\a
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise DataError(
            f"the file name '{name:.200}' leads out of the data folder; "
            "expected a path relative to it, without '..'"
        )


def existing_name(root: Path | str, name: str) -> str:
    """Return a file's name in the form in which it is in the folder ``root``.

    Tools of Windows write backslashes, and tools of the web percent signs ("my%20photo.jpg"). A
    name that is there in no form is returned as it is.
    """
    if not {"\\", "%"} & {*name}:
        return name
    for form in (name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/")):
        if NO_TEXT.search(form) or os.path.exists(os.path.join(root, form)):
            return form
    return name


def inside(root: Path | str, name: str) -> Path:
    """Return the path of ``name`` in the folder ``root``.

    Raises:
        DataError: The name, or a symbolic link in the path, leads out of ``root``.
    """
    check_name(name)
    path = Path(root, name)
    try:
        resolved = path.resolve()
        loops = resolved.is_symlink()  # from Python 3.13 on, such a link resolves to a link
    except (OSError, RuntimeError):  # before it, an error
        loops = True
    if loops:
        raise DataError(f"{path} is a symbolic link to itself; put the file there")
    if not resolved.is_relative_to(_resolved(os.path.abspath(root))):
        raise DataError(
            f"{path} is a symbolic link out of the data folder; put a copy of the file there"
        )
    return path


@functools.lru_cache(maxsize=64)  # many images share a folder
def _resolved(root: str) -> Path:
    return Path(root).resolve()


def read_text(path: Path | str) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        DataError: The file is missing, unreadable, larger than :data:`MAX_BYTES`, or not UTF-8.
    """
    path = Path(path)
    try:
        size = require_regular_file(path).stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path} has {size:,} bytes; expected at most {MAX_BYTES:,}: divide it")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path in the configuration") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); check the path") from error
    except ValueError as error:  # a NUL in the path, or bytes that are not UTF-8
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def read_json(path: Path | str) -> dict[str, Any]:
    """Return the JSON object in a file. NaN and infinities are accepted as floats.

    Raises:
        DataError: As in :func:`read_text`, or the text is not a JSON object.
    """
    return _read_json(path, dict, "an object {}")


def read_json_list(path: Path | str) -> list[Any]:
    """Return the JSON list in a file, as :func:`read_json` returns an object."""
    return _read_json(path, list, "a list []")


def _read_json(path: Path | str, kind: type, expected: str) -> Any:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); write the file again") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} contains a JSON {type(content).__name__}; expected {expected}")
    return content
