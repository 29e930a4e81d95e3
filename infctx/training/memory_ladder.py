"""What a run does when its memory runs out: the same gradient from shorter chunks, or an error with the numbers."""

from __future__ import annotations

import gc

import torch

from infctx.data.step_source import StepData
from infctx.errors import MachineError
from infctx.free_memory import free_host_bytes
from infctx.training.run import Done, Run

# Below this a chunk's activations are no longer what fills the memory.
SMALLEST_CHUNK_TOKENS = 16


def shorten_chunks(run: Run, done: Done, data: StepData, fault: str) -> None:
    """Halve the chunks for the rest of the run, and say so.

    Raises:
        MachineError: they are as short as they get; with what the memory holds.
    """
    longest = max(group.chunks.num_tokens for group in data.groups)
    tried = min(done.piece_tokens or data.chunk_tokens, longest)
    if tried < 2 * SMALLEST_CHUNK_TOKENS:
        raise MachineError(f"{fault}\nChunks of {tried} tokens do not fit either. {_memory_in_words(run)}")
    done.piece_tokens = -(-tried // 2)
    window = run.settings.window
    if window != "document":
        window *= data.in_pieces(done.piece_tokens).groups[0].chunks.pieces_per_chunk
    kept = "the whole document" if window == "document" else f"{window:,} of them"
    run.progress.message(
        f"out of memory in step {done.step + 1} with chunks of {tried:,} tokens: from here on {done.piece_tokens:,}, "
        f"and the gradient crosses {kept}, which makes it the same"
    )
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _memory_in_words(run: Run) -> str:
    parameters = list(run.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    # The gradient in float32, and Adam's two moments.
    training = sum(p.numel() * (4 + run.settings.moment_bytes) for p in parameters if p.requires_grad)
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(run.device)
        memory = f"{run.device}: {_gigabytes(free)} free of {_gigabytes(total)}"
    else:
        memory = f"{_gigabytes(free_host_bytes())} free"
    return (
        f"The weights take {_gigabytes(weights)}, gradient and optimizer {_gigabytes(training)}; {memory}. Train fewer "
        "parameters (adapter.kind: lora, a lower adapter.rank), use fewer run.rows, or a smaller model."
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
