"""Recall over chunks: which windows of the gradient learn to carry a key from a document's start to its end.

Every window sees the same documents in the same order from the same fresh weights; only how far the gradient reaches
differs. The learning rate is chosen for each window and setting from one grid, by the held-out loss on seeds that are
not reported. The task is in recall_task.py.

    python benchmarks/recall.py                          # about an hour; stopped, it goes on where it was
    python benchmarks/recall.py --quick                  # under a minute: one small setting, two windows
    python benchmarks/recall.py --write-dataset datasets/recall
    python benchmarks/recall.py --accuracy runs/recall   # of what recipes/recall.yaml trained
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from recall_picture import draw
from recall_task import (
    CHANCE,
    DISTANCES,
    MODEL_SIZES,
    QUICK,
    QUICK_RATE,
    SETTINGS,
    TEST_DOCUMENTS,
    Setting,
    Window,
    accuracy,
    test_sets,
    train_and_measure,
    write_dataset,
)

from infctx.trained import open_trained
from infctx.training.signals import StopRequested

RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEEDS = (100, 101)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Trains models of one setting in folders of their own; what is there already is read. name: of the setting."""

    name: str
    setting: Setting
    work: Path

    def run(self, window: Window, lr: float, seed: int) -> dict[str, Any]:
        """Train and measure one model, and say so."""
        folder = self.work / f"{self.name}-{self.setting.steps}-window-{window}-lr-{lr:g}-seed-{seed}"
        outcome = train_and_measure(folder, self.setting, window=window, lr=lr, seed=seed)
        print(f"{self.name:6} {in_words(outcome)}", flush=True)
        return outcome


