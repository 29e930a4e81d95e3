"""What became of a run, as a page: report.html, made from the files of the run folder alone."""

from infctx.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
