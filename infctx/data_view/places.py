"""Where documents come from, without the folders of the machine they lie on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

# A folder such as /home/ says nothing that may not be told, but the next one does.
_FEWEST_PARTS = 2


def without_folders(sets_of_files: Iterable[Iterable[str]], *, folder: Path) -> Callable[[str], str]:
    """Make a function that shortens the places in a text.

    Args:
        sets_of_files: the files of each set. Those outside of `folder` are named from the folder they have in common.
        folder: what is in it is named from there.
    Returns: A function; a place that it does not know keeps its file name only.
    """
    here = f"{str(folder).rstrip('/')}/"
    prefixes = {here} if here != "/" else set()
    for files in sets_of_files:
        outside = [file for file in files if file.startswith("/") and not file.startswith(here)]
        if outside:
            # The first and the last in order have in common what all have.
            common = f"{os.path.commonpath([os.path.dirname(min(outside)), os.path.dirname(max(outside))])}/"
            if common.count("/") > _FEWEST_PARTS:
                prefixes.add(common)
    longest_first = sorted(prefixes, key=len, reverse=True)

    def shortened(text: str) -> str:
        for prefix in longest_first:
            text = text.replace(prefix, "")
        if text.startswith("/"):
            path, separator, rest = text.partition(":")
            return path.rsplit("/", 1)[1] + separator + rest
        return text

    return shortened
