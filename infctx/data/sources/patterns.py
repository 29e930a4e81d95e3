"""The names that paths may use, and the patterns of data.exclude."""

from __future__ import annotations

import fnmatch
import importlib.util
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from infctx.data.sources.files import is_url


def fill_in(path: str) -> str:
    """Replace `{stdlib}` by the folder of Python's standard library, and `{torch}` by that of the installed torch."""
    if "{stdlib}" in path:
        path = path.replace("{stdlib}", Path(sysconfig.get_path("stdlib")).as_posix())
    if "{torch}" in path:
        # Found without being imported, which takes seconds.
        torch = importlib.util.find_spec("torch")
        assert torch is not None
        assert torch.origin is not None
        path = path.replace("{torch}", Path(torch.origin).parent.as_posix())
    return path


def filled_patterns(exclude: Sequence[str]) -> list[str]:
    """The patterns of data.exclude, ready for `is_excluded`."""
    return [fill_in(pattern) for pattern in exclude]


def is_excluded(file: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the whole path, as it was given or made absolute; its `*` crosses folders."""
    names = {file} if is_url(file) else {Path(file).as_posix(), Path(file).absolute().as_posix()}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
