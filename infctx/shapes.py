"""The letters of every shape in this project, and the aliases public signatures use.

B rows of the batch · T tokens in a chunk · C channels (n_embd) · A attention width · H heads · N head size (A = H·N)
V vocabulary · L layers · F feed-forward width · D rank of the token-shift mixes · E rank of the decay

The shapes are checked under pytest only (jaxtyping's import hook), so they cost nothing in a run.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B T"]
Targets = Int[Tensor, "B T"]
TokenWeights = Float[Tensor, "B T"]
Starts = Bool[Tensor, "B T"]
Activations = Float[Tensor, "B T C"]
Logits = Float[Tensor, "B T V"]
LayerWkv = Float[Tensor, "B H N N"]
LayerShift = Float[Tensor, "B C"]
Scalar = Float[Tensor, ""]

__all__ = ["Activations", "LayerShift", "LayerWkv", "Logits", "Scalar", "Starts", "Targets", "TokenWeights", "Tokens"]
