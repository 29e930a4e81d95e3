"""From files to documents: the policy for bad rows, the validation split, and the ledger."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infctx.data import rows as rows_module
from infctx.data.document import Document
from infctx.data.document_set import DocumentSet
from infctx.data.load import LoadedData, SetSpec, ledger, load_documents, load_sets
from infctx.data.rows import RowRules
from infctx.data.split import split_tail, split_validation
from infctx.data.templates import Rendered, TokenBatch, make_template
from infctx.data.tokenizer import BytesTokenizer, Tokenizer, WorldTokenizer
from infctx.errors import DataError

BYTES = BytesTokenizer()


def document_of(length: int, origin: str = "x:1") -> Document:
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0
    return Document(tokens=np.arange(1, length + 1, dtype=np.uint16), weights=weights, origin=origin)


@pytest.fixture
def mixed_rows(tmp_path: Path) -> Path:
    """Four good rows among bad ones of every kind."""
    lines = [
        b'\xef\xbb\xbf{"text": "one"}\r',
        b'{"text": "\xff"}',
        b"",
        b'{"text": "a\\u0000b"}',
        b"\x00",
        b'["not an object"]',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": ""}',
        b'{"title": "no text"}',
        b'{"prompt": "p", "completion": "c"}',
        b'{"text": "\xc3\xa9"}',
        b'{"text": "last"}',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    return file


def test_skip_keeps_the_good_rows_and_lists_the_bad(mixed_rows: Path) -> None:
    loaded = load_documents([str(mixed_rows)], tokenizer=BYTES, on_bad_row="skip")
    assert [BYTES.decode(document.tokens) for document in loaded.documents] == ["one", "a\x00b", "é", "last"]
    assert [document.origin for document in loaded.documents] == [f"{mixed_rows}:{n}" for n in (1, 4, 12, 13)]
    reasons = {row.line: row.reason for row in loaded.rejected}
    assert {row.file for row in loaded.rejected} == {str(mixed_rows)}
    expected = {
        2: "not valid UTF-8",
        5: "not valid JSON",
        6: "an array",
        7: "lone surrogate U+D800",
        8: "nested too deeply",
        9: "empty document",
        10: 'found the fields: "title"',
        11: "fit data.template=completion",
    }
    assert list(reasons) == list(expected)
    for line, reason in expected.items():
        assert reason in reasons[line]
    assert loaded.tokens_dropped == 0


def test_stop_names_the_first_bad_row(mixed_rows: Path) -> None:
    with pytest.raises(DataError, match=rf"{mixed_rows}:2: not valid UTF-8.*Set data\.on_bad_row=skip to skip"):
        load_documents([str(mixed_rows)], tokenizer=BYTES)


def test_stop_also_stops_at_a_row_that_fits_no_template(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n{"body": "what"}\n')
    with pytest.raises(DataError, match=rf'{file}:2: data\.template=text: .*"body"'):
        load_documents([str(file)], tokenizer=BYTES)


def test_files_come_in_sorted_order_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2"}\n')
    (tmp_path / "c.txt").write_text("left out")
    loaded = load_documents([f"{tmp_path}/*"], exclude=["*/c.txt"], tokenizer=WorldTokenizer())
    assert [document.origin for document in loaded.documents] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:3",
        f"{tmp_path}/b.txt:1",
    ]
    assert loaded.rejected == []


def test_completion_template_reaches_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "ab", "completion": "cd"}))
    (document,) = load_documents([str(file)], template="completion", tokenizer=BYTES).documents
    assert document.weights.tolist() == [0, 0, 1, 1, 1]


def test_ids_beyond_the_model_are_refused_even_when_skipping(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\x7fé")
    with pytest.raises(DataError, match=rf"{file}:1: data\.tokenizer=bytes .* id 196, .* 196 rows .*0\.\.195"):
        load_documents([str(file)], tokenizer=BYTES, vocab_size=196, on_bad_row="skip")
    assert len(load_documents([str(file)], tokenizer=BYTES, vocab_size=197).documents) == 1


def test_the_first_row_beyond_the_model_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "\u00e9"}\n{"text": "\U0001f600"}\n')
    with pytest.raises(DataError, match=rf"{file}:2: .* id 196, "):
        load_documents([str(file)], tokenizer=BYTES, vocab_size=196)


def test_no_documents_at_all(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl.*the files have no rows"):
        load_documents([str(file)], tokenizer=BYTES)
    file.write_bytes(b"[]\n{}\n")
    with pytest.raises(DataError, match=r"all 2 rows were rejected, the first \(.*:1\) because: expected a JSON obj"):
        load_documents([str(file)], tokenizer=BYTES, on_bad_row="skip")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.txt:1: empty document"):
        load_documents([str(empty)], tokenizer=BYTES)


def test_wrong_settings_are_refused_before_reading() -> None:
    with pytest.raises(DataError, match=r"data\.template=nope"):
        load_documents(["/nowhere"], template="nope", tokenizer=BYTES)
    with pytest.raises(DataError, match=r"data\.on_bad_row=ignore"):
        load_documents(["/nowhere"], on_bad_row="ignore", tokenizer=BYTES)  # type: ignore[arg-type]


def test_split_validation_divides_whole_documents() -> None:
    documents = [document_of(3, f"x:{number}") for number in range(40)]
    train, validation = split_validation(documents, fraction=0.1, seed=3)
    assert len(validation) == 4
    assert sorted(d.origin for d in [*train, *validation]) == sorted(d.origin for d in documents)
    again = split_validation(documents, fraction=0.1, seed=3)
    assert [d.origin for d in validation] == [d.origin for d in again[1]]
    others = [split_validation(documents, fraction=0.1, seed=seed)[1] for seed in range(5)]
    assert len({tuple(d.origin for d in held_out) for held_out in others}) > 1
    for side in (train, validation):
        places = [int(document.origin[2:]) for document in side]
        assert places == sorted(places)


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (100, 0.999, 99)])
def test_split_validation_leaves_something_on_both_sides(count: int, fraction: float, held_out: int) -> None:
    train, validation = split_validation([document_of(3)] * count, fraction=fraction, seed=0)
    assert (len(train), len(validation)) == (count - held_out, held_out)


def test_split_validation_of_one_document_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"needs at least 2, got 1.*data\.validation_tail=0\.1"):
        split_validation([document_of(100)], fraction=0.1, seed=0)
    for fraction in (0, 1, -0.5):
        with pytest.raises(DataError, match=r"data\.validation=.* above 0 and below 1"):
            split_validation([document_of(3)] * 5, fraction=fraction, seed=0)


def test_split_tail_cuts_every_document() -> None:
    documents = [document_of(100, "x:1"), document_of(10, "x:2")]
    train, validation = split_tail(documents, fraction=0.1)
    assert [len(document) for document in train] == [90, 10]
    assert [len(document) for document in validation] == [10]
    assert train[0].tokens.tolist() == list(range(1, 91))
    assert validation[0].tokens.tolist() == list(range(91, 101))
    assert train[0].weights.tolist() == [0.0] + [1.0] * 89
    assert validation[0].weights.tolist() == [0.0] + [1.0] * 9
    assert (train[0].origin, validation[0].origin) == ("x:1 [tokens 0-89]", "x:1 [tokens 90-99]")
    # Too short to cut: kept as it was, and the original weights are not touched.
    assert (train[1].origin, train[1].tokens.tolist()) == ("x:2", documents[1].tokens.tolist())
    assert documents[0].weights.tolist() == [0.0] + [1.0] * 99


def test_split_tail_is_not_off_by_one_from_rounding() -> None:
    for length in range(20, 200, 10):
        for tenths in range(1, 10):
            train, validation = split_tail([document_of(length)], fraction=tenths / 10)
            assert (len(train[0]), len(validation[0])) == (length * (10 - tenths) // 10, length * tenths // 10)


def test_split_tail_of_short_documents_only_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.validation_tail=0\.1.*each of the 2 documents"):
        split_tail([document_of(5), document_of(2)], fraction=0.1)
    with pytest.raises(DataError, match="above 0 and below 1"):
        split_tail([document_of(50)], fraction=1.0)


def test_ledger_accounts_for_every_token(mixed_rows: Path, tmp_path: Path) -> None:
    loaded = load_documents([str(mixed_rows)], tokenizer=BYTES, on_bad_row="skip")
    account = ledger(loaded.documents, loaded)
    assert account["documents"] == 4
    # "one", "a\0b", "é", "last" and an end of text each; the first token of each is masked.
    assert account["tokens"] == {"in": 16, "trained": 12, "masked": 4, "dropped": 0}
    rows = account["rejected_rows"]
    assert isinstance(rows, list)
    assert rows[0] == {
        "file": str(mixed_rows),
        "line": 2,
        "reason": "not valid UTF-8: byte 0xFF at byte offset 10 of the line",
    }
    assert len(rows) == 8
    assert json.loads(json.dumps(account)) == account

    tail_train, tail_validation = split_tail(loaded.documents, fraction=0.5)
    parts = ledger(DocumentSet.joined([tail_train, tail_validation]), loaded)
    assert parts["tokens"]["in"] == 16
    assert parts["tokens"]["masked"] == 4 + len(tail_validation)


def load_rows(folder: Path, rows: list[dict[str, object]], **rules: Any) -> LoadedData:
    """Rows of text, or of another template, through given rules."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {key: rules.pop(key) for key in ("on_duplicate", "rechunk_tokens") if key in rules}
    template = rules.pop("template", make_template("text"))
    spec = SetSpec(paths=(str(path),), template=template, rules=RowRules(**rules), **settings)
    return load_sets([spec], tokenizer=BYTES)


