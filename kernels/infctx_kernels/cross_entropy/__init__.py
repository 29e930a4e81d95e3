"""The head's matrix product and the cross entropy in one, without ever holding the logits of all tokens."""

from infctx_kernels.cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
