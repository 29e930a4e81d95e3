"""The loss of each data set of a mixture: right to the last digit, and without a trace in the training.

The oracle runs every document alone and in one piece through the plain model, and adds up torch's cross entropy by set.
Every token of its documents is another one, so that a step's tokens alone say what it read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.checkpoint.run_state import load_run_state
from infctx.data.document import Document
from infctx.data.stream import DocumentSource, StepData, StreamSource
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training import set_losses
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import ChunkObjective, Window
from infctx.training.engine import WholeWeights
from infctx.training.fabric_run import open_engine
from infctx.training.host_memory import HeapTrimmer
from infctx.training.loop import train
from infctx.training.loss import LossTerms
from infctx.training.metrics import MetricsLog, read_metrics
from infctx.training.optim import LearningRate, make_adamw, parameter_groups
from infctx.training.precision import apply_precision_
from infctx.training.progress import SilentProgress
from infctx.training.run import LoopSettings, Run
from infctx.training.set_losses import add_set_losses, sum_by_set
from infctx.training.signals import StopRequested
from infctx.training.step import StepGradient, step_gradient

NUM_SETS = 4
# Of the documents: sets 0 to 2 are mixed, nothing of set 2 is trained, and set 3 has one short document.
LENGTHS = [70, 1, 33, 5, 12, 90, 2, 41, 64, 17, 8, 3]
SETS = [0, 1, 1, 2, 0, 1, 0, 2, 0, 1, 0, 3]
VOCAB_SIZE = 1 + sum(LENGTHS)


def make_documents() -> list[Document]:
    generator = np.random.default_rng(0)
    documents = []
    first_id = 1
    for length, set_index in zip(LENGTHS, SETS, strict=True):
        weights = generator.random(length, dtype=np.float32) * (generator.random(length) < 0.7)
        weights = weights.astype(np.float32) * np.float32(set_index != 2)
        weights[0] = 0
        tokens = np.arange(first_id, first_id + length).astype(np.uint16)
        first_id += length
        origin = f"set {set_index}, {length} tokens"
        documents.append(Document(tokens=tokens, weights=weights, origin=origin, set_index=set_index))
    return documents


def without_sets(documents: Sequence[Document]) -> list[Document]:
    return [replace(document, set_index=0) for document in documents]


def make_model(make_finch: Callable[..., Finch], dtype: torch.dtype = torch.float64) -> Finch:
    return make_finch("6", n_layer=2, n_embd=16, dim_ffn=24, vocab_size=VOCAB_SIZE, dtype=dtype, has_initial_state=True)


@dataclass
class Oracle:
    """By token: its set, and what it is worth as an input: the weight of the token after it, and its weighted loss."""

    sets: Tensor
    weights: Tensor
    losses: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Finch, documents: Sequence[Document]) -> Oracle:
        sets = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
        weights, losses = torch.zeros(2, VOCAB_SIZE, dtype=torch.float64)
        for document in documents:
            tokens = torch.from_numpy(document.tokens.astype(np.int64))
            of_target = torch.from_numpy(document.weights[1:]).double()
            logits, _ = model(tokens[None])
            sets[tokens] = document.set_index
            weights[tokens[:-1]] = of_target
            losses[tokens[:-1]] = F.cross_entropy(logits[0, :-1], tokens[1:], reduction="none").double() * of_target
        return cls(sets, weights, losses)

    def add_up(self, tokens: Tensor) -> tuple[list[int], list[float], list[float]]:
        """Of each set: its tokens, their weights and their losses."""
        sets = self.sets[tokens]
        counted = torch.bincount(sets, minlength=NUM_SETS).tolist()
        sums = [torch.bincount(sets, x[tokens], minlength=NUM_SETS).tolist() for x in (self.weights, self.losses)]
        return counted, *sums


def read_in(data: StepData) -> Tensor:
    """Every token of a step; 0 is padding and no document's."""
    tokens = torch.cat([chunk.tokens.flatten() for group in data.groups for chunk in group.chunks])
    return tokens[tokens > 0]


