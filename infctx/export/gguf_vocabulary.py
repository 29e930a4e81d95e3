"""The vocabulary inside a GGUF file: llama.cpp tokenises by it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from infctx.checkpoint.weights import TOKENIZER_KEY
from infctx.data.tokenizer import TOKENIZER_OF_VOCAB_SIZE, TOKENIZERS, Tokenizer
from infctx.errors import CheckpointError
from infctx.model.tensors import ModelTensors

# llama.cpp's kinds of tokens.
NORMAL, CONTROL, UNUSED = 1, 3, 5
END_OF_TEXT_NAME = "<s>"
# "\n\n" as the file writes it. To ask the World encoder for its id would take 200 MB.
EMPTY_LINE = r"\n\n"
# A name that llama.cpp knows: "User: …\n\n", "Assistant: …\n\n".
CHAT_TEMPLATE = "rwkv-world"


def vocabulary_metadata(source: ModelTensors) -> tuple[dict[str, object], list[str]]:
    """What llama.cpp needs to tokenise for this model.

    Returns: metadata; sentences for the user, where the tokenizer was not said or cannot be written.
    Raises: CheckpointError if the tokenizer has more ids than the model.
    """
    notes = []
    vocab_size, name = source.config.vocab_size, source.tokenizer
    if name is None:
        name = TOKENIZER_OF_VOCAB_SIZE.get(vocab_size)
        if name is not None:
            notes.append(f"The model does not name its tokenizer; its {vocab_size} ids are those of {name!r}.")
    recorded: dict[str, object] = {} if name is None else {TOKENIZER_KEY: name}
    if name not in TOKENIZERS:
        what = (
            "The model does not name its tokenizer" if name is None else f"The tokenizer {name!r} has no GGUF form here"
        )
        notes.append(f"{what}: the file has no vocabulary, and llama.cpp takes and gives token ids only.")
        return recorded | {"tokenizer.ggml.model": "no_vocab"}, notes
    tokens, kinds = _tokens(TOKENIZERS[name](), vocab_size, origin=source.origin)
    metadata = recorded | {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        # Generation ends at either: documents end with id 0, turns of a chat with an empty line.
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if EMPTY_LINE in tokens:
        metadata["tokenizer.ggml.eot_token_id"] = tokens.index(EMPTY_LINE)
    return metadata, notes


def _tokens(tokenizer: Tokenizer, vocab_size: int, *, origin: str) -> tuple[list[str], list[int]]:
    """Every id as llama.cpp wants it: bytes written as Python would, the padding rows of the embedding by number."""
    if vocab_size < tokenizer.vocab_size:
        raise CheckpointError(
            f"{origin}: the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, the model {vocab_size}. "
            "Name the tokenizer that the model was trained with."
        )
    ids = np.arange(tokenizer.vocab_size)
    ends = np.cumsum(tokenizer.byte_lengths(ids)).tolist()
    joined = tokenizer.decode_bytes(ids)
    # Not the quotes and the b of repr(b'…').
    written = [repr(joined[start:end])[2:-1] for start, end in pairwise(ends)]
    padding = [f"[PAD{number}]" for number in range(tokenizer.vocab_size, vocab_size)]
    kinds = [CONTROL] + [NORMAL] * len(written) + [UNUSED] * len(padding)
    return [END_OF_TEXT_NAME, *written, *padding], kinds
