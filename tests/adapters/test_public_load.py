"""infctx.load_adapter: a run's adapter folder from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import infctx
from infctx.adapters.peft_adapters import attach_lora
from infctx.checkpoint.model_file import fingerprint, open_model
from infctx.model.finch import Finch

TOKENS = torch.arange(40)[None] % 50


def test_an_adapter_goes_back_on_its_own_base_only(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    base = tmp_path / "base.pth"
    # Stored in bf16 and read in fp32: the same values, and so the same base.
    infctx.save_model(make_finch("6"), base, dtype=torch.bfloat16)
    trained = infctx.load_model(base)
    adapter = attach_lora(trained, rank=3, alpha=6.0, targets=["key", "gate"])
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected, _ = trained(TOKENS)
    (tmp_path / "adapter").mkdir()
    adapter.save(tmp_path / "adapter", base_fingerprint=fingerprint(open_model(base)))
    model = infctx.load_model(base)
    loaded = infctx.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(TOKENS)[0], expected, rtol=0, atol=0)
    loaded.merge_()
    torch.testing.assert_close(model(TOKENS)[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(infctx.CheckpointError, match="fingerprint"):
        infctx.load_adapter(make_finch("6", seed=3), tmp_path / "adapter")
