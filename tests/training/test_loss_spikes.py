"""Spikes of the loss: planted ones are found in their step, by their documents, and noise is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from infctx.assemble import run_recipe
from infctx.data.document import Document
from infctx.data.stream import DocumentSource, StreamSource
from infctx.model.finch import Finch
from infctx.recipe.schema import Recipe
from infctx.training.bptt import ChunkObjective
from infctx.training.document_losses import PartLoss, document_losses, group_losses, show_command, worst_first
from infctx.training.loss_spikes import RECENT_STEPS, WARM_UP_STEPS, remember, usual_loss
from infctx.training.metrics import read_metrics
from infctx.training.progress import PlainProgress, SilentProgress
from infctx.training.ranks import ALONE
from infctx.training.signals import StopRequested

NOISES: dict[str, Callable[[np.random.Generator], float]] = {
    "normal": lambda random: 0.1 * random.standard_normal(),
    "strong": lambda random: 0.25 * random.standard_normal(),
    "heavy tails": lambda random: 0.1 * random.standard_t(5),
    "two kinds of documents": lambda random: 0.4 * (random.random() < 0.5) + 0.05 * random.standard_normal(),
    "hardly any": lambda random: 0.001 * random.standard_normal(),
}
PLANTED = (120, 250, 431)


@pytest.mark.parametrize("noise", list(NOISES))
@pytest.mark.parametrize("planted", [(), PLANTED])
def test_planted_losses_are_found_in_their_step_and_no_others_in_500(noise: str, planted: tuple[int, ...]) -> None:
    for seed in range(6):
        random, recent, found = np.random.default_rng(seed), [], []
        for step in range(500):
            loss = (1.2 + 9 * math.exp(-step / 50)) * math.exp(NOISES[noise](random))
            loss *= 50 if step in planted else 1
            usual = usual_loss(recent)
            if usual is not None and loss >= usual.threshold:
                found.append(step)
            recent = remember(recent, loss)
        assert tuple(found) == planted


def test_a_loss_that_stays_high_becomes_the_usual_one() -> None:
    recent = [2.0 + 0.01 * (step % 3) for step in range(80)]
    spikes = 0
    for step in range(80):
        usual = usual_loss(recent)
        assert usual is not None
        spikes += usual.threshold <= 8.0
        recent = remember(recent, 8.0 + 0.01 * (step % 3))
    assert 1 <= spikes <= 5
    assert len(recent) == RECENT_STEPS


def test_without_a_past_nothing_is_a_spike_and_near_zero_factors_mean_nothing() -> None:
    assert usual_loss([1.0] * (WARM_UP_STEPS - 1)) is None
    usual = usual_loss([1e-4] * 30)
    assert usual is not None
    assert usual.median == pytest.approx(1e-4)
    assert usual.threshold > 0.02


def make_document(number: int, length: int) -> Document:
    random = np.random.default_rng(number)
    weights = (random.random(length) < 0.7).astype(np.float32)
    weights[0] = 0.0
    return Document(
        tokens=random.integers(1, 50, length).astype(np.uint16), weights=weights, origin=f"d.jsonl:{number}"
    )


@pytest.mark.parametrize("mode", ["stream", "packed"])
@pytest.mark.parametrize("most_numbers", [255, 3])
def test_losses_of_documents_are_those_of_each_alone(
    make_finch: Callable[..., Finch], mode: str, most_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infctx.training.document_losses.MOST_NUMBERS", most_numbers)
    model = make_finch("6", n_layer=2, n_embd=16, dim_ffn=24).double().eval()
    documents = [make_document(number, length) for number, length in enumerate((9, 21, 5, 33, 14, 2, 27))]
    sizes = {"rows": 2, "accumulate": 1, "chunk_tokens": 8, "seed": 0, "epochs": 1}
    if mode == "stream":
        source = StreamSource(documents, window=20, **sizes)
    else:
        source = DocumentSource(documents, pack_tokens=60, **sizes)
    data = source.next_step()
    assert data is not None
    found = document_losses(ChunkObjective(model), data, [model.fresh_state(2)], ALONE)
    origins = [origin for part in found for origin in part.origins]
    assert sorted(origins) == sorted(set(data.groups[0].origins))
    assert (len(found) == len(origins)) == (most_numbers == 255)
    by_origin = {document.origin: document for document in documents}
    for part in found:
        loss_sum = weight = 0.0
        for origin in part.origins:
            document = by_origin[origin]
            tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
            logits, _ = model(tokens[:, :-1])
            losses = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
            loss_sum += float((losses.detach() * torch.tensor(document.weights[1:])).sum())
            weight += float(document.weights.sum())
        assert part.loss_sum == pytest.approx(loss_sum, rel=1e-10)
        assert part.weight == pytest.approx(weight)


def test_the_worst_first_over_ranks_that_share_documents() -> None:
    def part(name: str, loss_sum: float, weight: float) -> PartLoss:
        return PartLoss(name=name, origins=(name,), loss_sum=loss_sum, weight=weight)

    shared = [part("a", 1.0, 2.0), part("b", 9.0, 3.0)], [part("a", 1.0, 0.0), part("b", 3.0, 0.0)]
    other = [part("c", 10.0, 5.0), part("masked", 0.0, 0.0)]
    assert worst_first([*shared, other]) == [("b", 4.0), ("c", 2.0), ("a", 1.0)]


def test_groups_of_rows_stand_for_their_documents() -> None:
    documents = [make_document(number, 10) for number in range(4)]
    source = DocumentSource(documents, rows=2, accumulate=2, chunk_tokens=8, seed=0, epochs=1)
    data = source.next_step()
    assert data is not None
    found = worst_first([group_losses(torch.tensor([1.0, 50.0]).double(), data, ALONE)])
    assert [origin for origin, _ in found[:2]] == list(data.groups[1].origins)


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ("a b.jsonl:12", "sed -n 12p 'a b.jsonl'"),
        ("x/y.jsonl.gz:3", "zcat x/y.jsonl.gz | sed -n 3p"),
        ("y.ndjson.zst:3 [tokens 5-9]", "zstdcat y.ndjson.zst | sed -n 3p"),
        ("book.txt:1", None),
        ("s3://bucket/y.jsonl:3", None),
        ("table.csv:4", None),
    ],
)
def test_what_shows_a_document(origin: str, command: str | None) -> None:
    assert show_command(origin) == command


@pytest.fixture
def noisy(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes over 60 rows of one text, and a row that is nothing like it."""
    rows = [{"text": "the same words again and again. " * 2} for _ in range(60)]
    rows[25] = rows[51] = {"text": "".join(chr(33 + (number * 37) % 90) for number in range(64))}
    (tmp_path / "planted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(folder: str, *overrides: str) -> Recipe:
        return recipe(
            folder,
            f"data.path={tmp_path}/planted.jsonl",
            "data.validation=null",
            "data.order=file",
            "bptt.window=document",
            "bptt.chunk_tokens=24",
            "run.steps=30",
            "run.validate_every=null",
            "optimizer.lr=0.01",
            *overrides,
        )

    return build


def spikes_of(recipe: Recipe) -> dict[int, dict]:
    lines = read_metrics(Path(recipe.run.folder) / "metrics.jsonl")
    return {line["step"]: line["spike"] for line in lines if "spike" in line}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_run_tells_the_document_of_a_spike_also_where_it_was_stopped_before(
    noisy: Callable[..., Recipe],
    stop_after: Callable[[int | None], None],
    tmp_path: Path,
    rows: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = noisy("straight", f"run.rows={rows}")
    run_recipe(straight, SilentProgress())
    spikes = spikes_of(straight)
    # The first of them comes before enough steps are known where a step has two rows.
    assert list(spikes) == [26]
    planted = f"{tmp_path}/planted.jsonl:{26 * rows}"
    (spike,) = spikes.values()
    assert spike["loss"] > spike["threshold"] > spike["usual"]
    assert spike["documents"][0]["origin"] == planted
    assert len(spike["documents"]) == rows
    assert spike["documents"][0]["loss"] == max(document["loss"] for document in spike["documents"])
    log = Path(straight.run.folder, "run.log").read_text()
    assert f"highest in: {planted} (" in log
    assert f"to look at the first: sed -n {26 * rows}p {tmp_path}/planted.jsonl" in log

    stopped = noisy("stopped", f"run.rows={rows}")
    stop_after(100)
    with pytest.raises(StopRequested):
        run_recipe(stopped, SilentProgress())
    stop_after(None)
    run_recipe(stopped, SilentProgress())
    assert spikes_of(stopped) == spikes


def test_a_run_with_loggers_that_was_stopped_has_every_step_once(
    noisy: Callable[..., Recipe], stop_after: Callable[[int | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    import csv
    import io

    logged = noisy("logged", "run.loggers=[csv]")
    stop_after(100)
    with pytest.raises(StopRequested):
        run_recipe(logged, SilentProgress())
    stop_after(None)
    shown = io.StringIO()
    run_recipe(logged, PlainProgress(shown))
    with Path(logged.run.folder, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = read_metrics(Path(logged.run.folder) / "metrics.jsonl")
    assert [int(row["step"]) for row in rows] == [line["step"] for line in lines] == list(range(1, 31))
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines]
    assert "checkpoint after step 30" in shown.getvalue()