def texts_of(documents: DocumentSet) -> list[str]:
    return [BYTES.decode(document.tokens) for document in documents]


def test_the_tokens_of_a_row_with_nothing_to_train_on_are_counted_as_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "abc", "worth": 0}, {"text": "defg", "worth": 1}]
    loaded = load_rows(tmp_path, rows, template=make_template("text", weight_field="worth"), on_bad_row="skip")
    # Three bytes and the end of text.
    assert loaded.dropped == {"empty": 4}
    assert loaded.rejected[0].reason.startswith("nothing to train on")
    account = ledger(loaded.documents, loaded)
    assert account["tokens"] == {"in": 9, "trained": 4, "masked": 1, "dropped": 4}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: nothing to train on.*data\.on_bad_row=skip"):
        load_rows(tmp_path, rows, template=make_template("text", weight_field="worth"))
    template = make_template("text", weight_field="worth")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: nothing to train on.*data\.on_empty_row=skip"):
        load_rows(tmp_path, rows, template=template, on_empty_row="stop", on_bad_row="skip")


LENGTHS: list[dict[str, object]] = [{"text": letter * count} for letter, count in (("a", 3), ("b", 9), ("c", 20))]


def test_short_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    loaded = load_rows(tmp_path, LENGTHS, min_tokens=10)
    assert texts_of(loaded.documents) == ["b" * 9, "c" * 20]
    assert loaded.dropped == {"short": 4}
    assert loaded.rejected[0].reason == "4 tokens, fewer than data.min_tokens=10"


