"""The model: (tokens, state) -> (logits, state). It knows nothing of chunks, losses or training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infctx.model.catalog import BLOCK_PARTS
from infctx.model.config import FinchConfig
from infctx.model.layer_norm import LayerNorm
from infctx.model.linear import Linear
from infctx.model.state import ModelState, state_dtype
from infctx.model.time_parallel import TimeGroup
from infctx.shapes import Activations, LayerShift, LayerWkv, Logits, Starts, Tokens
from infctx_kernels import Backend

# Backends in torch operations alone.
PORTABLE = (Backend.TORCH, Backend.REFERENCE)


class Block(nn.Module):
    """One layer: time mix and channel mix, each on a normalised copy of the residual stream."""

    def __init__(self, config: FinchConfig, *, has_initial_state: bool) -> None:
        super().__init__()
        time_mix, channel_mix = BLOCK_PARTS[config.version]
        self.time_mix_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.time_mix = time_mix(config, has_initial_state=has_initial_state)
        self.channel_mix_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.channel_mix = channel_mix(config)

    def forward(
        self, x: Activations, wkv: LayerWkv, att_shift: LayerShift, ffn_shift: LayerShift, starts: Starts | None
    ) -> tuple[Activations, LayerWkv, LayerShift, LayerShift]:
        """Run one layer; returns the residual stream and the layer's three new states."""
        mixed, att_shift, wkv = self.time_mix(self.time_mix_norm(x), att_shift, wkv, starts)
        x = x + mixed
        mixed, ffn_shift = self.channel_mix(self.channel_mix_norm(x), ffn_shift, starts)
        return x + mixed, wkv, att_shift, ffn_shift

    def advance(
        self, x: Activations, wkv: LayerWkv, att_shift: LayerShift, ffn_shift: LayerShift, starts: Starts | None
    ) -> tuple[LayerWkv, LayerShift, LayerShift]:
        """The three new states alone: the channel mix's output is not computed, it has no part in them."""
        mixed, att_shift, wkv = self.time_mix(self.time_mix_norm(x), att_shift, wkv, starts)
        last = self.channel_mix_norm((x + mixed)[:, -1])
        return wkv, att_shift, self.channel_mix.advance(last, ffn_shift)


