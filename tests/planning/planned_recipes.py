"""Recipes for tests of plans: keys by section over a small default."""

from __future__ import annotations

from typing import Any

from infctx.model.config import FinchConfig
from infctx.model.init import new_config
from infctx.recipe.schema import Recipe


def small_config() -> FinchConfig:
    """In the proportions of released models."""
    return new_config(version="6", n_layer=4, n_embd=128, vocab_size=1024)


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    """A recipe of documents with the exact gradient, LoRA and chunks of 1,024 tokens where nothing else is said."""
    default: dict[str, dict[str, Any]] = {
        "model": {"path": "none.pth"},
        "data": {"path": "none.txt"},
        "adapter": {"kind": "lora"},
        "bptt": {"chunk_tokens": 1024},
        "optimizer": {"lr": 1e-5},
        "run": {"folder": "none", "steps": 10},
    }
    return Recipe.model_validate({name: {**keys, **sections.get(name, {})} for name, keys in default.items()})
