"""A place that a model of another dtype goes on from: states stay exact, caches have its bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from infctx.generation.prompt_state import in_dtype
from infctx.generation.reading import read_tokens
from infctx.model.finch import Finch


def test_the_cache_has_the_dtype_of_the_model(make_finch: Callable[..., Finch]) -> None:
    reading = read_tokens(make_finch("goldfinch", dtype=torch.bfloat16), np.arange(1, 9, dtype=np.int32))
    for logits in (torch.bfloat16, torch.float32):
        state = in_dtype(reading, state=torch.float32, logits=logits).state
        assert {part.dtype for part in state.recurrent} == {torch.float32}
        assert [part.dtype for part in state.cache] == [torch.int32, logits]