def run_setting(bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """Tune and train every window of a setting. Returns every run, those of the tuning included."""
    found: dict[str, Any] = {"setting": asdict(bench.setting), "tuning": [], "chosen_lr": {}, "runs": []}
    for window in bench.setting.windows:
        tuning = [bench.run(window, lr, seed) for lr in RATES for seed in TUNING_SEEDS]
        losses = {lr: mean(one["validation_loss"] for one in tuning if one["lr"] == lr) for lr in RATES}
        chosen = min(RATES, key=losses.__getitem__)
        found["tuning"] += tuning
        found["chosen_lr"][str(window)] = chosen
        found["runs"] += [bench.run(window, chosen, seed) for seed in seeds]
    return found


def beyond_the_comparison(far: Bench, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What shows whether a failure is one of tuning; not in the table, for it was not the same for every window.

    The truncated windows get a rate beyond the grid, and four times the documents. A seed that the gradient over the
    document failed on gets the other rates of the grid.
    """
    longer = replace(far, setting=replace(far.setting, steps=4 * far.setting.steps))
    chosen, reported = found["chosen_lr"], found["runs"]
    runs = []
    for window in (1, 3):
        runs += [far.run(window, 2 * max(RATES), seed) for seed in TUNING_SEEDS]
        runs.append(longer.run(window, chosen[str(window)], reported[0]["seed"]))
    at = str(max(far.setting.borders))
    for failed in (run for run in reported if run["window"] == "document" and run["accuracy"][at] < 0.5):
        runs += [far.run("document", lr, failed["seed"]) for lr in RATES if lr != failed["lr"]]
    return runs


def in_words(outcome: dict[str, Any]) -> str:
    """One line for a run."""
    scores = " ".join(f"{borders}:{score:.2f}" for borders, score in outcome["accuracy"].items())
    return (
        f"window {outcome['window']!s:8} lr {outcome['lr']:g} seed {outcome['seed']:<3} "
        f"{outcome['tokens']:,} tokens {outcome['seconds']:.0f} s  loss {outcome['validation_loss']:.3f}  {scores}"
    )


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: mean accuracy in percent, least and greatest over the seeds, for each window and distance."""
    distances = list(runs[0]["accuracy"])
    lines = [f"| window | {' | '.join(distances)} |", f"|---|{'---|' * len(distances)}"]
    for window in dict.fromkeys(run["window"] for run in runs):
        cells = []
        for borders in distances:
            scores = [100 * run["accuracy"][borders] for run in runs if run["window"] == window]
            cells.append(f"{mean(scores):.0f} ({min(scores):.0f}–{max(scores):.0f})")
        lines.append(f"| {window} | {' | '.join(cells)} |")
    return lines


def quick() -> list[dict[str, Any]]:
    """Train the two windows of QUICK on one seed, without tuning; in a folder that is removed."""
    with tempfile.TemporaryDirectory() as work:
        return [
            train_and_measure(
                Path(work, str(window)), QUICK, window=window, lr=QUICK_RATE, seed=0, distances=(0, 1, 2, 3, 8)
            )
            for window in QUICK.windows
        ]


def measure_all(names: Sequence[str], *, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that goes into the result file."""
    # One thread, so that figures do not depend on how many cores are free.
    torch.set_num_threads(1)
    benches = {name: Bench(name=name, setting=SETTINGS[name], work=work) for name in names}
    settings = {name: run_setting(bench, seeds) for name, bench in benches.items()}
    beyond = beyond_the_comparison(benches["far"], settings["far"]) if "far" in settings else []
    every = [run for found in settings.values() for run in found["tuning"] + found["runs"]] + beyond
    tokens = {
        str(borders): round(mean(document.distance_tokens for document in documents), 1)
        for borders, documents in test_sets(SETTINGS["far"], DISTANCES)
    }
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "training_seconds": round(sum(run["seconds"] for run in every)),
        "chance": CHANCE,
        "model": MODEL_SIZES,
        "rates": RATES,
        "tuning_seeds": TUNING_SEEDS,
        "seeds": list(seeds),
        "test_documents": TEST_DOCUMENTS,
        "mean_tokens_at_borders": tokens,
        "settings": settings,
        "beyond_the_comparison": beyond,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--quick", action="store_true", help="the two windows of a small setting, no files written")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="reported; default: 0 1 2 3 4")
    parser.add_argument("--work", type=Path, default=Path("runs/recall_benchmark"), help="where runs are kept")
    parser.add_argument("--output", type=Path, default=results / "recall_cpu.json", help="figures, as JSON")
    parser.add_argument("--picture", type=Path, help="accuracy against distance; pictures.py makes that of the docs")
    parser.add_argument("--write-dataset", type=Path, metavar="FOLDER", help="write the data of recipes/recall.yaml")
    parser.add_argument("--accuracy", type=Path, metavar="RUN", help="accuracy of a run of recipes/recall.yaml")
    arguments = parser.parse_args()
    if set(arguments.seeds) & set(TUNING_SEEDS):
        parser.error(f"--seeds: {TUNING_SEEDS} are for tuning; report others")
    if arguments.write_dataset is not None:
        write_dataset(arguments.write_dataset)
        return
    if arguments.accuracy is not None:
        model = open_trained(arguments.accuracy).model
        for borders, documents in test_sets(SETTINGS["far"], DISTANCES):
            print(f"{borders:3} chunk borders: {accuracy(model, documents):.3f}  (chance {CHANCE:.3f})")
        return
    if arguments.quick:
        torch.set_num_threads(1)
        print("\n".join(table(quick())))
        return
    try:
        found = measure_all(arguments.settings, work=arguments.work, seeds=arguments.seeds)
    except StopRequested:
        sys.exit("Stopped; the same command goes on from here.")
    for name, of_setting in found["settings"].items():
        print(f"\n{name}, trained at {of_setting['setting']['borders']} chunk borders; % right, chance {CHANCE:.1%}\n")
        print("\n".join(table(of_setting["runs"])))
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.picture is not None:
        arguments.picture.write_text(draw(found))


if __name__ == "__main__":
    main()
