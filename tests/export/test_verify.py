"""An export is compared with its source by its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infctx.adapters.peft_adapters import attach_lora
from infctx.checkpoint.model_file import open_model, tensors_of
from infctx.export.catalog import save_model
from infctx.export.verify import max_logit_difference, probe_logits
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


@pytest.mark.parametrize("version", ["6", "5.2", "6c2", "goldfinch"])
def test_logits_layer_by_layer_are_the_models(make_finch: Callable[..., Finch], version: str) -> None:
    """With tuned starts, and an adapter attached; from modules and from tensors; the model stays as it is."""
    model = make_finch(version, has_initial_state=True, dtype=torch.float64)
    model.add_initial_shifts_()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "initial_" in name:
                parameter.normal_()
    tokens = torch.randint(1, 50, (1, 64), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)[0][0]
    names = list(dict(model.named_parameters()))
    for found in (probe_logits(model, dtype=torch.float64), probe_logits(tensors_of(model), dtype=torch.float64)):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
    assert list(dict(model.named_parameters())) == names
    attach_lora(model, rank=2, alpha=4.0, targets=["key", "head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    found = probe_logits(model, dtype=torch.float64)
    torch.testing.assert_close(found, model(tokens)[0][0].detach(), rtol=0, atol=1e-9)
    assert float((found - expected).detach().abs().max()) > 0.1


def test_logits_of_a_gptalpha(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("gptalpha", has_initial_shifts=True, dtype=torch.float64)
    tokens = torch.randint(1, 50, (1, 64), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)[0][0].detach()
    for found in (probe_logits(model, dtype=torch.float64), probe_logits(tensors_of(model), dtype=torch.float64)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
