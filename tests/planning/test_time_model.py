"""What the time model counts is what is computed and sent; seconds follow from it by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infctx.adapters.full import attach_full
from infctx.adapters.peft_adapters import attach_lora
from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.state import ModelState
from infctx.model.time_parallel import bytes_per_chunk
from infctx.planning.planned_model import released_shape
from infctx.planning.spread import Spread
from infctx.planning.time_model import Machine, Work, flops_per_token, plan_time
from infctx.planning.traffic import chunk_messages, step_messages, time_parallel_messages
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx_kernels import linear as products

CHUNK, CHUNKS = 24, 3


@pytest.fixture(autouse=True)
def _countable_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's products are not known to the counter."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)


def a_model(make_finch: Callable[..., Finch], version: str, trained: str) -> Finch:
    layers = 4 if version == "goldfinch" else 2
    model = make_finch(version, n_layer=layers, n_embd=64, head_size=16, dim_ffn=224, vocab_size=160)
    if trained == "lora":
        gate = ["gate"] if version in ("6", "5.2") else []
        attach_lora(model, rank=4, alpha=8.0, targets=["receptance", "key", "value", "output", *gate])
    else:
        attach_full(model)
    return model.train()


@pytest.mark.parametrize("version", ["6", "5.2", "6c2", "goldfinch", "gptalpha"])
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize(("window", "is_recomputed"), [(1, False), ("document", False), ("document", True)])
def test_products_are_those_that_torch_counts(
    make_finch: Callable[..., Finch], version: str, trained: str, window: int | str, is_recomputed: bool
) -> None:
    model = a_model(make_finch, version, trained)
    model.recompute_layers(is_recomputed)
    tokens = torch.randint(0, 160, (1, CHUNK))
    weight = torch.ones(1, CHUNK)
    chunks = [
        Chunk(tokens=tokens, targets=tokens, loss_weight=weight, starts=None, index=index, has_loss=True)
        for index in range(CHUNKS)
    ]
    state = ModelState.zeros(model.config, 1, dtype=torch.float32, device="cpu")
    with FlopCounterMode(display=False) as counter:
        backward_through_windows(ChunkObjective(model), chunks, state, window=window, weight_total=1.0)
    flops = flops_per_token(model)
    sweep_1_share = (CHUNKS - 1) / CHUNKS if window == "document" else 0.0
    # The recurrence is a kernel of its own, which torch does not count: forward, backward, sweep 1, recomputation.
    recurrence = 2 * 256 * model.config.dim_att * model.config.n_recurrent
    without = dataclasses.replace(flops, blocks=flops.blocks - recurrence)
    expected = without.executed(sweep_1_share=sweep_1_share, is_recomputed=is_recomputed) * CHUNK * CHUNKS
    work = Work(document_tokens=CHUNK * CHUNKS, chunk_tokens=CHUNK, window=1 if window == 1 else None)
    expected += flops.attention.of_document(work.walk, is_recomputed=is_recomputed)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_flops_of_a_released_model_by_hand() -> None:
    with torch.device("meta"):
        model = Finch(new_config(version="6", n_layer=32, n_embd=4096, vocab_size=65536))
    channels, layers = 4096, 32
    products = 13 * channels**2 + 10 * 64 * channels + 2 * 128 * channels
    flops = flops_per_token(model)
    assert flops.blocks + flops.head == 2 * (layers * products + 65536 * channels) + 512 * layers * channels
    # Full fine-tuning: three forward passes' worth, but for the recurrence, which has no weights to learn by products.
    assert flops.model == 3 * (flops.blocks + flops.head) - 512 * layers * channels


MACHINE = Machine(
    flops_per_second=1e9,
    in_node_bytes_per_second=1e6,
    between_nodes_bytes_per_second=1e5,
    in_node_latency_seconds=0.25,
    between_nodes_latency_seconds=0.5,
)
WORK = Work(document_tokens=1000, chunk_tokens=100)


def test_one_device_waits_for_nothing(make_finch: Callable[..., Finch]) -> None:
    model = a_model(make_finch, "6", "full")
    time = plan_time(model, WORK, spread=Spread(), machine=MACHINE)
    per_token = flops_per_token(model).executed(sweep_1_share=0.9, is_recomputed=False)
    assert time.seconds == pytest.approx(1000 * per_token / 1e9)
    assert (time.waiting_seconds, time.received_bytes, time.efficiency) == (0.0, 0, pytest.approx(1.0))
    assert time.tokens_per_second == pytest.approx(1000 / time.seconds)


def test_gradients_are_added_up_once_in_a_step(make_finch: Callable[..., Finch]) -> None:
    model = a_model(make_finch, "6", "full")
    time = plan_time(model, WORK, spread=Spread(ranks=4, strategy="ddp"), machine=MACHINE)
    received = 2 * 4 * sum(p.numel() for p in model.parameters()) * 3 // 4
    assert time.received_bytes == received
    assert time.waiting_seconds == pytest.approx(0.25 + received / 1e6)
    assert time.documents == 4


def test_gathering_hides_behind_arithmetic_as_far_as_that_lasts(make_finch: Callable[..., Finch]) -> None:
    model = a_model(make_finch, "6", "full")
    spread = Spread(ranks=2, strategy="fsdp")
    instant = dataclasses.replace(MACHINE, flops_per_second=1e18)
    waits = plan_time(model, WORK, spread=spread, machine=instant)
    hides = plan_time(model, WORK, spread=spread, machine=dataclasses.replace(MACHINE, flops_per_second=1.0))
    messages = chunk_messages(model, spread, rows=1, chunks=10, sweep_1_chunks=9, is_recomputed=False)
    assert waits.waiting_seconds == pytest.approx(sum(MACHINE.seconds(m, spread) * m.count for m in messages))
    assert hides.waiting_seconds == 0.0
    # Blocks are gathered in sweep 1, forward and backward, the rest once a chunk; everything is reduced once a chunk.
    whole = sum(p.nbytes for p in model.parameters())
    blocks = sum(p.nbytes for p in model.blocks.parameters())
    gathered = sum(m.received_bytes * m.count for m in messages if m.what == "parameters")
    reduced = sum(m.received_bytes * m.count for m in messages if m.what == "gradients")
    assert gathered == pytest.approx((29 * blocks + 10 * (whole - blocks)) / 2, rel=0.02)
    assert reduced == pytest.approx(10 * whole / 2, rel=0.02)


def test_ranks_of_several_machines_use_the_links_between_them(make_finch: Callable[..., Finch]) -> None:
    model = a_model(make_finch, "6", "lora")
    near = plan_time(model, WORK, spread=Spread(ranks=8, strategy="ddp", devices_per_node=8), machine=MACHINE)
    far = plan_time(model, WORK, spread=Spread(ranks=8, strategy="ddp", devices_per_node=4), machine=MACHINE)
    assert near.waiting_seconds == pytest.approx(0.25 + near.received_bytes / 1e6)
    assert far.waiting_seconds == pytest.approx(0.5 + near.received_bytes / 1e5)


def test_a_shared_chunk_costs_the_same_messages_however_long_it_is(make_finch: Callable[..., Finch]) -> None:
    model = a_model(make_finch, "6", "lora")
    config, spread = model.config, Spread(ranks=4, strategy="ddp", time_parallel=4)
    messages = time_parallel_messages(config, 4, rows=2, hidden_bytes=2, forwards=1, backwards=1)
    state, channels = config.n_head * config.head_size**2, config.n_embd
    forward = 3 * 2 * ((state + config.dim_att) * 4 + 2 * channels * 2)
    backward = 3 * 2 * (state * 4 + 2 * channels * 4)
    assert sum(m.received_bytes * m.count for m in messages) == config.n_layer * (forward + backward)
    short = plan_time(model, WORK, spread=spread, machine=MACHINE)
    long = plan_time(model, dataclasses.replace(WORK, document_tokens=2000), spread=spread, machine=MACHINE)
    chunks_only = long.received_bytes - short.received_bytes
    assert chunks_only * 10 == pytest.approx((short.received_bytes - step_bytes(model, spread)) * 10, rel=0.06)
    assert short.documents == 1
    # Each rank computes a quarter.
    assert short.computing_seconds == pytest.approx(
        plan_time(model, WORK, spread=Spread(), machine=MACHINE).computing_seconds / 4
    )


def step_bytes(model: Finch, spread: Spread) -> int:
    return sum(message.received_bytes for message in step_messages(model, spread))


@pytest.mark.parametrize(("ranks", "rows", "hidden_bytes"), [(2, 1, 2), (8, 3, 2), (4, 2, 4)])
def test_shared_chunks_send_what_the_model_counts(ranks: int, rows: int, hidden_bytes: int) -> None:
    config = released_shape("1.6b")
    for is_backward in (False, True):
        passes = {"forwards": int(not is_backward), "backwards": int(is_backward)}
        messages = time_parallel_messages(config, ranks, rows=rows, hidden_bytes=hidden_bytes, **passes)
        planned = sum(message.received_bytes * message.count for message in messages)
        counted = bytes_per_chunk(config, rows, ranks, hidden_bytes=hidden_bytes, is_backward=is_backward)
        assert planned == counted
