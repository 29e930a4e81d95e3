"""One model out of several of the same sizes, tensor by tensor: no more than one tensor of each is in memory.

Source: Ilharco et al., "Editing Models with Task Arithmetic"; slerp: Shoemake, "Animating Rotation with Quaternion
Curves".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from infctx.errors import CheckpointError
from infctx.model.tensors import ModelTensors, StoredTensor

METHODS = ("linear", "slerp", "task")
# Nearer to one line than this, the arc between two tensors is a line as well as float32 can tell, or has no direction.
_PARALLEL_COSINE = 0.9995
_BLOCK = 1 << 20
# Of a config: what no tensor's shape tells.
_NOT_IN_TENSORS = ("head_size", "uses_rope", "uses_value2", "weakens_keys")


def merge_models(
    sources: Sequence[ModelTensors],
    *,
    method: str,
    weights: Sequence[float],
    base: ModelTensors | None = None,
    dtype: torch.dtype | None = None,
    is_normalised: bool = True,
) -> ModelTensors:
    """Merge models of the same version, sizes and vocabulary.

    The arithmetic is float32 (float64 for float64 tensors).

    Args:
        sources: two or more; one is enough for "task".
        method: "linear": Σ wᵢ·xᵢ. "slerp": of two, along the arc between them, tensor by tensor, at w₂ / (w₁ + w₂) of
            the way; along the line for tensors that are (nearly) parallel or opposite, or zero. "task": base +
            Σ wᵢ·(xᵢ − base).
        weights: one for each source.
        base: what the sources were tuned from, for "task" and for nothing else.
        dtype: of the result; None = of each tensor in the first source.
        is_normalised: divide the weights of "linear" by their sum. Those of "task" are taken as they are.
    Raises:
        CheckpointError: an unknown method, another number of weights, weights that cannot be normalised, or models that
            do not fit together, naming file, tensor and shapes.
    """
    factors = _checked_weights(sources, method, weights, base, is_normalised=is_normalised)
    inputs = [*sources, base] if base is not None else list(sources)
    for other in inputs[1:]:
        _check_same_sizes(inputs[0], other)
    tensors = {}
    for name, first in sources[0].tensors.items():
        tensors[name] = _merged(
            [model.tensors[name] for model in sources],
            factors,
            base=None if base is None else base.tensors[name],
            on_arc=method == "slerp",
            dtype=dtype or first.dtype,
        )
    tokenizer = next((model.tokenizer for model in inputs if model.tokenizer is not None), None)
    return dataclasses.replace(sources[0], tensors=tensors, tokenizer=tokenizer)


def _merged(
    stored: Sequence[StoredTensor],
    factors: Sequence[float],
    *,
    base: StoredTensor | None,
    on_arc: bool,
    dtype: torch.dtype,
) -> StoredTensor:
    """Σ factor·x, or base + Σ factor·(x − base); on_arc: the factors are shares of the way between two."""

    def read() -> Tensor:
        # A model of weight 0 has no part in it, not even through an infinity.
        kept = [(part.read(), factor) for part, factor in zip(stored, factors, strict=True) if factor != 0]
        if on_arc and len(kept) == 2:
            kept = _on_the_arc(kept)
        merged = torch.empty(stored[0].shape, dtype=dtype)
        origins = None if base is None else base.read().reshape(-1).split(_BLOCK)
        terms = [(tensor.reshape(-1).split(_BLOCK), factor) for tensor, factor in kept]
        # In blocks: float32 copies of whole embeddings would take several times the memory of what is read.
        for place, block in enumerate(merged.view(-1).split(_BLOCK)):
            origin = None if origins is None else origins[place].to(work)
            total = torch.zeros(block.shape, dtype=work) if origin is None else origin.clone()
            for blocks, factor in terms:
                value = blocks[place].to(work)
                total.add_(value if origin is None else value - origin, alpha=factor)
            block.copy_(total)
        return merged

    inputs = [*stored, *([] if base is None else [base])]
    work = torch.float64 if any(part.dtype == torch.float64 for part in inputs) else torch.float32
    return StoredTensor(stored[0].shape, dtype, read)


def _on_the_arc(ends: Sequence[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
    """Two tensors with the factors of the point on the arc between them, for shares of the way as factors."""
    (start, first), (end, second) = ends
    lengths = math.sqrt(_dot(start, start)) * math.sqrt(_dot(end, end))
    cosine = _dot(start, end) / lengths if lengths > 0 else 1.0
    if not abs(cosine) < _PARALLEL_COSINE:
        return list(ends)
    angle = math.acos(cosine)
    return [(start, math.sin(first * angle) / math.sin(angle)), (end, math.sin(second * angle) / math.sin(angle))]


def _dot(a: Tensor, b: Tensor) -> float:
    """In float64, a block at a time: the sum of a hundred million float32 products would lose half its digits."""
    pairs = zip(a.reshape(-1).split(_BLOCK), b.reshape(-1).split(_BLOCK), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


def _checked_weights(
    sources: Sequence[ModelTensors],
    method: str,
    weights: Sequence[float],
    base: ModelTensors | None,
    *,
    is_normalised: bool,
) -> list[float]:
    """The factor of each source."""
    if method not in METHODS:
        raise CheckpointError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    if len(sources) < (1 if method == "task" else 2) or (method == "slerp" and len(sources) != 2):
        wanted = {"linear": "two or more models", "slerp": "two models", "task": "one or more models"}[method]
        raise CheckpointError(f"method {method}: expected {wanted}, got {len(sources)}.")
    if (base is None) == (method == "task"):
        raise CheckpointError(
            "method task: expected the base that the models were tuned from."
            if base is None
            else f"method {method}: takes no base; only task does."
        )
    if len(weights) != len(sources) or not all(math.isfinite(weight) for weight in weights):
        raise CheckpointError(f"weights {list(weights)}: expected {len(sources)} finite numbers, one for each model.")
    if method == "task":
        return list(weights)
    total = sum(weights)
    if method == "slerp" and (min(weights) < 0 or total <= 0):
        raise CheckpointError(f"weights {list(weights)}: expected none below 0 and one above it for slerp.")
    if not is_normalised:
        if method == "slerp":
            raise CheckpointError("method slerp: its weights say where on the way, so they are always normalised.")
        return list(weights)
    if abs(total) < 1e-6:
        raise CheckpointError(f"weights {list(weights)}: their sum is 0, so they cannot be normalised.")
    return [weight / total for weight in weights]


def _check_same_sizes(first: ModelTensors, other: ModelTensors) -> None:
    if first.config.version != other.config.version:
        raise CheckpointError(
            f"{other.origin}: expected version {first.config.version} as {first.origin}, found {other.config.version}."
        )
    if first.tokenizer is not None and other.tokenizer is not None and first.tokenizer != other.tokenizer:
        raise CheckpointError(
            f"{other.origin}: expected the tokenizer {first.tokenizer!r} of {first.origin}, found {other.tokenizer!r}; "
            "their ids mean other texts."
        )
    for name in [*first.tensors, *other.tensors]:
        here, there = first.tensors.get(name), other.tensors.get(name)
        if here is None or there is None:
            lacking, having = (other, first) if there is None else (first, other)
            raise CheckpointError(
                f"{lacking.origin}: tensor {name} is missing; {having.origin} has it. Only models of the same "
                "sizes can be merged."
            )
        if here.shape != there.shape:
            raise CheckpointError(
                f"{other.origin}: tensor {name}: expected shape {list(here.shape)} as in {first.origin}, found "
                f"{list(there.shape)}. Only models of the same sizes can be merged."
            )
    for name in _NOT_IN_TENSORS:
        ours, theirs = getattr(first.config, name), getattr(other.config, name)
        if ours != theirs:
            raise CheckpointError(
                f"{other.origin}: {name}: expected {ours} as in {first.origin}, found {theirs}. Only models that "
                "compute in the same way can be merged."
            )
