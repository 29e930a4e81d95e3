"""Both steps in torch operations: exact in float64, on any device. Every other backend is compared with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_relu_reference(x: Tensor) -> Tensor:
    """relu(x)² in x's dtype."""
    return F.relu(x).square()


def sigmoid_gate_reference(receptance: Tensor, value: Tensor) -> Tensor:
    """sigmoid(receptance) · value, each operation rounded to their dtype."""
    return torch.sigmoid(receptance) * value
