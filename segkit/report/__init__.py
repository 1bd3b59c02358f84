"""A run as a page, and runs beside each other: ``segkit report``."""

from segkit.report.gallery import Gallery
from segkit.report.run_page import record, write_run_page
from segkit.report.text import class_table, score_table

__all__ = ["Gallery", "class_table", "record", "score_table", "write_run_page"]
