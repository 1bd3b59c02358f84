"""Write the pages of runs: a comparison of the runs in a folder, or the page of a single run.

    segkit report runs             # runs/index.html, and each run's report.html
    segkit report runs/demo-1      # runs/demo-1/report.html

Pages that segkit wrote are replaced; other files are not.
"""

import warnings
from functools import partial
from pathlib import Path

from segkit.commands import console
from segkit.core.errors import SegkitError
from segkit.core.files import write_text
from segkit.core.run import Run
from segkit.inference.origin import check_written_by_segkit
from segkit.report.html import MARK
from segkit.report.index_page import index_page
from segkit.report.log import RunLog
from segkit.report.run_page import run_page


def main(argv: list[str]) -> None:
    """Write the pages and print the path of the main page."""
    parser = console.parser("report", __doc__)
    parser.add_argument("runs", type=Path, help="a folder of runs, or a run")
    folder = parser.parse_args(argv).runs
    if (folder / "config.json").is_file():
        logs = [RunLog(Run(folder))]
        pages = {}
    else:
        logs = open_logs(folder)
        title = f"Runs in {folder.resolve().name}"
        pages = {folder / "index.html": partial(index_page, logs, title=title)}
    pages |= {log.run.folder / "report.html": partial(run_page, log) for log in logs}
    for path in pages:
        check_written_by_segkit(path, MARK.encode())
    for path, page in pages.items():
        write_text(path, page())
    print(next(iter(pages)))


def open_logs(folder: Path) -> list[RunLog]:
    """Read the runs in a folder, the newest first; unreadable runs are left out with a warning."""
    configs = list(folder.glob("*/config.json"))
    if not configs:
        raise SegkitError(f"{folder}: holds no run; expected a run's folder, or a folder of runs")
    logs = []
    for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            logs.append(RunLog(Run(path.parent)))
        except SegkitError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
    return logs
