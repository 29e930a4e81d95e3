"""Places without the folders of the machine."""

from pathlib import Path

import pytest

from infctx.data_view.places import without_folders


@pytest.mark.parametrize(
    ("sets", "text", "seen"),
    [
        ([["/w/p/rows/a.jsonl"]], "/w/p/rows/a.jsonl:3", "rows/a.jsonl:3"),
        ([["rows/a.jsonl", "../b.jsonl"]], "../b.jsonl:1", "../b.jsonl:1"),
        ([["s3://bucket/home/a.jsonl"]], "s3://bucket/home/a.jsonl:1", "s3://bucket/home/a.jsonl:1"),
        # Files outside are named from the folder they have in common.
        ([["/home/al/code/x/a.py", "/home/al/code/y/a.py"]], "/home/al/code/y/a.py:1", "y/a.py:1"),
        ([["/home/al/code/y/a.py", "/home/al/code/y/b.py"]], "/home/al/code/y/b.py:1", "b.py:1"),
        ([["/home/al/code/ya/b.py", "/home/al/code/yb/b.py"]], "/home/al/code/yb/b.py", "yb/b.py"),
        # What only the root or /home is common to would tell the rest.
        ([["/home/al/a.jsonl", "/home/bo/b.jsonl"]], "/home/al/a.jsonl:7 [tokens 0-9]", "a.jsonl:7 [tokens 0-9]"),
        ([["/home/al/a.jsonl", "/srv/b.jsonl"]], "/srv/b.jsonl:1", "b.jsonl:1"),
        ([["/home/al/data/a.jsonl"], ["/home/al/more/b.jsonl"]], "/home/al/more/b.jsonl:1", "b.jsonl:1"),
        ([["/home/al/data/a.jsonl"]], "because /home/al/data/a.jsonl is short", "because a.jsonl is short"),
        ([], "/elsewhere/x.jsonl:2", "x.jsonl:2"),
    ],
)
def test_places(sets: list[list[str]], text: str, seen: str) -> None:
    assert without_folders(sets, folder=Path("/w/p"))(text) == seen


def test_the_root_as_the_current_folder_is_no_prefix() -> None:
    assert without_folders([["/home/al/data/a.jsonl"]], folder=Path("/"))("/home/al/data/a.jsonl:1") == "a.jsonl:1"