def zeros(model: Finch, rows: int) -> ModelState:
    return ModelState.zeros(model.config, rows, dtype=model.state_dtype, device=next(model.parameters()).device)


def gradients_of(
    objective: Callable[..., tuple[Tensor, ...]],
    model: Finch,
    source: DocumentSource | StreamSource,
    *,
    window: Window,
    rows: int,
    piece_tokens: int | None = None,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
) -> list[tuple[StepData, StepGradient, list[Tensor]]]:
    """Every step of a source at the same weights, with its gradient."""
    engine = WholeWeights(model, torch.optim.SGD(model.parameters(), lr=0.1), backward=backward)
    states: list[ModelState] = []
    found = []
    while (data := source.next_step()) is not None:
        if not (data.carries_state and states):
            states = [zeros(model, rows) for _ in data.groups]
        model.zero_grad(set_to_none=True)
        pieces = data.in_pieces(piece_tokens)
        gradient = step_gradient(objective, pieces, states, window=window, engine=engine)
        states = gradient.states
        found.append((data, gradient, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    return found


def make_source(documents: Sequence[Document], mode: str, **settings: object) -> DocumentSource | StreamSource:
    shared = {"rows": 2, "accumulate": 2, "chunk_tokens": 7, "seed": 1, "epochs": 1} | settings
    if mode == "stream":
        return StreamSource(documents, **({"window": 2} | shared))
    return DocumentSource(documents, pack_tokens=40 if mode == "packed" else None, **shared)


@pytest.mark.parametrize(
    ("mode", "chunk_tokens", "window", "piece_tokens"),
    [
        ("stream", 1, 1, None),
        ("stream", 7, 1, None),
        ("stream", 7, 2, None),
        ("stream", 7, 2, 3),
        ("stream", 64, 1, None),
        ("documents", 1, "document", None),
        ("documents", 7, "document", None),
        ("documents", 7, 2, 4),
        ("packed", 1, 2, None),
        ("packed", 7, "document", 5),
        ("packed", 7, 1, None),
        ("packed", 64, "document", None),
        ("packed", 1000, "document", None),
    ],
)
def test_of_every_step_as_of_documents_alone(
    make_finch: Callable[..., Finch], mode: str, chunk_tokens: int, window: Window, piece_tokens: int | None
) -> None:
    model, documents = make_model(make_finch), make_documents()
    oracle = Oracle.of(model, documents)
    settings = {"chunk_tokens": chunk_tokens} | ({"window": window} if mode == "stream" else {})
    source = make_source(documents, mode, **settings)
    steps = gradients_of(ChunkObjective(model), model, source, window=window, rows=2, piece_tokens=piece_tokens)
    of_all = torch.zeros(NUM_SETS, dtype=torch.int64)
    for data, gradient, _ in steps:
        tokens, weights, losses = oracle.add_up(read_in(data))
        of_all += torch.tensor(data.set_tokens)
        assert data.set_tokens == tuple(tokens)
        assert data.set_weights == pytest.approx(weights, rel=1e-12)
        assert sum(data.set_tokens) == data.num_tokens
        assert sum(data.set_weights) == pytest.approx(data.weight_total, rel=1e-12)
        if data.weight_total == 0:
            assert gradient.set_losses is None
            continue
        assert gradient.set_losses is not None
        assert (gradient.set_losses.dtype, gradient.set_losses.requires_grad) == (torch.float64, False)
        assert gradient.set_losses.tolist() == pytest.approx(losses, rel=1e-10)
    assert len(steps) >= (1 if chunk_tokens == 1000 else 2)
    assert of_all.tolist() == [sum(n for n, s in zip(LENGTHS, SETS, strict=True) if s == k) for k in range(NUM_SETS)]


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_all_ranks_and_divisions_know_the_same_totals(mode: str) -> None:
    documents = make_documents()
    whole = make_source(documents, mode, rows=4, accumulate=2, chunk_tokens=9)
    ranks = [make_source(documents, mode, rows=2, chunk_tokens=9, rank=rank, world=2) for rank in range(2)]
    while (data := whole.next_step()) is not None:
        for source in ranks:
            of_rank = source.next_step()
            assert of_rank is not None
            assert (of_rank.set_tokens, of_rank.set_weights) == (data.set_tokens, data.set_weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_nothing_else_changes_by_a_bit(make_finch: Callable[..., Finch], mode: str, precision: str) -> None:
    """Through the engine, with the penalty on the logits: loss, states and gradients with and without sets."""
    results = []
    for documents in (make_documents(), without_sets(make_documents())):
        model = make_model(make_finch, torch.float32).train()
        engine = open_engine(devices=1, strategy="single", precision=precision)
        apply_precision_(model, engine.precision)
        make_optimizer = functools.partial(torch.optim.SGD, model.parameters(), lr=0.0)
        objective = engine.setup(ChunkObjective(model, terms=LossTerms(l2_wrap=1e-2)), make_optimizer)
        source = make_source(documents, mode)
        results.append(gradients_of(objective, model, source, window=2, rows=2, backward=engine.backward))
    assert len(results[0]) > 1
    for (_, found, gradients), (_, expected, expected_gradients) in zip(*results, strict=True):
        assert torch.equal(found.loss_sums, expected.loss_sums)
        assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients, strict=True))
        for state, other in zip(found.states, expected.states, strict=True):
            assert all(torch.equal(*pair) for pair in zip(state, other, strict=True))
        assert expected.set_losses is None
        if found.set_losses is not None:
            # The sum of a chunk is rounded to float32, the sums of the sets are not.
            assert float(found.set_losses.sum()) == pytest.approx(float(found.loss_sums.sum()), rel=1e-6)


def test_without_sets_nobody_is_asked_for_them(make_finch: Callable[..., Finch]) -> None:
    """An objective that knows no sets is called as ever; only the second sweep asks for losses."""
    model = make_model(make_finch)
    inner = ChunkObjective(model)
    asked = []

    def objective(*inputs: object, **settings: object) -> tuple[Tensor, ...]:
        asked.append(("sets" in settings, settings["with_loss"], torch.is_grad_enabled()))
        return inner(*inputs, **settings)

    gradients_of(objective, model, make_source(without_sets(make_documents()), "packed"), window=2, rows=2)
    assert not any(tells_sets for tells_sets, _, _ in asked)
    asked.clear()
    gradients_of(objective, model, make_source(make_documents(), "packed"), window=2, rows=2)
    assert all(tells_sets == has_graph for tells_sets, _, has_graph in asked)
    # Also where a chunk has no loss.
    assert {with_loss for tells_sets, with_loss, _ in asked if tells_sets} == {True, False}


@pytest.mark.parametrize("tokens_at_once", [1, 2, 1000])
def test_a_loss_that_is_not_finite_spoils_its_own_set_alone(
    tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_losses, "VALUES_AT_ONCE", 5 * tokens_at_once)
    losses = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 4.0], requires_grad=True)
    found = sum_by_set(losses, torch.tensor([0, 1, 0, 3, 2], dtype=torch.uint8), 5)
    torch.testing.assert_close(
        found, torch.tensor([3.0, torch.nan, 4.0, torch.inf, 0.0], dtype=torch.float64), equal_nan=True
    )
    assert not found.requires_grad
    # In float32 a thousandth added to 2^24 is lost.
    found = sum_by_set(torch.tensor([2.0**24, 0.001]), torch.full((2,), 255, dtype=torch.uint8), 256)
    assert found.tolist() == [0.0] * 255 + [2.0**24 + float(np.float32(0.001))]


