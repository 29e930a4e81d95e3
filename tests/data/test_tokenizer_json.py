"""Tokenizers from a file, on a small one trained here: as GPT-NeoX's, with NFC and added runs of spaces."""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Encoder

from infctx.data.rendered import Rendered
from infctx.data.templates import make_documents, make_template
from infctx.data.tokenizer import Tokenizer, tokenizer_by_name
from infctx.data.tokenizer_json import JsonTokenizer
from infctx.errors import DataError

CORPUS = [
    "hello world, def f(x):\n    return x ** 2",
    "café naïve Größe",
    "東京は日本の首都",
    "the theme of the then 👩‍👧",
]

TEXTS = ["", " ", "hello world", "def f(x):\n        return  x\n\n\n", "<|endoftext|> and <|padding|>", "   \t  "]
TEXTS += ["café 東京 👩‍👧 \x00\x7f\u2028"]
DECOMPOSED = ["e\u0301", "cafe\u0301 is", "a\u0323\u0301\u0302b", "\u1112\u1161\u11ab end", "e\u0301\u0301   e"]


def trained(normalizer: Any) -> Encoder:
    encoder = Encoder(models.BPE())
    encoder.normalizer = normalizer
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(CORPUS * 20, trainer)
    encoder.add_tokens([AddedToken(" " * count, normalized=True) for count in range(8, 1, -1)])
    return encoder


