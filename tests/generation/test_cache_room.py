"""A prompt that cannot be remembered is refused before any of it is read, with the figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from infctx.data.tokenizer import tokenizer_by_name
from infctx.errors import InfctxError
from infctx.generation import cache_room
from infctx.generation.batch import Prompt, write_texts
from infctx.generation.cache_room import cache_bytes_per_token, check_cache_room
from infctx.generation.long_reading import LongText, read_long_text
from infctx.generation.prompt_state import Reader
from infctx.generation.reading import read_tokens
from infctx.generation.row import Voice, Wish
from infctx.generation.sampling import SamplingOptions
from infctx.model.finch import Finch
from infctx.model.single_token import SingleTokenStep

TOKENS = np.arange(100, dtype=np.int32) % 50


@pytest.fixture
def hybrid(make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch) -> Finch:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    model = make_finch("goldfinch")
    monkeypatch.setattr(model, "skim", fail)
    return model


def with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(cache_room, "free_bytes", lambda _: num_bytes)


def test_figures_by_hand(make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_finch("goldfinch")
    # An id, and 32 / 16 numbers.
    assert cache_bytes_per_token(model) == 4 + 2 * 4
    assert cache_bytes_per_token(make_finch("goldfinch", dtype=torch.bfloat16)) == 4 + 2 * 2
    with_free(monkeypatch, 2 * 100 * 12)
    check_cache_room(model, 100)
    with pytest.raises(InfctxError, match=r"101 tokens .* 12 bytes .* room for 100\."):
        check_cache_room(model, 101)
    # What is there already is there once.
    check_cache_room(model, 150, num_cached=100)
    with pytest.raises(InfctxError, match=r"3 rows × 12 bytes .*--rows"):
        check_cache_room(model, 34, rows=3)


def test_a_long_prompt_is_refused_before_it_is_read(hybrid: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 2 * 99 * 12)
    with pytest.raises(InfctxError, match="100 tokens"):
        read_tokens(hybrid, TOKENS)
    reader = Reader(fingerprint="", tokenizer="", dtype="float32")
    with pytest.raises(InfctxError, match="100 tokens"):
        read_long_text(hybrid, reader, LongText(tokens=TOKENS), goes_on=lambda _: True)


def test_many_prompts_are_refused_before_any_is_read(hybrid: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = Voice(model=hybrid, step=SingleTokenStep(hybrid), tokenizer=tokenizer_by_name("bytes"))
    wish = Wish(sampling=SamplingOptions(), seed=0, max_tokens=1)
    prompts = [Prompt(tokens=TOKENS[:length], wish=wish) for length in (5, 40, 3)]
    with_free(monkeypatch, 2 * 2 * 39 * 12)
    with pytest.raises(InfctxError, match="40 tokens"):
        list(write_texts(voice, prompts, num_rows=2))


def test_a_recurrence_remembers_any_length(make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0)
    assert cache_bytes_per_token(make_finch("6c2")) == 0
    assert read_tokens(make_finch("6c2"), TOKENS).num_tokens == 100