def test_what_was_added_up_is_never_changed_in_place() -> None:
    one, two = torch.ones(2), torch.ones(2)
    assert add_set_losses(None, None) is None
    assert add_set_losses(None, one) is one
    assert add_set_losses(one, None) is one
    assert add_set_losses(one, two).tolist() == [2, 2]
    assert one.tolist() == two.tolist() == [1, 1]


NAMES = ("code", "chat", "read only", "rare")
SETTINGS = {"seed": 2, "steps": 4, "epochs": None}


def make_run(
    folder: Path,
    make_finch: Callable[..., Finch],
    *,
    mode: str = "stream",
    documents: Sequence[Document] | None = None,
    names: Sequence[str] = NAMES,
    chunk_tokens: int = 16,
) -> Run:
    """A run of a mixture, whose validation has documents of sets 0 and 2."""
    documents = make_documents() if documents is None else documents
    model = make_model(make_finch, torch.float32)
    engine = open_engine(devices=1, strategy="single", precision="fp32")
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0, decay_lr_multiplier=1.0)
    optimizer = make_adamw(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-3)
    objective = engine.setup(ChunkObjective(model), lambda: optimizer)
    folder.mkdir(exist_ok=True)
    return Run(
        folder=folder,
        model=model,
        objective=objective,
        engine=engine,
        strategy="single",
        device=engine.device,
        source=make_source(documents, mode, **SETTINGS, chunk_tokens=chunk_tokens),
        validation=[documents[8], documents[4], documents[3]],
        learning_rate=LearningRate(lr=1e-3, lr_final=1e-3, schedule="constant", warmup_steps=0, total_steps=4),
        settings=LoopSettings(
            window=2,
            chunk_tokens=chunk_tokens,
            rows=2,
            clip=1.0,
            checkpoint_every=1,
            validate_every=2,
            checkpoint_minutes=None,
            keep_checkpoints=2,
            max_nonfinite_steps=3,
            boundaries=BoundaryPlan(),
        ),
        metrics=MetricsLog(folder / "metrics.jsonl"),
        progress=SilentProgress(),
        headline=[],
        facts={"base_fingerprint": "of this test"},
        save_adapter=lambda whole: None,
        adapter_has_files=False,
        trimmer=HeapTrimmer(engine.device),
        set_names=names,
    )


