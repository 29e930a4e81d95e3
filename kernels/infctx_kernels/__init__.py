"""The WKV6 recurrence of RWKV-6 "Finch" (and, with a decay that does not depend on the token, of RWKV-5 "Eagle")."""

from infctx_kernels.dispatch import Backend, BackendError, choose_backend
from infctx_kernels.wkv6.op import wkv6, wkv6_from_raw_decay

__all__ = ["Backend", "BackendError", "choose_backend", "wkv6", "wkv6_from_raw_decay"]
