"""Twenty thousand hostile rows: each is accepted with the tokens of a plain reference, or counted with its place."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rwkv
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from infctx.data import prepare
from infctx.data.load import LoadedData, SetSpec, ledger, load_sets
from infctx.data.rows import RowRules
from infctx.data.templates import make_template
from infctx.data.tokenizer import WorldTokenizer

NUM_ROWS = 12_000
# The reference takes a minute for what is written in a second here.
MOST_COMPARED = 5_000
LARGE_BYTES = 64 * 2**20
REFERENCE = TRIE_TOKENIZER(str(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"))
SNIPPETS = [
    "plain words ",
    "User: hi\n\nAssistant: ",
    "\x00",
    "\u2028\u2029\x85",
    "é ü 日本語 ",
    "👩‍👩‍👧 ",
    "\r\n",
    "\t  ",
    "\ufeff",
    "‮right to left",
    "{braces} {{twice}} {0}",
    "<|endoftext|>",
    "\\u0041 \\ud800",
    "e\u0301",
    "\x1b[31m",
    "�",
]


@dataclass(frozen=True)
class Row:
    """A line, and the text and trained bytes that it should come to; None = rejected, "" = no row at all."""

    line: bytes
    text: str | None
    prompt_bytes: int = 0


def json_line(value: object, *, ascii_only: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def random_text(generator: random.Random) -> str:
    return "".join(generator.choice(SNIPPETS) for _ in range(generator.randint(1, 12)))


def good(generator: random.Random) -> Row:
    text = random_text(generator)
    row: dict[str, object] = {"text": text}
    if generator.random() < 0.3:
        row |= {"score": float("nan"), "n": 10**200, "nested": [[{}]], "none": None, "text2": 3}
    return Row(json_line(row, ascii_only=generator.random() < 0.5), text)


def spaced(generator: random.Random) -> Row:
    text = random_text(generator)
    return Row(b" \t " + json_line({"text": text}) + generator.choice([b"\r", b" ", b"\t\r"]), text)


def bad(make_line: Callable[[random.Random], bytes]) -> Callable[[random.Random], Row]:
    return lambda generator: Row(make_line(generator), None)


def cut_short(generator: random.Random) -> bytes:
    whole = json_line({"text": random_text(generator)})
    return whole[: generator.randrange(1, len(whole))]


def with_invalid_byte(generator: random.Random) -> bytes:
    whole = json_line({"text": random_text(generator)})
    place = generator.randrange(1, len(whole))
    broken = whole[:place] + bytes([generator.choice([0xFF, 0xFE, 0xC0, 0xF8])]) + whole[place:]
    return broken


KINDS: list[Callable[[random.Random], Row]] = [
    *[good] * 8,
    spaced,
    bad(cut_short),
    bad(with_invalid_byte),
    bad(lambda g: b'{"text": "' + bytes(g.choice([[0xED, 0xA0, 0x80], [0xE9], [0x80]])) + b'"}'),
    bad(lambda g: b'{"text": "lone \\ud83d surrogate"}'),
    bad(lambda g: b'{"text": "\\udc00\\ud83d"}'),
    bad(lambda g: b'{"text": "raw \x00 nul"}'),
    bad(lambda g: b"\x00"),
    bad(lambda g: bytes(g.randrange(128, 256) for _ in range(g.randint(1, 30)))),
    bad(lambda g: g.choice([b"[", b'{"text":', b'[{"a":']) * g.choice([2000, 100_000])),
    bad(lambda g: b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    bad(lambda g: b'{"text": "a", "n": ' + b"9" * 10_000 + b"}"),
    bad(lambda g: json_line({"text": g.choice([1, 1.5, True, None, [], {}, ["a"], {"text": "a"}])})),
    bad(lambda g: b'{"text": ' + g.choice([b"NaN", b"Infinity", b"-0", b"1e999"]) + b"}"),
    bad(lambda g: json_line(g.choice([["a"], "text", 3, None, True]))),
    bad(lambda g: json_line({"Text": "a", "body": "b"})),
    bad(lambda g: b'{"text": "first", "text": "second"}'),
    bad(lambda g: json_line({"text": ""})),
    bad(lambda g: b'{"text": "a"} {"text": "b"}'),
    bad(lambda g: b"{'text': 'single quotes'}"),
    bad(lambda g: b'{"text": "tab\there"}'),
    lambda g: Row(g.choice([b"", b"   ", b"\t", b"\r"]), ""),
]


def make_rows(generator: random.Random, count: int) -> list[Row]:
    rows = [generator.choice(KINDS)(generator) for _ in range(count)]
    # A byte order mark belongs to the file's first line alone; elsewhere it is no JSON.
    rows[0] = Row(b"\xef\xbb\xbf" + json_line({"text": "first"}), "first")
    rows[count // 2] = Row(b"\xef\xbb\xbf" + json_line({"text": "middle"}), None)
    large = "0123456789abcdé " * (LARGE_BYTES // 17)
    rows[count // 3] = Row(json_line({"text": large}), large)
    rows[count // 4] = Row(b'{"text": "' + b"x" * LARGE_BYTES, None)
    return rows


def load(path: Path, cache: Path | None, workers: int = 1) -> LoadedData:
    spec = SetSpec(paths=(str(path),), template=make_template("text"), rules=RowRules(on_bad_row="skip"))
    where = "memory" if cache is None else cache
    return load_sets([spec], tokenizer=WorldTokenizer(), cache=where, workers=workers)


def reference_tokens(text: str) -> list[int]:
    """What the Python tokenizer of the official runtime gives; of a very long text, for its beginning."""
    return REFERENCE.encode(text[:MOST_COMPARED])


def check(loaded: LoadedData, rows: list[Row], path: Path, tokens: dict[int, list[int]]) -> None:
    rejected = [number for number, row in enumerate(rows, start=1) if row.text is None]
    assert [row.line for row in loaded.rejected] == rejected
    assert {row.file for row in loaded.rejected} == {str(path)}
    assert all(row.reason for row in loaded.rejected)
    assert [document.origin for document in loaded.documents] == [f"{path}:{number}" for number in tokens]
    for document, (number, expected) in zip(loaded.documents, tokens.items(), strict=True):
        text = rows[number - 1].text
        assert text is not None
        if len(text) > MOST_COMPARED:
            # The reference's last token may be another where its text is cut.
            assert document.tokens[: len(expected) - 1].tolist() == expected[:-1]
            assert WorldTokenizer().decode(document.tokens) == text
        else:
            assert document.tokens.tolist() == [*expected, 0]
        assert document.weights.tolist() == [0.0] + [1.0] * (len(document) - 1)
    account = ledger(loaded.documents, loaded)
    counts = account["tokens"]
    assert counts["in"] == counts["trained"] + counts["masked"] + counts["dropped"]
    assert len(account["rejected_rows"]) == len(rejected)


def test_hostile_rows_at_once_and_prepared_in_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(random.Random(20_240_501), NUM_ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(row.line for row in rows))
    tokens = {number: reference_tokens(row.text) for number, row in enumerate(rows, start=1) if row.text}
    assert len(tokens) > 3000
    check(load(path, None), rows, path, tokens)
    monkeypatch.setattr(prepare, "UNIT_BYTES", 2**20)
    check(load(path, tmp_path / "cache", workers=2), rows, path, tokens)


# Templates of several columns


def mangled(generator: random.Random, template: str) -> object:
    """A row of the template's shape, or near it."""
    texts = [random_text(generator) for _ in range(4)]
    values: list[object] = [*texts, "", " \n ", None, 3, [], {"a": 1}, "\ud800"]

    def value() -> object:
        return generator.choice(values if generator.random() < 0.3 else texts)

    if template != "chat":
        columns = {"completion": ("prompt", "completion"), "instruct": ("instruction", "input", "output")}[template]
        row = {column: value() for column in columns}
        if generator.random() < 0.2:
            row.pop(generator.choice(columns))
        return row
    roles: list[object] = ["user", "assistant", "system", "tool", "human", "gpt"]
    if generator.random() < 0.3:
        roles += ["narrator", None, 3, ""]
    turns: list[object] = [
        {"role": generator.choice(roles), "content": value()} for _ in range(generator.randint(0, 5))
    ]
    if generator.random() < 0.2:
        turns.append(generator.choice([None, 3, "turn", {}, {"role": "user"}, {"content": "x"}, []]))
    return {generator.choice(["messages", "messages", "messages", "conversations"]): turns}


@pytest.mark.parametrize("template", ["completion", "instruct", "chat"])
def test_rows_of_templates_are_accepted_or_counted(template: str, tmp_path: Path) -> None:
    generator = random.Random(7)
    mangled_rows = [mangled(generator, template) for _ in range(4000)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(json_line(row, ascii_only=True) for row in mangled_rows))
    maker = make_template(template)
    spec = SetSpec(paths=(str(path),), template=maker, rules=RowRules(on_bad_row="skip"))
    loaded = load_sets([spec], tokenizer=WorldTokenizer())
    lines = [int(document.origin.rpartition(":")[2]) for document in loaded.documents]
    assert sorted(lines + [row.line for row in loaded.rejected]) == list(range(1, 4001))
    assert 400 < len(lines) < 3600
    for document, line in zip(loaded.documents, lines, strict=True):
        row = mangled_rows[line - 1]
        assert isinstance(row, dict)
        text = maker.render(row).text
        assert document.tokens.tolist() == [*reference_tokens(text), 0]
        # Of a row with an answer, something is trained, and never the whole prompt.
        assert document.weights.any()
        assert document.weights[0] == 0
        assert np.isfinite(document.weights).all()
