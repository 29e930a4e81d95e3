"""Fine-tune RWKV-6 Finch and Eagle models on documents of any length, with the exact gradient through the chunks.

Importing this package is cheap: torch and the rest are loaded when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infctx.checkpoint.model_file import load_model
    from infctx.errors import CheckpointError, DataError, InfctxError, RecipeError
    from infctx.export.adapter_files import load_adapter
    from infctx.export.catalog import save_model
    from infctx.training.chunked import backward_through_chunks, chunked_step

__version__ = "0.1.0"

_HOME_OF = {
    "CheckpointError": "infctx.errors",
    "DataError": "infctx.errors",
    "InfctxError": "infctx.errors",
    "RecipeError": "infctx.errors",
    "backward_through_chunks": "infctx.training.chunked",
    "chunked_step": "infctx.training.chunked",
    "load_adapter": "infctx.export.adapter_files",
    "load_model": "infctx.checkpoint.model_file",
    "save_model": "infctx.export.catalog",
}

__all__ = [
    "CheckpointError",
    "DataError",
    "InfctxError",
    "RecipeError",
    "__version__",
    "backward_through_chunks",
    "chunked_step",
    "load_adapter",
    "load_model",
    "save_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'infctx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
