"""The public operator: checks what it is given, chooses a backend, keeps the state in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from infctx_kernels.dispatch import Backend, choose_backend
from infctx_kernels.wkv6.blockwise_torch import wkv6_blockwise
from infctx_kernels.wkv6.cpp import wkv6_cpp
from infctx_kernels.wkv6.reference import wkv6_reference

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# exp(-exp(20)) is 0 in float64 too: above this the decay and its gradient are 0, and exp(raw) must not overflow.
LARGEST_RAW_DECAY = 20.0


def _in_the_states_dtype(recurrence: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make a runner of a recurrence in torch operations that works in one dtype and takes the log decay."""

    def run(
        receptance: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        bonus: Tensor,
        state: Tensor,
        starts: Tensor | None,
        start_state: Tensor | None,
        *,
        decay_is_raw: bool,
    ) -> tuple[Tensor, Tensor]:
        work = state.dtype
        log_decay = decay.to(work)
        if decay_is_raw:
            log_decay = -torch.exp(log_decay.clamp(max=LARGEST_RAW_DECAY))
        r, k, v, u = (x.to(work) for x in (receptance, key, value, bonus))
        fresh = None if start_state is None else start_state.to(work)
        output, new_state = recurrence(r, k, v, log_decay, u, state, starts, fresh)
        return output.to(receptance.dtype), new_state

    return run


def _triton(*arguments: Tensor | None, decay_is_raw: bool) -> tuple[Tensor, Tensor]:
    # Imported when it is needed: Triton is not everywhere, and takes its time.
    from infctx_kernels.wkv6.triton_op import wkv6_triton

    return wkv6_triton(*arguments, decay_is_raw=decay_is_raw)


# Each takes what `wkv6` takes, checked, and the decay as its logarithm or raw.
RUNNERS: dict[Backend, Callable[..., tuple[Tensor, Tensor]]] = {
    Backend.TRITON: _triton,
    Backend.CPP: wkv6_cpp,
    Backend.TORCH: _in_the_states_dtype(wkv6_blockwise),
    Backend.REFERENCE: _in_the_states_dtype(wkv6_reference),
}


def wkv6(
    receptance: Float[Tensor, "B T H N"],
    key: Float[Tensor, "B T H N"],
    value: Float[Tensor, "B T H N"],
    log_decay: Float[Tensor, "B T H N"],
    bonus: Float[Tensor, "H N"],
    state: Float[Tensor, "B H N N"],
    *,
    starts: Bool[Tensor, "B T"] | None = None,
    start_state: Float[Tensor, "H N N"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B H N N"]]:
    """Run the Finch recurrence over one chunk.

    Args:
        receptance, key, value: one dtype of fp32, bf16, fp16, fp64; T >= 1.
        log_decay: <= 0, the decay is exp(log_decay), per key channel; any float dtype.
        bonus: weight of the current token in its own read, per key channel; any float dtype.
        state: before the first token, key axis before value axis; float32 (float64 with float64 inputs); never changed.
        starts: True where a document begins: the state before that token is `start_state`. Pass None when none begins.
        start_state: key axis before value axis; None = zeros.
        backend: a name of `Backend`; None = the fastest that can run here.
    Returns:
        The output in receptance's dtype and the state after the last token, a new tensor. Gradients flow through both,
        into every tensor.
    Raises:
        ValueError: a shape or dtype is wrong. BackendError: the backend cannot run here.
    Source: Eagle and Finch paper, the Finch time-mix recurrence.
    """
    _check(receptance, key, value, ("log_decay", log_decay), bonus, state, starts, start_state)
    # Looking at values would stall a GPU; there the result of such a decay is NaN.
    if log_decay.device.type == "cpu" and not bool((log_decay.detach() <= 0).all()):
        worst = log_decay.detach().max()
        raise ValueError(
            f"log_decay: expected values <= 0, got {'NaN' if bool(worst.isnan()) else worst.item()}. It is the "
            "logarithm of the decay, -exp(raw); wkv6_from_raw_decay takes the raw values of a checkpoint"
        )
    return _run(receptance, key, value, log_decay, bonus, state, starts, start_state, backend, decay_is_raw=False)


def wkv6_from_raw_decay(
    receptance: Float[Tensor, "B T H N"],
    key: Float[Tensor, "B T H N"],
    value: Float[Tensor, "B T H N"],
    raw_decay: Float[Tensor, "B T H N"],
    bonus: Float[Tensor, "H N"],
    state: Float[Tensor, "B H N N"],
    *,
    starts: Bool[Tensor, "B T"] | None = None,
    start_state: Float[Tensor, "H N N"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B H N N"]]:
    """`wkv6` with log_decay = -exp(raw_decay), computed in the state's dtype; everything else as there.

    A NaN among the inputs is a NaN in the results: whoever trains must be able to see and skip it.
    """
    _check(receptance, key, value, ("raw_decay", raw_decay), bonus, state, starts, start_state)
    return _run(receptance, key, value, raw_decay, bonus, state, starts, start_state, backend, decay_is_raw=True)


def _run(
    receptance: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    starts: Tensor | None,
    start_state: Tensor | None,
    backend: str | None,
    *,
    decay_is_raw: bool,
) -> tuple[Tensor, Tensor]:
    device = receptance.device
    chosen = choose_backend(backend, device=device, head_size=receptance.shape[-1], dtype=receptance.dtype)
    # Under autocast a matrix product would round to bf16, the state included.
    with torch.autocast(device.type, enabled=False):
        return RUNNERS[chosen](
            receptance, key, value, decay, bonus, state, starts, start_state, decay_is_raw=decay_is_raw
        )


def _check(
    receptance: Tensor,
    key: Tensor,
    value: Tensor,
    named_decay: tuple[str, Tensor],
    bonus: Tensor,
    state: Tensor,
    starts: Tensor | None,
    start_state: Tensor | None,
) -> None:
    if receptance.dim() != 4 or receptance.shape[1] < 1:
        raise ValueError(f"receptance: expected [B, T, H, N] with T >= 1, got {list(receptance.shape)}")
    rows, num_tokens, heads, head_size = receptance.shape
    decay_name, decay = named_decay
    expected_shapes = {
        "key": (key, (rows, num_tokens, heads, head_size)),
        "value": (value, (rows, num_tokens, heads, head_size)),
        decay_name: (decay, (rows, num_tokens, heads, head_size)),
        "bonus": (bonus, (heads, head_size)),
        "state": (state, (rows, heads, head_size, head_size)),
        "starts": (starts, (rows, num_tokens)),
        "start_state": (start_state, (heads, head_size, head_size)),
    }
    for name, (tensor, shape) in expected_shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor is not None and tensor.device != receptance.device:
            raise ValueError(f"{name}: expected device {receptance.device} as receptance, got {tensor.device}")
    if receptance.dtype not in INPUT_DTYPES or not receptance.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"receptance, key, value: expected one dtype of fp32, bf16, fp16, fp64; "
            f"got {receptance.dtype}, {key.dtype}, {value.dtype}"
        )
    for name, tensor in (named_decay, ("bonus", bonus), ("start_state", start_state)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a float dtype, got {tensor.dtype}")
    state_dtype = torch.float64 if receptance.dtype == torch.float64 else torch.float32
    if state.dtype != state_dtype:
        raise ValueError(f"state: expected {state_dtype} with {receptance.dtype} inputs, got {state.dtype}")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"starts: expected bool, got {starts.dtype}")
