"""Token shift with a tuned vector in the place of the token before a document's first, and what crosses its borders."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from infctx.model.time_parallel import TimeGroup
from infctx.shapes import Activations, LayerShift, Starts
from infctx_kernels import shifted_mix_unbound


def token_shift(
    hidden: Activations,
    shift: LayerShift,
    weights: Float[Tensor, "M C"],
    *,
    dynamic: Float[Tensor, "M B T C"] | None = None,
    starts: Starts | None = None,
    start: Float[Tensor, " C"] | None = None,
    backend: str | None = None,
) -> tuple[Activations, ...]:
    """`shifted_mix_unbound`, where a document's first token moves towards `start` instead of towards zeros.

    The operator is linear in the token before: start · (weights + dynamic) is what its zeros leave out.

    Args:
        start: the tuned vector, any float dtype; None = zeros.
    Everything else is as in `shifted_mix_unbound`. Gradients flow into `start` too.
    """
    mixed = shifted_mix_unbound(hidden, shift, weights, dynamic=dynamic, starts=starts, backend=backend)
    if start is None or starts is None:
        return mixed
    amount = weights.to(hidden.dtype)[:, None, None]
    if dynamic is not None:
        amount = amount + dynamic
    missing = (start.to(hidden.dtype) * amount).masked_fill(~starts[..., None], 0.0)  # [M, B, T, C]
    return tuple(one + part for one, part in zip(mixed, missing, strict=True))


def vector_before(
    hidden: Activations, shift: LayerShift, group: TimeGroup | None
) -> tuple[LayerShift, LayerShift | None]:
    """What the first token here takes for the one before it, and what a time group says of the chunk's last one.

    Args:
        hidden: the normalised input of a mix, of the chunk, or with a time group of this rank's slice of it.
        shift: the state before the chunk.
    """
    return (shift, None) if group is None else group.exchange(hidden[:, -1], shift)


def shift_behind(hidden: Activations, shift: LayerShift, after: LayerShift | None) -> LayerShift:
    """The new shift state: what the time group said, or without one hidden at the last token, in the state's dtype."""
    return hidden[:, -1].to(shift.dtype) if after is None else after
