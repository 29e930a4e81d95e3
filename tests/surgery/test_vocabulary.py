"""Other sizes of vocabulary, and tokens that are added."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer, world_lines
from infctx.errors import CheckpointError, DataError
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.vocabulary import EMBEDDING, HEAD, add_tokens, resize_vocabulary, vocabulary_text

TOKENS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(3))


def rows_of(model: ModelTensors, name: str) -> Tensor:
    stored = model.tensors[name]
    value = stored.read()
    assert (tuple(value.shape), value.dtype) == (stored.shape, stored.dtype)
    return value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_larger(make_finch: Callable[..., Finch], dtype: torch.dtype) -> None:
    model = make_finch("6", dtype=dtype)
    with torch.no_grad():
        model.embedding.weight.mul_(torch.linspace(0.5, 3, 32))
    source = tensors_of(model)
    result = resize_vocabulary(source, 60)
    assert result.config == dataclasses.replace(source.config, vocab_size=60)
    old_rows, rows = rows_of(source, EMBEDDING), rows_of(result, EMBEDDING)
    assert torch.equal(rows[:50], old_rows)
    assert torch.equal(rows_of(result, HEAD)[:50], rows_of(source, HEAD))
    assert torch.equal(rows, rows_of(result, EMBEDDING))
    old_rows = old_rows.double()
    noise = (rows[50:].double() - old_rows.mean(0)) / old_rows.std(0, correction=0)
    # Of 10 rows each, so that a channel's own scale is seen.
    assert all(0.03 < spread < 0.2 for spread in noise.std(0))
    assert not torch.equal(rows, rows_of(resize_vocabulary(source, 60, seed=1), EMBEDDING))
    head_mean = rows_of(source, HEAD).double().mean(0).to(dtype)
    assert torch.equal(rows_of(result, HEAD)[50:], head_mean.expand(10, -1))
    assert all(result.tensors[name] is source.tensors[name] for name in source.tensors if "." in name[5:])


def test_old_logits_stay_and_new_ones_take_little(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    result = build_model(resize_vocabulary(tensors_of(model), 60))
    (found, state), (expected, before) = result(TOKENS), model(TOKENS)
    assert torch.equal(found[..., :50], expected)
    assert torch.equal(state.wkv, before.wkv)
    torch.testing.assert_close(found[..., 50:], expected.mean(-1, keepdim=True).expand(-1, -1, 10), rtol=0, atol=1e-5)
    share = found.softmax(-1)[..., 50:].sum(-1)
    assert share.min() > 0
    assert share.max() <= 10 / 60 + 1e-6


def test_smaller_only_when_asked(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    source = dataclasses.replace(tensors_of(model), origin="mine.pth")
    with pytest.raises(CheckpointError, match=r"mine\.pth.*40 ids.*last 10 of 50"):
        resize_vocabulary(source, 40)
    result = resize_vocabulary(source, 40, drops_rows=True)
    assert torch.equal(rows_of(result, EMBEDDING), rows_of(source, EMBEDDING)[:40])
    found, expected = build_model(result)(TOKENS % 40)[0], model(TOKENS % 40)[0]
    assert torch.equal(found, expected[..., :40])
    for size, noise in ((0, 0.1), (60, -1.0), (60, float("nan"))):
        with pytest.raises(CheckpointError, match="expected at least 1"):
            resize_vocabulary(source, size, drops_rows=True, noise=noise)


def test_a_known_size_leaves_its_tokenizer_behind(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("6", vocab_size=257))
    assert resize_vocabulary(source, 300).tokenizer == "bytes"
    assert resize_vocabulary(dataclasses.replace(source, tokenizer="x.json"), 300).tokenizer == "x.json"


# Tokens


def test_a_new_row_is_the_mean_of_the_texts_tokens(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", vocab_size=257)
    source = tensors_of(model)
    added = add_tokens(source, ["abba", "é"], tokenizer=BytesTokenizer())
    assert added.ids == {"abba": 257, "é": 258}
    assert added.replaced == 0
    assert added.model.config.vocab_size == 259
    assert added.model.tokenizer == "bytes"
    for name in (EMBEDDING, HEAD):
        old, new = rows_of(source, name), rows_of(added.model, name)
        assert torch.equal(new[:257], old)
        torch.testing.assert_close(new[257], (old[98] + old[99]) / 2, rtol=0, atol=1e-7)
        torch.testing.assert_close(new[258], (old[0xC3 + 1] + old[0xA9 + 1]) / 2, rtol=0, atol=1e-7)
    found, expected = build_model(added.model)(TOKENS)[0], model(TOKENS)[0]
    assert torch.equal(found[..., :257], expected)
    mean = expected[..., [98, 99]].mean(-1)
    torch.testing.assert_close(found[..., 257], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "first_id", "kind", "words"),
    [
        ([], None, DataError, "no texts"),
        ([""], None, DataError, "it is empty"),
        (["a"], None, DataError, "it is the token 98 already"),
        (["ab", "ab"], None, DataError, "given twice"),
        (["ab"], 256, CheckpointError, r"first new id 256.*expected 257 .* to 257"),
        (["ab"], 258, CheckpointError, "first new id 258"),
        (["\ud800ab"], None, DataError, "surrogate"),
    ],
)
def test_refused(
    make_finch: Callable[..., Finch], texts: list[str], first_id: int | None, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        add_tokens(tensors_of(make_finch("6", vocab_size=257)), texts, tokenizer=BytesTokenizer(), first_id=first_id)


def test_tokens_of_another_tokenizer(make_finch: Callable[..., Finch]) -> None:
    with pytest.raises(DataError, match="beyond the model's 257 rows"):
        add_tokens(tensors_of(make_finch("6", vocab_size=257)), ["the Eiffel tower"], tokenizer=WorldTokenizer())


def test_unused_rows_of_world_and_a_vocabulary_for_others(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    source = tensors_of(make_finch("6", n_embd=8, n_layer=2))
    rows = {name: StoredTensor.of(torch.randn(65536, 8)) for name in (EMBEDDING, HEAD)}
    config = dataclasses.replace(source.config, vocab_size=65536)
    source = dataclasses.replace(source, config=config, tensors={**source.tensors, **rows})
    world = WorldTokenizer()
    texts = [" zebra crossing", "<|call|>", 'it\'s \\ "new"\n\tüé']
    added = add_tokens(source, texts, tokenizer=world, first_id=65530)
    assert added.ids == dict(zip(texts, range(65530, 65533), strict=True))
    assert (added.replaced, added.model.config.vocab_size) == (3, 65536)
    old, new = rows_of(source, EMBEDDING), rows_of(added.model, EMBEDDING)
    kept = [*range(65530), *range(65533, 65536)]
    assert torch.equal(new[kept], old[kept])
    ids = torch.from_numpy(world.encode(texts[1])).long()
    torch.testing.assert_close(new[65531], old[ids].mean(0))
    beyond = add_tokens(source, [f"<|{i}|>" for i in range(7)], tokenizer=world, first_id=65530)
    assert (beyond.replaced, beyond.model.config.vocab_size) == (6, 65537)

    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    # A part of World, of all single bytes and the shortest tokens: the whole takes that program many seconds.
    text = vocabulary_text(world_lines()[:3000], added.ids)
    (tmp_path / "vocabulary.txt").write_text(text, encoding="utf-8", newline="\n")
    theirs = TRIE_TOKENIZER(str(tmp_path / "vocabulary.txt"))
    for text, number in added.ids.items():
        assert theirs.encode(text) == [number]
        assert theirs.decode([number]) == text
        assert theirs.encode(f"\x01{text}\x01") == [2, number, 2]
    assert theirs.encode("a\n\n") == world.encode("a\n\n").tolist() == [98, 261]
