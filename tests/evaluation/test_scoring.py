"""Many prompts side by side: the same numbers as each by itself, in one piece."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from infctx.data.tokenizer import BytesTokenizer
from infctx.errors import CheckpointError
from infctx.evaluation.greedy import continue_greedily
from infctx.evaluation.row_states import MIN_SHARED_TOKENS, read_prompts, select_rows
from infctx.evaluation.scoring import score_continuations
from infctx.evaluation.text_losses import text_log_probabilities
from infctx.model.finch import Finch

MakeFinch = Callable[..., Finch]
Pair = tuple[tuple[int, ...], tuple[int, ...]]


def ids(source: random.Random, count: int) -> tuple[int, ...]:
    return tuple(source.randrange(50) for _ in range(count))


def make_requests(*, shared: int = 0) -> list[Pair]:
    """Contexts of 1 to 40 tokens behind a shared beginning, with 1 to 4 continuations each, in mixed order."""
    source = random.Random(0)
    prefix = ids(source, shared)
    requests = []
    for length in (30, 3, 17, 1, 18):
        context = prefix + ids(source, length)
        requests += [(context, ids(source, source.randrange(1, 9))) for _ in range(source.randrange(1, 5))]
    source.shuffle(requests)
    return requests


@torch.no_grad()
def score_alone(model: Finch, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[float, bool]:
    logits, _ = model(torch.tensor([context + continuation]))
    logits = logits[0, len(context) - 1 : -1]
    chosen = torch.log_softmax(logits, -1)[range(len(continuation)), list(continuation)]
    return float(chosen.sum()), logits.argmax(-1).tolist() == list(continuation)


@pytest.mark.parametrize(
    ("version", "has_start", "shared"), [("6", False, 0), ("6", False, 50), ("6", True, 50), ("5.2", True, 50)]
)
def test_scores_side_by_side_are_those_of_each_alone(
    make_finch: MakeFinch, version: str, has_start: bool, shared: int
) -> None:
    model = make_finch(version, dtype=torch.float64, has_initial_state=has_start, has_initial_shifts=has_start)
    if has_start:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "initial" in name:
                    parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requests = make_requests(shared=shared)
    found = score_continuations(model, requests, rows=4, chunk_tokens=7)
    assert len(found) == len(requests)
    for (context, continuation), score in zip(requests, found, strict=True):
        expected, is_greedy = score_alone(model, context, continuation)
        assert score.log_probability == pytest.approx(expected, abs=1e-9)
        assert score.is_greedy == is_greedy
    # What was put in the place of the initial state is gone.
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scores_in_float32_do_not_depend_on_the_batch(make_finch: MakeFinch) -> None:
    model, requests = make_finch(), make_requests()
    batched = score_continuations(model, requests, rows=5)
    alone = [score_continuations(model, [request], rows=1)[0] for request in requests]
    assert [one.log_probability for one in batched] == pytest.approx([one.log_probability for one in alone], abs=1e-5)
    assert [one.is_greedy for one in batched] == [one.is_greedy for one in alone]


def test_what_the_model_would_say_is_greedy(make_finch: MakeFinch) -> None:
    model, context = make_finch(), ids(random.Random(1), 12)
    tokens = list(context)
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    said = tuple(tokens[12:])
    other = (*said[:3], (said[3] + 1) % 50)
    found = score_continuations(model, [(context, said), (context, other), (context, said[:1])], rows=3)
    assert [one.is_greedy for one in found] == [True, False, True]


def test_shared_beginnings_are_read_once(make_finch: MakeFinch) -> None:
    """4 questions with 3 answers of 2 tokens each, behind 100 tokens that all have, side by side."""
    source = random.Random(2)
    prefix = ids(source, 100)
    contexts = [(*prefix, number, *ids(source, 4)) for number in range(4)]
    requests = [(context, ids(source, 2)) for context in contexts for _ in range(3)]
    model, read = make_finch(), []
    handle = model.embedding.register_forward_pre_hook(lambda module, given: read.append(given[0].numel()))
    score_continuations(model, requests, rows=12)
    handle.remove()
    assert read == [100, 4 * 5, 12 * 1]
    assert len(prefix) >= MIN_SHARED_TOKENS


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_states_of_rows_are_those_of_their_prompts(make_finch: MakeFinch, chunk_tokens: int) -> None:
    model, source = make_finch(dtype=torch.float64), random.Random(3)
    prompts = [ids(source, length) for length in (9, 1, 4, 12)]
    logits, state = read_prompts(model, prompts, chunk_tokens=chunk_tokens)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            alone, alone_state = model(torch.tensor([prompt]))
        assert torch.allclose(logits[row], alone[0, -1], atol=1e-10)
        for ours, theirs in zip(select_rows(state, [row]), alone_state, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-10)


def greedy_by_hand(model: Finch, prompt: tuple[int, ...], max_tokens: int) -> bytes:
    """The whole text read anew for every token."""
    tokens, text = list(prompt), b""
    for _ in range(max_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens]))[0][0, -1].argmax())
        if token == 0:
            break
        tokens.append(token)
        text += bytes([token - 1])
    return text


@pytest.fixture
def talker(make_finch: MakeFinch) -> Finch:
    """A model over bytes, whose texts are of printable letters and end now and then."""
    model = make_finch(vocab_size=257, dtype=torch.float64, n_layer=2)
    with torch.no_grad():
        model.head.weight[1:98] = -3.0 * model.head.weight[200]
        model.head.weight[123:] = -3.0 * model.head.weight[201]
        model.head.weight[98:123].mul_(4.0)
        model.head.weight[0].mul_(3.0)
    return model


def test_texts_side_by_side_are_those_of_each_alone(talker: Finch) -> None:
    source = random.Random(4)
    shared = ids(source, 40)
    prompts = [shared + ids(source, length) for length in (5, 1, 30, 5, 12)]
    tokenizer = BytesTokenizer()
    expected = [greedy_by_hand(talker, prompt, 12) for prompt in prompts]
    # The test would show little if all were the same, or none ended by itself.
    assert len(set(expected)) > 2
    # The first row of the first batch, the longest prompt, ends before the rows beside it.
    stop = expected[2][1:3].decode()
    cut = [text.partition(stop.encode())[0] for text in expected]
    assert len(cut[2]) <= 1 < 5 < max(len(cut[0]), len(cut[4]))
    for stops, texts in (((), expected), ((stop,), cut)):
        found = continue_greedily(
            talker, prompts, tokenizer=tokenizer, max_tokens=12, stops=stops, rows=3, chunk_tokens=9
        )
        assert found == [text.decode("utf-8", "replace") for text in texts]


def test_a_text_ends_before_its_first_stop_string(talker: Finch) -> None:
    with torch.no_grad():
        talker.head.weight[0] = talker.head.weight[1]
    tokenizer, prompts = BytesTokenizer(), [ids(random.Random(5), 8), ids(random.Random(6), 11)]
    whole = continue_greedily(talker, prompts, tokenizer=tokenizer, max_tokens=20, rows=2)
    stops = [text[6:9] for text in whole]
    assert all(len(stop) == 3 for stop in stops)
    found = continue_greedily(talker, prompts, tokenizer=tokenizer, max_tokens=20, stops=[*stops, "never"], rows=2)
    for text, full in zip(found, whole, strict=True):
        assert text == full[: min(full.find(stop) for stop in stops if stop in full)]
    assert continue_greedily(talker, prompts, tokenizer=tokenizer, max_tokens=0, rows=2) == ["", ""]
    assert continue_greedily(talker, prompts, tokenizer=tokenizer, max_tokens=5, rows=2) == [text[:5] for text in whole]


def test_a_damaged_model_says_nothing(talker: Finch, make_finch: MakeFinch) -> None:
    model = make_finch(vocab_size=257)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        continue_greedily(model, [(1, 2)], tokenizer=BytesTokenizer(), max_tokens=3)


def test_whole_texts_of_any_length_have_one_probability(make_finch: MakeFinch) -> None:
    model, tokenizer = make_finch(vocab_size=257, dtype=torch.float64), BytesTokenizer()
    texts = ["a text", "", "and a longer one, of several chunks"]
    found = text_log_probabilities(model, tokenizer, texts, rows=2, chunk_tokens=8)
    for text, value in zip(texts, found, strict=True):
        if not text:
            assert value == 0.0
            continue
        expected, _ = score_alone(model, (0,), tuple(tokenizer.encode(text).tolist()))
        assert value == pytest.approx(expected, rel=1e-10)
