"""The two element-wise steps of an RWKV channel mix: squared ReLU and the sigmoid gate."""

from infctx_kernels.channel_mix.op import sigmoid_gate, squared_relu

__all__ = ["sigmoid_gate", "squared_relu"]
