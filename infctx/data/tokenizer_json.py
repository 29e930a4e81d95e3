"""A tokenizer that comes as a JSON file of the `tokenizers` package, such as GPT-NeoX's: byte-level BPE only.

Ids are the package's own, without special tokens: text that reads "<|endoftext|>" stays text. The bytes of a token
follow from the vocabulary, where each byte stands as a printable character; tokens added to it, such as NeoX's runs of
spaces, are plain text.

NeoX's normalizer is NFC. The text is normalised as a whole before it is cut into tokens, so the bytes of the tokens are
those of the normalised text, and `decode_bytes` gives that. Where normalising changes a text, the ends of its tokens
are taken from the package's alignment with the text as it was: a span means the same bytes with and without a
normalizer. A letter and an accent that become one character lie where the letter lay, even if a span begins between.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infctx.data.tokenizer import END_OF_TEXT, TokenIds, checked_ids, encode_utf8, joined_ids, utf8_length
from infctx.errors import DataError

END_OF_TEXT_TOKEN = "<|endoftext|>"

_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")

# NeoX's vocabulary has no tokens for these.
_NEVER_IN_UTF8 = frozenset([0xC0, 0xC1, *range(0xF5, 0x100)])


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes, in order, for the characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class JsonTokenizer:
    """Byte-level BPE from a file. name: the path; digest: the SHA-256 of the file.

    Raises: DataError where the file cannot be read, is no byte-level BPE, or does not close documents with id 0.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"data.tokenizer={path}: cannot be read: {error.strerror or error}.") from None
        self.digest = hashlib.sha256(raw).hexdigest()
        self._encoder = _load(raw, path)
        self._normalizer = self._encoder.normalizer
        self._tokens = _token_bytes(self._encoder, path)
        self._byte_lengths = np.array([len(token) for token in self._tokens], dtype=np.int64)
        self.vocab_size = len(self._tokens)

    def __reduce__(self) -> tuple[type["JsonTokenizer"], tuple[str]]:
        return JsonTokenizer, (self.name,)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Give the ids of a text. Raises DataError for text that UTF-8 cannot hold, or that the file's rules change."""
        encode_utf8(text)
        ids = np.array(self._encoder.encode(text).ids, dtype=np.int32)
        expected, got = utf8_length(self._normalised(text)), int(self._byte_lengths[ids].sum())
        if expected != got or (ids == END_OF_TEXT).any():
            raise DataError(
                f"data.tokenizer={self.name}: expected tokens that hold the text's {expected} bytes, got {got} bytes "
                f"for {text[:40]!r}. The file's pre-tokenizer or added tokens change the text, which is not supported."
            )
        return ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode each text by itself; the package's own batches would start threads in each worker process."""
        return joined_ids([self.encode(text) for text in texts])

    def token_ends(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Say where tokens end in the joined texts, as they were before the file's normalizer."""
        ends = [np.zeros(0, dtype=np.int64)]
        text_start = first = 0
        for text, length in zip(texts, lengths.tolist(), strict=True):
            is_changed = self._normalised(text) != text
            own = self._aligned_ends(text) if is_changed else np.cumsum(self._byte_lengths[ids[first : first + length]])
            ends.append(text_start + own)
            first += length
            text_start += utf8_length(text)
        return np.concatenate(ends)

    def byte_lengths(self, ids: TokenIds | Sequence[int]) -> npt.NDArray[np.int64]:
        """Give the number of bytes of each id."""
        return self._byte_lengths[checked_ids(ids, self)]

    def decode_bytes(self, ids: TokenIds | Sequence[int]) -> bytes:
        """Join the bytes of the ids."""
        return b"".join(self._tokens[token_id] for token_id in checked_ids(ids, self).tolist())

    def decode(self, ids: TokenIds | Sequence[int]) -> str:
        """Decode for display."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _normalised(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _aligned_ends(self, text: str) -> npt.NDArray[np.int64]:
        """Give the end of each token in the bytes of a text that the normalizer changes."""
        offsets = self._encoder.encode(text).offsets
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(sizes)])
        return bytes_before[np.array([end for _, end in offsets], dtype=np.int64)]


def _load(raw: bytes, path: str) -> Any:
    try:
        from tokenizers import Tokenizer as Encoder
    except ImportError:
        raise DataError(
            f"data.tokenizer={path}: needs the package tokenizers. Install it: pip install tokenizers"
        ) from None
    try:
        content = json.loads(raw)
        encoder = Encoder.from_str(raw.decode("utf-8"))
    except MemoryError:
        raise
    # The package raises a bare Exception for whatever it does not understand.
    except Exception as error:
        raise DataError(
            f"data.tokenizer={path}: expected a tokenizer JSON of the tokenizers package: {error}."
        ) from None
    fault = _fault(content)
    if fault:
        raise DataError(f"data.tokenizer={path}: expected a byte-level BPE as GPT-NeoX's, got {fault}.")
    encoder.no_truncation()
    encoder.no_padding()
    # It would add special tokens, and may leave spaces out of a token's offsets.
    encoder.post_processor = None
    # Text that reads like a special token stays text.
    encoder.encode_special_tokens = True
    return encoder


def _fault(content: dict[str, Any]) -> str | None:
    """Say why a file is not one whose tokens hold the text's bytes, or None."""
    model = content["model"]
    if model.get("type") != "BPE":
        return f"a model of type {model.get('type')}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"a model with {key}={model[key]!r}"
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = [step for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if step.get("type") == "ByteLevel"]
    if not steps:
        return "a file without the pre-tokenizer ByteLevel"
    if steps[0].get("add_prefix_space"):
        return "a pre-tokenizer with add_prefix_space=true"
    in_text = {character for character, byte in _byte_of_character().items() if byte not in _NEVER_IN_UTF8}
    missing = in_text - model["vocab"].keys()
    if missing:
        return f"a vocabulary without tokens for {len(missing)} of the {len(in_text)} bytes of UTF-8"
    normalizer = content.get("normalizer") or {"type": "Sequence", "normalizers": []}
    for form in normalizer.get("normalizers", [normalizer]):
        # Others fail on texts with added tokens, or add text of their own.
        if form.get("type") not in _NORMAL_FORMS:
            return f"a normalizer of type {form.get('type')} (supported: {', '.join(_NORMAL_FORMS)})"
    added = content.get("added_tokens") or []
    for token in added:
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            return f"the added token {token['content']!r}, which takes spaces beside it away"
    closing = {"content": END_OF_TEXT_TOKEN, "id": END_OF_TEXT, "special": True}
    if not any(closing.items() <= token.items() for token in added):
        return f"a file in which the special token {END_OF_TEXT_TOKEN!r} is not id 0, which closes documents"
    return None


def _token_bytes(encoder: Any, path: str) -> list[bytes]:
    """Give the bytes of every id; those that the file leaves out, and end of text, have none."""
    added = {token_id: token.content for token_id, token in encoder.get_added_tokens_decoder().items()}
    vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max(vocabulary.values()) + 1)
    table = _byte_of_character()
    for token, token_id in vocabulary.items():
        if token_id in added or token_id == END_OF_TEXT:
            continue
        try:
            tokens[token_id] = bytes(table[character] for character in token)
        except KeyError as error:
            raise DataError(
                f"data.tokenizer={path}: expected a byte-level vocabulary, got the token {token!r}, in which {error} "
                "stands for no byte."
            ) from None
    for token_id, text in added.items():
        if token_id != END_OF_TEXT:
            tokens[token_id] = text.encode("utf-8")
    return tokens
