"""Plans of models with attention: where the cache is, what grows with a document, and the words for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infctx.model.config import FinchConfig
from infctx.model.init import new_config
from infctx.planning.attention_time import Walk
from infctx.planning.devices import Room, device_named
from infctx.planning.from_recipe import Planner
from infctx.planning.lengths import longest_document, plans_by_length
from infctx.planning.recipe_plan import Target
from infctx.planning.report import Report, report_in_words
from infctx.planning.report_json import report_as_json
from infctx.training.cache_place import bytes_with_gradient, cache_bytes
from tests.planning.planned_recipes import recipe_of

LORA = {"kind": "lora", "targets": ["key", "value", "receptance", "output"]}


def config_of(version: str = "goldfinch") -> FinchConfig:
    return new_config(version=version, n_layer=6, n_embd=128, vocab_size=1024)


def planner_of(version: str = "goldfinch", *, device: int = 10**10, host: int = 10**10, **sections: Any) -> Planner:
    adapter = LORA if version == "goldfinch" else {"kind": "full"}
    recipe = recipe_of(**{"adapter": adapter, **sections})
    room = Room(device=device, host=host, disk=10**12)
    return Planner(recipe, config_of(version), Target(kind="cuda", room=room, ranks=1))


def test_a_large_cache_goes_to_the_host() -> None:
    tokens, config = 100_000, config_of()
    needed = bytes_with_gradient(config, rows=1, num_tokens=tokens)
    here = planner_of(device=4 * needed).plan(tokens)
    there = planner_of(device=4 * needed - 4).plan(tokens)
    assert (here.chunk.cache.on_host, there.chunk.cache.on_host) == (False, True)
    assert here.memory.device["cache of the tokens"] == cache_bytes(config, rows=1, num_tokens=tokens)
    assert there.memory.host["cache of the tokens"] == cache_bytes(config, rows=1, num_tokens=tokens)
    assert there.memory.host_bytes - there.memory.host.get("boundary states", 0) == needed


def test_a_stream_carries_caches() -> None:
    sections = {"bptt": {"window": 2, "chunk_tokens": 1000}, "data": {"mode": "stream"}, "run": {"accumulate": 3}}
    cache = planner_of(**sections).plan(10_000).chunk.cache
    assert cache.window_tokens == 12_000
    # Before the step and behind it, of three groups; the last one's is that of the window.
    assert cache.kept_tokens == 3 * (10_000 + 12_000)
    # A window of a document's chunks sees all chunks before it.
    documents = {**sections, "data": {"mode": "document"}}
    assert planner_of(**documents).plan(10_000).chunk.cache.window_tokens == 10_000


@pytest.mark.parametrize("version", ["goldfinch", "gptalpha"])
def test_the_longest_document_is_the_longest_that_fits(version: str) -> None:
    planner = planner_of(version, device=10**9, host=10**9)
    longest = longest_document(planner, planner.plan(4096))
    assert longest.bound == "host"
    assert longest.tokens is not None
    assert planner.plan(longest.tokens).fits
    assert planner.plan(longest.tokens + 1024).fits is False


def test_chunks_that_attention_sees() -> None:
    walk = Walk(document_tokens=25, chunk_tokens=10)
    # Chunks of 10, 10 and 5, each with a block of its own keys.
    assert walk.both_sweeps() == (10 * 10 + 10 * 20 + 5 * 25, 10 + 20 + 25)
    assert walk.sweep_1(None) == (10 * 10 + 10 * 20, 30)
    assert walk.sweep_1(3) == (3 * 30, 30)
    windows = replace(walk, document_tokens=45, window=2, sweeps=2, cached_before=7)
    # The second and the fourth chunk end a window, the last the document.
    assert windows.sweep_1(None) == (2 * (10 * 17 + 10 * 37), 2 * (17 + 37))
    assert (walk.num_sweep_1, windows.num_sweep_1) == (2, 4)


def test_the_report_tells_the_cache_and_what_grows_with_the_square() -> None:
    planner, device = planner_of(), device_named("rtx-4090")
    plan = planner.plan(200_000)
    report = Report(
        recipe="my.yaml",
        plan=plan,
        device=device,
        lengths=plans_by_length(planner),
        longest=longest_document(planner, plan),
        fitting=None,
    )
    text = "\n".join(report_in_words(report))
    assert "cache of 200,000 tokens" in text
    assert "cache      36 bytes of each token, and as much for the gradient, on the device" in text
    assert f"is {plan.step_time.attention_share:.0%} of that arithmetic" in " ".join(text.split())
    assert "The longest document: beyond 10,485,760 tokens." in text
    assert max(map(len, text.splitlines())) <= 80
    found = report_as_json(report)["cache"]
    assert found["bytes"] == 36 * 200_000
    assert (found["tokens"], found["bytes_per_token"], found["place"]) == (200_000, 36, "device")
    assert 0.5 < plan.times[1_048_576].attention_share < plan.times[10_485_760].attention_share < 1
    assert plan.times[10_485_760].seconds > 80 * plan.times[1_048_576].seconds
