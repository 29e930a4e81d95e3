"""Of RWKV-infctx-trainer's section trainer, what spreads a run over devices and how many rows a step has.

There as here a step is rows of a device × groups of rows × devices × machines. target_batch_size is that product, and
accumulate_grad_batches the groups of one device, as run.accumulate.
"""

import re

from infctx.recipe.infctx_trainer.draft import Part, count, shown

_MOST = 65_536
_NO_NAME = (
    "Of Lightning's names those of DDP, FSDP and DeepSpeed are translated; say it with run.strategy and run.offload."
)
# Lightning's names, and which part waits in host memory. deepspeed alone is its stage 2.
_STRATEGIES = {
    "auto": ("auto", "none"),
    "fsdp": ("fsdp", "none"),
    "fsdp_cpu_offload": ("fsdp", "all"),
    "deepspeed": ("deepspeed_2", "none"),
    "deepspeed_stage_1": ("deepspeed_1", "none"),
    "deepspeed_stage_2": ("deepspeed_2", "none"),
    "deepspeed_stage_2_offload": ("deepspeed_2", "optimizer"),
    "deepspeed_stage_3": ("deepspeed_3", "none"),
    "deepspeed_stage_3_offload": ("deepspeed_3", "all"),
    "deepspeed_stage_3_offload_nvme": ("deepspeed_3", "all"),
}
_DDP = re.compile(r"ddp(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?")
_OFFLOAD_ALONE = (
    "One device: nothing is spread. optimizer.name: adamw-offloaded keeps the moments in host memory there; a strategy "
    "set by hand would do on one device, too."
)


def translate_spread(trainer: Part) -> None:
    """Translate devices, num_nodes, strategy, and the three keys of the batch."""
    num_devices = _devices(trainer)
    num_nodes = _number(trainer, "num_nodes", "run.num_nodes")
    _strategy(trainer, is_alone=num_devices == 1 and num_nodes == 1)
    _batch(trainer, num_devices=num_devices, num_nodes=num_nodes)


def _number(trainer: Part, name: str, key: str) -> int:
    """A number that is 1 where nothing is said, or nothing that can be understood."""
    number = count(trainer.get(name, 1), most=_MOST)
    if number is None:
        trainer.without(name, f"Expected a whole number from 1 to {_MOST:,}; say it with {key}, which is 1 now.")
        return 1
    trainer.to(name, {key: number})
    return number


def _devices(trainer: Part) -> int | None:
    """Devices of each machine; None where only the machine knows."""
    said = trainer.get("devices", "auto")
    if isinstance(said, str) and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", said) and "," in said:
        said = [int(number) for number in said.split(",") if number.strip()]
    if said in ("auto", "-1", [-1]) or (said == -1 and not isinstance(said, bool)):
        trainer.to("devices", {"run.devices": "auto"})
        return None
    numbers = said if isinstance(said, list) else None
    if numbers and all(type(number) is int and number >= 0 for number in numbers):
        num_devices = count(len(numbers), most=_MOST)
        if sorted(numbers) != list(range(len(numbers))):
            trainer.draft.note(
                f"trainer.devices: {shown(numbers)} names GPUs. run.devices is their number, and the first ones are "
                "taken; the environment variable CUDA_VISIBLE_DEVICES chooses others."
            )
    else:
        num_devices = count(said, most=_MOST)
    if num_devices is None:
        trainer.without("devices", "Expected a number of devices, a list of them, or auto; say it with run.devices.")
    else:
        trainer.to("devices", {"run.devices": num_devices})
    return num_devices


def _strategy(trainer: Part, *, is_alone: bool) -> None:
    """How weights, gradients and moments are divided. It decides memory, and nothing that is computed."""
    if not trainer.has("strategy"):
        if not is_alone:
            trainer.draft.note(
                "trainer.strategy is not there, and was deepspeed_stage_2_offload in that trainer. Here, several "
                "devices compute the same with ddp, in more memory; run.strategy: deepspeed_2 with run.offload: "
                "optimizer is its like."
            )
        return
    name = trainer.get("strategy")
    if isinstance(name, str) and _DDP.fullmatch(name):
        ours = ("ddp", "none")
    elif isinstance(name, str) and name in _STRATEGIES:
        ours = _STRATEGIES[name]
    else:
        trainer.without("strategy", _NO_NAME)
        return
    strategy, offload = ours
    if is_alone and offload != "none":
        trainer.without("strategy", _OFFLOAD_ALONE)
    elif is_alone:
        trainer.no_effect("strategy")
    elif offload == "none":
        trainer.to("strategy", {"run.strategy": strategy})
    else:
        trainer.to("strategy", {"run.strategy": strategy, "run.offload": offload})
        if "nvme" in name:
            trainer.draft.note(
                "trainer.strategy kept weights and moments on a drive; with run.offload: all they wait in host memory. "
                "run.deepspeed hands DeepSpeed an nvme_path (docs/many_gpus.md), which nobody has tried here."
            )


def _batch(trainer: Part, *, num_devices: int | None, num_nodes: int) -> None:
    rows = _number(trainer, "microbatch_size", "run.rows")
    target, groups = count(trainer.get("target_batch_size")), count(trainer.get("accumulate_grad_batches"), most=_MOST)
    if target:
        _target(trainer, target, rows=rows, num_devices=num_devices, num_nodes=num_nodes)
        if groups == 1:
            trainer.no_effect("accumulate_grad_batches")
        trainer.without("accumulate_grad_batches", "Not beside target_batch_size, which that trainer refuses too.")
    elif groups:
        trainer.to("accumulate_grad_batches", {"run.accumulate": groups})
    if trainer.get("target_batch_size") == -1:
        trainer.no_effect("target_batch_size")


def _target(trainer: Part, target: int, *, rows: int, num_devices: int | None, num_nodes: int) -> None:
    """target_batch_size: the rows of a step on all devices together; rounded down, as there."""
    ranks = (num_devices or 1) * num_nodes
    accumulate = max(1, target // (rows * ranks))
    if accumulate > _MOST:
        trainer.without("target_batch_size", f"run.accumulate would be {accumulate:,}; it is at most {_MOST:,}.")
        return
    trainer.to("target_batch_size", {"run.accumulate": accumulate})
    on = f" on {ranks} devices" if ranks > 1 else ""
    if target % (rows * ranks):
        of_all = f" x {ranks} devices" if ranks > 1 else ""
        trainer.draft.note(
            f"trainer.target_batch_size: {target} is no multiple of microbatch_size {rows}{of_all}: a step has "
            f"{accumulate * rows * ranks} rows{on}."
        )
    # One group of rows is the least, there as here, on any number of devices.
    if num_devices is None and accumulate > 1:
        machines = f" on each of {num_nodes} machines" if num_nodes > 1 else ""
        trainer.draft.note(
            "The config does not say how many devices a machine had, and run.devices: auto takes all there are. "
            f"run.accumulate: {accumulate} is for one device{machines}. Divide it by the number of devices of a "
            f"machine to keep target_batch_size: {target}; with 8 it is {max(1, target // (rows * num_nodes * 8))}."
        )
