"""How exact the chunked gradient is on a run's own model, data, precision and backend, and what its window costs.

Three gradients of the loss of one document's beginning: in one piece, in chunks over the whole of it, and in chunks
with the run's window. The first two should be equal up to rounding; the third shows what cutting the gradient costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from infctx.data.chunking import chunk_rows, join_pieces
from infctx.data.document import Document
from infctx.errors import DataError, machine_fault
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import Window, backward_through_windows
from infctx.training.precision import Precision

# Relative, per group of parameters. float32: two orders above what is measured, for models whose gradients cancel.
# bf16 keeps 8 bits of every activation, and chunks cut the sums of the weight gradients elsewhere.
BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2}
SMALLEST_PREFIX_TOKENS = 16

Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientCheck:
    """Relative errors by group of parameters (the same parameter of every layer), norm over norm.

    relative_error: chunked against unchunked. window_bias: the window's gradient against the exact one; None where the
    prefix is not longer than the window. num_tokens: length of the prefix. without_gradient: groups whose gradient is
    0, as that of a fresh adapter's first matrices.
    """

    relative_error: dict[str, float]
    window_bias: dict[str, float] | None
    bound: float
    num_tokens: int
    without_gradient: frozenset[str]

    @property
    def is_within_bound(self) -> bool:
        """Whether every group's error is at most the bound; an error that is not a number is not."""
        return all(error <= self.bound for error in self.relative_error.values())


def check_gradient(
    objective: Callable[..., tuple[Tensor, ...]],
    model: Finch,
    documents: Sequence[Document],
    *,
    chunk_tokens: int,
    window: Window,
    precision: Precision,
    backward: Callable[[Tensor], None],
    num_tokens: int | None = None,
) -> GradientCheck:
    """Compare the three gradients on the longest document, from where it begins to be trained.

    Args:
        objective: a ChunkObjective over `model`, wrapped by an engine or not.
        num_tokens: length of the prefix; None = twice the window, or 4 chunks where that is more. Halved for as long
            as one piece of it does not fit into the memory.
    Raises:
        DataError: no document is long enough to be cut, or the prefix has nothing to learn.
    """
    document = max(documents, key=len)
    chunks_wanted = 4 if window == "document" else max(4, 2 * window)
    length = min(len(document) - 1, num_tokens or chunks_wanted * chunk_tokens)
    was_training = model.training
    # Dropout would draw other numbers for other pieces.
    model.eval()
    try:
        while True:
            if length < SMALLEST_PREFIX_TOKENS:
                raise DataError(
                    f"{document.origin}: a prefix of {length} tokens is too short to be cut; expected at least "
                    f"{SMALLEST_PREFIX_TOKENS} that fit into the memory in one piece."
                )
            try:
                return _compare(objective, model, document, length, chunk_tokens, window, precision, backward)
            except Exception as error:
                if machine_fault(error) is None or length < 2 * SMALLEST_PREFIX_TOKENS:
                    raise
                length //= 2
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def _compare(
    objective: Callable[..., tuple[Tensor, ...]],
    model: Finch,
    document: Document,
    length: int,
    chunk_tokens: int,
    window: Window,
    precision: Precision,
    backward: Callable[[Tensor], None],
) -> GradientCheck:
    trained = np.flatnonzero(document.weights)
    if len(trained) == 0:
        raise DataError(f"{document.origin}: nothing to learn in it.")
    # Past a prompt that is longer than the piece: with the first trained token behind a quarter of it.
    begin = max(0, min(int(trained[0]) - length // 4, len(document) - 1 - length))
    # A piece of one chunk would be one piece both times.
    chunk_tokens = min(chunk_tokens, max(1, length // 4))

    def gradients(piece_tokens: int, reach: Window) -> Gradients:
        sequence = chunk_rows([join_pieces([(document, begin)], num_tokens=length)], chunk_tokens=piece_tokens)
        model.zero_grad(set_to_none=True)
        device = next(model.parameters()).device
        backward_through_windows(
            objective,
            sequence.chunks,
            ModelState.zeros(model.config, 1, dtype=model.state_dtype, device=device),
            window=reach,
            weight_total=sequence.weight_total,
            backward=backward,
        )
        return _by_group(model)

    unchunked = gradients(length, "document")
    chunked = gradients(chunk_tokens, "document")
    is_cut = window != "document" and window * chunk_tokens < length
    return GradientCheck(
        relative_error=_relative(chunked, unchunked),
        window_bias=_relative(gradients(chunk_tokens, window), chunked) if is_cut else None,
        bound=BOUNDS[precision],
        num_tokens=length,
        without_gradient=frozenset(group for group, gradient in unchunked.items() if not bool(gradient.any())),
    )


def _by_group(model: nn.Module) -> Gradients:
    """Gradients of the same parameter of every layer, in one vector; parameters without one are left out."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            group = re.sub(r"^blocks\.\d+\.|\.default|\.weight$", "", name)
            parts.setdefault(group, []).append(parameter.grad.detach().double().flatten().cpu())
    return {group: torch.cat(tensors) for group, tensors in parts.items()}


def _relative(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Norm of the difference beside the norm of what is expected; where that is 0, the norm of what was found."""
    return {
        group: float((found[group] - reference).norm() / (reference.norm() if bool(reference.any()) else 1.0))
        for group, reference in expected.items()
    }