FORMS = {
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "two": normalizers.Sequence([normalizers.NFD(), normalizers.NFKC()]),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, form in {**FORMS, "none": None}.items():
        trained(form).save(str(folder / f"{name}.json"))
    return {name: str(folder / f"{name}.json") for name in (*FORMS, "none")}


@pytest.fixture
def path(paths: dict[str, str]) -> str:
    return paths["nfc"]


@pytest.fixture
def tokenizer(path: str) -> JsonTokenizer:
    return JsonTokenizer(path)


def random_texts(seed: int, characters: list[str]) -> list[str]:
    generator = np.random.Generator(np.random.PCG64(seed))
    return ["".join(generator.choice(characters, size=int(generator.integers(0, 40)))) for _ in range(100)]


MIXED = ["a", "the", " ", "   ", "\n", ":", "é", "東", "京", "👩", "\u200d", "x"]


def official(path: str) -> Encoder:
    """The package's own reading, with special tokens in the text left as text and offsets untrimmed."""
    encoder = Encoder.from_file(path)
    encoder.encode_special_tokens = True
    encoder.post_processor = processors.ByteLevel(trim_offsets=False)
    return encoder


def test_ids_are_the_packages_own(tokenizer: JsonTokenizer, path: str) -> None:
    encoder = official(path)
    for text in TEXTS + DECOMPOSED + random_texts(0, [*MIXED, "\u0301"]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == encoder.encode(text, add_special_tokens=False).ids
        assert 0 not in ids
        normalised = normalizers.NFC().normalize_str(text)
        assert tokenizer.decode_bytes(ids) == normalised.encode()
        assert tokenizer.decode(ids) == normalised
        assert tokenizer.byte_lengths(ids).sum() == len(normalised.encode())


def test_every_id_has_its_bytes(tokenizer: JsonTokenizer) -> None:
    lengths = tokenizer.byte_lengths(np.arange(tokenizer.vocab_size))
    for token_id in range(tokenizer.vocab_size):
        assert lengths[token_id] == len(tokenizer.decode_bytes([token_id]))
    assert lengths[0] == 0
    assert (lengths[1:] > 0).all()
    spaces = tokenizer.encode("x" + " " * 5 + "\n")[1]
    assert tokenizer.decode_bytes([spaces]) == b" " * 5
    with pytest.raises(DataError, match=rf"token id {tokenizer.vocab_size}: expected 0\.\.{tokenizer.vocab_size - 1}"):
        tokenizer.decode_bytes([tokenizer.vocab_size])


def test_a_batch_is_its_texts_one_by_one(tokenizer: JsonTokenizer) -> None:
    ids, lengths = tokenizer.encode_batch(TEXTS)
    assert [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] == [
        tokenizer.encode(text).tolist() for text in TEXTS
    ]
    ids, lengths = tokenizer.encode_batch([])
    assert tokenizer.token_ends([], ids, lengths).tolist() == []


def last_characters(text: str, ends: np.ndarray) -> list[int]:
    """The number of the character in which each token's last byte lies."""
    data = text.encode()
    return [len(data[: end - 1].decode(errors="ignore")) for end in ends.tolist()]


@pytest.mark.parametrize("form", FORMS)
def test_token_ends_follow_the_packages_alignment(form: str, paths: dict[str, str]) -> None:
    tokenizer, encoder = JsonTokenizer(paths[form]), official(paths[form])
    characters = [*MIXED, "\u0301", "\u0323", "e", "\u1112", "\u1161", "\ufb01", "\u2167", "\u0130"]
    texts = [text for text in TEXTS + DECOMPOSED + random_texts(1, characters) if text]
    ids, lengths = tokenizer.encode_batch(texts)
    row_ends = np.split(tokenizer.token_ends(texts, ids, lengths), np.cumsum(lengths)[:-1])
    num_changed = text_start = 0
    for text, ends in zip(texts, row_ends, strict=True):
        own_ends = ends - text_start
        text_start += len(text.encode())
        offsets = encoder.encode(text, add_special_tokens=False).offsets
        assert (np.diff(own_ends) >= 0).all()
        assert last_characters(text, own_ends) == [end - 1 for _, end in offsets]
        num_changed += FORMS[form].normalize_str(text) != text
    assert num_changed > 20


def test_token_ends_without_a_normalizer_are_the_bytes_of_the_tokens(paths: dict[str, str]) -> None:
    tokenizer = JsonTokenizer(paths["none"])
    texts = TEXTS + DECOMPOSED
    ids, lengths = tokenizer.encode_batch(texts)
    everything = b""
    for token, end in zip(ids.tolist(), tokenizer.token_ends(texts, ids, lengths).tolist(), strict=True):
        everything += tokenizer.decode_bytes([token])
        assert len(everything) == end
    assert everything == "".join(texts).encode()


def trained_text(tokenizer: Tokenizer, rendered: Rendered) -> str:
    batch = make_documents([rendered], tokenizer)
    return tokenizer.decode(batch.tokens[batch.weights > 0])


def test_spans_hold_where_the_text_is_normalised(tokenizer: JsonTokenizer) -> None:
    """Seven decomposed characters before the span would move it by as many bytes."""
    template = make_template("completion")
    for prompt in ("e\u0301" * 7 + ":", "é" * 7 + ":", "\u1112\u1161\u11ab" * 5 + ":"):
        for completion in ("\ntrained", "\ne\u0301trained", "\nétrained"):
            rendered = template.render({"prompt": prompt, "completion": completion})
            assert trained_text(tokenizer, rendered) == completion.replace("e\u0301", "é")
    chat = make_template("chat").render(
        {
            "messages": [
                {"role": role, "content": f"e\u0301 {role}!"} for role in ("user", "assistant", "user", "assistant")
            ]
        }
    )
    assert trained_text(tokenizer, chat) == " é assistant!\n\n é assistant!"


def test_a_composed_character_lies_where_its_letter_lay(tokenizer: JsonTokenizer) -> None:
    rendered = make_template("completion").render({"prompt": "x:e", "completion": "\u0301!"})
    assert trained_text(tokenizer, rendered) == "!"
    rendered = make_template("completion").render({"prompt": "x:", "completion": "e\u0301!"})
    assert trained_text(tokenizer, rendered) == "é!"


def test_a_token_across_the_border_belongs_to_the_side_of_its_last_byte(tokenizer: JsonTokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("x  the")] == ["x", "  ", "the"]
    rendered = make_template("completion").render({"prompt": "x ", "completion": " the"})
    assert trained_text(tokenizer, rendered) == "  the"


def test_it_is_a_tokenizer_by_its_path(path: str) -> None:
    tokenizer = tokenizer_by_name(path)
    assert isinstance(tokenizer, JsonTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.name == path
    assert tokenizer.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert tokenizer.vocab_size == Encoder.from_file(path).get_vocab_size(with_added_tokens=True)


def test_it_can_be_pickled(tokenizer: JsonTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.digest == tokenizer.digest
    assert copy.encode("the theme").tolist() == tokenizer.encode("the theme").tolist()


def test_a_lone_surrogate_is_a_data_error(tokenizer: JsonTokenizer) -> None:
    with pytest.raises(DataError, match=r"U\+D800 at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800cd"])


def test_settings_of_the_file_that_cut_pad_or_frame_are_not_followed(path: str, tmp_path: Path) -> None:
    encoder = Encoder.from_file(path)
    encoder.post_processor = processors.TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", 1)])
    encoder.enable_truncation(2)
    encoder.enable_padding(length=30)
    encoder.save(str(tmp_path / "cut.json"))
    text = "the theme of the then"
    assert JsonTokenizer(str(tmp_path / "cut.json")).encode(text).tolist() == JsonTokenizer(path).encode(text).tolist()


def added(content: dict[str, Any], index: int, **changes: object) -> None:
    content["added_tokens"][index].update(changes)


def without_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["\u4e00"] = content["model"]["vocab"].pop("z")


def with_foreign_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["\u4e00"] = 9999


FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda content: content["model"].update(type="WordPiece"), r"expected a tokenizer JSON|a model of type WordPiece"),
    (lambda content: content["model"].update(dropout=0.1), r"got a model with dropout=0\.1"),
    (
        lambda content: content["model"].update(end_of_word_suffix="</w>"),
        r"expected a tokenizer JSON|end_of_word_suffix",
    ),
    (lambda content: content.update(pre_tokenizer=None), r"got a file without the pre-tokenizer ByteLevel"),
    (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), r"add_prefix_space=true"),
    (
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        r"a normalizer of type Lowercase \(supported: NFC",
    ),
    (without_byte, r"a vocabulary without tokens for 1 of the 243 bytes of UTF-8"),
    (with_foreign_token, r"expected a byte-level vocabulary, got the token '一'"),
    (lambda content: added(content, 0, special=False), r"'<\|endoftext\|>' is not id 0"),
    (lambda content: content.update(added_tokens=[]), r"'<\|endoftext\|>' is not id 0"),
    (lambda content: added(content, 2, lstrip=True), r"the added token ' {8}', which takes spaces beside it away"),
    (lambda content: content.pop("model"), r"expected a tokenizer JSON of the tokenizers package"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_a_file_of_another_kind_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, path: str, tmp_path: Path
) -> None:
    content = json.loads(Path(path).read_text())
    change(content)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"data\.tokenizer={changed}: .*({message})"):
        JsonTokenizer(str(changed))


def test_a_file_that_loses_text_is_refused_at_the_first_text(path: str, tmp_path: Path) -> None:
    content = json.loads(Path(path).read_text())
    split = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    tokenizer = JsonTokenizer(str(changed))
    assert tokenizer.decode(tokenizer.encode("the theme")) == "the theme"
    with pytest.raises(DataError, match=r"expected tokens that hold the text's 3 bytes, got 2 bytes for 'axb'"):
        tokenizer.encode("axb")


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff", b"[1]", b"{}"])
def test_a_file_that_is_no_json_of_a_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.json: expected a tokenizer JSON of the tokenizers package"):
        JsonTokenizer(str(path))


def test_the_missing_package_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs the package tokenizers\. Install it: pip install tokenizers"):
        JsonTokenizer(path)