def test_long_documents_stop_unless_something_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 10 tokens, more than data\.max_tokens=8\. Set data\.on_long"):
        load_rows(tmp_path, LENGTHS, max_tokens=8)


@pytest.mark.parametrize(
    ("policy", "kept", "dropped"),
    [
        ("skip", ["aaa"], {"long": 31}),
        ("cut", ["aaa", "b" * 8, "c" * 8], {"cut": 2 + 13}),
        ("split", ["aaa", "b" * 8, "b", "c" * 8, "c" * 8, "c" * 4], {}),
    ],
)
def test_long_documents(tmp_path: Path, policy: str, kept: list[str], dropped: dict[str, int]) -> None:
    loaded = load_rows(tmp_path, LENGTHS, max_tokens=8, on_long=policy)
    assert texts_of(loaded.documents) == kept
    assert {reason: count for reason, count in loaded.dropped.items() if count} == dropped
    account = ledger(loaded.documents, loaded)
    assert account["tokens"]["in"] == 4 + 10 + 21
    assert all(document.weights[0] == 0 for document in loaded.documents)
    assert len(loaded.rejected) == (2 if policy == "skip" else 0)
    if policy == "split":
        assert [document.origin.rpartition(":")[2] for document in loaded.documents] == [
            "1",
            "2 [tokens 0-7]",
            "2 [tokens 8-9]",
            "3 [tokens 0-7]",
            "3 [tokens 8-15]",
            "3 [tokens 16-20]",
        ]


