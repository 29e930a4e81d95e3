"""What a person sees of a run's data before it is trained on: in the terminal, as a page to share, or as JSON."""

from infctx.data_view.facts import DataFacts, account_with_facts, measure
from infctx.data_view.opened import DataToView
from infctx.data_view.page import check_page, write_page
from infctx.data_view.terminal import show_data

__all__ = [
    "DataFacts",
    "DataToView",
    "account_with_facts",
    "check_page",
    "measure",
    "show_data",
    "write_page",
]
