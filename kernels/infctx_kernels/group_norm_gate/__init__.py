"""What follows the recurrence in an RWKV time mix: group norm of each head, then the gate."""

from infctx_kernels.group_norm_gate.op import group_norm_gate

__all__ = ["group_norm_gate"]