class Finch(nn.Module):
    """RWKV-6 "Finch", or RWKV-5.2 "Eagle" where the config says so."""

    def __init__(
        self, config: FinchConfig, *, has_initial_state: bool = False, has_initial_shifts: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.input_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config, has_initial_state=has_initial_state) for _ in range(config.n_layer))
        self.output_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size)
        # The dtype of the activations where it is not that of the weights: bf16 training keeps some weights float32.
        self.compute_dtype: torch.dtype | None = None
        self.recomputes_layers = False
        # In training, the largest absolute value of what is added to the embeddings at random; 0 = nothing.
        self.embedding_noise = 0.0
        # Of the operators around the recurrence, the loss among them; None = the fastest.
        self.surrounding_backend: str | None = None
        if has_initial_shifts:
            self.add_initial_shifts_()

    def forward(
        self, tokens: Tokens, state: ModelState | None = None, *, starts: Starts | None = None
    ) -> tuple[Logits, ModelState]:
        """Next-token logits and the state after the last token.

        Args:
            tokens: int64 ids, T >= 1.
            state: what an earlier call returned; None = fresh documents. Never changed.
            starts: True at a document's first token, whose predecessors are forgotten.
        Returns:
            Logits in the model's dtype and a new state. Gradients flow through both.
        """
        hidden, state = self.forward_hidden(tokens, state, starts=starts)
        return self.head(hidden), state

    def forward_hidden(
        self, tokens: Tokens, state: ModelState | None = None, *, starts: Starts | None = None
    ) -> tuple[Activations, ModelState]:
        """The same without the head: what the head would be applied to, so that a loss can do it in pieces."""
        if state is None:
            state = self.fresh_state(tokens.shape[0])
        x = self._embed(tokens)
        layers = []
        for block, layer_state in zip(self.blocks, _by_layer(state), strict=True):
            if self.recomputes_layers and torch.is_grad_enabled():
                x, *new_states = checkpoint(block, x, *layer_state, starts, use_reentrant=False)
            else:
                x, *new_states = block(x, *layer_state, starts)
            layers.append(new_states)
        return self.output_norm(x), _stacked(layers)

    def advance(self, tokens: Tokens, state: ModelState, *, starts: Starts | None = None) -> ModelState:
        """The new state alone, bit for bit that of `forward`; the last layer does no more than the state needs."""
        x = self._embed(tokens)
        *before, last_state = _by_layer(state)
        layers = []
        for block, layer_state in zip(self.blocks, before, strict=False):
            x, *new_states = block(x, *layer_state, starts)
            layers.append(new_states)
        layers.append(self.blocks[-1].advance(x, *last_state, starts))
        return _stacked(layers)

    def fresh_state(self, rows: int) -> ModelState:
        """The state before a document's first token: zeros, or the tuned initial state (and then part of its graph)."""
        weight = self.embedding.weight
        zeros = ModelState.zeros(self.config, rows, dtype=self.state_dtype, device=weight.device)
        tuned = (
            [block.time_mix.initial_state for block in self.blocks],
            [block.time_mix.initial_shift for block in self.blocks],
            [block.channel_mix.initial_shift for block in self.blocks],
        )
        return ModelState(
            *(
                zero if layers[0] is None else torch.stack(layers).to(zero.dtype)[:, None].expand_as(zero)
                for layers, zero in zip(tuned, zeros, strict=True)
            )
        )

    @property
    def has_initial_state(self) -> bool:
        """Whether documents begin with a tuned state of the recurrence."""
        return self.blocks[0].time_mix.initial_state is not None

    @property
    def has_initial_shifts(self) -> bool:
        """Whether a document's first token has tuned vectors before it."""
        return self.blocks[0].time_mix.initial_shift is not None

    def add_initial_state_(self) -> None:
        """Let every block's initial state be a parameter, of zeros where it is none yet."""
        if self.has_initial_state:
            return
        heads, size = self.config.n_head, self.config.head_size
        for block in self.blocks:
            block.time_mix.initial_state = nn.Parameter(self._zeros(heads, size, size))

    def add_initial_shifts_(self) -> None:
        """The same for the two vectors that stand for the token before a document's first."""
        if self.has_initial_shifts:
            return
        for block in self.blocks:
            block.time_mix.initial_shift = nn.Parameter(self._zeros(self.config.n_embd))
            block.channel_mix.initial_shift = nn.Parameter(self._zeros(self.config.n_embd))

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the recurrent state."""
        return state_dtype(self._activation_dtype())

    def recompute_layers(self, wanted: bool = True) -> None:
        """Keep only each layer's input for the backward pass, and run the layer again there: the same numbers."""
        self.recomputes_layers = wanted

    def add_embedding_noise(self, alpha: float, *, chunk_tokens: int) -> None:
        """In training, add noise to each embedding, uniform within ± alpha / sqrt(chunk_tokens · channels); 0 = none.

        Source: NEFTune, arXiv 2310.05914, algorithm 1, with the length of a chunk for that of a sequence.
        """
        self.embedding_noise = alpha / math.sqrt(chunk_tokens * self.config.n_embd)

    def use_backend(self, name: str | None) -> None:
        """Run the recurrence on this WKV6 backend; None = the fastest that can run where the tensors are.

        The operators around it follow: with a portable backend they are plain torch too.
        """
        self.surrounding_backend = name if name in PORTABLE else None
        for block in self.blocks:
            block.time_mix.backend = name
            block.time_mix.surrounding_backend = self.surrounding_backend
            block.channel_mix.surrounding_backend = self.surrounding_backend

    def use_time_group(self, group: TimeGroup | None) -> None:
        """Take tokens for this rank's slice of a chunk that the group has together; None = for the chunk.

        States, and their gradients, are those of the whole chunk on every rank; a rank's gradients of the parameters
        are its slice's part.
        """
        for block in self.blocks:
            block.time_mix.time_group = group
            block.channel_mix.time_group = group

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.state_dtype, device=self.embedding.weight.device)

    def _embed(self, tokens: Tokens) -> Activations:
        x = self.embedding(tokens)
        if self.training and self.embedding_noise > 0.0:
            # Before anything is rounded to bf16, where most of so small a number would be lost.
            x = x if x.dtype == torch.float64 else x.float()
            x = x + torch.empty_like(x).uniform_(-self.embedding_noise, self.embedding_noise)
        return self.input_norm(x.to(self._activation_dtype()))

    def _activation_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embedding.weight.dtype


def _by_layer(state: ModelState) -> list[tuple[Tensor, ...]]:
    """The states of each layer, in the order of ModelState."""
    return list(zip(*(tensor.unbind(0) for tensor in state), strict=True))


def _stacked(layers: list[Sequence[Tensor]]) -> ModelState:
    # Stacking copies: a view of the last token would keep a whole chunk's activations alive at every boundary.
    return ModelState(*(torch.stack(parts) for parts in zip(*layers, strict=True)))
