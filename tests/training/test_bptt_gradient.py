"""The two-sweep gradient equals autograd over the whole sequence, for every parameter and for the initial state.

Looking at outputs, or at the head's gradient, cannot see a gradient that was cut at a chunk border: these tests compare
all of them, and check that they would notice.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infctx
from infctx.adapters.peft_adapters import attach_lora
from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective, Window, backward_through_windows
from infctx.training.chunked import chunked_step

VERSIONS = ["6", "5.2", "6c2", "goldfinch", "gptalpha"]
NUM_TOKENS = 83
Gradients = dict[str, Tensor]


def make_batch(rows: int = 2, num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights with masked stretches longer than a chunk, and documents that start mid-chunk."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 50, (rows, num_tokens), generator=generator)
    weight = torch.rand(rows, num_tokens, generator=generator, dtype=torch.float64)
    weight = weight * (torch.rand(rows, num_tokens, generator=generator) < 0.7)
    weight[:, 25:45] = 0
    starts = torch.rand(rows, num_tokens, generator=generator) < 0.05
    return tokens, weight, starts


def whole_sequence(
    model: Finch, tokens: Tensor, weight: Tensor, starts: Tensor | None, *, cut_every: int | None, state: ModelState
) -> tuple[Tensor, Gradients, ModelState]:
    """Loss and gradients by autograd through everything at once; `cut_every` detaches the state at window borders."""
    model.zero_grad(set_to_none=True)
    weight = weight.clone()
    weight[:, 0] = 0
    if starts is not None:
        weight = weight.masked_fill(starts, 0)
    initial = state.leaves()
    state, pieces = initial, []
    window = cut_every or tokens.shape[1]
    for first in range(0, tokens.shape[1], window):
        place = slice(first, first + window)
        if first:
            state = state.detach()
        logits, state = model(tokens[:, place], state, starts=None if starts is None else starts[:, place])
        pieces.append(logits)
    logits = torch.cat(pieces, 1)[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (losses * weight[:, 1:]).sum() / weight.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"state.{i}": t.grad for i, t in enumerate(initial) if t.grad is not None}
    return loss.detach(), gradients, state.detach()


def chunked(
    model: Finch, tokens: Tensor, state: ModelState, **settings: object
) -> tuple[Tensor, Gradients, ModelState]:
    model.zero_grad(set_to_none=True)
    step = chunked_step(model, tokens, state=state, **settings)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {
        f"state.{i}": tensor for i, tensor in enumerate(step.initial_state_gradient) if tensor.is_floating_point()
    }
    return step.loss, gradients, step.state


def relative_errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Norm of the difference over the norm of what is expected; absolute where nothing is expected.

    Nor is it of what moves all keys of a layer alike: no softmax sees that, and the gradient is rounding.
    """
    errors = {}
    for name, gradient in found.items():
        reference = expected.get(name, torch.zeros_like(gradient)).double()
        is_relative = bool(reference.any()) and not name.endswith("time_mix.key_norm.bias")
        errors[name] = float((gradient.double() - reference).norm() / (reference.norm() if is_relative else 1.0))
    return errors


