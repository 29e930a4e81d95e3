"""Whose names a file's tensors have, and back to the official ones. A new layout adds a file and a few lines here."""

from __future__ import annotations

from collections.abc import Mapping

from infctx.checkpoint.layouts.fla import LAYOUT as FLA
from infctx.checkpoint.layouts.fla import VALUE_SCALE, VALUE_SCALE_KEY, fla_num_layers, fla_rows, is_fla
from infctx.checkpoint.layouts.gguf import ARCHITECTURE_KEY, from_gguf, is_gguf
from infctx.checkpoint.layouts.gguf import LAYOUT as GGUF
from infctx.checkpoint.layouts.hugging_face import LAYOUT as HUGGING_FACE
from infctx.checkpoint.layouts.hugging_face import hugging_face_rows, hugging_face_version, is_hugging_face
from infctx.checkpoint.layouts.rows import LayoutRow, from_layout
from infctx.errors import CheckpointError
from infctx.model.config import FinchConfig
from infctx.model.finch_keys import strip_prefix
from infctx.model.tensors import StoredTensor


def to_official(
    stored: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, file: str
) -> dict[str, StoredTensor]:
    """The tensors under official names, whatever layout they come in; shapes may still be squeezed.

    Args: metadata: of the file; a GGUF file is told by it.
    Raises: CheckpointError if a layout is recognised and a tensor of it is missing, or one is too many.
    """
    if ARCHITECTURE_KEY in metadata:
        return from_gguf(stored, metadata, file=file)
    rows: list[LayoutRow]
    if is_hugging_face(stored):
        version, num_layers = hugging_face_version(stored)
        rows, layout = hugging_face_rows(_sizeless(version, num_layers)), HUGGING_FACE
    elif is_fla(stored):
        is_scaled = VALUE_SCALE_KEY in metadata
        if is_scaled and metadata[VALUE_SCALE_KEY] != str(VALUE_SCALE):
            raise CheckpointError(
                f"{file}: its metadata has {VALUE_SCALE_KEY} {metadata[VALUE_SCALE_KEY][:40]!r}; "
                f"expected {VALUE_SCALE}."
            )
        config = _sizeless("6", fla_num_layers(stored))
        rows, layout = fla_rows(config, value_scale=VALUE_SCALE if is_scaled else 1.0), FLA
    else:
        return strip_prefix(stored)
    return from_layout(rows, stored, file=file, layout=layout)


def layout_of(names: Mapping[str, StoredTensor]) -> str:
    """Whose names these are, in words."""
    if is_hugging_face(names):
        return HUGGING_FACE
    if is_gguf(names):
        return GGUF
    return FLA if is_fla(names) else "official"


def _sizeless(version: str, num_layers: int) -> FinchConfig:
    """What names depend on; the sizes are read when the tensors have official names."""
    return FinchConfig(version=version, n_layer=num_layers, n_embd=0, vocab_size=0, head_size=0, n_head=0, dim_ffn=0)
