"""Every token of the files is accounted for: in the ledger with a reason, and in one epoch of steps exactly once.

Counted here from the files' own bytes and from the chunks alone, the second with nothing but the starts and the end of
text that closes every document: it has the id 0, as padding has.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER  # type: ignore[import-untyped]

from infctx.assemble import run_recipe
from infctx.data.chunking import Chunk
from infctx.data.document import Document
from infctx.data.load import LoadedData, ledger, load_documents
from infctx.data.stream import DocumentSource, StepData, StreamSource
from infctx.data.tokenizer import END_OF_TEXT, BytesTokenizer, WorldTokenizer
from infctx.recipe.schema import Recipe
from infctx.training.progress import SilentProgress

Ids = tuple[int, ...]
Trained = tuple[bool, ...]
Source = StreamSource | DocumentSource

# A character of one to four bytes, joined characters, and line ends of every kind.
ALPHABET = [
    "a",
    "b",
    " ",
    "the ",
    "\n",
    "\r\n",
    "\x00",
    "\u2028",
    "é",
    "ß",
    "Ω",
    "東",
    "京",
    "👩‍👧",
    "\U0010ffff",
    "e\u0301",
]


@dataclass
class Expected:
    """What the files hold, counted as they are written: documents in order, and rejected rows with their reasons."""

    documents: list[tuple[Ids, Trained]] = field(default_factory=list)
    rejected: list[tuple[str, int, str]] = field(default_factory=list)
    num_dropped: int = 0


@functools.cache
def official_world() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(str(files("rwkv").joinpath("rwkv_vocab_v20230424.txt")))


def ids_by_hand(text: str, tokenizer: str) -> Ids:
    if tokenizer == "bytes":
        return (*(byte + 1 for byte in text.encode()), END_OF_TEXT)
    return (*official_world().encode(text), END_OF_TEXT)


def trained_by_hand(ids: Ids, tokenizer: str, *, num_prompt_bytes: int) -> Trained:
    """A token is trained where its last byte lies behind the prompt, and so is the end; never the first token."""
    ends = np.cumsum([1 if tokenizer == "bytes" else len(official_world().decodeBytes([token])) for token in ids[:-1]])
    return (False, *(bool(end > num_prompt_bytes) for end in ends[1:]), True)


def random_text(generator: np.random.Generator, longest: int) -> str:
    chosen = generator.integers(len(ALPHABET), size=int(generator.integers(1, longest + 1)))
    return "".join(ALPHABET[index] for index in chosen.tolist())


UNUSABLE: list[tuple[bytes, str]] = [
    (b'{"text": "\xff"}', "not valid UTF-8"),
    (b'{"text": "no end', "not valid JSON"),
    (b'["text"]', "an array"),
    (b"null", "null"),
    (b'{"body": "what"}', "found the fields"),
    (b'{"text": 7}', "found the fields"),
    (b'{"text": "\\udc80", "prompt": "\\udc80", "completion": ""}', "lone surrogate"),
    (b'{"text": "", "prompt": "", "completion": ""}', "empty document"),
]


def row_of(template: str, generator: np.random.Generator) -> dict[str, str]:
    if template == "completion":
        prompt, completion = random_text(generator, 40), random_text(generator, 80)
        return {"prompt": prompt, "completion": completion if generator.random() < 0.8 else ""}
    return {"text": random_text(generator, 120)}


def write_rows(path: Path, template: str, tokenizer: str, generator: np.random.Generator, expected: Expected) -> None:
    """Usable rows, unusable ones of every kind, and blank lines, in a random order."""
    kinds = generator.permutation(["row"] * 20 + ["blank"] * 4 + [str(n) for n in range(len(UNUSABLE))]).tolist()
    lines = []
    for number, kind in enumerate(kinds, start=1):
        if kind == "row":
            row = row_of(template, generator)
            ids = ids_by_hand("".join(row.values()), tokenizer)
            num_prompt_bytes = len(row.get("prompt", "").encode())
            expected.documents.append((ids, trained_by_hand(ids, tokenizer, num_prompt_bytes=num_prompt_bytes)))
            lines.append(json.dumps(row, ensure_ascii=bool(generator.random() < 0.5)).encode())
        elif kind == "blank":
            lines.append(b" " if generator.random() < 0.5 else b"")
        else:
            line, reason = UNUSABLE[int(kind)]
            expected.rejected.append((str(path), number, reason))
            lines.append(line)
    path.write_bytes(b"\n".join(lines))


def write_texts(folder: Path, tokenizer: str, generator: np.random.Generator, expected: Expected) -> None:
    """Plain files: usable ones, one without a byte and one that is not UTF-8."""
    for number in range(4):
        text = random_text(generator, 300)
        (folder / f"t{number}.txt").write_bytes(text.encode())
        ids = ids_by_hand(text, tokenizer)
        expected.documents.append((ids, trained_by_hand(ids, tokenizer, num_prompt_bytes=0)))
    (folder / "t4.txt").touch()
    expected.rejected.append((str(folder / "t4.txt"), 1, "empty document"))
    (folder / "t5.txt").write_bytes(b"\xc3(")
    expected.rejected.append((str(folder / "t5.txt"), 1, "not valid UTF-8"))


def write_corpus(folder: Path, template: str, tokenizer: str) -> Expected:
    expected = Expected()
    generator = np.random.default_rng(5)
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, template, tokenizer, generator, expected)
    if template == "text":
        write_texts(folder, tokenizer, generator, expected)
    return expected


def load(folder: Path, template: str, tokenizer: str) -> LoadedData:
    chosen = BytesTokenizer() if tokenizer == "bytes" else WorldTokenizer()
    return load_documents([f"{folder}/*"], tokenizer=chosen, template=template, on_bad_row="skip")


@pytest.mark.parametrize("tokenizer", ["bytes", "world"])
@pytest.mark.parametrize("template", ["text", "completion"])
def test_the_ledger_counts_every_token_and_names_every_row_left_out(
    tmp_path: Path, template: str, tokenizer: str
) -> None:
    expected = write_corpus(tmp_path, template, tokenizer)
    loaded = load(tmp_path, template, tokenizer)
    found = [(tuple(d.tokens.tolist()), tuple((d.weights > 0).tolist())) for d in loaded.documents]
    assert found == expected.documents
    account = ledger(loaded.documents, loaded)
    num_in = sum(len(ids) for ids, _ in expected.documents)
    num_trained = sum(sum(trained) for _, trained in expected.documents)
    assert account["documents"] == len(expected.documents)
    assert account["tokens"] == {"in": num_in, "trained": num_trained, "masked": num_in - num_trained, "dropped": 0}
    assert_reasons(account, expected)


def assert_reasons(account: Mapping[str, object], expected: Expected) -> None:
    rejected = account["rejected_rows"]
    assert isinstance(rejected, list)
    assert [(row["file"], row["line"]) for row in rejected] == [(file, line) for file, line, _ in expected.rejected]
    for row, (_, _, reason) in zip(rejected, expected.rejected, strict=True):
        assert reason in row["reason"]


def test_the_ledger_counts_the_tokens_of_rows_that_teach_nothing(tmp_path: Path) -> None:
    """Conversations without an answer: their tokens went in, and were dropped for a reason."""
    generator = np.random.default_rng(2)
    path = tmp_path / "rows.jsonl"
    sizes, trained, reasons, rows = [], 0, [], []
    for line in range(1, 31):
        turns = [{"role": "user", "content": "q" * int(generator.integers(1, 80))}]
        if generator.random() < 0.5:
            turns.append({"role": "assistant", "content": "a" * int(generator.integers(1, 80))})
            # The space before it, and the end of text behind it.
            trained += 1 + len(turns[1]["content"]) + 1
        else:
            reasons.append((str(path), line, "nothing to train on"))
        text = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
        sizes.append(len(text) + 1)
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows))
    loaded = load(tmp_path, "chat", "bytes")
    account = ledger(loaded.documents, loaded)
    dropped = sum(sizes[line - 1] for _, line, _ in reasons)
    assert 0 < len(reasons) < 30
    assert account["documents"] == 30 - len(reasons)
    assert account["tokens"] == {
        "in": sum(sizes),
        "trained": trained,
        "masked": sum(sizes) - trained - dropped,
        "dropped": dropped,
    }
    assert_reasons(account, Expected(rejected=reasons))


Row = list[tuple[int, int, float, bool]]
"""Token, target, weight and start of one row, in the order in which it is read."""


def rows_of(steps: Sequence[StepData], *, is_stream: bool) -> list[Row]:
    """What every row reads, over all chunks; of a stream, whose rows go on, over all steps."""
    rows: list[Row] = []
    for step in steps:
        read = [row for group in step.groups for row in rows_of_group(list(group.chunks))]
        if is_stream and rows:
            for row, more in zip(rows, read, strict=True):
                row += more
        else:
            rows += read
    return rows


def rows_of_group(chunks: Sequence[Chunk]) -> list[Row]:
    starts = [torch.zeros_like(chunk.tokens) if chunk.starts is None else chunk.starts for chunk in chunks]
    parts = [
        [chunk.tokens for chunk in chunks],
        [chunk.targets for chunk in chunks],
        [chunk.loss_weight for chunk in chunks],
        starts,
    ]
    columns = [torch.cat(part, dim=1).tolist() for part in parts]
    return [[(*values[:3], bool(values[3])) for values in zip(*row, strict=True)] for row in zip(*columns, strict=True)]


def documents_in(row: Row) -> Iterator[Row]:
    """Cut at the starts. Behind the end of text that closes the last document there is padding, worth nothing."""
    places = [place for place, (_, _, _, starts) in enumerate(row) if starts]
    if not places:
        assert not any(token or target or weight for token, target, weight, _ in row)
        return
    assert places[0] == 0
    for begin, end in zip(places, [*places[1:], len(row)], strict=True):
        tokens = [token for token, _, _, _ in row[begin:end]]
        length = tokens.index(END_OF_TEXT) + 1
        assert end == len(row) or length == end - begin
        assert not any(token or target or weight for token, target, weight, _ in row[begin + length : end])
        yield row[begin : begin + length]


def assert_read_once(documents: Sequence[Document], ranks: Sequence[Sequence[StepData]], *, is_stream: bool) -> None:
    """Over all ranks and steps: every document whole, once, each token with the one behind it as its target."""
    rows = [row for steps in ranks for row in rows_of(steps, is_stream=is_stream)]
    read = [document for row in rows for document in documents_in(row)]
    found = Counter(
        (tuple(token for token, *_ in document), tuple(weight for _, _, weight, _ in document[:-1]))
        for document in read
    )
    assert found == Counter(
        (tuple(document.tokens.tolist()), tuple(document.weights[1:].tolist())) for document in documents
    )
    for document in read:
        # Nobody predicts what comes behind a document.
        assert document[-1][2] == 0
        for (_, target, _, _), (following, _, _, starts) in itertools.pairwise(document):
            assert target == following
            assert not starts


def assert_totals(documents: Sequence[Document], ranks: Sequence[Sequence[StepData]]) -> None:
    """What the steps say of themselves is what their chunks hold, and adds up to the documents."""
    weight_total = sum(float(document.weights.sum(dtype=np.float64)) for document in documents)
    assert sum(step.num_tokens for step in ranks[0]) == sum(map(len, documents))
    assert sum(step.weight_total for step in ranks[0]) == pytest.approx(weight_total, rel=1e-12)
    for of_ranks in zip(*ranks, strict=True):
        groups = [group for step in of_ranks for group in step.groups]
        weights = [chunk.loss_weight.double().sum() for group in groups for chunk in group.chunks]
        for step in of_ranks:
            assert step.num_tokens == sum(group.num_tokens for group in groups)
            assert step.weight_total == pytest.approx(float(sum(weights)), rel=1e-12)
            assert step.weight_total == pytest.approx(sum(group.weight_total for group in groups), rel=1e-12)


def steps_of(source: Source) -> list[StepData]:
    steps = []
    while (step := source.next_step()) is not None:
        steps.append(step)
    assert len(steps) == source.total_steps
    return steps


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """Of both templates; with fractional weights too, as templates to come may want them."""
    generator = np.random.default_rng(1)
    loaded: list[Document] = []
    for template in ("text", "completion"):
        folder = tmp_path_factory.mktemp(template)
        write_corpus(folder, template, "bytes")
        loaded += load(folder, template, "bytes").documents[::3]
    for document in loaded:
        document.weights[:] *= generator.choice([0.25, 1.0, 0.1], size=len(document)).astype(np.float32)
    return loaded


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(("rows", "chunk_tokens"), [(1, 7), (3, 1), (3, 16), (3, 1000)])
def test_a_stream_reads_every_token_once(
    documents: list[Document], rows: int, chunk_tokens: int, window: int, world: int
) -> None:
    ranks = [
        steps_of(
            StreamSource(
                documents,
                rows=rows,
                accumulate=2,
                chunk_tokens=chunk_tokens,
                window=window,
                seed=3,
                epochs=1,
                rank=rank,
                world=world,
            )
        )
        for rank in range(world)
    ]
    assert_read_once(documents, ranks, is_stream=True)
    assert_totals(documents, ranks)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("pack_tokens", [None, 1, 200, 100_000])
@pytest.mark.parametrize(("rows", "chunk_tokens"), [(1, 7), (3, 1), (3, 16), (3, 1000)])
def test_rows_of_documents_read_every_token_once(
    documents: list[Document], rows: int, chunk_tokens: int, pack_tokens: int | None, world: int
) -> None:
    ranks = [
        steps_of(
            DocumentSource(
                documents,
                rows=rows,
                accumulate=2,
                chunk_tokens=chunk_tokens,
                seed=3,
                epochs=1,
                rank=rank,
                world=world,
                pack_tokens=pack_tokens,
            )
        )
        for rank in range(world)
    ]
    assert_read_once(documents, ranks, is_stream=False)
    assert_totals(documents, ranks)


def test_rows_of_a_validation_file_that_were_skipped_are_listed(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text('{"text": "held out"}\nnot json\n')
    built = recipe("run", f"data.validation='{tmp_path}/val.jsonl'", "data.on_bad_row=skip", "run.steps=1")
    run_recipe(built, SilentProgress())
    account = json.loads(Path(built.run.folder, "ledger.json").read_text())
    assert [(Path(row["file"]).name, row["line"]) for row in account["rejected_rows"]] == [("val.jsonl", 2)]
    assert account["held_out"] == {"documents": 1, "tokens": len("held out") + 1}
    tokens = account["tokens"]
    assert tokens["in"] == tokens["trained"] + tokens["masked"] + tokens["dropped"]
