"""AdamW whose moments take one byte each: the optimizer of bitsandbytes, the only file that knows it.

Its state is not tensors alone (the number of steps is an integer), and part of it is nested; `optimizer_state.py` keeps
any of that.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from types import ModuleType
from typing import Any

import torch

from infctx.errors import RecipeError

# Its 8-bit moments come in blocks, and tensors below this size keep 32 bits.
SMALLEST_8_BIT_ELEMENTS = 4096


def make_eight_bit_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments in blocks of 256 over `parameter_groups`; tensors below 4,096 elements keep 32 bits.

    Args:
        device: where the parameters will be when it steps; tried with one small step.
    Raises:
        RecipeError: bitsandbytes is not installed, or cannot step on this device.
    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """
    bitsandbytes = _import_bitsandbytes()
    trial = torch.nn.Parameter(torch.zeros(SMALLEST_8_BIT_ELEMENTS, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        bitsandbytes.optim.AdamW8bit([trial]).step()
    except Exception as error:
        version = importlib.metadata.version("bitsandbytes")
        raise RecipeError(
            f"optimizer.name: adamw-8bit cannot run here: bitsandbytes {version} does not step on {device}: "
            f"{str(error)[:300]} Install a newer one, or use adamw."
        ) from error
    # Its own rule of groups has no weight decay of ours in it: each group brings its own.
    return bitsandbytes.optim.AdamW8bit(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, min_8bit_size=SMALLEST_8_BIT_ELEMENTS
    )


def _import_bitsandbytes() -> ModuleType:
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    # It tells of kernels for quantized models that it would like to have, which no optimizer needs.
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError as error:
        raise RecipeError(
            "optimizer.name: adamw-8bit needs bitsandbytes, which is not installed here "
            f"({error}). Install it: pip install 'infctx[bitsandbytes]', or use adamw."
        ) from error
    finally:
        logger.setLevel(level)
    return bitsandbytes
