"""The WKV6 recurrence of RWKV-6 "Finch" (and, with a decay that does not depend on the token, of RWKV-5 "Eagle")."""

from infctx_kernels.channel_mix.op import sigmoid_gate, squared_relu
from infctx_kernels.cross_entropy.op import linear_cross_entropy
from infctx_kernels.dispatch import Backend, BackendError, choose_backend
from infctx_kernels.group_norm_gate.op import group_norm_gate
from infctx_kernels.shifted_mix.op import shifted_mix, shifted_mix_unbound
from infctx_kernels.wkv6.op import wkv6, wkv6_from_raw_decay

__all__ = [
    "Backend",
    "BackendError",
    "choose_backend",
    "group_norm_gate",
    "linear_cross_entropy",
    "shifted_mix",
    "shifted_mix_unbound",
    "sigmoid_gate",
    "squared_relu",
    "wkv6",
    "wkv6_from_raw_decay",
]
