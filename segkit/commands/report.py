"""Write the pages of runs: a comparison of a folder's runs, or the page of one run.

segkit report runs             # runs/index.html, and each run's report.html
segkit report runs/demo-1      # runs/demo-1/report.html
"""

import argparse
import warnings
from pathlib import Path
from urllib.parse import quote

from segkit.commands import console
from segkit.core.errors import SegkitError
from segkit.core.files import write_text
from segkit.core.run import Run
from segkit.inference.origin import refuse_foreign
from segkit.report.blocks import MARK
from segkit.report.index_page import index_page
from segkit.report.log import RunLog
from segkit.report.run_page import run_page


def main(argv: list[str]) -> None:
    """Write the pages and print the path of the main one."""
    parser = argparse.ArgumentParser(
        prog="segkit report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, help="a folder of runs, or one run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    alone = (args.runs / "config.json").is_file()
    folders = [args.runs] if alone else [path.parent for path in args.runs.glob("*/config.json")]
    if not folders:
        raise SegkitError(
            f"{args.runs}: holds no run; expected a run's folder, or a folder of runs"
        )
    folders.sort(key=lambda folder: (folder / "config.json").stat().st_mtime, reverse=True)
    logs = [log for folder in folders if (log := open_log(folder, alone=alone)) is not None]
    pages = [log.run.folder / "report.html" for log in logs]
    for page in [*pages, *([] if alone else [args.runs / "index.html"])]:
        refuse_foreign(page, MARK.encode())
    links = {}
    for log in logs:
        write_text(log.run.folder / "report.html", run_page(log))
        links[log.name] = f"{quote(log.name)}/report.html"
    if not alone:
        title = f"Runs in {args.runs.resolve().name}"
        write_text(args.runs / "index.html", index_page(logs, title=title, links=links))
    print(args.runs / ("report.html" if alone else "index.html"))


def open_log(folder: Path, *, alone: bool) -> RunLog | None:
    """Read a run; return ``None`` with a warning if it is unreadable and not ``alone``."""
    try:
        return RunLog(Run(folder))
    except SegkitError as error:
        if alone:
            raise
        warnings.warn(f"{error}; left out", stacklevel=2)
        return None


if __name__ == "__main__":
    console.run(main)
