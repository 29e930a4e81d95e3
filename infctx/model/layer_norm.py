"""The model's layer norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm that answers in its input's dtype, whatever its own and whatever autocast would make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        normed = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return normed.to(x.dtype)
