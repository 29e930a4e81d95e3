"""What a chunk's activations take, and whether they are kept for its backward pass or computed again layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infctx.free_memory import free_bytes
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.step_place import random_state, set_random_state

# Of the memory that is free beside weights, gradient and optimizer: kernels need room to work in, too.
ACTIVATION_SHARE = 0.6
MEASURED_TOKENS = 32


def activation_bytes(objective: Callable[..., tuple[Tensor, ...]], model: Finch) -> int:
    """Bytes that autograd keeps for each token of a chunk, measured on two short ones."""
    short, long = (_saved_bytes(objective, model, length) for length in (MEASURED_TOKENS, 2 * MEASURED_TOKENS))
    return (long - short) // MEASURED_TOKENS


def should_recompute(
    objective: Callable[..., tuple[Tensor, ...]],
    model: Finch,
    *,
    tokens_at_once: int,
    device: torch.device,
    moment_bytes: int = 8,
) -> bool:
    """Whether the activations of so many tokens (rows × chunk) would not fit beside what training needs.

    Args:
        moment_bytes: the optimizer's on the device, for each trained parameter.
    """
    # The gradient in float32 and Adam's two moments are still to come.
    training = sum(p.numel() * (4 + moment_bytes) for p in model.parameters() if p.requires_grad)
    room = ACTIVATION_SHARE * max(0, free_bytes(device) - training)
    return activation_bytes(objective, model) * tokens_at_once > room


def _saved_bytes(objective: Callable[..., tuple[Tensor, ...]], model: Finch, num_tokens: int) -> int:
    device = model.embedding.weight.device
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    weight = torch.ones(1, num_tokens, device=device)
    state = ModelState.zeros(model.config, 1, dtype=model.state_dtype, device=device)
    leaves = state.leaves()
    before = random_state(device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            # Kept until counted: what autograd has let go of may lie where the next tensor does.
            outputs = objective(tokens, tokens, weight, None, *leaves, with_loss=True)
        del outputs
    finally:
        set_random_state(before, device)
    return sum(saved.values())
