"""What a run did: a page and a few lines for the terminal."""

from .page import write_report
from .read import Run, read_run
from .verdict import summary

__all__ = ["Run", "read_run", "summary", "write_report"]
