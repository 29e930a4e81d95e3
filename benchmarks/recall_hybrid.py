"""Recall by a Finch and by a GoldFinch of the same number of parameters, side by side.

Two tasks. In "one" a single marked key has to be carried over a distance (recall_task.py). In "pairs" a document is a
list of names with a value each, in random order, and one of the names is asked for: a state of fixed size has to hold
all of them, a cache grows with them.

    Kd Qb xa … Rc ?Q  answer: b        (in the documents without spaces)

Both models see the same documents in the same order, with the gradient of the whole document; the learning rate is
chosen for each model from the task's grid, by the held-out loss on a seed that is not reported.

    python benchmarks/recall_hybrid.py                             # stopped, it goes on where it was
    python benchmarks/recall_hybrid.py --write-dataset datasets/recall_pairs
    python benchmarks/recall_hybrid.py --accuracy runs/recall_pairs_goldfinch
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from recall_task import (
    DISTANCES,
    KEYS,
    SETTINGS,
    TEST_DOCUMENTS,
    TEST_SEED,
    VALIDATION_SEED,
    RecallDocument,
    accuracy,
    make_documents,
    write_rows,
)

from infctx.assemble import run_recipe
from infctx.data.tokenizer import BytesTokenizer
from infctx.export.catalog import save_model
from infctx.generation.reading import read_tokens
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.recipe.schema import Recipe
from infctx.trained import open_trained
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZijklmnopqrstuvwxyz"
VALUES = "abcdefgh"
# Pairs in a document; trained on all but the last.
PAIRS = (4, 8, 16, 32, 44)
ROWS = 16
TUNING_SEED = 100
SEEDS = (0, 1, 2)
_SHARED = {"n_layer": 3, "n_embd": 64, "head_size": 64, "lerp_rank": 8, "decay_rank": 16}
# The feed-forward widths make them equal: 193,664 and 193,600 parameters.
MODELS: dict[str, dict[str, Any]] = {
    "finch": {**_SHARED, "version": "6", "dim_ffn": 162},
    "goldfinch": {**_SHARED, "version": "goldfinch", "ratio": 3, "dim_ffn": 128},
}


def make_pairs(count: int, *, pairs: Sequence[int], seed: int) -> list[RecallDocument]:
    """Draw documents of the task "pairs"; the same arguments give the same ones."""
    source = random.Random(seed)
    documents = []
    for _ in range(count):
        names = source.sample(NAMES, k=source.choice(pairs))
        values = source.choices(VALUES, k=len(names))
        asked = source.randrange(len(names))
        prompt = "".join(name + value for name, value in zip(names, values, strict=True)) + "?" + names[asked]
        documents.append(
            RecallDocument(prompt=prompt, answer=values[asked], key_place=2 * asked + 1, question_place=len(prompt) - 1)
        )
    return documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """draw: (count, what accuracy is measured against, seed) -> documents."""

    trained_at: tuple[int, ...]
    tested_at: tuple[int, ...]
    chunk_tokens: int
    steps: int
    rates: tuple[float, ...]
    draw: Callable[[int, Sequence[int], int], list[RecallDocument]]


TASKS = {
    "one": Task(
        trained_at=SETTINGS["far"].borders,
        tested_at=DISTANCES,
        chunk_tokens=SETTINGS["far"].chunk_tokens,
        steps=300,
        rates=(1e-3, 2e-3, 4e-3),
        draw=lambda count, borders, seed: make_documents(count, borders=borders, seed=seed),
    ),
    "pairs": Task(
        trained_at=PAIRS[:-1],
        tested_at=PAIRS,
        chunk_tokens=16,
        steps=600,
        rates=(1e-3, 2e-3),
        draw=lambda count, pairs, seed: make_pairs(count, pairs=pairs, seed=seed),
    ),
}


def fresh_model(name: str, *, seed: int) -> Finch:
    """One of MODELS, as `infctx model new` would make it."""
    model = Finch(new_config(vocab_size=BytesTokenizer.vocab_size, **MODELS[name]))
    initialise_(model, seed=seed)
    return model


def prepare_run(folder: Path, task: Task, name: str, *, lr: float, seed: int) -> Recipe:
    """Write data and a fresh model of this seed into the folder, and a recipe that trains them in folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    # One epoch: no document is seen twice.
    write_rows(task.draw(ROWS * task.steps, task.trained_at, seed), folder / "train.jsonl")
    write_rows(task.draw(TEST_DOCUMENTS, task.trained_at, VALIDATION_SEED), folder / "validation.jsonl")
    save_model(
        fresh_model(name, seed=seed),
        folder / "fresh.safetensors",
        format="safetensors",
        dtype=torch.float32,
        tokenizer="bytes",
    )
    return Recipe.model_validate(
        {
            "model": {"path": str(folder / "fresh.safetensors")},
            "data": {
                "path": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "template": "completion",
                "mode": "document",
            },
            "bptt": {"chunk_tokens": task.chunk_tokens, "window": "document"},
            "optimizer": {"lr": lr},
            "run": {"folder": str(folder / "run"), "epochs": 1, "rows": ROWS, "seed": seed, "devices": 1},
        }
    )


