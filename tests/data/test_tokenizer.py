"""The tokenizers against the rwkv package's own, and on bytes that are not text."""

import pickle
from importlib import metadata
from importlib.resources import files

import numpy as np
import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from infctx.data.tokenizer import (
    END_OF_TEXT,
    BytesTokenizer,
    Tokenizer,
    WorldTokenizer,
    tokenizer_by_name,
    tokenizer_for_vocab,
)
from infctx.errors import DataError

MIXED_TEXTS = [
    "",
    " ",
    "The Eiffel tower is in the city of",
    "User: hi\n\nAssistant:",
    "line\r\nline\n\n\n\tline\x00\x7f",
    "Größe, façade, naïve — “quoted” … 12 345,67 €",
    "Привет, мир! Γειά σου κόσμε. שלום עולם مرحبا بالعالم",
    "東京は日本の首都です。你好，世界！안녕하세요 세계",
    "สวัสดีชาวโลก नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff\u2028\U0010ffff",
    "def f(x):\n    return x ** 2  # ∂f/∂x = 2x\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + "=" * 300,
]


@pytest.fixture(scope="module")
def oracle() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(str(files("rwkv").joinpath("rwkv_vocab_v20230424.txt")))


def random_text(generator: np.random.Generator, num_characters: int) -> str:
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x400, 0x460), (0x4E00, 0x5200), (0x1F300, 0x1F600), (0x9, 0xE)]
    chosen = generator.integers(len(blocks), size=num_characters // 5 + 1).repeat(5)[:num_characters]
    return "".join(chr(generator.integers(*blocks[block])) for block in chosen)


def test_world_encodes_as_the_official_tokenizer(oracle: TRIE_TOKENIZER) -> None:
    tokenizer = WorldTokenizer()
    generator = np.random.Generator(np.random.PCG64(0))
    texts = MIXED_TEXTS + [random_text(generator, int(generator.integers(1, 200))) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == oracle.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths(ids).sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), BytesTokenizer()], ids=["world", "bytes"])
def test_a_batch_is_its_texts_one_by_one(tokenizer: WorldTokenizer | BytesTokenizer) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    texts = MIXED_TEXTS + [random_text(generator, int(generator.integers(1, 50))) for _ in range(20)] + [""]
    ids, lengths = tokenizer.encode_batch(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    expected = [tokenizer.encode(text).tolist() for text in texts]
    assert [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    ends = tokenizer.token_ends(texts, ids, lengths)
    assert ends.dtype == np.int64
    everything = b""
    for token, end in zip(ids.tolist(), ends.tolist(), strict=True):
        everything += tokenizer.decode_bytes([token])
        assert end == len(everything)
    assert everything == "".join(texts).encode()
    for nothing in ([], [""]):
        ids, lengths = tokenizer.encode_batch(nothing)
        assert (ids.tolist(), lengths.tolist()) == ([], [0] * len(nothing))
        assert tokenizer.token_ends(nothing, ids, lengths).tolist() == []
    with pytest.raises(DataError, match=r"U\+D800 at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800cd"])


def test_world_knows_the_bytes_of_every_token(oracle: TRIE_TOKENIZER) -> None:
    tokenizer = WorldTokenizer()
    assert len(oracle.idx2token) == 65529
    lengths = tokenizer.byte_lengths(np.arange(tokenizer.vocab_size))
    assert lengths[END_OF_TEXT] == 0
    for token_id, token in oracle.idx2token.items():
        assert tokenizer.decode_bytes([token_id]) == token
        assert lengths[token_id] == len(token)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("\n", [11]),
        ("\n\n", [261]),
        ("\n\n\n", [3328]),
        ("\r\n", [263]),
        ("Assistant", [5585, 41693]),
        ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
        (
            "The Eiffel tower is in the city of",
            [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706],
        ),
    ],
)
def test_known_world_ids(text: str, ids: list[int]) -> None:
    assert WorldTokenizer().encode(text).tolist() == ids


def test_bytes_round_trip_of_any_bytes() -> None:
    tokenizer = BytesTokenizer()
    generator = np.random.Generator(np.random.PCG64(1))
    for length in (0, 1, 7, 1000):
        raw = generator.integers(256, size=length, dtype=np.uint8)
        ids = raw.astype(np.int32) + 1
        assert tokenizer.decode_bytes(ids) == raw.tobytes()
    for text in MIXED_TEXTS:
        ids = tokenizer.encode(text)
        assert ids.tolist() == [byte + 1 for byte in text.encode("utf-8")]
        assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths([0, 1, 256]).tolist() == [0, 1, 1]


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), BytesTokenizer()])
def test_end_of_text_has_no_bytes(tokenizer: WorldTokenizer | BytesTokenizer) -> None:
    ids = [*tokenizer.encode("one").tolist(), END_OF_TEXT, *tokenizer.encode("two").tolist()]
    assert tokenizer.decode(ids) == "onetwo"


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), BytesTokenizer()])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: WorldTokenizer | BytesTokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size, 70000):
        with pytest.raises(DataError, match=f"{wrong}.*0..{tokenizer.vocab_size - 1}"):
            tokenizer.decode_bytes([1, wrong])
        with pytest.raises(DataError, match=tokenizer.name):
            tokenizer.byte_lengths([wrong])


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), BytesTokenizer()])
def test_a_lone_surrogate_is_a_data_error(tokenizer: WorldTokenizer | BytesTokenizer) -> None:
    with pytest.raises(DataError, match=r"U\+D800 at character 2"):
        tokenizer.encode("ab\ud800cd")


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), BytesTokenizer()])
def test_tokenizers_can_be_pickled_after_use(tokenizer: WorldTokenizer | BytesTokenizer) -> None:
    expected = tokenizer.encode("héllo").tolist()
    assert pickle.loads(pickle.dumps(tokenizer)).encode("héllo").tolist() == expected


def test_names_and_vocabulary_sizes() -> None:
    assert isinstance(WorldTokenizer(), Tokenizer)
    assert isinstance(BytesTokenizer(), Tokenizer)
    assert tokenizer_by_name("world").name == "world"
    assert tokenizer_by_name("bytes").name == "bytes"
    with pytest.raises(DataError, match=r"data\.tokenizer=wrld: expected one of world, bytes, or the path of a tok"):
        tokenizer_by_name("wrld")
    with pytest.raises(DataError, match=r"data\.tokenizer=neox: .*[Gg]ive the path of a tokenizer JSON"):
        tokenizer_by_name("neox")
    with pytest.raises(DataError, match=r"data\.tokenizer=gone\.json: cannot be read: No such file"):
        tokenizer_by_name("gone.json")
    assert tokenizer_for_vocab(65536) == "world"
    assert tokenizer_for_vocab(257) == "bytes"
    with pytest.raises(DataError, match=r"50277.*Set data\.tokenizer.*path of a tokenizer JSON"):
        tokenizer_for_vocab(50277)
    digests = {WorldTokenizer().digest, BytesTokenizer().digest}
    assert len(digests) == 2
    assert metadata.version("pyrwkv-tokenizer") in WorldTokenizer().digest
