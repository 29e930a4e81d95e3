"""Warnings of ours on the command line: one line each, and once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import infctx
from infctx.checkpoint.switches import SUFFIX
from infctx.cli_output import warnings_for_people
from infctx.errors import InfctxWarning
from tests.conftest import random_finch


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GoldFinch as its authors' trainer leaves it, which does not say how it was trained."""
    path = tmp_path_factory.mktemp("untold") / "gold.pth"
    infctx.save_model(random_finch("goldfinch", n_embd=16), path)
    path.with_name(path.name + SUFFIX).unlink()
    return path


def test_one_line_without_a_place_in_the_code(cli: Any, untold: Path) -> None:
    # --check opens the model a second time.
    for options in (("--check",), ("--json",)):
        ended = cli("model", "info", untold, *options).ok()
        (line,) = ended.err.splitlines()
        assert line.startswith(f"Warning: {untold}: the file does not say how the model was trained")
        assert '{"use_v2": true, "use_one_minus_w": true, "rope": false}' in line
        assert ".py" not in line
        assert "Warning" not in ended.out
    assert ended.json["version"] == "goldfinch"


def test_nothing_where_the_file_beside_says_it(cli: Any, tmp_path: Path) -> None:
    infctx.save_model(random_finch("goldfinch", n_embd=16), tmp_path / "gold.pth")
    assert cli("model", "info", tmp_path / "gold.pth").ok().err == ""


def test_warnings_of_others_are_as_python_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    def warn() -> None:
        with warnings_for_people():
            warnings.warn("theirs", FutureWarning, stacklevel=1)
            for _ in range(2):
                warnings.warn("ours", InfctxWarning, stacklevel=1)

    with pytest.warns(FutureWarning, match="theirs"):
        warn()
    assert capsys.readouterr().err == "Warning: ours\n"
