"""What a recipe may say, and what it may not: types, ranges, keys that exclude each other, resolution."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from infctx.recipe.load import recipe_differences
from infctx.recipe.schema import Recipe


def make(**sections: dict[str, Any]) -> Recipe:
    """A smallest recipe with the given keys on top."""
    mapping: dict[str, dict[str, Any]] = {
        "model": {"path": "m.pth"},
        "data": {"path": "docs.jsonl"},
        "optimizer": {"lr": 1e-4},
        "run": {"folder": "runs/x", "steps": 10},
    }
    for section, keys in sections.items():
        mapping[section] = {**mapping.get(section, {}), **keys}
    return Recipe.model_validate(mapping)


def sections_of(recipe: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {}
    for name, field in recipe.model_fields.items():
        assert isinstance(field.annotation, type)
        found[name] = field.annotation
    return found


def test_defaults() -> None:
    recipe = make()
    assert recipe.data.model_dump() == {
        "path": "docs.jsonl",
        "exclude": [],
        "format": "auto",
        "split": "train",
        "subset": None,
        "template": "text",
        "fields": {},
        "roles": {},
        "train_turns": "all",
        "weights": {},
        "weight_field": None,
        "weight": 1.0,
        "min_tokens": None,
        "max_tokens": None,
        "on_long": "stop",
        "on_bad_row": "stop",
        "on_empty_row": None,
        "on_duplicate": "keep",
        "rechunk_tokens": None,
        "sets": None,
        "tokenizer": "auto",
        "mode": "auto",
        "pack_tokens": None,
        "order": "random",
        "validation": None,
        "validation_tail": None,
        "cache": "auto",
        "workers": "auto",
    }
    assert recipe.adapter.model_dump() == {
        "kind": "full",
        "rank": 32,
        "alpha": None,
        "dropout": 0.0,
        "targets": ["receptance", "key", "value", "gate", "output"],
        "ranks": {},
        "alphas": {},
        "train_also": [],
        "svd_iterations": 4,
        "miss_init": "default",
        "miss_mini_rank": None,
        "freeze": [],
        "initial_state": False,
        "initial_shifts": False,
    }
    assert recipe.bptt.model_dump() == {
        "chunk_tokens": 1024,
        "window": "document",
        "activations": "auto",
        "boundaries": "auto",
        "thin_boundaries": False,
    }
    assert recipe.optimizer.model_dump() == {
        "name": "adamw",
        "fused": "auto",
        "lr": 1e-4,
        "warmup_steps": 10,
        "schedule": "constant",
        "lr_final": None,
        "decay_fraction": None,
        "clip": 1.0,
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "decay_lr_multiplier": 2.0,
        "lr_multipliers": {},
        "state_lr": None,
        "l2_wrap": 0.0,
        "z_loss": 0.0,
        "min_token_loss": None,
        "token_dropout": 0.0,
        "embedding_noise": 0.0,
        "ema_decay": None,
    }
    assert recipe.kernel.backend == "auto"
    assert recipe.run.model_dump() == {
        "folder": "runs/x",
        "steps": 10,
        "epochs": None,
        "rows": 1,
        "accumulate": 1,
        "devices": "auto",
        "num_nodes": 1,
        "strategy": "auto",
        "offload": "none",
        "deepspeed": {},
        "time_parallel": 1,
        "hang_seconds": 1800.0,
        "precision": "auto",
        "seed": 0,
        "checkpoint_every": None,
        "validate_every": None,
        "checkpoint_minutes": 30.0,
        "keep_checkpoints": 2,
        "max_nonfinite_steps": 10,
        "report": True,
        "loggers": [],
        "wandb": {"project": "infctx", "entity": None, "name": None, "offline": False},
    }


def test_every_key_is_described() -> None:
    sections = sections_of(Recipe)
    assert set(sections) == {"model", "data", "adapter", "bptt", "optimizer", "kernel", "run"}
    fields = [(f"{name}.{key}", field) for name, cls in sections.items() for key, field in cls.model_fields.items()]
    assert len(fields) > 30
    assert [key for key, field in fields if not field.description or len(field.description) < 20] == []
    assert all(field.description for field in Recipe.model_fields.values())


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("model", {"path": ""}),
        ("model", {"path": 3}),
        ("data", {"path": []}),
        ("data", {"path": [""]}),
        ("data", {"path": None}),
        ("data", {"template": "chatt"}),
        ("data", {"tokenizer": "gpt2"}),
        ("data", {"pack_tokens": 0}),
        ("data", {"validation": 0.0}),
        ("data", {"validation": 1}),
        ("data", {"validation": ""}),
        ("data", {"validation_tail": 1.0}),
        ("data", {"validation": 0.1, "validation_tail": 0.1}),
        ("data", {"on_bad_row": "ignore"}),
        ("adapter", {"kind": "full", "rank": 32}),
        ("adapter", {"rank": 8}),
        ("adapter", {"targets": ["key"]}),
        ("adapter", {"train_also": []}),
        ("adapter", {"dropout": 0.0}),
        ("adapter", {"alpha": 1.0}),
        ("adapter", {"kind": "lora", "freeze": ["*"]}),
        ("adapter", {"kind": "lora", "dropout": 1.0}),
        ("adapter", {"kind": "lora", "rank": 0}),
        ("adapter", {"kind": "lora", "alpha": 0}),
        ("adapter", {"kind": "lora", "targets": []}),
        ("adapter", {"kind": "bone"}),
        ("adapter", {"kind": "lora", "ranks": {"*.key": 0}}),
        ("adapter", {"kind": "lora", "ranks": {"": 3}}),
        ("adapter", {"kind": "lora", "svd_iterations": 4}),
        ("adapter", {"kind": "lora", "miss_init": "bat"}),
        ("adapter", {"kind": "miss", "alpha": 4}),
        ("adapter", {"kind": "miss", "ranks": {"key": 4}}),
        ("adapter", {"kind": "miss", "miss_init": "mini"}),
        ("adapter", {"kind": "miss", "miss_mini_rank": 4}),
        ("adapter", {"kind": "state", "rank": 4}),
        ("adapter", {"kind": "state", "initial_state": True}),
        ("adapter", {"initial_shifts": True}),
        ("adapter", {"kind": "lora", "initial_shifts": True}),
        ("bptt", {"chunk_tokens": 0}),
        ("bptt", {"chunk_tokens": 1.0}),
        ("bptt", {"chunk_tokens": True}),
        ("bptt", {"window": 0}),
        ("bptt", {"window": "all"}),
        ("bptt", {"window": True}),
        ("optimizer", {"lr": 0}),
        ("optimizer", {"lr": -1e-4}),
        ("optimizer", {"lr": True}),
        ("optimizer", {"lr": "fast"}),
        ("optimizer", {"lr": "nan"}),
        ("optimizer", {"lr": float("nan")}),
        ("optimizer", {"lr": float("inf")}),
        ("optimizer", {"warmup_steps": -1}),
        ("optimizer", {"lr_final": 1e-5}),
        ("optimizer", {"schedule": "exponential", "lr_final": 0}),
        ("optimizer", {"clip": 0}),
        ("optimizer", {"betas": [0.9]}),
        ("optimizer", {"betas": [0.9, 1.0]}),
        ("optimizer", {"betas": [0.9, 0.99, 0.999]}),
        ("optimizer", {"eps": 0}),
        ("kernel", {"backend": ""}),
        ("run", {"steps": 0}),
        ("run", {"steps": None}),
        ("run", {"epochs": 1}),
        ("run", {"steps": "10"}),
        ("run", {"rows": 0}),
        ("run", {"devices": 0}),
        ("run", {"devices": "all"}),
        ("run", {"strategy": "fsdp2"}),
        ("run", {"strategy": "single", "devices": 2}),
        ("run", {"strategy": "single", "num_nodes": 2}),
        ("run", {"num_nodes": 0}),
        ("run", {"offload": "optimizer"}),
        ("run", {"strategy": "ddp", "offload": "all"}),
        ("run", {"strategy": "fsdp", "offload": "optimizer"}),
        ("run", {"strategy": "deepspeed_2", "offload": "all"}),
        ("run", {"deepspeed": {"aio": {}}}),
        ("run", {"strategy": "deepspeed_1", "deepspeed": {"zero_optimization": {"stage": 3}}}),
        ("run", {"strategy": "deepspeed_1", "deepspeed": {"gradient_clipping": 1.0}}),
        ("run", {"strategy": "deepspeed_1", "deepspeed": {"managed_gradient_accumulation": False}}),
        ("run", {"devices": 4, "time_parallel": 3}),
        ("run", {"devices": 2, "num_nodes": 3, "time_parallel": 4}),
        ("run", {"hang_seconds": 1}),
        ("run", {"precision": "fp16"}),
        ("run", {"seed": -1}),
        ("run", {"seed": 2**63}),
        ("run", {"checkpoint_every": 0}),
        ("run", {"keep_checkpoints": 0}),
        ("run", {"checkpoint_minutes": 0}),
        ("bptt", {"activations": "some"}),
        ("run", {"surprise": 1}),
        ("surprise", {"key": 1}),
    ],
)
def test_refused(section: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make(**{section: keys})


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("data", {"path": ["a/*.txt", "{stdlib}/*.py"]}),
        ("data", {"validation": "held_out.jsonl"}),
        ("data", {"validation": 0.25}),
        ("data", {"validation_tail": 0.1}),
        ("adapter", {"kind": "full", "freeze": ["emb*"]}),
        ("adapter", {"kind": "full", "alpha": None}),
        ("adapter", {"kind": "lora", "rank": 4, "train_also": ["*norm*"]}),
        ("adapter", {"kind": "dora", "ranks": {"blocks.0.*": 8}, "alphas": {"key": 3.5}}),
        ("adapter", {"kind": "pissa", "svd_iterations": None}),
        ("adapter", {"kind": "miss", "miss_init": "mini", "miss_mini_rank": 4, "initial_state": True}),
        ("adapter", {"kind": "state", "initial_shifts": True}),
        ("adapter", {"initial_state": True, "initial_shifts": True}),
        ("bptt", {"window": 3}),
        ("optimizer", {"lr": 1}),
        ("optimizer", {"clip": None}),
        ("optimizer", {"schedule": "cosine", "lr_final": 0}),
        ("run", {"steps": None, "epochs": 2}),
        ("run", {"devices": 2}),
    ],
)
def test_accepted(section: str, keys: dict[str, Any]) -> None:
    recipe = make(**{section: keys})
    for key, value in keys.items():
        assert getattr(getattr(recipe, section), key) == value


def test_numbers_written_as_yaml_1_1_text_are_numbers() -> None:
    recipe = make(
        optimizer={"lr": "1e-5", "eps": "+1E-18", "betas": [".9", "0.95"], "clip": "2."}, data={"validation": "1e-2"}
    )
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.optimizer.clip) == (1e-5, 1e-18, 2.0)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.data.validation == 0.01


def test_frozen() -> None:
    recipe = make()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.run.steps = 5  # type: ignore[misc]


def test_a_stream_has_no_document_window() -> None:
    with pytest.raises(ValidationError, match="without an end"):
        make(data={"mode": "stream"})
    assert make(data={"mode": "stream"}, bptt={"window": 4}).resolved().data.mode == "stream"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"bptt": {"chunk_tokens": 3}, "run": {"devices": 4, "time_parallel": 4}}, r"bptt\.chunk_tokens.*got 3"),
        ({"adapter": {"kind": "lora"}, "model": {"quantize": "int8"}, "run": {"strategy": "fsdp"}}, r"model\.quantize"),
        ({"optimizer": {"name": "adamw-8bit"}, "run": {"strategy": "deepspeed_1"}}, r"optimizer\.name.*adamw-8bit"),
        ({"optimizer": {"ema_decay": 0.9}, "run": {"strategy": "deepspeed_2"}}, r"optimizer\.ema_decay"),
    ],
)
def test_what_a_strategy_cannot_do(sections: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make(**sections)


def test_what_strategies_can_do() -> None:
    make(adapter={"kind": "lora"}, model={"path": "m.pth", "quantize": "int8"}, run={"strategy": "deepspeed_2"})
    make(optimizer={"ema_decay": 0.9}, run={"strategy": "fsdp", "offload": "all"})
    make(bptt={"chunk_tokens": 4}, run={"devices": 2, "num_nodes": 4, "time_parallel": 4})
    nvme = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}, "aio": {"queue": 8}}
    assert make(run={"strategy": "deepspeed_3", "offload": "optimizer", "deepspeed": nvme}).run.deepspeed == nvme


def test_packing_is_for_documents() -> None:
    with pytest.raises(ValidationError, match=r"data\.pack_tokens"):
        make(data={"pack_tokens": 4096}, bptt={"window": 4})
    with pytest.raises(ValidationError, match=r"data\.pack_tokens"):
        make(data={"pack_tokens": 4096, "mode": "stream"}, bptt={"window": 4})
    assert make(data={"pack_tokens": 4096, "mode": "document"}, bptt={"window": 4}).data.pack_tokens == 4096
    assert make(data={"pack_tokens": 4096}).data.pack_tokens == 4096


def test_both_cross_section_problems_are_told() -> None:
    with pytest.raises(ValidationError) as caught:
        make(data={"mode": "stream", "pack_tokens": 5})
    assert "data.mode" in str(caught.value)
    assert "data.pack_tokens" in str(caught.value)


@pytest.mark.parametrize(("window", "mode"), [("document", "document"), (1, "stream"), (16, "stream")])
def test_mode_follows_the_window(window: int | str, mode: str) -> None:
    recipe = make(bptt={"window": window})
    assert recipe.data.mode == "auto"
    assert recipe.resolved().data.mode == mode


@pytest.mark.parametrize(
    ("kind", "alpha"), [("dora", 16.0), ("rslora", 16.0), ("pissa", 8.0), ("olora", 8.0), ("miss", None)]
)
def test_alpha_of_every_kind(kind: str, alpha: float | None) -> None:
    assert make(adapter={"kind": kind, "rank": 8}).resolved().adapter.alpha == alpha


def test_alphas_follow_the_ranks_unless_they_are_given() -> None:
    ranks = {"blocks.0.*": 4, "key": 2, "head": 16}
    adapter = make(adapter={"kind": "lora", "ranks": ranks, "alphas": {"key": 3.0}}).resolved().adapter
    assert list(adapter.alphas.items()) == [("blocks.0.*", 8.0), ("head", 32.0), ("key", 3.0)]
    adapter = make(adapter={"kind": "rslora", "ranks": ranks}).resolved().adapter
    assert adapter.alphas == {}
    adapter = make(adapter={"kind": "lora", "ranks": ranks, "alpha": 8}).resolved().adapter
    assert (adapter.alpha, adapter.alphas) == (8.0, {})


def test_the_order_of_ranks_is_part_of_a_recipe() -> None:
    one, other = ({"kind": "lora", "ranks": dict(ranks)} for ranks in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
    assert recipe_differences(make(adapter=one), make(adapter=one)) == []
    differences = recipe_differences(make(adapter=one), make(adapter=other))
    assert [line.split(":")[0] for line in differences] == ["adapter.ranks", "adapter.alphas"]


def test_a_document_may_have_a_truncated_window() -> None:
    assert make(bptt={"window": 2}, data={"mode": "document"}).resolved().data.mode == "document"


def test_alpha_resolves_to_twice_the_rank_with_lora_only() -> None:
    assert make(adapter={"kind": "lora", "rank": 8}).resolved().adapter.alpha == 16.0
    assert make(adapter={"kind": "lora"}).resolved().adapter.alpha == 64.0
    assert make(adapter={"kind": "lora", "rank": 8, "alpha": 8}).resolved().adapter.alpha == 8.0
    assert make().resolved().adapter.alpha is None


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential"])
def test_final_rate_resolves_to_a_tenth(schedule: str) -> None:
    assert make(optimizer={"schedule": schedule, "lr": 0.5}).resolved().optimizer.lr_final == pytest.approx(0.05)
    kept = make(optimizer={"schedule": schedule, "lr": 0.5, "lr_final": 0.25})
    assert kept.resolved().optimizer.lr_final == 0.25


def test_constant_schedule_has_no_final_rate() -> None:
    assert make().resolved().optimizer.lr_final is None


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"freeze": ["emb*"]},
        {"kind": "lora", "alpha": 8, "train_also": ["*norm*"]},
        {"kind": "pissa", "ranks": {"key": 3}, "svd_iterations": None},
        {"kind": "state"},
    ],
)
def test_resolved_mapping_reads_back_equal(adapter: dict[str, Any]) -> None:
    recipe = make(adapter=adapter, optimizer={"clip": None, "schedule": "cosine"}, data={"validation": 0.5}).resolved()
    mapping = recipe.to_mapping()
    assert Recipe.model_validate(json.loads(json.dumps(mapping))) == recipe
    assert recipe.resolved() == recipe
    assert mapping["optimizer"]["clip"] is None, "null is not the default of clip and must be kept"
    assert "epochs" not in mapping["run"]


def test_two_recipes_do_not_share_their_default_lists() -> None:
    make().data.exclude.append("x")
    assert make().data.exclude == []


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"loggers": ["csv", "csv"]}, r"run\.loggers: expected each name once"),
        ({"wandb": {"offline": True}}, r"run\.wandb: has no effect without wandb in run\.loggers"),
        ({"loggers": ["mlflow"]}, r"run\.loggers"),
    ],
)
def test_loggers_that_cannot_be(run: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make(run=run)
