"""Text to token ids and back, for the two vocabularies that need no extra file: World and bytes.

Encoding World text is done by pyrwkv-tokenizer. Decoding is ours, from the vocabulary file of the same package: the
package cannot decode a token that is half a character, which both display and byte offsets need. Tokenizers that come
as a file, such as GPT-NeoX's, are in `tokenizer_json`.
"""

import ast
import functools
import importlib.metadata
import importlib.resources
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyrwkv_tokenizer

from infctx.errors import DataError

END_OF_TEXT = 0
"""The id that closes a document in every vocabulary here; it has no bytes."""

TokenIds = npt.NDArray[np.integer[Any]]

_WORLD_VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the program may ask of a tokenizer."""

    name: str
    vocab_size: int

    @property
    def digest(self) -> str:
        """A string that changes where the ids of a text may change."""
        ...

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Give the ids of a text, without end of text. Raises DataError for text that UTF-8 cannot hold."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode each text by itself.

        One core is used: whoever has several gives each its own texts.
        Returns: all ids one after the other, and the number of ids of each text.
        Raises: DataError for text that UTF-8 cannot hold.
        """
        ...

    def token_ends(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Say where tokens end in the UTF-8 bytes of the joined texts; `ids` and `lengths` are `encode_batch(texts)`.

        Returns: for each id, the number of bytes up to its last, never decreasing.
        """
        ...

    def byte_lengths(self, ids: TokenIds | Sequence[int]) -> npt.NDArray[np.int64]:
        """Give the number of bytes of each id (end of text: 0). Raises DataError for an id outside the vocabulary."""
        ...

    def decode_bytes(self, ids: TokenIds | Sequence[int]) -> bytes:
        """Join the bytes of the ids. Raises DataError for an id outside the vocabulary."""
        ...

    def decode(self, ids: TokenIds | Sequence[int]) -> str:
        """Decode for display: bytes that are not UTF-8 become U+FFFD."""
        ...


def encode_utf8(text: str) -> bytes:
    """Encode as UTF-8. Raises DataError for a lone surrogate, which JSON's "\\ud800" can smuggle into a string."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _surrogate_error(error) from None


def utf8_length(text: str) -> int:
    """Count the bytes of a text in UTF-8. Raises DataError for a lone surrogate."""
    return len(text) if text.isascii() else len(encode_utf8(text))


def joined_ids(
    rows: Sequence[npt.NDArray[np.int32]],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Put the ids of several texts one after the other, as `Tokenizer.encode_batch` gives them."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=np.int32), *rows]), lengths


def _surrogate_error(error: UnicodeEncodeError) -> DataError:
    return DataError(
        f"expected text, got the lone surrogate U+{ord(error.object[error.start]):04X} at character {error.start}, "
        "which UTF-8 cannot hold"
    )


def checked_ids(ids: TokenIds | Sequence[int], tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64)
    outside = (array < 0) | (array >= tokenizer.vocab_size)
    if outside.any():
        raise DataError(
            f"token id {int(array[outside][0])}: expected 0..{tokenizer.vocab_size - 1} for the tokenizer "
            f"{tokenizer.name!r}. Use the tokenizer that made these ids (data.tokenizer)."
        )
    return array


def world_vocabulary_text() -> str:
    """The World vocabulary file, as its package carries it."""
    return importlib.resources.files(pyrwkv_tokenizer).joinpath(_WORLD_VOCABULARY_FILE).read_text(encoding="utf-8")


def world_lines() -> list[str]:
    """A line for each World id from 1: the id, a literal, and the number of bytes."""
    # Not splitlines(), which would also cut at characters that a token may hold.
    return world_vocabulary_text().rstrip("\n").split("\n")


@functools.cache
def _world_tokens() -> tuple[bytes, ...]:
    """The bytes of every World id; id 0 has none."""
    tokens = [b""]
    for line in world_lines():
        number, rest = line.split(" ", 1)
        literal, num_bytes = rest.rsplit(" ", 1)
        value = ast.literal_eval(literal)
        token = value.encode("utf-8") if isinstance(value, str) else value
        assert int(number) == len(tokens), f"{_WORLD_VOCABULARY_FILE}: expected id {len(tokens)}, got {number}"
        assert int(num_bytes) == len(token), f"{_WORLD_VOCABULARY_FILE}: id {number} has {len(token)} bytes"
        tokens.append(token)
    return tuple(tokens)


@functools.cache
def _world_byte_lengths() -> npt.NDArray[np.int64]:
    # Not from the tokens: their 65 529 literals take half a second, which every worker would spend.
    return np.array([0, *(int(line.rpartition(" ")[2]) for line in world_lines())], dtype=np.int64)


# Cached here rather than on the instance: the Rust object cannot be pickled, a WorldTokenizer can.
@functools.cache
def _world_encoder() -> Callable[[str], list[int]]:
    encode: Callable[[str], list[int]] = pyrwkv_tokenizer.RWKVTokenizer().encode
    return encode


class WorldTokenizer:
    """The 65 529 tokens of the World models; ids 65530..65535 of their embedding are padding rows."""

    name = "world"
    vocab_size = 65530

    @property
    def digest(self) -> str:
        """The version of the package that holds the vocabulary."""
        return f"world {importlib.metadata.version('pyrwkv-tokenizer')}"

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Give the ids of a text: at each byte the longest token of the vocabulary."""
        try:
            return np.array(_world_encoder()(text), dtype=np.int32)
        except UnicodeEncodeError as error:
            raise _surrogate_error(error) from None

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode each text by itself; the package's own batches take all cores and, on each, no less time."""
        return joined_ids([self.encode(text) for text in texts])

    def token_ends(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Say where tokens end in the joined texts."""
        return np.cumsum(_world_byte_lengths()[ids])

    def byte_lengths(self, ids: TokenIds | Sequence[int]) -> npt.NDArray[np.int64]:
        """Give the number of bytes of each id."""
        return _world_byte_lengths()[checked_ids(ids, self)]

    def decode_bytes(self, ids: TokenIds | Sequence[int]) -> bytes:
        """Join the bytes of the ids."""
        tokens = _world_tokens()
        return b"".join(tokens[token_id] for token_id in checked_ids(ids, self).tolist())

    def decode(self, ids: TokenIds | Sequence[int]) -> str:
        """Decode for display."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class BytesTokenizer:
    """One token a byte: id = byte + 1."""

    name = "bytes"
    vocab_size = 257
    digest = "bytes"

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Give the ids of the text's UTF-8 bytes."""
        return np.frombuffer(encode_utf8(text), dtype=np.uint8).astype(np.int32) + 1

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode each text by itself."""
        return joined_ids([self.encode(text) for text in texts])

    def token_ends(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Say where tokens end in the joined texts."""
        return np.arange(1, len(ids) + 1)

    def byte_lengths(self, ids: TokenIds | Sequence[int]) -> npt.NDArray[np.int64]:
        """Give 1 for every id but end of text."""
        has_byte: npt.NDArray[np.bool_] = checked_ids(ids, self) != END_OF_TEXT
        return has_byte.astype(np.int64)

    def decode_bytes(self, ids: TokenIds | Sequence[int]) -> bytes:
        """Join the bytes of the ids."""
        array = checked_ids(ids, self)
        values: npt.NDArray[np.int64] = array[array != END_OF_TEXT] - 1
        return values.astype(np.uint8).tobytes()

    def decode(self, ids: TokenIds | Sequence[int]) -> str:
        """Decode for display."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"world": WorldTokenizer, "bytes": BytesTokenizer}

TOKENIZER_OF_VOCAB_SIZE = {65536: "world", 257: "bytes"}

_CHOICES = f"{', '.join(TOKENIZERS)}, or the path of a tokenizer JSON"


def tokenizer_by_name(name: str) -> Tokenizer:
    """Make the tokenizer that `data.tokenizer` names: world, bytes, or a path that ends in .json.

    Raises: DataError for an unknown name, and for a file that cannot be read or is of a kind that is not supported.
    """
    if name.endswith(".json"):
        from infctx.data.tokenizer_json import JsonTokenizer

        return JsonTokenizer(name)
    if name == "neox":
        raise DataError(
            "data.tokenizer=neox: the vocabulary of GPT-NeoX is not part of this program. Give the path of a tokenizer "
            "JSON: the 20B_tokenizer.json that came with the model."
        )
    if name not in TOKENIZERS:
        raise DataError(f"data.tokenizer={name}: expected one of {_CHOICES}.")
    return TOKENIZERS[name]()


def tokenizer_for_vocab(vocab_size: int) -> str:
    """Name the tokenizer of a model that does not say its own. Raises DataError where the size does not tell."""
    if vocab_size not in TOKENIZER_OF_VOCAB_SIZE:
        known = ", ".join(f"{size} = {name}" for size, name in TOKENIZER_OF_VOCAB_SIZE.items())
        raise DataError(
            f"data.tokenizer=auto: the model does not name its tokenizer and its vocabulary size {vocab_size} does not "
            f"tell it (known: {known}). Set data.tokenizer, or --tokenizer, to one of {_CHOICES}."
        )
    return TOKENIZER_OF_VOCAB_SIZE[vocab_size]
