"""Which documents of a step had the highest losses: asked for rarely, and answered for every rank."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from infctx.data.chunking import ChunkSequence, RowSlice
from infctx.data.step_source import StepData
from infctx.model.state import ModelState
from infctx.training.bptt import run_chunk
from infctx.training.ranks import Ranks
from infctx.training.set_losses import add_set_losses

# What a token can be numbered with.
MOST_NUMBERS = 255
_ROW_OF_JSON_LINES = re.compile(r"(?P<file>.+\.(?:jsonl|ndjson)(?P<packed>\.gz|\.zst)?):(?P<line>\d+)(?: \[.*\])?")
_READ = {
    None: "sed -n {line}p {file}",
    ".gz": "zcat {file} | sed -n {line}p",
    ".zst": "zstdcat {file} | sed -n {line}p",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartLoss:
    """A part of a step: a document of it, or a group of rows. loss_sum: weighted; name: the same on every rank."""

    name: str
    origins: tuple[str, ...]
    loss_sum: float
    weight: float


def group_losses(loss_sums: Tensor, data: StepData, ranks: Ranks) -> list[PartLoss]:
    """The groups of rows of this rank, whose losses a step has found anyway."""
    return [
        PartLoss(
            name=f"rows {ranks.data_rank}.{number}",
            origins=group.origins,
            loss_sum=loss_sum,
            weight=_own_weight(group.weight_total, ranks),
        )
        for number, (group, loss_sum) in enumerate(zip(data.groups, loss_sums.tolist(), strict=True))
    ]


@torch.no_grad()
def document_losses(
    objective: Callable[..., tuple[Tensor, ...]], data: StepData, states: Sequence[ModelState], ranks: Ranks
) -> list[PartLoss]:
    """The documents of this rank, by another forward pass over the step; all ranks call this together.

    Args:
        objective: of a model in evaluation.
        states: of each group, before its first chunk.
    """
    found = []
    for group, before in zip(data.groups, states, strict=True):
        rows, origins, weights = _numbered(group)
        chunks = replace(group.chunks, rows=rows, num_sets=max(2, len(origins)))
        sums: Tensor | None = None
        state = before
        for chunk in chunks:
            _, after, of_chunk = run_chunk(objective, chunk, state)
            state = state.followed_by(after)
            sums = add_set_losses(sums, of_chunk)
        assert sums is not None, "a group without a chunk"
        for names, loss_sum, weight in zip(origins, sums.tolist(), weights, strict=False):
            of_rank = _own_weight(weight, ranks)
            found.append(PartLoss(name=names[0], origins=names, loss_sum=loss_sum, weight=of_rank))
    return found


def worst_first(of_ranks: Sequence[Sequence[PartLoss]]) -> list[tuple[str, float]]:
    """The documents of what the ranks gave, and the mean loss of each (or of the group it is in), the worst first.

    Ranks that share a document have a part of its loss each, and one of them its weight.
    """
    parts: dict[str, PartLoss] = {}
    for part in (part for of_rank in of_ranks for part in of_rank):
        before = parts.get(part.name)
        if before is not None:
            part = replace(part, loss_sum=part.loss_sum + before.loss_sum, weight=part.weight + before.weight)
        parts[part.name] = part
    worst: dict[str, float] = {}
    for part in parts.values():
        for origin in part.origins if part.weight > 0 else ():
            # A document may be in several groups.
            worst[origin] = max(worst.get(origin, -np.inf), part.loss_sum / part.weight)
    return sorted(worst.items(), key=lambda found: found[1], reverse=True)


def show_command(origin: str) -> str | None:
    """What prints a document in a shell; None where no short command does."""
    row = _ROW_OF_JSON_LINES.fullmatch(origin)
    if row is None or "://" in origin:
        return None
    return _READ[row["packed"]].format(line=row["line"], file=shlex.quote(row["file"]))


def _numbered(group: ChunkSequence) -> tuple[list[RowSlice], list[tuple[str, ...]], list[float]]:
    """The rows with each token numbered by its document; the documents of each number, and their weight.

    Where there are more documents than numbers, neighbours share one.
    """
    counts = [_count(row) for row in group.chunks.rows]
    shared = max(1, -(-sum(counts) // MOST_NUMBERS))
    names: list[str] = []
    rows = []
    for row, count in zip(group.chunks.rows, counts, strict=True):
        # A row may go on with a document that began in an earlier step.
        numbers = (np.cumsum(row.starts) - row.starts[:1].sum() + len(names)) // shared
        rows.append(replace(row, sets=numbers.astype(np.uint8)))
        names += row.origins[:count]
    origins = [tuple(names[begin : begin + shared]) for begin in range(0, len(names), shared)]
    weights = np.zeros(max(2, len(origins)))
    for row in rows:
        weights += row.totals_by_set(len(weights))[1]
    return rows, origins, weights.tolist()


def _count(row: RowSlice) -> int:
    """Documents that have a token in the row."""
    return int(row.starts.sum()) + (len(row) > 0 and not row.starts[0])


def _own_weight(weight: float, ranks: Ranks) -> float:
    return weight if ranks.time_rank == 0 else 0.0
