"""Merged against attached: what may differ, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infctx.checkpoint.model_file import tensors_of
from infctx.errors import CheckpointError
from infctx.export import proved
from infctx.export.options import ExportOptions
from infctx.export.proved import export_model
from infctx.export.verify import probe_logits
from infctx.model.finch import Finch


@pytest.mark.parametrize(("noise", "is_written"), [(0.0, False), (1e-3, False), (1e-2, True)])
def test_a_difference_within_the_models_own_rounding_is_told_not_refused(
    make_finch: Callable[..., Finch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float, is_written: bool
) -> None:
    """A model that is another one in float64, by `noise`; merged and attached differ by 0.05."""
    model = make_finch("6")

    def probe(source: Any, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return probe_logits(source, dtype=dtype) + (noise if dtype == torch.float64 else 0.0)

    monkeypatch.setattr(proved, "probe_logits", probe)

    def export() -> proved.Exported:
        return export_model(
            tensors_of(model, origin="the run"),
            tmp_path / "m.pth",
            format="pth",
            options=ExportOptions(dtype=None),
            expected=probe_logits(model) + 0.05,
        )

    if is_written:
        written = export()
        assert written.max_logit_difference == pytest.approx(0.05, abs=1e-4)
        assert any("uncertain by 1.0e-02 in float32" in note for note in written.notes)
    else:
        with pytest.raises(CheckpointError, match=r"the run: merged, .* differ .* by 5.00e-02"):
            export()
        assert list(tmp_path.iterdir()) == []


def test_a_model_as_it_is_needs_no_word(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    model = make_finch("6")
    written = export_model(tensors_of(model), tmp_path / "m.pth", format="pth", options=ExportOptions(dtype=None))
    assert written.notes == []
    assert written.max_logit_difference == 0.0