def test_a_batch_is_bounded_by_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may be large: so many of them are not held at once."""
    sizes: list[int] = []
    original = rows_module.make_documents

    def note(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> TokenBatch:
        sizes.append(len(rendered))
        return original(rendered, tokenizer)

    monkeypatch.setattr(rows_module, "make_documents", note)
    monkeypatch.setattr(rows_module, "BATCH_CHARACTERS", 100)
    rows: list[dict[str, object]] = [{"text": "x" * length} for length in (60, 60, 10, 10, 300, 5)]
    assert len(load_rows(tmp_path, rows).documents) == 6
    assert sizes == [2, 3, 1]


def test_duplicates(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": text} for text in ("one", "two", "one", "one", "three")]
    assert load_rows(tmp_path, rows).duplicates == (2,)
    loaded = load_rows(tmp_path, rows, on_duplicate="skip")
    assert texts_of(loaded.documents) == ["one", "two", "three"]
    assert [row.line for row in loaded.rejected] == [3, 4]
    assert loaded.dropped == {"duplicate": 8}
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the same as an earlier row, and 1 more"):
        load_rows(tmp_path, rows, on_duplicate="stop")


def test_rechunking_joins_what_is_kept(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": text} for text in ("one", "two", "one", "three")]
    loaded = load_rows(tmp_path, rows, rechunk_tokens=5, on_duplicate="skip")
    joined = [token for text in ("one", "two", "three") for token in [*BYTES.encode(text).tolist(), 0]]
    assert [token for document in loaded.documents for token in document.tokens.tolist()] == joined
    assert [len(document) for document in loaded.documents] == [5, 5, 4]


def test_several_sets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "aa"}\n{"text": "ab"}\n')
    (tmp_path / "b.txt").write_text("bbbb")
    specs = [
        SetSpec(name=name, paths=(str(tmp_path / file),), template=make_template("text", weight=weight))
        for name, file, weight in (("rows", "a.jsonl", 1.0), ("book", "b.txt", 0.25))
    ]
    loaded = load_sets(specs, tokenizer=BYTES)
    assert texts_of(loaded.documents) == ["aa", "ab", "bbbb"]
    assert [document.set_index for document in loaded.documents] == [0, 0, 1]
    assert loaded.documents[2].weights.tolist() == [0, 0.25, 0.25, 0.25, 0.25]
    assert loaded.documents[2].origin == f"{tmp_path}/b.txt:1"
    assert ledger(loaded.documents, loaded)["sets"] == [
        {"name": "rows", "documents": 2, "tokens": 6, "trained": 4, "masked": 2},
        {"name": "book", "documents": 1, "tokens": 5, "trained": 4, "masked": 1},
    ]
