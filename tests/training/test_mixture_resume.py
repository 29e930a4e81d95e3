"""A run over a mixture goes on where it was, in the same bits, however its data were read each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infctx.assemble import run_recipe
from infctx.data import prepare
from infctx.recipe.load import load_recipe
from infctx.recipe.schema import Recipe
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress
from infctx.training.signals import StopRequested

MEASURED = ("step", "tokens", "loss", "grad_norm", "val_loss", "sets", "val_loss_by_set")
DATA = """
data:
  sets:
    - {{name: docs, path: '{folder}/docs.jsonl', share: 2}}
    - {{name: talks, path: '{folder}/talks.jsonl', template: chat, share: 1, weights: {{user: 0.25}}}}
    - {{name: books, path: '{folder}/*.txt', share: 3, max_tokens: 150, on_long: split}}
  validation: 0.2
"""


@pytest.fixture
def mixture(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """The small model of `recipe` on three sets."""
    turns = [{"role": role, "content": f"{role} says something"} for role in ("user", "assistant")]
    talks = [{"messages": turns * n} for n in (1, 3, 2, 1)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"Chapter {number}. " * (10 + 5 * number))

    def build(folder: str, *overrides: str) -> Recipe:
        recipe(folder)
        file = tmp_path / "recipe.yaml"
        lines = [line for line in file.read_text().splitlines() if not line.startswith("data:")]
        file.write_text("\n".join(lines) + DATA.format(folder=tmp_path))
        return load_recipe(file, overrides)

    return build


def outcome(recipe: Recipe) -> dict[str, object]:
    folder = Path(recipe.run.folder)
    checkpoint = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    return {
        "weights": (checkpoint / "trainable.safetensors").read_bytes(),
        "cursor": json.loads((checkpoint / "state.json").read_text())["cursor"],
        "metrics": [
            {key: line[key] for key in MEASURED if key in line} for line in read_metrics(folder / "metrics.jsonl")
        ],
        "ledger": json.loads((folder / "ledger.json").read_text()),
    }


@pytest.mark.parametrize("settings", [(), ("bptt.window=document", "run.accumulate=2"), ("data.order=bucket",)])
def test_stopped_anywhere_and_read_in_another_way(
    mixture: Callable[..., Recipe],
    stop_after: Callable[[int | None], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 500)
    straight = mixture("straight", *settings, "data.cache=memory")
    run_recipe(straight, SilentProgress())
    expected = outcome(straight)
    metrics = expected["metrics"]
    assert isinstance(metrics, list)
    assert {name for line in metrics for name in line.get("sets", {})} == {"docs", "talks", "books"}
    ways = (
        "data.cache=memory",
        f"data.cache={tmp_path}/cache_of_one",
        f"data.cache={tmp_path}/cache_of_two",
    )
    stops = 0
    while True:
        workers = "data.workers=2" if stops % 3 == 2 else "data.workers=1"
        stop_after(3 + stops if stops < 9 else None)
        stopped = mixture("stopped", *settings, ways[stops % 3], workers)
        try:
            run_recipe(stopped, SilentProgress())
            break
        except StopRequested:
            stops += 1
    assert stops >= 3
    assert outcome(stopped) == expected
