"""How probable continuations of contexts are, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.evaluation.row_states import TokenRow, as_floats, read_prompts, select_rows, sharing_prefix
from infctx.model.finch import Finch
from infctx.model.state import ModelState

# Logits alive at once, as in the loss.
LOGITS_AT_ONCE = 2**24


class Score(NamedTuple):
    """log_probability: of all tokens of the continuation, nats. is_greedy: each is the most probable one."""

    log_probability: float
    is_greedy: bool


class _Wanted(NamedTuple):
    """A continuation, its place among the requests, and the row of the batch that its context is in."""

    request: int
    row: int
    tokens: TokenRow


@torch.no_grad()
def score_continuations(
    model: Finch, requests: Sequence[tuple[TokenRow, TokenRow]], *, rows: int, chunk_tokens: int = 2048
) -> list[Score]:
    """Score continuations; each distinct context is read once, and what all contexts begin with is read once.

    Args:
        requests: ids of a context and of its continuation, at least one each; contexts of any length.
        rows: contexts, and then continuations, side by side.
    Returns:
        In the order of the requests.
    """
    if not requests:
        return []
    by_context: dict[TokenRow, list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        assert min(len(context), len(continuation)) >= 1, f"request {number} is empty: {context} {continuation}"
        by_context.setdefault(context, []).append(number)
    contexts = sorted(by_context, key=len, reverse=True)
    scores: list[Score | None] = [None] * len(requests)
    with sharing_prefix(model, contexts, chunk_tokens=chunk_tokens) as num_shared:
        for first in range(0, len(contexts), rows):
            batch = contexts[first : first + rows]
            logits, state = read_prompts(model, [one[num_shared:] for one in batch], chunk_tokens=chunk_tokens)
            wanted = [
                _Wanted(request, row, requests[request][1])
                for row, context in enumerate(batch)
                for request in by_context[context]
            ]
            wanted.sort(key=lambda one: len(one.tokens), reverse=True)
            for begin in range(0, len(wanted), rows):
                group = wanted[begin : begin + rows]
                for one, score in zip(
                    group, _score_group(model, group, logits, state, chunk_tokens=chunk_tokens), strict=True
                ):
                    scores[one.request] = score
    return [score for score in scores if score is not None]


def _score_group(
    model: Finch, group: Sequence[_Wanted], logits: Tensor, state: ModelState, *, chunk_tokens: int
) -> Iterator[Score]:
    device = logits.device
    rows = [one.row for one in group]
    length = max(len(one.tokens) for one in group)
    targets = torch.zeros(len(group), length, dtype=torch.int64)
    for row, one in enumerate(group):
        targets[row, : len(one.tokens)] = torch.tensor(one.tokens)
    targets = targets.to(device)
    # The first token follows from the context alone.
    found = [_token_scores(logits[rows, None], targets[:, :1])]
    if length > 1:
        state = select_rows(state, rows)
        for begin in range(0, length - 1, chunk_tokens):
            end = min(begin + chunk_tokens, length - 1)
            hidden, state = model.forward_hidden(targets[:, begin:end], state)
            piece = max(1, LOGITS_AT_ONCE // (model.config.vocab_size * len(group)))
            for place in range(begin, end, piece):
                until = min(place + piece, end)
                part = as_floats(model.head(hidden[:, place - begin : until - begin]))
                found.append(_token_scores(part, targets[:, place + 1 : until + 1]))
    log_probabilities = torch.cat([one for one, _ in found], dim=1).double().cpu()
    is_top = torch.cat([one for _, one in found], dim=1).cpu()
    for row, one in enumerate(group):
        own = slice(0, len(one.tokens))
        yield Score(float(log_probabilities[row, own].sum()), bool(is_top[row, own].all()))


def _token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether no other id is more probable; logits [B, T, V], targets [B, T]."""
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == targets
