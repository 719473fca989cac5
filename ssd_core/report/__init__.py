"""What a run did: a page and a few lines for the terminal."""

from ssd_core.report.page import write_report
from ssd_core.report.read import Run, read_run
from ssd_core.report.verdict import summary

__all__ = ["Run", "read_run", "summary", "write_report"]
