"""What the model computes at one token: norms, the recurrence in one head, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import run_chunk

Objective = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenForward:
    """What was seen; every norm is of one row.

    Attributes:
        embedding, head_input: norms of the embedding, and of what the head is applied to.
        layers: norm of the residual stream behind each layer.
        recurrence: of one head of the last layer that has one, that with the largest output: norms of what goes in and
            comes out, and the range of the decay; empty in a GPTAlpha.
        state_before, state_after: norms of the state's parts, before and behind the token's chunk.
        log_probabilities: of the next token, [V].
    """

    embedding: float
    layers: list[float]
    head_input: float
    recurrence: dict[str, float | int]
    state_before: dict[str, float]
    state_after: dict[str, float]
    log_probabilities: Tensor


@torch.no_grad()
def look_at_token(objective: Objective, model: Finch, chunk: Chunk, state: ModelState, *, place: int) -> TokenForward:
    """Run one row's chunk as training would, and look at one token of it.

    Args:
        chunk: of one row. state: before it. place: of the token in the chunk.
    """
    norms: dict[str, float] = {}
    seen: dict[str, Any] = {"recurrence": {}}
    recurrent = model.blocks[: model.config.n_recurrent]

    def norm_of(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: object, output: Any) -> None:
            norms[name] = _norm((output[0] if isinstance(output, tuple) else output)[0, place])

        return note

    def note_head(module: nn.Module, inputs: object, output: Tensor) -> None:
        # Here the dtypes are those of the surrounding computation.
        logits = model.head(output[:, place : place + 1])[0, 0]
        seen["log_probabilities"] = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def note_recurrence(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = recurrent[-1].time_mix.recurrence_values(*inputs)
        head = int(values.output[0, place].float().norm(dim=-1).argmax())
        decay = values.log_decay[0, place, head].exp()
        seen["recurrence"] = {
            "layer": len(recurrent) - 1,
            "head": head,
            **{name: _norm(getattr(values, name)[0, place, head]) for name in ("receptance", "key", "value", "output")},
            "smallest_decay": float(decay.min()),
            "largest_decay": float(decay.max()),
        }

    with ExitStack() as hooks:
        for name, module in [("embedding", model.embedding), ("output", model.output_norm)]:
            hooks.callback(module.register_forward_hook(norm_of(name)).remove)
        for number, block in enumerate(model.blocks):
            hooks.callback(block.register_forward_hook(norm_of(f"layer {number}")).remove)
        hooks.callback(model.output_norm.register_forward_hook(note_head).remove)
        if recurrent:
            hooks.callback(recurrent[-1].time_mix.register_forward_pre_hook(note_recurrence).remove)
        # What only needs the state afterwards would leave out the head and half of the last layer.
        after = state.followed_by(run_chunk(objective, chunk, state, reaches_all=True).state)
    return TokenForward(
        embedding=norms["embedding"],
        layers=[norms[f"layer {number}"] for number in range(len(model.blocks))],
        head_input=norms["output"],
        state_before=state_norms(state),
        state_after=state_norms(after),
        **seen,
    )


def state_norms(state: ModelState) -> dict[str, float]:
    """The norm of each part of a state, or of a gradient of one; of the tokens in a cache there is none."""
    parts = zip(state.fields, state, strict=True)
    return {name: _norm(tensor) for name, tensor in parts if tensor.is_floating_point()}


@contextmanager
def without_random_numbers(model: Finch) -> Iterator[None]:
    """Within the block the model computes as in training, without dropout and without noise on the embeddings."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    was_training, noise = model.training, model.embedding_noise
    model.train()
    try:
        for module in dropouts:
            module.eval()
        model.embedding_noise = 0.0
        yield
    finally:
        model.embedding_noise = noise
        model.train(was_training)


def _norm(tensor: Tensor) -> float:
    # float32 squares overflow where a trained state does not.
    return float(tensor.detach().double().norm())
