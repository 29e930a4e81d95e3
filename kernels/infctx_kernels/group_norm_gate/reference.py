"""Group norm and gate in torch operations: exact in float64, on any device. Other backends are compared with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_gate_reference(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Norm in float32 (float64 with float64 x), rounded to gate's dtype, times the gate; as `op.group_norm_gate`."""
    heads, size = x.shape[2:]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1, heads * size).to(work)
    normed = F.group_norm(flat, heads, weight.to(work), bias.to(work), eps).view(gate.shape)
    return normed.to(gate.dtype) * F.silu(gate)
