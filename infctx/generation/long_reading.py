"""A long text read with what was read kept in a file: stopped anywhere, it goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infctx.errors import CheckpointError
from infctx.generation.prompt_state import PromptState, Reader, digest_of, read_prompt_state, write_prompt_state
from infctx.generation.reading import ReadChunk, Reading, TokenArray, read_chunks
from infctx.model.finch import Finch

SAVE_EVERY_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LongText:
    """What is to be read.

    Attributes:
        tokens: ids of the text, one at least.
        before: a state that it is read behind; None = a fresh document.
        file: where what was read is kept; None = nowhere.
        may_replace: whether a file that holds something else is written over.
    """

    tokens: TokenArray
    before: PromptState | None = None
    file: Path | None = None
    may_replace: bool = False

    @property
    def digest_before(self) -> str:
        """Of what it is read behind."""
        return "" if self.before is None else self.before.text_digest


def read_on(model: Finch, reader: Reader, text: LongText) -> PromptState | None:
    """What an earlier reading of this text has left in its file; None = nothing.

    Raises: CheckpointError where the file holds something else.
    """
    if text.file is None or not text.file.exists():
        return None
    try:
        found = read_prompt_state(text.file, reader=reader, config=model.config, device=model.embedding.weight.device)
        is_of_this = (
            found.conversation is None
            and found.before == text.digest_before
            and found.text_tokens <= len(text.tokens)
            and found.text_digest == digest_of(text.tokens[: found.text_tokens], text.digest_before)
        )
        if is_of_this and found.reader == reader:
            return found
        what = "in another --dtype" if is_of_this else "of another text"
        raise CheckpointError(f"{text.file}: exists, and holds what was read {what}. Give another name, or --force.")
    except CheckpointError:
        if text.may_replace:
            return None
        raise


def read_long_text(
    model: Finch,
    reader: Reader,
    text: LongText,
    *,
    goes_on: Callable[[int], bool],
    clock: Callable[[], float] = time.monotonic,
) -> PromptState:
    """Read the text, from where its file has it.

    The file is written when the text ends, when reading is stopped, and every ten minutes.

    Args:
        goes_on: told at the start and after each chunk how many of its tokens have been read; False = stop here.
    Returns:
        The place behind it, or, stopped, the place that was come to: `is_whole` tells.
    Raises:
        CheckpointError: see `read_on`. OSError where the disk is full.
    """
    found = read_on(model, reader, text)
    saved_at = clock()
    num_read = 0 if found is None else found.text_tokens
    if found is not None and num_read == len(text.tokens):
        return found
    behind = text.before.reading if text.before is not None else None
    start = found.reading if found is not None else behind
    if not goes_on(num_read) and found is not None:
        return found
    chunk: ReadChunk | None = None
    first = 0 if start is None else start.num_tokens - num_read
    for chunk in read_chunks(model, text.tokens[num_read:], start):
        num_read = chunk.num_tokens - first
        is_whole = num_read == len(text.tokens)
        is_stopped = not goes_on(num_read) and not is_whole
        if text.file is not None and (is_whole or is_stopped or clock() - saved_at >= SAVE_EVERY_SECONDS):
            write_prompt_state(text.file, _place(reader, text, chunk.whole(), num_read))
            saved_at = clock()
        if is_stopped:
            break
    assert chunk is not None
    return _place(reader, text, chunk.whole(), num_read)


def _place(reader: Reader, text: LongText, reading: Reading, num_read: int) -> PromptState:
    return PromptState(
        reading=reading,
        reader=reader,
        text_tokens=num_read,
        text_digest=digest_of(text.tokens[:num_read], text.digest_before),
        is_whole=num_read == len(text.tokens),
        before=text.digest_before,
    )
