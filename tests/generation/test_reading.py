"""Long texts: read in one go, kept and asked, stopped and read on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import CheckpointError
from infctx.generation.long_reading import LongText, read_long_text
from infctx.generation.prompt_state import PromptState, Reader, digest_of, read_prompt_state, write_prompt_state
from infctx.generation.reading import CHUNK_TOKENS, Reading, TokenArray, read_tokens
from infctx.generation.row import Voice


def read_state(path: Path, voice: Voice, reader: Reader) -> PromptState:
    return read_prompt_state(path, reader=reader, config=voice.model.config, device=torch.device("cpu"))


def assert_same(found: Reading, expected: Reading, **tolerance: float) -> None:
    """Logits and all three states; to the same bits where no tolerance is given."""
    chosen = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert found.num_tokens == expected.num_tokens
    torch.testing.assert_close(found.logits, expected.logits, **chosen)
    for one, other in zip(found.state, expected.state, strict=True):
        torch.testing.assert_close(one, other, **chosen)


@pytest.fixture
def saved(voice: Voice, reader: Reader, document: TokenArray, tmp_path: Path) -> Path:
    path = tmp_path / "document.state"
    text = LongText(tokens=document, file=path)
    assert read_long_text(voice.model, reader, text, goes_on=lambda n: True).is_whole
    return path


def test_chunks_are_the_whole(voice: Voice, document: TokenArray) -> None:
    with torch.no_grad():
        logits, state = voice.model(torch.from_numpy(document.astype(np.int64))[None])
    whole = Reading(state=state, logits=logits[0, -1], num_tokens=len(document))
    # Chunks of another length are added up in another order.
    assert_same(read_tokens(voice.model, document), whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_document", [2 * CHUNK_TOKENS, 2 * CHUNK_TOKENS + 77])
def test_read_once_and_asked_is_read_in_one_go(
    voice: Voice, reader: Reader, document: TokenArray, tmp_path: Path, num_document: int
) -> None:
    path = tmp_path / "document.state"
    text = LongText(tokens=document[:num_document], file=path)
    read_long_text(voice.model, reader, text, goes_on=lambda n: True)
    expected = read_tokens(voice.model, document)
    for _ in range(2):
        kept = read_state(path, voice, reader)
        found = read_tokens(voice.model, document[num_document:], kept.reading)
        if num_document % CHUNK_TOKENS == 0:
            assert_same(found, expected)
        else:
            assert_same(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stops_after", [1, 2])
def test_stopped_and_read_on_ends_in_the_same_bits(
    voice: Voice, reader: Reader, document: TokenArray, tmp_path: Path, stops_after: int
) -> None:
    text = LongText(tokens=document, file=tmp_path / "document.state")
    half = read_long_text(voice.model, reader, text, goes_on=lambda n: n < stops_after * CHUNK_TOKENS)
    assert (half.is_whole, half.text_tokens) == (False, stops_after * CHUNK_TOKENS)
    assert_same(read_state(tmp_path / "document.state", voice, reader).reading, half.reading)
    seen: list[int] = []
    whole = read_long_text(voice.model, reader, text, goes_on=lambda n: seen.append(n) is None)
    assert seen[0] == stops_after * CHUNK_TOKENS
    assert whole.is_whole
    assert_same(whole.reading, read_tokens(voice.model, document))
    again: list[int] = []
    read_long_text(voice.model, reader, text, goes_on=lambda n: again.append(n) is None)
    assert again == [], "there was nothing left to read"


def test_what_is_read_is_kept_every_ten_minutes(
    voice: Voice, reader: Reader, document: TokenArray, tmp_path: Path
) -> None:
    times = iter([0.0, 599.0, 601.0, 601.0, 700.0, 700.0])
    path = tmp_path / "document.state"
    sizes: list[int] = []

    def goes_on(num_read: int) -> bool:
        sizes.append(read_state(path, voice, reader).text_tokens if path.exists() else 0)
        return True

    text = LongText(tokens=document, file=path)
    read_long_text(voice.model, reader, text, goes_on=goes_on, clock=lambda: next(times))
    assert sizes == [0, 0, 0, 2 * CHUNK_TOKENS]


def test_behind_a_state(voice: Voice, reader: Reader, document: TokenArray, saved: Path, tmp_path: Path) -> None:
    """A second text behind a first: the file knows both."""
    before = read_state(saved, voice, reader)
    more = document[:30]
    text = LongText(tokens=more, before=before, file=tmp_path / "both.state")
    found = read_long_text(voice.model, reader, text, goes_on=lambda n: True)
    assert_same(found.reading, read_tokens(voice.model, more, before.reading))
    assert found.text_digest != digest_of(more), "the same words behind another text are another text"
    assert found.before == before.text_digest == digest_of(document)
    with pytest.raises(CheckpointError, match="another text"):
        read_long_text(voice.model, reader, LongText(tokens=more, file=text.file), goes_on=lambda n: True)


def test_a_file_of_another_text(voice: Voice, reader: Reader, document: TokenArray, saved: Path) -> None:
    content = saved.read_bytes()
    changed = document.copy()
    changed[3] += 1 if changed[3] < 256 else -1
    for tokens in (changed, document[:100]):
        text = LongText(tokens=tokens, file=saved)
        with pytest.raises(CheckpointError, match=r"document\.state.*another text.*--force"):
            read_long_text(voice.model, reader, text, goes_on=lambda n: True)
        assert saved.read_bytes() == content
    text = LongText(tokens=changed, file=saved, may_replace=True)
    read_long_text(voice.model, reader, text, goes_on=lambda n: True)
    assert read_state(saved, voice, reader).text_digest == digest_of(changed)


def altered(path: Path, **changes: Any) -> None:
    """Write the file again with other metadata."""
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, {name: x.clone() for name, x in tensors.items()}, metadata | changes)


def test_broken_state_files(voice: Voice, reader: Reader, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    metadata = read_safetensors(saved)[1]

    def refused(*words: str, by: Reader = reader) -> None:
        with pytest.raises(CheckpointError) as error:
            read_state(saved, voice, by)
        for word in (str(saved), *words):
            assert word in str(error.value), (word, str(error.value))
        saved.write_bytes(content)

    refused("another model", "e" * 16, "f" * 16, by=Reader(fingerprint="e" * 16, tokenizer="bytes", dtype="float32"))
    refused("another tokenizer", "world", by=Reader(fingerprint="f" * 16, tokenizer="world", dtype="float32"))
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        refused("truncated")
    for place in (len(content) - 3, len(content) - 2_000):
        changed = bytearray(content)
        changed[place] ^= 1
        saved.write_bytes(changed)
        refused("damaged")
    altered(saved, infctx_prompt_state="2")
    refused("another version", "schema 1", "2")
    altered(saved, facts=json.dumps(json.loads(metadata["facts"]) | {"tokens": 5}))
    refused("damaged")
    write_safetensors(saved, {"x": torch.zeros(1)})
    refused("--save-state")
    saved.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(saved, voice, reader)


def test_a_state_of_other_sizes(make_finch: Any, reader: Reader, saved: Path) -> None:
    """Whoever gives two models one fingerprint is told of the shapes."""
    other = make_finch(n_layer=3, n_embd=16, vocab_size=257, dim_ffn=32)
    with pytest.raises(CheckpointError, match=r"wkv: expected shape \[3, .*found \(2, "):
        read_prompt_state(saved, reader=reader, config=other.config, device=torch.device("cpu"))


def test_a_full_disk_leaves_the_old_file(
    voice: Voice, reader: Reader, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved.read_bytes()
    state = read_state(saved, voice, reader)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infctx.checkpoint.atomic._fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_prompt_state(saved, state)
    assert saved.read_bytes() == content
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
