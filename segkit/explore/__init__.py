"""Labelled photographs as a page: ``python -m segkit.explore``."""

from segkit.explore.findings import Findings, Part, findings
from segkit.explore.page import explore_page
from segkit.explore.survey import survey

__all__ = ["Findings", "Part", "explore_page", "findings", "survey"]
