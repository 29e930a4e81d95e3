"""The model: (tokens, state) -> (logits, state). It knows nothing of chunks, losses or training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infctx.model.block import AttentionBlock, Block
from infctx.model.catalog import ATTENTION_PARTS
from infctx.model.config import FinchConfig
from infctx.model.gold import CachedKeys, TokenCat
from infctx.model.layer_norm import LayerNorm
from infctx.model.linear import Linear
from infctx.model.seen_tokens import SeenTokens, mark_starts
from infctx.model.state import ModelState, state_dtype
from infctx.model.time_parallel import TimeGroup
from infctx.shapes import Activations, Logits, Starts, Tokens
from infctx_kernels import Backend

# Backends in torch operations alone.
PORTABLE = (Backend.TORCH, Backend.REFERENCE)


class Finch(nn.Module):
    """RWKV-6 "Finch", or by its config the ancestor Eagle, Finch-C2, or a hybrid with attention in its last layers."""

    def __init__(
        self, config: FinchConfig, *, has_initial_state: bool = False, has_initial_shifts: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.input_norm = LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        kinds = [config.kind(layer) for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(
            AttentionBlock(config, kind)
            if kind in ATTENTION_PARTS
            else Block(config, kind, has_initial_state=has_initial_state)
            for kind in kinds
        )
        self.token_cat = TokenCat(config) if "gold" in kinds else None
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
        hidden, chunk = self.forward_chunk(tokens, state, starts=starts)
        return hidden, state.followed_by(chunk)

    def forward_chunk(
        self, tokens: Tokens, state: ModelState, *, starts: Starts | None = None
    ) -> tuple[Activations, ModelState]:
        """The same, where the cache of the new state is that of the chunk alone: see `ModelState.followed_by`."""
        x, layers = self._recur(tokens, state, starts)
        if not self.config.n_attention:
            return self.output_norm(x), _stacked(layers)
        x, shifts, cache = self._attend(x, tokens, state, starts)
        return self.output_norm(x), _hybrid(state, layers, shifts, cache)

    def advance(self, tokens: Tokens, state: ModelState, *, starts: Starts | None = None) -> ModelState:
        """The new state alone; see `advance_chunk`."""
        return state.followed_by(self.advance_chunk(tokens, state, starts=starts))

    def advance_chunk(self, tokens: Tokens, state: ModelState, *, starts: Starts | None = None) -> ModelState:
        """The new state alone, with the cache of the chunk alone. The last layers do no more than the state needs.

        It is bit for bit that of `forward`; but for the shifts of GOLD's layers, which are so up to rounding.
        """
        if self.token_cat is not None:
            x, whole = self.skim(tokens, state, starts=starts)
            _, after = self.finish(x, whole)
            return ModelState(*after.recurrent, *(part[:, :, state.num_cached :] for part in whole.cache))
        if self.config.n_attention:
            return self.forward_chunk(tokens, state, starts=starts)[1]
        x = self._embed(tokens)
        layers = []
        *before, last_state = _by_layer(state)
        for block, layer_state in zip(self.blocks, before, strict=False):
            x, *new_states = block(x, *layer_state, starts)
            layers.append(new_states)
        layers.append(self.blocks[-1].advance(x, *last_state, starts))
        return _stacked(layers)

    @property
    def num_tail(self) -> int:
        """The last tokens that GOLD's layers have to see for the output and the shifts of the very last one.

        Two shifts in each layer carry what is wrong at the first of them one token further.
        """
        return 2 * self.config.n_attention + 1

    def skim(
        self, tokens: Tokens, state: ModelState, *, starts: Starts | None = None
    ) -> tuple[Activations, ModelState]:
        """Of a GoldFinch, the layers with a recurrence alone, which is all that filling the cache takes.

        Returns:
            The residual stream behind them, and the new state, where GOLD's shifts are still those before: see
            `finish`.
        """
        assert self.token_cat is not None, "a GoldFinch"
        x, layers = self._recur(tokens, state, starts)
        own = mark_starts(tokens, starts, is_first=state.num_cached == 0)
        chunk = _hybrid(state, layers, self._shifts(state), [own[None], self.token_cat.compress(x)[None]])
        return x, state.followed_by(chunk)

    def finish(self, x: Activations, state: ModelState) -> tuple[Float[Tensor, "B 1 C"], ModelState]:
        """GOLD's layers behind `skim`, as far as the last token needs them.

        Args:
            x: what `skim` gave for the last tokens of the cache: all since GOLD's shifts were right, or at least
                `num_tail`.
            state: behind them.
        Returns:
            What the head would be applied to, of the last token alone, [B, 1, C]; and the state.
        """
        x = x[:, -self.num_tail :]
        border = state.num_cached - x.shape[1]
        tokens, vectors = state.cached_tokens[0], state.cached[0]
        own = tokens[:, border:].to(x.device)
        seen = SeenTokens(tokens[:, :border], own)
        keys = self._cached_keys(seen, vectors[:, :border], vectors[:, border:].to(x))
        x, shifts = self._run_gold(x, keys, self._shifts(state), own < 0)
        first = self.config.n_recurrent
        att_shift, ffn_shift = (torch.stack(parts) for parts in zip(*shifts, strict=True))
        after = ModelState(
            state.wkv,
            torch.cat([state.att_shift[:first], att_shift]),
            torch.cat([state.ffn_shift[:first], ffn_shift]),
            *state.cache,
        )
        return self.output_norm(x[:, -1:]), after

    def _recur(self, tokens: Tensor, state: ModelState, starts: Tensor | None) -> tuple[Tensor, list[Sequence[Tensor]]]:
        """The layers with a recurrence: the residual stream behind them, and their new states."""
        x = self._embed(tokens)
        layers: list[Sequence[Tensor]] = []
        for block, layer_state in zip(self.blocks, _by_layer(state), strict=False):
            x, *new_states = self._run(block, x, *layer_state, starts)
            layers.append(new_states)
        return x, layers

    def _attend(
        self, x: Tensor, tokens: Tensor, state: ModelState, starts: Tensor | None
    ) -> tuple[Tensor, list[Sequence[Tensor]], list[Tensor]]:
        """The layers that attend: the residual stream behind them, their shifts, the cache of the chunk."""
        own_tokens = mark_starts(tokens, starts, is_first=state.num_cached == 0)
        seen, past = SeenTokens(state.cached_tokens[0], own_tokens), state.cached[0]
        if self.token_cat is not None:
            own = self.token_cat.compress(x)
            x, shifts = self._run_gold(x, self._cached_keys(seen, past, own), self._shifts(state), starts)
            return x, shifts, [own_tokens[None], own[None].to(past.dtype)]
        shifts, caches = [], []
        pasts = past.split(2 * self.config.dim_att, dim=-1)
        blocks = self.blocks[self.config.n_recurrent :]
        for block, pair, of_layer in zip(blocks, self._shifts(state), pasts, strict=True):
            x, *pair, own = self._run(block, x, seen, of_layer, *pair, starts)
            shifts.append(pair)
            caches.append(own)
        return x, shifts, [own_tokens[None], torch.cat(caches, dim=-1)[None].to(past.dtype)]

    def _run_gold(
        self, x: Tensor, keys: CachedKeys, before: Sequence[Sequence[Tensor]], starts: Tensor | None
    ) -> tuple[Tensor, list[Sequence[Tensor]]]:
        shifts: list[Sequence[Tensor]] = []
        for block, pair in zip(self.blocks[self.config.n_recurrent :], before, strict=True):
            x, *pair = self._run(block, x, keys, None, *pair, starts)
            shifts.append(pair)
        return x, shifts

    def _run(self, block: nn.Module, *inputs: object) -> tuple[Tensor, ...]:
        if self.recomputes_layers and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _cached_keys(self, seen: SeenTokens, past: Tensor, own: Tensor) -> CachedKeys:
        assert self.token_cat is not None
        return CachedKeys(
            seen,
            past,
            own,
            embedding=self.embedding,
            embedding_norm=self.input_norm,
            token_cat=self.token_cat,
        )

    def _shifts(self, state: ModelState) -> list[Sequence[Tensor]]:
        """Of the layers that attend."""
        first = self.config.n_recurrent
        return list(zip(state.att_shift[first:].unbind(0), state.ffn_shift[first:].unbind(0), strict=True))

    def fresh_state(self, rows: int) -> ModelState:
        """The state before a document's first token: zeros, or the tuned initial state (and then part of its graph)."""
        weight = self.embedding.weight
        zeros = ModelState.zeros(self.config, rows, dtype=self.state_dtype, device=weight.device)
        tuned = (
            [block.time_mix.initial_state for block in self.blocks[: self.config.n_recurrent]],
            [getattr(block.time_mix, "initial_shift", None) for block in self.blocks],
            [block.channel_mix.initial_shift for block in self.blocks],
        )
        return ModelState(
            *(
                _stacked_starts(layers, zero) if any(layer is not None for layer in layers) else zero
                for layers, zero in zip(tuned, zeros.recurrent, strict=True)
            ),
            # As many bytes as the model computes with: they are nothing that is added up.
            *(part.to(self.activation_dtype) if part.is_floating_point() else part for part in zeros.cache),
        )

    @property
    def has_initial_state(self) -> bool:
        """Whether documents begin with a tuned state of the recurrence."""
        return self.config.n_recurrent > 0 and self.blocks[0].time_mix.initial_state is not None

    @property
    def has_initial_shifts(self) -> bool:
        """Whether a document's first token has tuned vectors before it."""
        return self.blocks[0].time_mix.initial_shift is not None

    def add_initial_state_(self) -> None:
        """Let every block's initial state be a parameter, of zeros where it is none yet."""
        if self.has_initial_state:
            return
        heads, size = self.config.n_head, self.config.head_size
        for block in self.blocks[: self.config.n_recurrent]:
            block.time_mix.initial_state = nn.Parameter(self._zeros(heads, size, size))

    def add_initial_shifts_(self) -> None:
        """The same for the two vectors that stand for the token before a document's first."""
        if self.has_initial_shifts:
            return
        for block in self.blocks:
            if hasattr(block.time_mix, "initial_shift"):
                block.time_mix.initial_shift = nn.Parameter(self._zeros(self.config.n_embd))
            block.channel_mix.initial_shift = nn.Parameter(self._zeros(self.config.n_embd))

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the recurrent state."""
        return state_dtype(self.activation_dtype)

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

        Raises:
            ValueError: a model with attention, whose layers would see their own slice alone.
        """
        if group is not None and self.config.n_attention:
            raise ValueError(
                f"time group: the last {self.config.n_attention} of the {self.config.n_layer} layers of a "
                f"{self.config.name} attend, and ranks do not send each other what they cache; give each whole chunks"
            )
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
        return self.input_norm(x.to(self.activation_dtype))

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.compute_dtype or self.embedding.weight.dtype