def train_and_measure(folder: Path, task: Task, name: str, *, lr: float, seed: int) -> dict[str, Any]:
    """Train one model and measure it; where the folder holds the outcome already, read it."""
    done = folder / "outcome.json"
    if done.is_file():
        outcome: dict[str, Any] = json.loads(done.read_text())
        return outcome
    began = time.perf_counter()
    result = run_recipe(prepare_run(folder, task, name, lr=lr, seed=seed), SilentProgress())
    seconds = time.perf_counter() - began
    model = open_trained(folder / "run").model
    outcome = {
        "model": name,
        "lr": lr,
        "seed": seed,
        "steps": result["steps"],
        "tokens": result["tokens"],
        "seconds": round(seconds, 1),
        "validation_loss": round(result["val_loss"], 4),
        "accuracy": {
            str(place): accuracy(model, task.draw(TEST_DOCUMENTS, [place], TEST_SEED + place))
            for place in task.tested_at
        },
    }
    done.write_text(json.dumps(outcome) + "\n")
    return outcome


def run_task(name: str, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Tune and train both models on a task."""
    task = TASKS[name]
    found: dict[str, Any] = {"trained_at": task.trained_at, "chunk_tokens": task.chunk_tokens, "steps": task.steps}
    found |= {"rates": task.rates, "tuning": [], "chosen_lr": {}, "runs": []}

    def run(model: str, lr: float, seed: int, *, times: int = 1) -> dict[str, Any]:
        longer = replace(task, steps=times * task.steps)
        folder = work / f"{name}-{longer.steps}-{model}-lr-{lr:g}-seed-{seed}"
        outcome = train_and_measure(folder, longer, model, lr=lr, seed=seed)
        print(f"{name:6} {in_words(outcome)}", flush=True)
        return outcome

    for model in MODELS:
        tuning = [run(model, lr, TUNING_SEED) for lr in task.rates]
        chosen = min(tuning, key=lambda one: one["validation_loss"])["lr"]
        found["tuning"] += tuning
        found["chosen_lr"][model] = chosen
        found["runs"] += [run(model, chosen, seed) for seed in seeds]
    # Whether a Finch needs more documents; not in the table, for the GoldFinch has no more.
    found["longer"] = [run("finch", found["chosen_lr"]["finch"], seeds[0], times=4)] if name == "pairs" else []
    return found


@torch.inference_mode()
def speeds(name: str, *, tokens: int = 4096) -> dict[str, float]:
    """Of a fresh model: tokens per second of processor time, read and written behind so many; bytes it remembers."""
    from infctx.model.single_token import SingleTokenStep

    model = fresh_model(name, seed=0).eval()
    ids = torch.randint(1, 257, (tokens,)).numpy().astype("int32")
    seconds = []
    for _ in range(5):
        began = time.process_time()
        reading = read_tokens(model, ids)
        seconds.append(time.process_time() - began)
    step, state, written = SingleTokenStep(model), reading.state, []
    _, state = step.advance_(torch.tensor([1]), state)
    for _ in range(64):
        began = time.process_time()
        _, state = step.advance_(torch.tensor([1]), state)
        written.append(time.process_time() - began)
    recurrent = sum(part.numel() * part.element_size() for part in reading.state.recurrent)
    cache = sum(part.numel() * part.element_size() for part in reading.state.cache)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "read_tokens_per_s": round(tokens / sorted(seconds)[2]),
        "write_tokens_per_s": round(1 / sorted(written)[32]),
        "state_bytes": recurrent,
        "cache_bytes_per_token": cache / tokens,
        "transformer_bytes_per_token": 2 * model.config.n_layer * model.config.dim_att * 4,
    }


def in_words(outcome: dict[str, Any]) -> str:
    """One line for a run."""
    scores = " ".join(f"{place}:{score:.2f}" for place, score in outcome["accuracy"].items())
    return (
        f"{outcome['model']:9} lr {outcome['lr']:g} seed {outcome['seed']:<3} {outcome['tokens']:,} tokens "
        f"{outcome['seconds']:.0f} s  loss {outcome['validation_loss']:.3f}  {scores}"
    )


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: mean accuracy in percent, least and greatest over the seeds, for each model and place."""
    places = list(runs[0]["accuracy"])
    lines = [f"| model | {' | '.join(places)} |", f"|---|{'---|' * len(places)}"]
    for model in dict.fromkeys(run["model"] for run in runs):
        cells = []
        for place in places:
            scores = [100 * run["accuracy"][place] for run in runs if run["model"] == model]
            cells.append(f"{mean(scores):.0f} ({min(scores):.0f}–{max(scores):.0f})")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def write_dataset(folder: Path) -> None:
    """Write the data and the fresh models of recipes/recall_pairs_finch.yaml and recall_pairs_goldfinch.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS["pairs"]
    write_rows(task.draw(ROWS * task.steps, task.trained_at, 0), folder / "train.jsonl")
    for name in MODELS:
        path = folder / f"{name}.safetensors"
        save_model(fresh_model(name, seed=0), path, format="safetensors", dtype=torch.bfloat16, tokenizer="bytes")


def measure_all(names: Sequence[str], *, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that goes into the result file."""
    # One thread, so that figures do not depend on how many cores are free.
    torch.set_num_threads(1)
    tasks = {name: run_task(name, work, seeds) for name in names}
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "models": {name: {**sizes, **speeds(name)} for name, sizes in MODELS.items()},
        "tuning_seed": TUNING_SEED,
        "seeds": list(seeds),
        "test_documents": TEST_DOCUMENTS,
        "chance": {"one": 1 / len(KEYS), "pairs": 1 / len(VALUES)},
        "tasks": tasks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="reported")
    parser.add_argument("--work", type=Path, default=Path("runs/recall_hybrid"), help="where runs are kept")
    parser.add_argument("--output", type=Path, default=results / "recall_hybrid_cpu.json", help="figures, as JSON")
    parser.add_argument("--write-dataset", type=Path, metavar="FOLDER", help="write the data of the recipes")
    parser.add_argument("--accuracy", type=Path, metavar="RUN", help="accuracy of a run of one of the recipes")
    arguments = parser.parse_args()
    if TUNING_SEED in arguments.seeds:
        parser.error(f"--seeds: {TUNING_SEED} is for tuning; report others")
    if arguments.write_dataset is not None:
        write_dataset(arguments.write_dataset)
        return
    if arguments.accuracy is not None:
        model, task = open_trained(arguments.accuracy).model, TASKS["pairs"]
        for place in task.tested_at:
            score = accuracy(model, task.draw(TEST_DOCUMENTS, [place], TEST_SEED + place))
            print(f"{place:3} pairs: {score:.3f}  (chance {1 / len(VALUES):.3f})")
        return
    try:
        found = measure_all(arguments.tasks, work=arguments.work, seeds=arguments.seeds)
    except StopRequested:
        sys.exit("Stopped; the same command goes on from here.")
    for name, of_task in found["tasks"].items():
        print(f"\n{name}, trained at {of_task['trained_at']}; % right, chance {found['chance'][name]:.1%}\n")
        print("\n".join(table(of_task["runs"])))
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
