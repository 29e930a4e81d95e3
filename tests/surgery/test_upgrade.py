"""Eagle -> Finch: the same logits, states and gradients; what is new trains at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import build_model, tensors_of
from infctx.checkpoint.pth_writer import write_pth
from infctx.errors import CheckpointError
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.tensors import ModelTensors, StoredTensor
from infctx.surgery.upgrade import upgrade_to_finch

MIXES = {"lerp_key": "mix_key", "lerp_value": "mix_value", "lerp_receptance": "mix_receptance", "lerp_gate": "mix_gate"}


def tokens(length: int = 45) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(3))


def scalar_of(model: Finch) -> Tensor:
    """Something that every output and every state has a part in, over two chunks."""
    logits, state = model(tokens()[:, :17])
    more, state = model(tokens()[:, 17:], state)
    parts = [logits, more, *state]
    return sum((part * torch.sin(torch.arange(part.numel()).double() + 1).view_as(part)).sum() for part in parts)


@pytest.mark.parametrize("has_initial_state", [False, True])
def test_logits_states_and_gradients_are_the_same(make_finch: Callable[..., Finch], has_initial_state: bool) -> None:
    eagle = make_finch("5.2", has_initial_state=has_initial_state, dtype=torch.float64)
    finch = build_model(upgrade_to_finch(tensors_of(eagle), lerp_rank=3, decay_rank=5), dtype=torch.float64)
    assert (finch.config.version, finch.config.lerp_rank, finch.config.decay_rank) == ("6", 3, 5)
    with torch.no_grad():
        for ours, theirs in zip(finch(tokens())[1], eagle(tokens())[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        torch.testing.assert_close(finch(tokens())[0], eagle(tokens())[0], rtol=0, atol=1e-12)
    for model in (eagle, finch):
        scalar_of(model).backward()
    theirs = dict(eagle.named_parameters())
    compared = set()
    for name, parameter in finch.named_parameters():
        owner, _, last = name.rpartition(".")
        counterpart = f"{owner}.{MIXES.get(last, last)}"
        if counterpart not in theirs:
            continue
        expected = theirs[counterpart].grad.view_as(parameter)
        # One minus the mix: its gradient has the other sign.
        expected = -expected if last in MIXES else expected
        assert expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        compared.add(counterpart)
    assert compared == set(theirs)


def test_what_is_new_trains_from_the_first_step(make_finch: Callable[..., Finch]) -> None:
    finch = build_model(upgrade_to_finch(tensors_of(make_finch("5.2"))))
    scalar_of(finch).backward()
    for block in finch.blocks:
        for down, up in (("lerp_down", "lerp_up"), ("decay_down", "decay_up")):
            first, second = (getattr(block.time_mix, name) for name in (down, up))
            assert not first.any()
            assert first.grad.abs().max() > 0
            assert 0 < second.abs().max() <= 0.01
            assert second.grad.abs().max() == 0
    with torch.no_grad():
        for parameter in finch.parameters():
            parameter -= 1e-4 * parameter.grad
            parameter.grad = None
    scalar_of(finch).backward()
    assert all(block.time_mix.lerp_up.grad.abs().max() > 0 for block in finch.blocks)
    assert all(block.time_mix.decay_up.grad.abs().max() > 0 for block in finch.blocks)


def test_mixes_of_a_bf16_file_stay_exact(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("5.2", n_embd=64, dtype=torch.bfloat16))
    result = upgrade_to_finch(source)
    for name, stored in result.tensors.items():
        is_mix = "time_maa" in name and not name.endswith(("_w1", "_w2"))
        assert stored.dtype == (torch.float32 if is_mix else torch.bfloat16), name
        assert stored.read().dtype == stored.dtype
        assert stored.read().shape == stored.shape
    mix = source.tensors["blocks.1.att.time_mix_v"].read().double()
    assert torch.equal(result.tensors["blocks.1.att.time_maa_v"].read().double(), 1 - mix)
    rounded = {name: stored.to(torch.bfloat16) for name, stored in result.tensors.items()}
    expected, _ = build_model(source)(tokens())
    assert torch.equal(build_model(result)(tokens())[0], expected)
    off = (build_model(dataclasses.replace(result, tensors=rounded))(tokens())[0] - expected).abs().max()
    assert off > 1e-3


def test_the_official_runtime_computes_the_same(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    source = tensors_of(make_finch("5.2", n_embd=128, head_size=64, has_initial_state=True))
    result = upgrade_to_finch(source)
    write_pth(tmp_path / "eagle.pth", source.tensors)
    write_pth(tmp_path / "finch.pth", result.tensors)
    eagle, finch = (load_official(tmp_path / name) for name in ("eagle", "finch"))
    assert (str(eagle.version), str(finch.version)) == ("5.2", "6")
    ids = tokens()[0].tolist()
    (theirs, their_state), (ours, our_state) = (model.forward(ids, None, full_output=True) for model in (eagle, finch))
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for found, expected in zip(our_state, their_state, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def load_official(path: Path) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        return RWKV(model=str(path), strategy="cpu fp32", verbose=False)


@pytest.mark.parametrize(("channels", "ranks"), [(2048, (32, 64)), (4096, (64, 128))])
def test_usual_ranks(channels: int, ranks: tuple[int, int]) -> None:
    with torch.device("meta"):
        eagle = Finch(new_config(version="5.2", n_layer=2, n_embd=channels, vocab_size=100))
    result = upgrade_to_finch(tensors_of(eagle))
    assert (result.config.lerp_rank, result.config.decay_rank) == ranks
    expected = new_config(version="6", n_layer=2, n_embd=channels, vocab_size=100)
    assert result.config == expected
    with torch.device("meta"):
        wanted = {name: stored.shape for name, stored in tensors_of(Finch(expected)).tensors.items()}
    assert {name: stored.shape for name, stored in result.tensors.items()} == wanted
    assert list(result.tensors) == list(wanted)


def unreadable(source: ModelTensors) -> ModelTensors:
    def read() -> Tensor:
        raise AssertionError("read too early")

    tensors = {name: StoredTensor(stored.shape, stored.dtype, read) for name, stored in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)


def test_nothing_is_read_before_it_is_asked_for(make_finch: Callable[..., Finch]) -> None:
    upgrade_to_finch(unreadable(tensors_of(make_finch("5.2", has_initial_state=True))))


def test_random_values_depend_on_seed_and_name_alone(make_finch: Callable[..., Finch]) -> None:
    source = tensors_of(make_finch("5.2"))
    result, other = upgrade_to_finch(source), upgrade_to_finch(source, seed=1)
    first, second = "blocks.0.att.time_maa_w2", "blocks.1.att.time_maa_w2"
    assert torch.equal(result.tensors[first].read(), result.tensors[first].read())
    assert not torch.equal(result.tensors[first].read(), result.tensors[second].read())
    assert not torch.equal(result.tensors[first].read(), other.tensors[first].read())


def test_refused(make_finch: Callable[..., Finch]) -> None:
    finch = dataclasses.replace(tensors_of(make_finch("6")), origin="mine.pth")
    with pytest.raises(CheckpointError, match=r"mine\.pth.*Eagle.*found version 6"):
        upgrade_to_finch(finch)
    with pytest.raises(CheckpointError, match="ranks 0 and 64"):
        upgrade_to_finch(tensors_of(make_finch("5.2")), lerp_rank=0)
