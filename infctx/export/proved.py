"""An export from beginning to end: written under another name, read back, compared, and only then put in its place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from infctx.checkpoint.atomic import remove_tree, set_aside
from infctx.checkpoint.model_file import open_model
from infctx.checkpoint.switches import move_switches, remove_switches
from infctx.data.tokenizer import TOKENIZER_OF_VOCAB_SIZE
from infctx.errors import CheckpointError
from infctx.export.catalog import FORMATS, check_output, write_prepared
from infctx.export.options import ExportOptions
from infctx.export.verify import probe_logits
from infctx.model.tensors import ModelTensors

# Between the logits of the tensors that were to be written and of those read back, beside the largest: one layer's
# matrices may be laid out differently in memory, and be multiplied in another order.
_SAME = 1e-4
# Two ways to compute the same may be this many times as far apart as one of them is from float64.
_NOISE = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """max_logit_difference: against the source, float32. logit_std: of the source's logits. seconds: of writing, and of
    computing logits. notes: for the user."""

    path: Path
    format: str
    max_logit_difference: float
    logit_std: float
    num_bytes: int
    seconds: tuple[float, float]
    notes: Sequence[str]


def export_model(
    source: ModelTensors,
    output: Path,
    *,
    format: str,
    options: ExportOptions,
    expected: Tensor | None = None,
    force: bool = False,
) -> Exported:
    """Write a model and prove it: the file is read back and its logits are compared with the source's.

    Args:
        expected: `probe_logits` of what the source stands for, where that is another object, as a model with its
            adapter attached; None = of the source itself.
    Raises:
        CheckpointError: something the format cannot hold, an output that exists, or a file that reads back as another
            model; then nothing is left of it. OSError: the disk is full or fails.
    """
    check_output(output, format=format, force=force)
    began = time.perf_counter()
    source = replace(source, tokenizer=source.tokenizer or TOKENIZER_OF_VOCAB_SIZE.get(source.config.vocab_size))
    merged = probe_logits(source)
    if expected is None:
        expected = merged
    told = _check_merge(expected, merged, source)
    prepared = FORMATS[format].prepare(source, options)
    # Of the same kind as the output, and with its suffix, by which safetensors are files or folders.
    unproved = output.with_name(f".unproved-{os.getpid()}-{output.name}")
    try:
        before_writing = time.perf_counter()
        notes = [*told, *write_prepared(prepared, unproved, format, options)]
        if prepared.config.version != source.config.version:
            notes.insert(
                0,
                f"{format} knows Finch only: this {source.config.name} is written as the Finch that computes the same.",
            )
        writing = time.perf_counter() - before_writing
        found = probe_logits(replace(open_model(unproved, is_streamed=True), origin=f"{output}, read back"))
        _check_same(lambda: FORMATS[format].read_back(prepared, options), expected, found, output=output)
        num_bytes = _size(unproved)
        if output.is_dir():
            set_aside(output)
        move_switches(unproved, output)
        os.replace(unproved, output)
    except OSError as error:
        error.filename = str(output)
        raise
    finally:
        remove_tree(unproved)
        remove_switches(unproved)
    return Exported(
        path=output,
        format=format,
        max_logit_difference=float((found - expected).abs().max()),
        logit_std=float(expected.std()),
        num_bytes=num_bytes,
        seconds=(writing, time.perf_counter() - began - writing),
        notes=notes,
    )


def _check_merge(expected: Tensor, merged: Tensor, source: ModelTensors) -> list[str]:
    """What is written has to be what was trained, before anything is rounded for the file; returns what to tell."""
    difference, bound = float((merged - expected).abs().max()), _SAME * max(1.0, float(expected.abs().max()))
    if difference <= bound:
        return []
    # Some models make much of little: their own rounding in float32 is the measure then.
    noise = float((merged - probe_logits(source, dtype=torch.float64)).abs().max())
    if not difference <= _NOISE * noise:
        raise CheckpointError(
            f"{source.origin}: merged, its logits differ from those with the adapter attached by {difference:.2e}; at "
            f"most {max(bound, _NOISE * noise):.2e} was expected. Nothing was written. "
            "This is a bug of infctx; please report it."
        )
    return [
        f"This model's logits are uncertain by {noise:.1e} in float32, whatever computes them; merged and attached "
        f"differ by {difference:.1e}."
    ]


def _check_same(written: Callable[[], ModelTensors], expected: Tensor, found: Tensor, *, output: Path) -> None:
    """The file must compute what the tensors that went into it compute; how far that is from the source is told."""
    bound = _SAME * max(1.0, float(expected.abs().max()))
    difference = float((found - expected).abs().max())
    if not difference <= bound:
        difference = float((found - probe_logits(written())).abs().max())
    if not difference <= bound:
        raise CheckpointError(
            f"{output}: read back, its logits differ from those of what was written by {difference:.2e}; at most "
            f"{bound:.2e} was expected. Nothing was written. "
            "This is a bug of infctx or a failing disk; please report it."
        )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
