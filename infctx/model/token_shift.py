"""Token shift with a tuned vector in the place of the token before a document's first."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

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
