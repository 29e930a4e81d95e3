"""Reading a whole path, as every test here does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infctx.data.sources.catalog import ReadOptions, read_unit, whole
from infctx.data.sources.records import Record, Rejection, Unit

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]


@pytest.fixture
def read_all() -> ReadAll:
    """Gives a function: of a path or unit, all records and all rejections."""

    def read(source: str | Path | Unit, format: str = "auto", **options: Any) -> tuple[list[Record], list[Rejection]]:
        rejected: list[Rejection] = []
        unit = source if isinstance(source, Unit) else whole(str(source), format=format)
        return list(read_unit(unit, options=ReadOptions(**options), on_reject=rejected.append)), rejected

    return read
