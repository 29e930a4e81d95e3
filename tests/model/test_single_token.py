"""The step of a single token against the forward pass: logits and all three states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from infctx.adapters.quantized_base import quantize_
from infctx.model import single_token_attention
from infctx.model.finch import Finch
from infctx.model.single_token import SingleTokenStep
from infctx.model.state import ModelState, join_rows

# The forward pass sums over a chunk in another order, in float32 by C++: measured 1e-6 for logits of about 1, 1e-5 for
# states of about 5.
FLOAT32 = {"rtol": 2e-5, "atol": 5e-5}
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}
# The chunk path's kernels round once where the steps here round twice.
BFLOAT16 = {"rtol": 0.1, "atol": 0.15}


def compare(model: Finch, *, rows: int, tolerance: dict[str, float], prompt_tokens: int = 5) -> None:
    """Read a prompt with the forward pass, then token after token; compare with the forward pass at each of them."""
    tokens = torch.randint(model.config.vocab_size, (rows, prompt_tokens + 6))
    with torch.no_grad():
        _, before = model(tokens[:, :prompt_tokens])
        state = ModelState(*(part.clone() for part in before))
        step = SingleTokenStep(model)
        for at in range(prompt_tokens, tokens.shape[1]):
            logits, state = step.advance_(tokens[:, at], state)
            # What it gave back before is not what it goes on from here.
            state = ModelState(*(part.clone() for part in state)) if at % 3 == 0 else state
            expected, expected_state = model(tokens[:, prompt_tokens : at + 1], before)
            torch.testing.assert_close(logits, expected[:, -1], **tolerance)
            for found, wanted in zip(state, expected_state, strict=True):
                assert found.dtype == wanted.dtype
                torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("rows", [1, 8, 17])
@pytest.mark.parametrize("version", ["6", "5.2", "6c2", "goldfinch", "gptalpha"])
def test_the_same_as_the_forward_pass(make_finch: Callable[..., Finch], version: str, rows: int) -> None:
    compare(make_finch(version, dtype=torch.float64), rows=rows, tolerance=FLOAT64)
    compare(make_finch(version), rows=rows, tolerance=FLOAT32)


@pytest.mark.parametrize("version", ["6", "5.2", "6c2", "goldfinch", "gptalpha"])
def test_bf16(make_finch: Callable[..., Finch], version: str) -> None:
    compare(make_finch(version, dtype=torch.bfloat16), rows=2, tolerance=BFLOAT16)


@pytest.mark.parametrize("version", ["goldfinch", "gptalpha"])
@pytest.mark.parametrize("room", ["none kept", "little room"])
def test_keys_that_are_not_kept(
    make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch, version: str, room: str
) -> None:
    """The same, where keys and values take more memory than they may, from the beginning or from some token on."""
    model = make_finch(version, dtype=torch.float64)
    each = 2 * model.config.n_attention * model.config.dim_att * 8 * 2
    monkeypatch.setattr(single_token_attention, "_ROOM", 3)
    monkeypatch.setattr(single_token_attention.AttentionStep.__init__, "__kwdefaults__", {"ready_bytes": each * 8})
    compare(model, rows=2, tolerance=FLOAT64, prompt_tokens=7 if room == "none kept" else 4)


@pytest.mark.parametrize("version", ["goldfinch", "gptalpha"])
def test_rows_whose_documents_began_elsewhere(make_finch: Callable[..., Finch], version: str) -> None:
    """Rows of different lengths side by side are what each is alone; positions are relative."""
    model = make_finch(version, dtype=torch.float64)
    prompts = [torch.randint(50, (1, length)) for length in (3, 9, 1)]
    more = torch.randint(50, (3, 5))
    with torch.no_grad():
        alone = [
            model(torch.cat([prompt, more[row : row + 1]], dim=1))[0][:, -5:] for row, prompt in enumerate(prompts)
        ]
        joined = join_rows([model(prompt)[1] for prompt in prompts])
        assert joined.num_cached == 9
        whole, _ = model(more, joined)
        torch.testing.assert_close(whole, torch.cat(alone), **FLOAT64)
        step, state = SingleTokenStep(model), ModelState(*(part.clone() for part in joined))
        for at in range(5):
            logits, state = step.advance_(more[:, at], state)
            torch.testing.assert_close(logits, torch.cat(alone)[:, at], **FLOAT64)


def test_from_a_tuned_state_and_tuned_shifts(make_finch: Callable[..., Finch]) -> None:
    model = make_finch(has_initial_state=True, has_initial_shifts=True, dtype=torch.float64)
    tokens = torch.randint(50, (3, 1))
    with torch.no_grad():
        expected, expected_state = model(tokens)
    state = ModelState(*(part.clone() for part in model.fresh_state(3)))
    torch.testing.assert_close(SingleTokenStep(model).advance_(tokens[:, 0], state)[0], expected[:, 0], **FLOAT64)
    for found, wanted in zip(state, expected_state, strict=True):
        torch.testing.assert_close(found, wanted, **FLOAT64)


def test_extreme_decays(make_finch: Callable[..., Finch]) -> None:
    """A raw decay of 100 forgets at once, one of -100 never; neither is a NaN."""
    model = make_finch(dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.decay_base[::3] = 100.0
            block.time_mix.decay_base[1::3] = -100.0
    compare(model, rows=2, tolerance=FLOAT64)


def test_a_quantised_base(make_finch: Callable[..., Finch]) -> None:
    model = make_finch()
    quantize_(model, "int8")
    compare(model, rows=2, tolerance=FLOAT32)


def test_an_attached_adapter(make_finch: Callable[..., Finch]) -> None:
    from infctx.recipe.adapter_section import AdapterSection
    from infctx.run_adapter import attach_adapter

    model = make_finch(dtype=torch.float64)
    section = AdapterSection(kind="lora", rank=2, alpha=4, targets=["receptance", "key", "value", "head"])
    attach_adapter(section, model, frozen_dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    compare(model, rows=2, tolerance=FLOAT64)
