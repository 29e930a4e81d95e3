"""What became of a run, as a page: report.html, made from the files of the run folder alone."""

from infctx.report.facts import read_facts
from infctx.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "read_facts", "write_report"]
