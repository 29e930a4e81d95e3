"""Which matrices a recipe's names mean, and what each of them is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from infctx.adapters.patterns import nearest_names
from infctx.errors import RecipeError

Value = TypeVar("Value", int, float)


def target_matrices(model: nn.Module, targets: Sequence[str], *, with_embedding: bool, kind: str) -> list[str]:
    """Full names of the matrices that targets mean, in the model's order.

    Args:
        targets: a name or its last part or parts ("key", "channel_mix.key"); globs ("blocks.2*.time_mix.*").
        with_embedding: whether this kind can be put on an embedding.
        kind: for the message.
    Raises:
        RecipeError: a target matches no matrix, or an embedding that it cannot; names the nearest, and the kinds.
    """
    if not targets:
        raise RecipeError("adapter.targets: expected at least one matrix name, got an empty list.")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for target in targets:
        if not any(is_meant(name, target) for name in modules):
            raise RecipeError(f"adapter.targets: {target!r} matches no matrix. {nearest_names(target, modules)}")
    meant = [name for name in modules if any(is_meant(name, target) for target in targets)]
    embeddings = [name for name in meant if isinstance(modules[name], nn.Embedding)]
    if embeddings and not with_embedding:
        raise RecipeError(
            f"adapter.targets: {embeddings[0]!r} cannot be a target with adapter.kind {kind}: peft puts it on matrix "
            "products only. Leave it out, or use adapter.kind: lora, rslora or dora."
        )
    if embeddings and getattr(model, "token_cat", None) is not None:
        raise RecipeError(
            "adapter.targets: 'embedding' cannot be a target in a GoldFinch: attention makes keys of the rows "
            "themselves. Train it as it is: adapter.train_also: [embedding.weight]."
        )
    if "token_cat.decompress" in meant:
        raise RecipeError(
            "adapter.targets: 'token_cat.decompress' cannot be a target: attention makes keys of the matrix itself. "
            "Train it as it is: adapter.train_also: [token_cat.*]."
        )
    return meant


def by_matrix(
    matrices: Sequence[str], default: Value, exceptions: Mapping[str, Value], *, key: str
) -> dict[str, Value]:
    """The value of each matrix: the default, or that of the last exception that means it.

    Args:
        exceptions: value by name or glob, as in `target_matrices`.
        key: the recipe key they come from, for the message.
    Raises:
        RecipeError: an exception means none of the matrices; names the nearest.
    """
    values = dict.fromkeys(matrices, default)
    for pattern, value in exceptions.items():
        hits = [name for name in matrices if is_meant(name, pattern)]
        if not hits:
            raise RecipeError(f"{key}: {pattern!r} matches none of the targets. {nearest_names(pattern, matrices)}")
        values.update(dict.fromkeys(hits, value))
    return values


def is_meant(name: str, pattern: str) -> bool:
    """Whether a pattern is a name or its last parts, either of them as a glob."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
