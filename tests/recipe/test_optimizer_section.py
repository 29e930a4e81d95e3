"""What the optimizer section refuses, and what it fills in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from infctx.recipe.load import parse_recipe, recipe_text
from infctx.recipe.optimizer_section import OptimizerSection


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "sgd"},
        {"name": "adamw-4bit"},
        {"schedule": "wsd", "decay_fraction": 0.0},
        {"schedule": "wsd", "decay_fraction": 1.0},
        {"schedule": "wsd", "decay_fraction": 100},
        {"lr_multipliers": {"*": 0}},
        {"lr_multipliers": {"*": -1.0}},
        {"lr_multipliers": {"": 1.0}},
        {"lr_multipliers": ["*"]},
        {"state_lr": 0},
        {"z_loss": -1e-4},
        {"min_token_loss": 0},
        {"token_dropout": 1.0},
        {"token_dropout": -0.1},
        {"embedding_noise": -5},
        {"ema_decay": 0},
        {"ema_decay": 1.0},
    ],
)
def test_values_out_of_range_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimizerSection.model_validate({"lr": 1e-4, **keys})


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "exponential"])
def test_the_length_of_a_descent_belongs_to_wsd(schedule: str) -> None:
    with pytest.raises(ValidationError, match=rf"optimizer\.decay_fraction: means nothing with schedule {schedule}"):
        OptimizerSection.model_validate({"lr": 1e-4, "schedule": schedule, "decay_fraction": 0.1})


def test_both_problems_of_a_schedule_are_told() -> None:
    with pytest.raises(ValidationError, match=r"(?s)optimizer\.lr_final.*optimizer\.decay_fraction"):
        OptimizerSection.model_validate({"lr": 1e-4, "lr_final": 1e-5, "decay_fraction": 0.1})


def test_what_wsd_leaves_open_is_filled_in() -> None:
    section = OptimizerSection(lr=1e-4, schedule="wsd").resolved()
    assert (section.lr_final, section.decay_fraction) == (pytest.approx(1e-5), 0.1)
    kept = OptimizerSection(lr=1e-4, schedule="wsd", lr_final=0.0, decay_fraction=0.5).resolved()
    assert (kept.lr_final, kept.decay_fraction) == (0.0, 0.5)
    assert OptimizerSection(lr=1e-4).resolved() == OptimizerSection(lr=1e-4)


def test_factors_by_name_survive_a_recipe_file() -> None:
    text = """
model: {path: m.pth}
data: {path: d.txt}
optimizer: {lr: 1e-4, lr_multipliers: {"*.lora_B.*": 16, 'blocks.[01].*': 5e-1, head*: 2.5}}
run: {folder: r, steps: 1}
"""
    recipe = parse_recipe(text, name="r.yaml")
    assert recipe.optimizer.lr_multipliers == {"*.lora_B.*": 16.0, "blocks.[01].*": 0.5, "head*": 2.5}
    again = parse_recipe(recipe_text(recipe.resolved().to_mapping()), name="again.yaml")
    assert again.optimizer == recipe.optimizer


def test_eight_bit_moments_are_not_fused() -> None:
    with pytest.raises(ValidationError, match=r"optimizer\.fused: means nothing with optimizer.name adamw-8bit"):
        OptimizerSection.model_validate({"lr": 1e-4, "name": "adamw-8bit", "fused": True})
    assert OptimizerSection.model_validate({"lr": 1e-4, "fused": True}).fused is True
