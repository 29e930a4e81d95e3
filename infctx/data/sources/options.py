"""What a recipe may say about the reading of a set, beyond its paths and format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infctx.data.sources.records import Rejection

OnReject = Callable[[Rejection], None]
"""Told of every unusable row; reading goes on with the next one when it returns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How the files of a set are read.

    Attributes:
        columns: of Parquet, the only columns to read, as far as a file has them; None = all.
        split, subset: of a Hugging Face set, the split and the configuration (None = the only one).
        exclude: patterns of files that code_repository leaves out of its folders, as for `find_files`.
    """

    columns: tuple[str, ...] | None = None
    split: str = "train"
    subset: str | None = None
    exclude: tuple[str, ...] = ()