def _by_layer(state: ModelState) -> list[tuple[Tensor, ...]]:
    """The states of each layer with a recurrence, in the order of ModelState."""
    # The shifts of those that attend follow.
    return list(zip(*(tensor.unbind(0) for tensor in state.recurrent), strict=False))


def _hybrid(
    before: ModelState, recurrent: list[Sequence[Tensor]], attention: list[Sequence[Tensor]], cache: Sequence[Tensor]
) -> ModelState:
    """The state behind a chunk, its cache of the chunk alone."""
    wkv = [wkv for wkv, _, _ in recurrent]
    att_shift, ffn_shift = zip(*(layer[-2:] for layer in [*recurrent, *attention]), strict=True)
    return ModelState(torch.stack(wkv) if wkv else before.wkv, torch.stack(att_shift), torch.stack(ffn_shift), *cache)


def _stacked_starts(layers: Sequence[Tensor | None], zero: Tensor) -> Tensor:
    """What documents begin with, of all layers and rows; zeros where a layer has nothing tuned."""
    layers = [zero[number, 0] if one is None else one.to(zero.dtype) for number, one in enumerate(layers)]
    return torch.stack(layers)[:, None].expand_as(zero)


def _stacked(layers: list[Sequence[Tensor]]) -> ModelState:
    # Stacking copies: a view of the last token would keep a whole chunk's activations alive at every boundary.
    return ModelState(*(torch.stack(parts) for parts in zip(*layers, strict=True)))