def lines_of(run: Run) -> list[dict]:
    """Its metrics without what takes time and room."""
    unsteady = {"seconds", "tokens_per_second", "peak_host_bytes", "peak_device_bytes"}
    lines = read_metrics(run.folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in unsteady} for line in lines]


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_the_metrics_of_a_run(tmp_path: Path, make_finch: Callable[..., Finch], mode: str) -> None:
    run = make_run(tmp_path / "run", make_finch, mode=mode)
    oracle = Oracle.of(make_model(make_finch), make_documents())
    train(run)
    first, *steps = lines_of(run)
    assert "sets" not in first
    held_out = torch.cat([torch.from_numpy(document.tokens.astype(np.int64)) for document in run.validation])
    _, weights, losses = oracle.add_up(held_out)
    assert first["val_loss_by_set"] == {"code": pytest.approx(losses[0] / weights[0], rel=1e-5), "read only": None}
    assert [line["step"] for line in steps if "val_loss_by_set" in line] == [2, 4]
    assert all(("val_loss" in line) == ("val_loss_by_set" in line) for line in steps)

    again = make_source(make_documents(), mode, **SETTINGS, chunk_tokens=16)
    before = 0
    for line in steps:
        data = again.next_step()
        assert data is not None
        tokens, weights, losses = oracle.add_up(read_in(data))
        sets = line["sets"]
        assert list(sets) == [name for name, number in zip(NAMES, tokens, strict=True) if number]
        assert {name: of_set["tokens"] for name, of_set in sets.items()} == {
            name: number for name, number in zip(NAMES, tokens, strict=True) if number
        }
        assert sum(of_set["tokens"] for of_set in sets.values()) == line["tokens"] - before
        before = line["tokens"]
        by_name = dict(zip(NAMES, weights, strict=True))
        assert {name: of_set["loss"] is None for name, of_set in sets.items()} == {
            name: by_name[name] == 0 for name in sets
        }
        total = sum(of_set["loss"] * by_name[name] for name, of_set in sets.items() if of_set["loss"] is not None)
        assert total / data.weight_total == pytest.approx(line["loss"], rel=1e-5)
        if line["step"] == 1:
            for name, weight, loss in zip(NAMES, weights, losses, strict=True):
                assert not weight or sets[name]["loss"] == pytest.approx(loss / weight, rel=1e-5)
    assert any("read only" in line["sets"] for line in steps)
    assert any("rare" not in line["sets"] for line in steps)


