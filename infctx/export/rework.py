"""Write a reworked model: streamed, read back and proved before it has its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from infctx.checkpoint.model_file import TOKENIZER_KEY, build_model, open_model
from infctx.checkpoint.weights import write_pth, write_safetensors
from infctx.errors import CheckpointError
from infctx.export.catalog import check_output
from infctx.export.verify import PROBE_TOKENS
from infctx.model.tensors import ModelTensors
from infctx.surgery.info import find_bad_tensors

# "keep": every tensor as it is stored or was computed.
DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = ("pth", "safetensors")

_Proof = TypeVar("_Proof")


def check_rework(sources: Sequence[Path], output: Path, *, dtype: str, force: bool) -> None:
    """Refuse, before any work is done, what cannot be written or would write over what is read.

    Raises:
        CheckpointError: an unknown dtype or ending, an output that exists without force, a folder that does not exist,
            or an output that is one of the sources or lies in a source's folder.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    if output.suffix.lstrip(".") not in FORMATS:
        raise CheckpointError(f"{output}: expected a name that ends in {' or '.join(f'.{name}' for name in FORMATS)}.")
    for source in sources:
        place, target = source.resolve(), output.resolve()
        if place == target or (source.is_dir() and target.parent == place and target.exists()):
            raise CheckpointError(f"{output}: is what is read ({source}). Give another path for the output.")
    check_output(output, format=output.suffix[1:], force=force)


def write_rework(
    result: ModelTensors, output: Path, *, dtype: str = "keep", prove: Callable[[ModelTensors], _Proof]
) -> _Proof:
    """Write a model in the format its name ends in, one tensor in memory at a time, whole or not at all.

    Args:
        dtype: a name of DTYPES.
        prove: given the tensors of the written file, before it takes the place of what was there; whatever it raises
            leaves that as it was.
    Returns:
        What `prove` gives.
    Raises:
        CheckpointError: the file cannot be read back. OSError: the disk is full or fails.
    """
    wanted = DTYPES[dtype]
    tensors = {name: stored if wanted is None else stored.to(wanted) for name, stored in result.tensors.items()}
    unproved = output.with_name(f".{output.name}.unproved-{os.getpid()}")
    try:
        if output.suffix == ".safetensors":
            metadata = {"format": "pt", "infctx.version": result.config.version}
            if result.tokenizer is not None:
                metadata[TOKENIZER_KEY] = result.tokenizer
            write_safetensors(unproved, tensors, metadata)
        else:
            write_pth(unproved, tensors)
        proof = prove(open_model(unproved, is_streamed=True))
        os.replace(unproved, output)
    except OSError as error:
        error.filename = str(output)
        raise
    finally:
        unproved.unlink(missing_ok=True)
    return proof


@torch.no_grad()
def logit_difference(source: ModelTensors, result: ModelTensors, *, num_ids: int | None = None) -> float:
    """Largest absolute difference between the logits of two models in float32, over a fixed probe sequence.

    Args:
        num_ids: compare the logits of the first ids alone, on a probe of those; None = of all ids of both.
    Raises:
        CheckpointError: either has logits that are not finite.
    """
    shared = min(source.config.vocab_size, result.config.vocab_size, num_ids or source.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(1, shared - 1), shared, (1, PROBE_TOKENS), generator=generator)
    logits = []
    for model, what in ((source, "the source"), (result, "the result")):
        found = build_model(model)(tokens)[0][..., :shared]
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"the logits of {what} are not finite; nothing was written. The weights are damaged, or too large for "
                "this dtype: infctx model info --check names them."
            )
        logits.append(found)
    return float((logits[0] - logits[1]).abs().max())


def require_finite(result: ModelTensors) -> None:
    """Read every tensor once.

    Raises:
        CheckpointError: one holds a NaN or an infinity.
    """
    for bad in find_bad_tensors(result):
        raise CheckpointError(
            f"tensor {bad.name}: {bad.num_nan} NaN and {bad.num_infinite} infinite values; nothing was written. A "
            "source is damaged, or its values are too large for this dtype."
        )
