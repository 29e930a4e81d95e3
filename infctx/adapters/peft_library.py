"""Where peft is imported: it takes seconds, and brings bitsandbytes along where that is installed."""

from __future__ import annotations

from types import ModuleType

from infctx.model.bitsandbytes_linear import without_its_advice


def import_peft() -> ModuleType:
    """The library, without what bitsandbytes says about kernels that nobody here uses."""
    with without_its_advice():
        import peft
    return peft