def test_held_out_documents_of_other_sets_are_not_called_by_the_mixtures_names(
    tmp_path: Path, make_finch: Callable[..., Finch]
) -> None:
    mixture = make_run(tmp_path / "run", make_finch)
    run = replace(mixture, validation=without_sets(mixture.validation), validation_set_names=("of a file",))
    train(run)
    lines = lines_of(run)
    assert all("sets" in line for line in lines[1:])
    assert not any("val_loss_by_set" in line for line in lines)


def test_a_run_of_one_set_writes_what_it_always_did(tmp_path: Path, make_finch: Callable[..., Finch]) -> None:
    """And the same numbers as the mixture of the same documents."""
    mixed = make_run(tmp_path / "mixed", make_finch)
    plain = make_run(tmp_path / "plain", make_finch, documents=without_sets(make_documents()), names=("",))
    train(mixed)
    train(plain)
    more = {"sets", "val_loss_by_set"}
    lines = lines_of(plain)
    assert not any(more & line.keys() for line in lines)
    assert [{key: value for key, value in line.items() if key not in more} for line in lines_of(mixed)] == lines
    for found, expected in zip(mixed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_stopped_behind_every_chunk_and_continued_writes_the_same(
    tmp_path: Path, make_finch: Callable[..., Finch], stop_after: Callable[[int | None], None], mode: str
) -> None:
    straight = make_run(tmp_path / "straight", make_finch, mode=mode)
    train(straight)
    stops = 0
    while True:
        stopped = make_run(tmp_path / "stopped", make_finch, mode=mode)
        # A validation begins anew, and needs 12 chunks in one go.
        stop_after(1 if stops < 40 else 13)
        try:
            train(stopped)
            break
        except StopRequested:
            stops += 1
    assert stops > 41
    assert lines_of(stopped) == lines_of(straight)


@pytest.mark.parametrize("is_continued", [False, True])
def test_shorter_chunks_for_want_of_memory_count_nothing_twice(
    tmp_path: Path,
    make_finch: Callable[..., Finch],
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[[int | None], None],
    is_continued: bool,
) -> None:
    """The step begins anew, whether its first chunks ran in this process or before a checkpoint."""
    plain = make_run(tmp_path / "plain", make_finch, mode="packed", chunk_tokens=32)
    train(plain)
    if is_continued:
        stop_after(16)
        with pytest.raises(StopRequested):
            train(make_run(tmp_path / "short", make_finch, mode="packed", chunk_tokens=32))
        stop_after(None)
        left = load_run_state(tmp_path / "short")
        assert left is not None
        # In the second sweep of the second group of the second step.
        assert left.state.step == 1
        assert {"0.groups_set_losses", "0.set_losses"} <= left.state.tensors["under_way"].keys()
    forward = ChunkObjective.forward
    calls = 0

    def limited(self: ChunkObjective, tokens: Tensor, *arguments: object, **settings: object) -> object:
        nonlocal calls
        calls += torch.is_grad_enabled()
        # After some chunks have been added up.
        if tokens.shape[1] == 32 and torch.is_grad_enabled() and (is_continued or calls > 4):
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return forward(self, tokens, *arguments, **settings)

    monkeypatch.setattr(ChunkObjective, "forward", limited)
    short = make_run(tmp_path / "short", make_finch, mode="packed", chunk_tokens=32)
    train(short)
    found, expected = lines_of(short), lines_of(plain)
    assert [line["chunk_tokens"] for line in found[1:]] == [32 if is_continued else 16, 16, 16, 16]
    for line, other in zip(found[1:], expected[1:], strict=True):
        assert line["sets"].keys() == other["sets"].keys()
        for name, of_set in line["sets"].items():
            assert of_set["tokens"] == other["sets"][name]["tokens"]
            expected_loss = other["sets"][name]["loss"]
            assert of_set["loss"] == (None if expected_loss is None else pytest.approx(expected_loss, rel=1e-5))
