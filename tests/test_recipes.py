"""Every recipe of the project can be read, and those for models that are not here run on a small one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infctx
from infctx.assemble import run_recipe
from infctx.planning.devices import Room
from infctx.planning.from_recipe import plan_recipe
from infctx.planning.planned_model import released_shape
from infctx.planning.recipe_plan import Target
from infctx.recipe.load import load_recipe, recipe_differences, write_recipe
from infctx.training.metrics import read_metrics
from infctx.training.progress import SilentProgress

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 0
    assert list(FOLDER.rglob("*.yml")) == [], "one ending for all, so that none is missed here"


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(FOLDER)) for path in RECIPES])
def test_recipe_loads_and_survives_its_run_folder(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert recipe_differences(load_recipe(tmp_path / "recipe.yaml"), recipe) == []


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(FOLDER)) for path in RECIPES])
def test_recipe_says_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe begins with its purpose, hardware and figures"


# The recipes of a model that nobody here has, on a small one of the same vocabulary, with data of the same shape

# Their memory comes from `infctx plan`. They differ from the others in sizes and in how they are spread, and need GPUs.
PLANNED = [path for path in RECIPES if "by `infctx plan`" in path.read_text(encoding="utf-8")]
OF_WORLD_MODELS = [
    path for path in RECIPES if "models/RWKV-" in path.read_text(encoding="utf-8") and path not in PLANNED
]
INSTRUCTIONS = FOLDER.parent / "datasets" / "instructions"


@pytest.fixture(scope="module")
def world_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "world.pth"
    sizes = ["--layers", "2", "--channels", "32", "--head-size", "16", "--lerp-rank", "4", "--decay-rank", "4"]
    subprocess.run([sys.executable, "-m", "infctx", "model", "new", *sizes, "--output", str(path)], check=True)
    return path


def with_working_recurrence(world_model: Path, path: Path) -> Path:
    """The same model, where the recurrence has an effect: in a fresh one its initial state has no gradient."""
    model = infctx.load_model(world_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.output.weight.normal_(std=0.2, generator=generator)
    infctx.save_model(model, path, dtype=torch.float32)
    return path


def upgraded(world_model: Path, path: Path) -> Path:
    """What the head of a recipe for a GoldFinch says to do before it."""
    command = [sys.executable, "-m", "infctx", "model", "upgrade", str(world_model), "--to", "goldfinch"]
    # The small model has too few layers for one in 6.
    subprocess.run([*command, "--ratio", "2", "--output", str(path)], check=True)
    return path


def test_there_are_recipes_of_world_models() -> None:
    assert {path.stem for path in OF_WORLD_MODELS} >= {
        "goldfinch_upgrade",
        "finch_1b6_instruct",
        "finch_1b6_chat",
        "finch_1b6_lora_exact",
        "finch_1b6_mixed",
        "finch_1b6_state",
    }


def test_there_are_planned_recipes() -> None:
    assert {path.stem for path in PLANNED} == {
        "finch_1b6_lora_24gb",
        "finch_3b_lora_128k",
        "finch_7b_lora_24gb",
        "finch_7b_lora_48gb",
        "finch_7b_full_8x80gb",
        "finch_14b_lora_80gb",
        "finch_14b_full_8x80gb",
    }


@pytest.mark.parametrize("path", PLANNED, ids=[path.stem for path in PLANNED])
def test_planned_recipe_fits_what_it_names(path: Path) -> None:
    header = " ".join(line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
    found = re.search(
        r"of (\d+) GB; ([\d.]+) GB (?:on each )?by `infctx plan` for documents of ([\d ]+) tokens", header
    )
    assert found, header
    device_gb, planned_gb, document_tokens = int(found[1]), float(found[2]), int(found[3].replace(" ", ""))
    assert f"{device_gb}gb" in path.stem or "gb" not in path.stem
    assert "not measured" in header
    size = re.match(r"finch_(\w+?)_", path.stem)[1]
    assert f"World-{size.replace('1b6', '1B6').replace('b', 'B')}-" in path.read_text("utf-8")
    # Its model on the meta device, adapter attached.
    plan = plan_recipe(
        load_recipe(path),
        released_shape(size),
        Target(room=Room(device=device_gb * 10**9)),
        document_tokens=document_tokens,
    )
    assert plan.fits
    assert planned_gb == round(plan.memory.device_bytes / 1e9, 1)


@pytest.mark.parametrize("path", OF_WORLD_MODELS, ids=[path.stem for path in OF_WORLD_MODELS])
def test_recipe_of_a_world_model_trains(path: Path, world_model: Path, tmp_path: Path) -> None:
    documents = [json.loads(line)["input"] for line in (INSTRUCTIONS / "long.jsonl").read_text("utf-8").splitlines()]
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(document[:1500], encoding="utf-8")
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": document[:1500]}) + "\n" for document in documents), encoding="utf-8"
    )
    tasks = [json.loads(line) for line in (INSTRUCTIONS / "instruct.jsonl").read_text("utf-8").splitlines()]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": row["instruction"], "completion": row["output"]}) + "\n" for row in tasks[:60])
    )
    text = path.read_text(encoding="utf-8")
    rows = "pairs.jsonl" if "template: completion" in text else "tasks.jsonl"
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks[:60]))
    if "kind: state" in text:
        world_model = with_working_recurrence(world_model, tmp_path / "model.pth")
    if "goldfinch" in path.stem:
        world_model = upgraded(world_model, tmp_path / "goldfinch.safetensors")
    for theirs, ours in {
        re.search(r"path: (models/\S+?\.(pth|safetensors))", text)[1]: world_model,
        "my_rows/*.jsonl": tmp_path / rows,
        "my_chats/*.jsonl": INSTRUCTIONS / "chat.jsonl",
        "my_docs/*.txt": tmp_path / "*.txt",
        "my_docs/*.jsonl": tmp_path / "docs.jsonl",
    }.items():
        text = text.replace(str(theirs), str(ours))
    assert "my_" not in text
    changed = tmp_path / "recipe.yaml"
    changed.write_text(text, encoding="utf-8")
    # A GoldFinch makes its keys again for each chunk.
    smaller = [
        f"bptt.chunk_tokens={256 if 'goldfinch' in path.stem else 64}",
        "run.rows=2",
        "run.accumulate=1",
        "data.validation=0.1",
    ]
    if "pack_tokens" in text:
        smaller.append("data.pack_tokens=256")
    end = "run.steps=6" if "steps:" in text.split("run:")[1] else "run.epochs=1"
    recipe = load_recipe(changed, [*smaller, end, f"run.folder={tmp_path}/run"])
    result = run_recipe(recipe, SilentProgress())
    assert result["steps"] >= 2
    assert result["val_loss"] < result["first_val_loss"]
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    tokens = account["tokens"]
    assert tokens["in"] == tokens["trained"] + tokens["masked"] + tokens["dropped"]
    if "mixed" not in path.stem:
        # Of instructions and conversations, the answers only.
        assert (tokens["masked"] > tokens["trained"]) == ("chat" in text or "instruct" in text)
    else:
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert set(lines[-1]["val_loss_by_set"]) == {"books", "chats"}
        assert {name for line in lines[1:] for name in line["sets"]} == {"books", "chats"}
