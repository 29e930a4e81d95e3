"""infctx check --gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_json_form(cli: Any, make_recipe: Callable[..., Path], tmp_path: Path, precision: str) -> None:
    answer = cli("check", make_recipe(run={"precision": precision}), "--gradient", "--json").ok().json
    assert answer.keys() == {"relative_error", "window_bias", "bound", "tokens"}
    assert answer["relative_error"].keys() == answer["window_bias"].keys()
    assert 0 < max(answer["relative_error"].values()) <= answer["bound"]
    assert not (tmp_path / "run").exists()


def test_people_get_a_table(cli: Any, make_recipe: Callable[..., Path]) -> None:
    shown = cli("check", make_recipe(), "--gradient").ok().out
    assert "Every error is within the bound of 0.0001." in shown
    assert "time_mix.decay_base" in shown


def test_an_error_beyond_the_bound_is_a_failure(
    cli: Any, make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("infctx.training.gradient_check", fromlist=["BOUNDS"]).BOUNDS, "fp32", 1e-12)
    ended = cli("check", make_recipe(), "--gradient")
    assert ended.code == 1
    assert "further than 1e-12" in ended.err
