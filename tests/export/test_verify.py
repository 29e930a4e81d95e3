"""An export is compared with its source by its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.checkpoint.model_file import open_model
from infctx.export.catalog import save_model
from infctx.export.verify import max_logit_difference
from infctx.model.finch import Finch


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_a_true_export_has_no_difference_and_a_false_one_has(
    make_finch: Callable[..., Finch], tmp_path: Path, format: str
) -> None:
    model = make_finch("6")
    path = tmp_path / "model"
    save_model(model, path, format=format, dtype=torch.float32)
    assert max_logit_difference(model, open_model(path)) == 0.0
    save_model(model, path, format=format, dtype=torch.bfloat16)
    assert 0 < max_logit_difference(model, open_model(path)) < 0.5
    with torch.no_grad():
        model.blocks[1].time_mix.bonus.add_(0.1)
    save_model(make_finch("6"), path, format=format, dtype=torch.float32)
    assert max_logit_difference(model, open_model(path)) > 1e-3