def random_state(model: Finch, rows: int) -> ModelState:
    generator = torch.Generator().manual_seed(3)
    dtype = model.embedding.weight.dtype
    fresh = model.fresh_state(rows)
    recurrent = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in fresh.recurrent)
    if not fresh.has_cache:
        return ModelState(*recurrent)
    ids = torch.randint(0, 50, (1, rows, 9), generator=generator, dtype=torch.int32)
    # Two documents in the first row.
    ids[:, :, 0], ids[:, 0, 4] = ~ids[:, :, 0], ~ids[:, 0, 4]
    vectors = torch.randn(1, rows, 9, fresh.cached.shape[3], generator=generator, dtype=torch.float64).to(dtype)
    return ModelState(*recurrent, ids, vectors)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_equals_whole_sequence_autograd_in_fp64(
    make_finch: Callable[..., Finch], version: str, with_starts: bool, chunk_tokens: int
) -> None:
    model = make_finch(version, n_layer=2, dtype=torch.float64, has_initial_state=with_starts)
    tokens, weight, starts = make_batch(num_tokens=NUM_TOKENS if chunk_tokens > 1 else 60)
    starts = starts if with_starts else None
    state = random_state(model, 2)
    for window in (1, 2, "document"):
        cut_every = None if window == "document" else window * chunk_tokens
        expected = whole_sequence(model, tokens, weight, starts, cut_every=cut_every, state=state)
        found = chunked(
            model, tokens, state, loss_weight=weight, starts=starts, chunk_tokens=chunk_tokens, window=window
        )
        torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
        errors = relative_errors(found[1], expected[1])
        assert max(errors.values()) < 1e-10, (window, errors)
        for ours, theirs in zip(found[2].trimmed(), expected[2].trimmed(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_fp32_is_as_exact_as_fp32_can_be(make_finch: Callable[..., Finch], version: str) -> None:
    """Against float64; autograd over the whole sequence in float32 has an error of the same size."""
    tokens, weight, starts = make_batch()
    exact_model, model = make_finch(version, dtype=torch.float64), make_finch(version)
    exact_state, state = random_state(exact_model, 2), random_state(model, 2)
    _, exact, _ = whole_sequence(exact_model, tokens, weight, starts, cut_every=None, state=exact_state)
    for chunk_tokens in (1, 7, 64):
        _, found, _ = chunked(
            model, tokens, state, loss_weight=weight.float(), starts=starts, chunk_tokens=chunk_tokens
        )
        errors = relative_errors(found, exact)
        assert max(errors.values()) < 1e-5, (chunk_tokens, errors)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_gradient_would_be_noticed(make_finch: Callable[..., Finch], version: str) -> None:
    model = make_finch(version, dtype=torch.float64)
    tokens, weight, _ = make_batch()
    state = random_state(model, 2)
    _, exact, _ = whole_sequence(model, tokens, weight, None, cut_every=None, state=state)
    _, found, _ = chunked(model, tokens, state, loss_weight=weight, chunk_tokens=7, window=1)
    errors = relative_errors(found, exact)
    cut = {name for name, error in errors.items() if error > 1e-3}
    recurrent = {"blocks.0.time_mix.decay_base", "state.0"} if version != "gptalpha" else set()
    cached = {"state.4"} if model.config.n_attention else set()
    assert {"blocks.0.time_mix.key.weight", "embedding.weight"} | recurrent | cached <= cut
    if version == "goldfinch":
        assert {"token_cat.compress.weight", "token_cat.decompress.weight"} <= cut
    # What lies behind the last recurrence is right even so, and proves nothing.
    assert errors["head.weight"] < 1e-10


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("window", [1, 3, "document"])
def test_backward_through_chunks_is_the_same_from_fresh_documents(
    make_finch: Callable[..., Finch], version: str, window: int | str
) -> None:
    model = make_finch(version, dtype=torch.float64, has_initial_state=True)
    tokens, weight, starts = make_batch()
    fresh = model.fresh_state(2)
    cut_every = None if window == "document" else window * 16
    expected_loss, expected, _ = whole_sequence(
        model, tokens, weight, starts, cut_every=cut_every, state=fresh.detach()
    )
    # The tuned initial state also begins every row: its gradient is the rows' sum, beside that of the starts.
    wkv = expected.pop("state.0").sum(1) if model.config.n_recurrent else []
    for i, block in enumerate(model.blocks[: model.config.n_recurrent]):
        name = f"blocks.{i}.time_mix.initial_state"
        assert block.time_mix.initial_state is model.get_parameter(name)
        expected[name] = expected[name] + wkv[i]
    model.zero_grad(set_to_none=True)
    loss = infctx.backward_through_chunks(
        model, tokens, loss_weight=weight, starts=starts, chunk_tokens=16, window=window
    )
    assert loss.dim() == 0
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    errors = relative_errors({name: p.grad for name, p in model.named_parameters()}, expected)
    assert max(errors.values()) < 1e-10, errors


def test_gradients_add_up_over_calls_with_a_given_weight_total(make_finch: Callable[..., Finch]) -> None:
    """Two rows in two calls give the gradient of one call."""
    model = make_finch("6", dtype=torch.float64)
    tokens, weight, _ = make_batch()
    total = float(weight[:, 1:].sum())
    whole_loss, whole, _ = chunked(
        model, tokens, model.fresh_state(2), loss_weight=weight, chunk_tokens=10, weight_total=total
    )
    model.zero_grad(set_to_none=True)
    losses = [
        chunked_step(
            model, tokens[row : row + 1], loss_weight=weight[row : row + 1], weight_total=total, chunk_tokens=7
        )
        for row in range(2)
    ]
    torch.testing.assert_close(losses[0].loss + losses[1].loss, whole_loss, rtol=1e-12, atol=0)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert max(relative_errors(found, {name: whole[name] for name in found}).values()) < 1e-10


def test_the_carried_state_continues_a_document(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6", dtype=torch.float64)
    tokens, _, _ = make_batch()
    first = chunked_step(model, tokens[:, :40], chunk_tokens=16)
    second = chunked_step(model, tokens[:, 40:], state=first.state, chunk_tokens=16)
    _, expected = model(tokens)
    for ours, theirs in zip(second.state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert not ours.requires_grad


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_a_model_with_frozen_parts_gets_gradients_only_where_it_learns(
    make_finch: Callable[..., Finch], chunk_tokens: int
) -> None:
    model = make_finch("6", dtype=torch.float64)
    tokens, weight, _ = make_batch()
    _, expected, _ = whole_sequence(model, tokens, weight, None, cut_every=None, state=model.fresh_state(2))
    trained = {"blocks.0.time_mix.key.weight", "blocks.2.channel_mix.lerp_key"}
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    infctx.backward_through_chunks(model, tokens, loss_weight=weight, chunk_tokens=chunk_tokens)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == trained
    assert max(relative_errors(found, {name: expected[name] for name in trained}).values()) < 1e-10


def test_dropout_falls_on_the_same_places_in_both_sweeps(make_finch: Callable[..., Finch]) -> None:
    """Against a graph kept through all chunks, run once, in order, from the same random state."""
    model = make_finch("6", dtype=torch.float64)
    for block in model.blocks:
        block.channel_mix.value = nn.Sequential(nn.Dropout(0.5), block.channel_mix.value)
    model.train()
    tokens, _, _ = make_batch()
    parameters = list(model.parameters())
    for window in (1, 3, "document"):
        torch.manual_seed(7)
        state, losses = model.fresh_state(2), []
        for index, first in enumerate(range(0, NUM_TOKENS, 16)):
            if window != "document" and index % window == 0:
                state = state.detach()
            logits, state = model(tokens[:, first : first + 16], state)
            targets = tokens[:, first + 1 : first + 17]
            losses.append(F.cross_entropy(logits[:, : targets.shape[1]].transpose(1, 2), targets, reduction="sum"))
        loss = sum(losses) / (2 * (NUM_TOKENS - 1))
        expected = torch.autograd.grad(loss, parameters)
        after = torch.get_rng_state()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        found = infctx.backward_through_chunks(model, tokens, chunk_tokens=16, window=window)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        # A run goes on with the random numbers that come after the ones it used.
        assert torch.equal(torch.get_rng_state(), after)


def test_logits_of_all_tokens_never_exist(make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infctx.training.loss.LOGITS_AT_ONCE", 50 * 6)
    model = make_finch("6", dtype=torch.float64)
    tokens, weight, starts = make_batch()
    sizes = []
    kept: list[torch.Size] = []
    handle = model.head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1].numel()))

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        infctx.backward_through_chunks(model, tokens, loss_weight=weight, starts=starts, chunk_tokens=40)
    handle.remove()
    assert max(sizes) <= 6
    # Nor are all pieces' logits kept for the backward pass: each is computed again, and they are more than 30.
    assert 1 <= kept.count(torch.Size([6, 50])) <= 2
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    _, expected, _ = whole_sequence(model, tokens, weight, starts, cut_every=None, state=model.fresh_state(2))
    assert max(relative_errors(found, {name: expected[name] for name in found}).values()) < 1e-10


@pytest.mark.usefixtures("_as_users_run_it")
def test_wrong_arguments_say_what_was_expected(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    tokens = torch.randint(0, 50, (2, 9))
    cases: list[tuple[tuple, dict, str]] = [
        ((tokens.int(),), {}, "tokens: expected int64"),
        ((tokens[0],), {}, "tokens: expected int64"),
        ((tokens[:, :0],), {}, "T >= 1"),
        ((tokens[:, :1],), {}, "nothing to learn"),
        ((tokens,), {"loss_weight": torch.zeros(2, 9)}, "nothing to learn"),
        ((tokens,), {"loss_weight": torch.ones(2, 8)}, "loss_weight: expected shape"),
        ((tokens,), {"starts": torch.ones(2, 9)}, "starts: expected bool"),
        ((tokens,), {"chunk_tokens": 0}, "chunk_tokens: expected at least 1"),
        ((tokens,), {"window": 0}, "window: expected"),
        ((tokens,), {"window": "all"}, "window: expected"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            infctx.backward_through_chunks(model, *arguments, **settings)
    assert all(parameter.grad is None for parameter in model.parameters())


class SavedTensors:
    """Counts the tensors that autograd keeps for a backward pass."""

    def __init__(self) -> None:
        self.now = self.largest = 0

    def pack(self, tensor: Tensor) -> Kept:
        self.now += 1
        self.largest = max(self.largest, self.now)
        return Kept(self, tensor)


class Kept:
    """A tensor that is kept until its graph is gone."""

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self._counter, self.tensor = counter, tensor

    def __del__(self) -> None:
        self._counter.now -= 1


def test_memory_does_not_grow_with_the_document(make_finch: Callable[..., Finch]) -> None:
    """No more tensors are ever kept for 16 chunks than for one."""
    model = make_finch("6")
    largest = []
    for num_chunks in (1, 4, 16):
        counter = SavedTensors()
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda kept: kept.tensor):
            infctx.backward_through_chunks(model, torch.randint(0, 50, (1, 16 * num_chunks)), chunk_tokens=16)
        assert counter.now == 0
        largest.append(counter.largest)
    # A chunk of a longer document also keeps the states and gradients that tie it to the next one.
    assert largest[2] == largest[1] <= 1.1 * largest[0], largest


def test_the_two_sweeps_are_compared(make_finch: Callable[..., Finch]) -> None:
    """Nothing when they compute the same; with random numbers that are not replayed, the difference shows."""
    model = make_finch("6")
    targets = ["receptance", "key", "value", "gate", "output"]
    attach_lora(model, rank=4, alpha=8.0, dropout=0.5, targets=targets, train_also=[])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    tokens = torch.randint(1, 50, (2, 60), generator=torch.Generator().manual_seed(0))
    chunks = []
    for index in range(5):
        place = slice(12 * index, 12 * index + 12)
        chunk = Chunk(
            tokens=tokens[:, place],
            targets=tokens[:, place],
            loss_weight=torch.ones(2, 12),
            starts=None,
            index=index,
            has_loss=True,
        )
        chunks.append(chunk)

    def difference(*, keeps_random_state: bool, window: Window) -> float:
        result = backward_through_windows(
            ChunkObjective(model),
            chunks,
            model.fresh_state(2),
            window=window,
            weight_total=120.0,
            keeps_random_state=keeps_random_state,
        )
        return float(result.largest_difference)

    assert difference(keeps_random_state=True, window="document") == 0
    assert difference(keeps_random_state=True, window=2) == 0
    assert difference(keeps_random_state=False, window="document") > 0.1
    assert difference(keeps_random_state=False, window=2) > 0.1
    assert difference(keeps_random_state=False, window=1) == 0


@pytest.mark.parametrize("version", ["goldfinch", "gptalpha"])
def test_attention_of_frozen_weights_gives_the_gradient_of_trained_ones(
    make_finch: Callable[..., Finch], version: str
) -> None:
    """GOLD's values are made of the embeddings alone: where those are frozen, nothing of them asks for a gradient."""
    model = make_finch(version, dtype=torch.float64)
    tokens, weight, starts = make_batch()
    settings = {"loss_weight": weight, "starts": starts, "chunk_tokens": 7}
    _, expected, _ = chunked(model, tokens, random_state(model, 2), **settings)
    learns = ("query.weight", "output.weight", "time_mix.key.weight", "compress.weight")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(learns))
    _, found, _ = chunked(model, tokens, random_state(model, 2), **settings)
    found = {name: gradient for name, gradient in found.items() if gradient is not None}
    assert len(found) > len(model.blocks)
    assert max(relative_errors(found, expected).values()) < 1e-12
