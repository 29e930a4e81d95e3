"""Mixes of each token with the one before it, the inputs of an RWKV-6 block's projections."""

from infctx_kernels.shifted_mix.op import shifted_mix, shifted_mix_unbound

__all__ = ["shifted_mix", "shifted_mix_unbound"]
