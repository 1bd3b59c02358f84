"""HTML pages: of a run, of runs compared, and of a data set."""

from segkit.report.gallery import Gallery, record
from segkit.report.run_page import write_run_page
from segkit.report.text import candidate_table, class_table, details_table, score_table

__all__ = [
    "Gallery",
    "candidate_table",
    "class_table",
    "details_table",
    "record",
    "score_table",
    "write_run_page",
]
