"""Devices, machines, strategy and the rows of a step of RWKV-infctx-trainer's configs."""

import itertools
from typing import Any

import pytest
import yaml

NO_STRATEGY = "trainer.strategy is not there"
DIVIDE = "Divide it by the number of devices"
UNEVEN = "is no multiple"


def run_of(config: Any, trainer: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What the recipe says of its run beyond folder and length, and the translation."""
    translation = config.translate(trainer=trainer)
    config.load(translation)
    run = yaml.safe_load(translation.text)["run"]
    assert (run.pop("folder"), run.pop("epochs")) == ("runs/config", 1)
    return run, translation


def notes_of(translation: Any, *marks: str) -> list[str]:
    """Those of the marks that a note has."""
    return [mark for mark in marks if any(mark in note for note in translation.notes)]


# Devices and machines


@pytest.mark.parametrize(
    ("devices", "ours", "kind"),
    [
        ("auto", "auto", "translated"),
        (-1, "auto", "translated"),
        ("-1", "auto", "translated"),
        ([-1], "auto", "translated"),
        (None, "auto", "translated"),
        (1, 1, "translated"),
        (8, 8, "translated"),
        ("8", 8, "translated"),
        ([0, 1, 2], 3, "translated"),
        ([3], 1, "translated"),
        ("0,", 1, "translated"),
        ("0, 2", 2, "translated"),
        (0, "auto", "without_counterpart"),
        (65_537, "auto", "without_counterpart"),
        ([], "auto", "without_counterpart"),
        ([0, "x"], "auto", "without_counterpart"),
        (True, "auto", "without_counterpart"),
        ("?!", "auto", "without_counterpart"),
    ],
)
def test_devices(config: Any, devices: object, ours: object, kind: str) -> None:
    run, translation = run_of(config, {"devices": devices})
    assert run == ({} if ours == "auto" else {"devices": ours})
    assert config.of(translation, "trainer.devices")[0] == kind
    # Only their number counts here: a list of others than the first has to be chosen another way.
    assert bool(notes_of(translation, "CUDA_VISIBLE_DEVICES")) == (devices in ([3], "0, 2"))


def test_machines(config: Any) -> None:
    run, translation = run_of(config, {"devices": 8, "num_nodes": 4, "strategy": "ddp"})
    assert run == {"devices": 8, "num_nodes": 4, "strategy": "ddp"}
    assert config.of(translation, "trainer.num_nodes") == ("translated", "run.num_nodes: 4")
    run, translation = run_of(config, {"num_nodes": 0, "microbatch_size": "many"})
    assert run == {}
    for key in ("num_nodes", "microbatch_size"):
        assert config.of(translation, f"trainer.{key}")[0] == "without_counterpart"


# Strategies

STRATEGIES = {
    "auto": {},
    "ddp": {"strategy": "ddp"},
    "ddp_find_unused_parameters_false": {"strategy": "ddp"},
    "ddp_find_unused_parameters_true": {"strategy": "ddp"},
    "ddp_spawn_find_unused_parameters_true": {"strategy": "ddp"},
    "ddp_notebook": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp_cpu_offload": {"strategy": "fsdp", "offload": "all"},
    "deepspeed": {"strategy": "deepspeed_2"},
    "deepspeed_stage_1": {"strategy": "deepspeed_1"},
    "deepspeed_stage_2": {"strategy": "deepspeed_2"},
    "deepspeed_stage_2_offload": {"strategy": "deepspeed_2", "offload": "optimizer"},
    "deepspeed_stage_3": {"strategy": "deepspeed_3"},
    "deepspeed_stage_3_offload": {"strategy": "deepspeed_3", "offload": "all"},
    "deepspeed_stage_3_offload_nvme": {"strategy": "deepspeed_3", "offload": "all"},
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("devices", ["auto", 8])
def test_strategies_on_several_devices(config: Any, name: str, devices: object) -> None:
    run, translation = run_of(config, {"strategy": name, "devices": devices})
    assert run == {**STRATEGIES[name], **({} if devices == "auto" else {"devices": devices})}
    assert config.of(translation, "trainer.strategy")[0] == "translated"
    assert bool(notes_of(translation, "nvme_path")) == ("nvme" in name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_on_one_device_are_left_out(config: Any, name: str) -> None:
    run, translation = run_of(config, {"strategy": name, "devices": 1, "num_nodes": 1})
    assert run == {"devices": 1}
    kind, text = config.of(translation, "trainer.strategy")
    assert kind == ("without_counterpart" if "offload" in name else "no_effect")
    assert ("adamw-offloaded" in text) == ("offload" in name)
    # One device on each of two machines is two.
    run, translation = run_of(config, {"strategy": name, "devices": 1, "num_nodes": 2})
    assert run == {"devices": 1, "num_nodes": 2, **STRATEGIES[name]}


@pytest.mark.parametrize("name", ["xla", "single_device", "ddp_sharded", 3, {"class_path": "DeepSpeedStrategy"}])
def test_other_strategies_are_told(config: Any, name: object) -> None:
    run, translation = run_of(config, {"strategy": name, "devices": 2})
    assert run == {"devices": 2}
    assert config.of(translation, "trainer.strategy")[0] == "without_counterpart"


def test_the_strategy_that_trainer_took_unasked_is_told_where_there_may_be_several_devices(config: Any) -> None:
    assert notes_of(config.translate(trainer={}), NO_STRATEGY)
    assert notes_of(config.translate(trainer={"devices": 2}), NO_STRATEGY)
    assert not notes_of(config.translate(trainer={"devices": 1}), NO_STRATEGY)
    assert not notes_of(config.translate(trainer={"strategy": "auto"}), NO_STRATEGY)


# Rows of a step


@pytest.mark.parametrize(
    ("trainer", "ours", "told"),
    [
        ({"target_batch_size": 32}, {"accumulate": 32}, [DIVIDE]),
        ({"target_batch_size": 32, "microbatch_size": 8}, {"rows": 8, "accumulate": 4}, [DIVIDE]),
        ({"target_batch_size": 33, "microbatch_size": 8}, {"rows": 8, "accumulate": 4}, [UNEVEN, DIVIDE]),
        ({"target_batch_size": 4, "microbatch_size": 8}, {"rows": 8}, [UNEVEN]),
        ({"target_batch_size": 64, "num_nodes": 4}, {"num_nodes": 4, "accumulate": 16}, [DIVIDE]),
        ({"target_batch_size": 32, "devices": 1}, {"devices": 1, "accumulate": 32}, []),
        ({"target_batch_size": 256, "devices": 8}, {"devices": 8, "accumulate": 32}, []),
        (
            {"target_batch_size": 256, "devices": 8, "num_nodes": 2, "microbatch_size": 4},
            {"devices": 8, "num_nodes": 2, "rows": 4, "accumulate": 4},
            [],
        ),
        (
            {"target_batch_size": 100, "devices": 8, "microbatch_size": 2},
            {"devices": 8, "rows": 2, "accumulate": 6},
            [UNEVEN],
        ),
        ({"target_batch_size": 4, "devices": 8}, {"devices": 8}, [UNEVEN]),
        ({"target_batch_size": 100_000, "devices": 8}, {"devices": 8, "accumulate": 12_500}, []),
        ({"accumulate_grad_batches": 6}, {"accumulate": 6}, []),
        (
            {"accumulate_grad_batches": 6, "devices": 4, "num_nodes": 2},
            {"devices": 4, "num_nodes": 2, "accumulate": 6},
            [],
        ),
        (
            {"accumulate_grad_batches": 2, "devices": [0, 1], "microbatch_size": 2},
            {"devices": 2, "rows": 2, "accumulate": 2},
            [],
        ),
        ({"accumulate_grad_batches": 2, "target_batch_size": 8}, {"accumulate": 8}, [DIVIDE]),
        ({"target_batch_size": -1}, {}, []),
    ],
)
def test_rows_of_a_step(config: Any, trainer: dict[str, Any], ours: dict[str, Any], told: list[str]) -> None:
    run, translation = run_of(config, {"strategy": "auto", **trainer})
    assert run == ours
    assert notes_of(translation, UNEVEN, DIVIDE) == told


def test_the_rows_of_a_step_are_those_that_trainer_counted(config: Any) -> None:
    """Against that trainer's own words: rounded down to whole groups of rows of all devices, at least one group."""
    for target, devices, num_nodes, rows in itertools.product((1, 31, 96), (1, 3, 8), (1, 2), (1, 4)):
        trainer = {"target_batch_size": target, "devices": devices, "num_nodes": num_nodes, "microbatch_size": rows}
        run = config.recipe(trainer={"strategy": "deepspeed_stage_2", **trainer}).run
        of_all = rows * devices * num_nodes
        fitting = list(range(of_all, target + 1, of_all)) or [of_all]
        assert run.rows * run.accumulate * run.devices * run.num_nodes == fitting[-1]


def test_the_notes_have_the_numbers(config: Any) -> None:
    trainer = {"target_batch_size": 500, "microbatch_size": 4, "num_nodes": 2}
    notes = " ".join(config.translate(trainer=trainer).notes)
    assert "a step has 496 rows on 2 devices" in notes
    assert "run.accumulate: 62 is for one device on each of 2 machines." in notes
    assert "to keep target_batch_size: 500; with 8 it is 7." in notes


def test_more_groups_than_a_recipe_can_hold_are_told(config: Any) -> None:
    run, translation = run_of(config, {"target_batch_size": 10**6})
    assert run == {}
    assert config.of(translation, "trainer.target_batch_size")[0] == "without_counterpart"
