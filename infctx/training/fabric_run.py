"""The only file that knows Lightning Fabric: devices, processes, strategies.

Fabric's own precision plugins cast every floating input of the wrapped call to the compute dtype. That would round the
recurrent state at every chunk border, and nobody would see it: the plugin here leaves inputs and outputs alone, and
`ChunkObjective` enters autocast itself.

A step has many backward passes and one update. Every engine takes the mean of the ranks' gradients, and each one has
its own way of being told which backward pass is the last; where it is not told, gradients are wrong without a word.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infctx.errors import MachineError, RecipeError
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective
from infctx.training.deepspeed_config import deepspeed_config
from infctx.training.engine import Part, WholeWeights
from infctx.training.optimizer_state import Numbers
from infctx.training.precision import Precision, apply_precision_, cast_parameters_
from infctx.training.ranks import ALONE, connect, count_devices
from infctx.training.step_place import random_state, set_random_state
from infctx.training.zero_stages import DeepSpeedStages, quieten

# Importing Lightning takes seconds, and it warns about things its users cannot change.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import Precision as FabricPrecision
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy

# A minute or two, of a processor that has other work.
_LONGEST_BUILD_SECONDS = 300.0

MakeOptimizer = Callable[[], torch.optim.Optimizer]


class StatePreservingPrecision(FabricPrecision):
    """Tensors that go in or come out are never cast."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = "32-true"


class FabricEngine(WholeWeights):
    """One process on one device, and what engines of many processes share.

    `precision`, `strategy` and `num_devices` (of this machine) say what was chosen where the recipe says auto.
    """

    def __init__(self, fabric: Fabric, **settings: Any) -> None:
        self._fabric = fabric
        self.precision: Precision = settings["precision"]
        self.strategy: str = settings["strategy"]
        self.num_devices: int = settings["num_devices"]
        self.ranks = settings["ranks"]
        self._offload: str = settings["offload"]

    divides_weights = False
    """Whether no process has a whole weight between two chunks."""

    @property
    def device(self) -> torch.device:
        """Where the chunks go, and the model while it computes."""
        return self._fabric.device

    def setup(self, objective: ChunkObjective, make_optimizer: MakeOptimizer) -> nn.Module:
        """Give weights their dtype and their place, then make the optimizer; call only what is returned."""
        self._model = objective.model
        with _quiet():
            wrapped = self._wrap(objective)
        self.optimizer = make_optimizer()
        return wrapped

    def backward(self, scalar: Tensor) -> None:
        """Backward pass of one chunk's objective."""
        self._fabric.backward(scalar)

    def _wrap(self, objective: ChunkObjective) -> nn.Module:
        self._settle_(objective.model, lambda part: part.to(self.device))
        return self._fabric.setup_module(objective)

    def _settle_(self, model: nn.Module, put_in_place: Callable[[nn.Module], object]) -> None:
        """Give weights their dtype and their place, block by block: host memory never has all of them in float32."""
        for block in model.blocks:
            cast_parameters_(block, self.precision)
            put_in_place(block)
        apply_precision_(model, self.precision)
        put_in_place(model)


class DdpEngine(FabricEngine):
    """All weights in every process. Gradients pile up in each, and are exchanged in the last backward pass.

    They pile up in the buckets they are sent from: a gradient that was put in place by an exchange stays there.
    """

    def expect(self, *, is_last: bool) -> bool:
        """Exchange gradients in the last backward pass only; of what it does not reach, they would not be."""
        self._ddp.require_backward_grad_sync = is_last
        return is_last

    def forget_gradient(self) -> None:
        """Begin a step, or begin it again."""
        self.optimizer.zero_grad(set_to_none=False)

    def setup(self, objective: ChunkObjective, make_optimizer: MakeOptimizer) -> nn.Module:
        """Give weights their dtype and their place, then make the optimizer; call only what is returned."""
        wrapped = super().setup(objective, make_optimizer)
        # Exchanges of nothing before there are gradients, or the first steps would hold each of them twice: the first
        # one finds the order in which gradients come, the second puts the buckets in it.
        before = random_state(self.device)
        for _ in range(2):
            self.expect(is_last=True)
            self.backward(self._weightless_loss(wrapped) * 0.0)
        set_random_state(before, self.device)
        self.forget_gradient()
        return wrapped

    def _weightless_loss(self, wrapped: nn.Module) -> Tensor:
        """The objective of one token that reaches every trained parameter."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        state = ModelState.zeros(self._model.config, 1, dtype=self._model.state_dtype, device=self.device)
        starts, weight = torch.ones_like(token, dtype=torch.bool), torch.ones_like(token, dtype=torch.float32)
        loss, *after = wrapped(token, token, weight, starts, *state, with_loss=True)
        return loss + sum(tensor.sum() for tensor in after)

    def _wrap(self, objective: ChunkObjective) -> nn.Module:
        wrapped = super()._wrap(objective)
        self._ddp = wrapped._forward_module
        return wrapped


class FsdpEngine(FabricEngine):
    """FSDP2: a part of every weight in each process, whole only while its block computes.

    Gradients are exchanged in every backward pass, so that no process holds a whole one longer than a block takes.
    """

    divides_weights = True

    def whole(self, part: Part, *, is_wanted: bool = True) -> Tensor | None:
        """All of a tensor, on the host; collected from all ranks."""
        whole = part.full_tensor() if isinstance(part, torch.distributed.tensor.DTensor) else part
        return super().whole(whole, is_wanted=is_wanted)

    def load(self, trained: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put this rank's parts of whole tensors in place."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        parts = {}
        for place, tensor in optimizer.items():
            parameter = parameters[int(place.split(".", 1)[0])]
            parts[place] = _part_of(parameter, tensor) if tensor.shape == parameter.shape else tensor
        super().load(trained, parts, numbers)

    def put(self, part: Part, whole: Tensor) -> None:
        """Put this rank's part of a whole tensor in its place."""
        super().put(part, _part_of(part, whole))

    def own_gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the gradient, on the host."""
        return {name: p.grad.to_local().cpu() for name, p in self._named() if p.grad is not None}

    def put_own_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put this rank's parts of the gradient into .grad."""
        parameters = dict(self._named())
        for name, gradient in gradients.items():
            parameter = parameters[name]
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.to_local().copy_(gradient)

    def setup(self, objective: ChunkObjective, make_optimizer: MakeOptimizer) -> nn.Module:
        """Give weights their dtype, divide them, then make the optimizer; call only what is returned."""
        wrapped = super().setup(objective, make_optimizer)
        # For as long as the process lives: a block gives out views of its activations, which nothing here writes to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return wrapped

    def _wrap(self, objective: ChunkObjective) -> nn.Module:
        wrapped = self._fabric.setup_module(objective)
        # After a pass without a graph the root stays whole: the model then names tensors that only stand for these.
        self._divided = [(name, p) for name, p in objective.model.named_parameters() if p.requires_grad]
        return wrapped

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._divided)

    def shard(self, objective: ChunkObjective, mesh: Any) -> nn.Module:
        """Divide one block after the other, so that never more than one is in memory in the dtype of training."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        pins = self.device.type == "cuda"
        policy = CPUOffloadPolicy(pin_memory=pins) if self._offload == "all" else OffloadPolicy()
        mesh = mesh["data_parallel"]
        for block in objective.model.blocks:
            cast_parameters_(block, self.precision)
            fully_shard(block, mesh=mesh, offload_policy=policy)
            if hasattr(block, "advance"):
                register_fsdp_forward_method(block, "advance")
        apply_precision_(objective.model, self.precision)
        return fully_shard(objective, mesh=mesh, offload_policy=policy)


@dataclass(frozen=True, slots=True)
class _ZeroPart:
    """A tensor that DeepSpeed has in pieces: a trained weight, or what the optimizer keeps for it."""

    parameter: nn.Parameter
    key: str | None = None
    dtype: torch.dtype = torch.float32

    def numel(self) -> int:
        """Numbers of the whole."""
        return getattr(self.parameter, "ds_numel", self.parameter.numel())


class DeepSpeedEngine(FabricEngine):
    """ZeRO of DeepSpeed, see `DeepSpeedStages`."""

    # What there is of a gradient inside a step lies in another form in each stage.
    stops_inside_steps = False

    def __init__(self, fabric: Fabric, stages: DeepSpeedStages, **settings: Any) -> None:
        super().__init__(fabric, **settings)
        self._stages = stages
        self.divides_weights = self.strategy == "deepspeed_3"

    def setup(self, objective: ChunkObjective, make_optimizer: MakeOptimizer) -> nn.Module:
        """Give weights their dtype, make the optimizer and divide both; call only what is returned."""
        self._model = objective.model
        # While parameters still have their shapes.
        optimizer = make_optimizer()
        # In the order in which an optimizer's state is numbered.
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with _quiet():
            self._settle_(objective.model, lambda part: self._stages.put_in_place_(part, self.device))
            wrapped, self.optimizer = self._stages.setup(self._fabric, objective, optimizer)
        quieten()
        return wrapped

    def expect(self, *, is_last: bool) -> bool:
        """Say whether the backward pass that comes is the last of the step.

        All of them have to reach everything: what the first one misses, stage 3 adds to the gradient of the step
        before; what the last one misses is lost where the optimizer is offloaded.
        """
        self._stages.expect(is_last=is_last)
        return True

    def backward(self, scalar: Tensor) -> None:
        """Backward pass of one chunk's objective."""
        self._stages.backward(scalar)

    def update(self, clip: float | None) -> float:
        """Clip and update, see `Engine`; of a gradient that is not finite the norm is given as inf."""
        return self._stages.update(clip)

    def forget_gradient(self) -> None:
        """Begin a step, or begin it again."""
        self._stages.forget_gradient()

    def trained(self) -> dict[str, Part]:
        """The trained weights by the names of the model."""
        return {name: _ZeroPart(parameter) for name, parameter in self._named()}

    def optimizer_state(self) -> tuple[dict[str, Part], Numbers]:
        """The optimizer's tensors and numbers."""
        parts: dict[str, Part] = {}
        numbers: Numbers = {}
        for index, parameter in enumerate(self._parameters):
            for key, value in self._stages.optimizer_state(parameter).items():
                place = f"{index}.{key}"
                if isinstance(value, int | float):
                    numbers[place] = value
                else:
                    parts[place] = _ZeroPart(parameter, key) if value is None else value
        return parts, numbers

    def whole(self, part: Part, *, is_wanted: bool = True) -> Tensor | None:
        """All of a tensor, on the host; collected from all ranks."""
        if not isinstance(part, _ZeroPart):
            return super().whole(part, is_wanted=is_wanted)
        if part.key is None:
            whole = self._stages.full_parameter(part.parameter)
        else:
            whole = self._stages.full_state(part.parameter, part.key)
        return whole if is_wanted else None

    def whole_gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient that the next update would use, on the host."""
        assert isinstance(parameter, nn.Parameter)
        return self._stages.full_gradient(parameter)

    def load(self, trained: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put whole tensors in place."""
        parameters = dict(self._named())
        for name, tensor in trained.items():
            self._stages.load_parameter(parameters[name], tensor)
        states: dict[int, dict[str, Any]] = {}
        for place, value in [*optimizer.items(), *numbers.items()]:
            index, key = place.split(".", 1)
            states.setdefault(int(index), {})[key] = value
        for index, state in sorted(states.items()):
            self._stages.load_optimizer_state(self._parameters[index], state)


def _part_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor, divided as the parameter is; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(whole.to(parameter.dtype), mesh, placements, src_data_rank=None)
    return part.to(parameter.device)


def open_engine(
    *,
    precision: str,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    time_parallel: int = 1,
    offload: str = "none",
    deepspeed: Mapping[str, Any] | None = None,
    hang_seconds: float = 1800.0,
    last_words: Callable[[], str] = lambda: "",
) -> FabricEngine:
    """Find the devices, and meet the other processes of the run where there are any.

    Args:
        as the keys of a recipe's run section. last_words: to end with where another rank is lost.
    Raises:
        RecipeError: there are not as many processes as the recipe says.
    """
    available = torch.cuda.device_count()
    accelerator = "cuda" if available else "cpu"
    num_devices = count_devices(devices)
    num_ranks = num_devices * num_nodes
    chosen = strategy if strategy != "auto" else ("single" if num_ranks == 1 else "ddp")
    settings: dict[str, Any] = {
        "precision": _choose_precision(precision, on_cuda=bool(available)),
        "strategy": chosen,
        "num_devices": num_devices,
        "offload": offload,
    }
    if chosen == "single":
        # One process, whatever a scheduler's variables in the environment say of others.
        plugins = [StatePreservingPrecision(), LightningEnvironment()]
        with _quiet():
            fabric = Fabric(accelerator=accelerator, devices=1, plugins=plugins)
            fabric.launch()
        return FabricEngine(fabric, ranks=ALONE, **settings)
    environment = _environment(num_devices, num_nodes)
    # The watch over the ranks is to be the first to say what is wrong.
    timeout = timedelta(seconds=2 * hang_seconds)
    engines: list[FabricEngine] = []
    stages = None
    if chosen.startswith("deepspeed"):
        config = deepspeed_config(stage=int(chosen[-1]), offload=offload, extra=deepspeed)
        stages, spread = DeepSpeedStages(config), _deepspeed_strategy(config, timeout=timeout)
    elif chosen == "ddp":
        # Gradients lie in the buckets they are sent from, and buffers never change.
        spread = DDPStrategy(timeout=timeout, gradient_as_bucket_view=True, broadcast_buffers=False)
    else:
        spread = _fsdp_strategy(lambda: engines[0], num_ranks=num_ranks, timeout=timeout, offload=offload)
    with _quiet():
        fabric = Fabric(
            accelerator=accelerator,
            devices=num_devices,
            num_nodes=num_nodes,
            strategy=spread,
            plugins=[StatePreservingPrecision(), environment],
        )
        _meet(fabric, environment)
    ranks = connect(
        time_parallel=time_parallel,
        local_rank=fabric.local_rank,
        local_size=num_devices,
        address=environment.main_address,
        hang_seconds=hang_seconds,
        last_words=last_words,
    )
    if stages is not None:
        return DeepSpeedEngine(fabric, stages, ranks=ranks, **settings)
    engines.append((DdpEngine if chosen == "ddp" else FsdpEngine)(fabric, ranks=ranks, **settings))
    return engines[0]


def _meet(fabric: Fabric, environment: Any) -> None:
    """Wait until all processes of the run are there."""
    try:
        fabric.launch()
    except torch.distributed.DistError as error:
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"{socket.gethostname()} cannot meet the other ranks at {environment.main_address}, port "
            f"{environment.main_port}: {reason}. Are all of them started, with the same MASTER_ADDR and MASTER_PORT, "
            "and is that port open between the machines? infctx doctor --distributed tells more."
        ) from error


def _fsdp_strategy(engine: Callable[[], Any], *, num_ranks: int, timeout: timedelta, offload: str) -> Strategy:
    """FSDP2 over all ranks. engine: known by the time that a model is set up."""
    # Where weights wait in host memory, so do the parts of the gradient whose norm is taken.
    backend = "cpu:gloo,cuda:nccl" if offload == "all" and torch.cuda.is_available() else None
    return ModelParallelStrategy(
        lambda objective, mesh: engine().shard(objective, mesh),
        data_parallel_size=num_ranks,
        tensor_parallel_size=1,
        process_group_backend=backend,
        timeout=timeout,
    )


def _deepspeed_strategy(config: dict[str, Any], *, timeout: timedelta) -> Strategy:
    """DeepSpeed's strategy of Fabric; on a CPU without Fabric's refusal, for tests.

    That overrides private methods: look here when Lightning changes.
    """
    if torch.cuda.is_available():
        return DeepSpeedStrategy(config=config, logging_level=logging.WARNING, timeout=timeout)
    # DeepSpeed looks for it when it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    class OnCpu(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._setup_distributed()

        def _setup_distributed(self) -> None:
            _tell_of_builds()
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            self._format_config()
            self._config_initialized = True

        def _initialize_engine(
            self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scheduler: object = None
        ) -> tuple[Any, Any, Any]:
            import deepspeed

            assert scheduler is None, "the loop sets the rates"
            engine, optimizer, _, _ = deepspeed.initialize(
                config=self.config,
                model=model,
                model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
                optimizer=optimizer,
                dist_init_required=False,
            )
            return engine, optimizer, None

    return OnCpu(config=config, logging_level=logging.WARNING, timeout=timeout)


def _tell_of_builds() -> None:
    """DeepSpeed waits without a word and without an end for a build that a killed process has left."""
    from torch.utils.cpp_extension import get_default_build_root

    for lock in Path(get_default_build_root()).glob("*/deepspeed*/lock"):
        if time.time() - lock.stat().st_mtime < _LONGEST_BUILD_SECONDS:
            continue
        logging.getLogger(__name__).warning(
            "DeepSpeed waits until another process has built its extension. None should need this long: stop the run, "
            "delete %s and start again.",
            lock,
        )


def _environment(num_devices: int, num_nodes: int) -> Any:
    """Who has started the processes; refuses another number of them than the recipe wants."""
    # In a job of Slurm torchrun may have started the ranks, or our launcher, which set LOCAL_RANK; srun does not.
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect() and "LOCAL_RANK" not in os.environ:
        environment = _of_slurm()
    else:
        environment = LightningEnvironment()
        _check_rank_by_hand(environment, num_devices)
    if not environment.creates_processes_externally:
        raise RecipeError(
            f"run.devices: {num_devices * num_nodes} processes have to be started, and this one was started alone. Use "
            "`infctx train`, torchrun or srun."
        )
    started = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else environment.world_size()
    if started != num_devices * num_nodes:
        raise RecipeError(
            f"run.devices × run.num_nodes: expected {num_devices} × {num_nodes} = {num_devices * num_nodes} processes, "
            f"{started} were started. Start as many, or change the two keys."
        )
    return environment


def _of_slurm() -> Any:
    try:
        return SLURMEnvironment()
    except RuntimeError as error:
        # As srun -n 16, which leaves open how many are on a machine.
        raise RecipeError(f"The processes of this run were not started as they have to be: {error}") from error


def _check_rank_by_hand(environment: Any, num_devices: int) -> None:
    """Fabric counts ranks from the machine's number and the process's in it; RANK may say something else."""
    counted = environment.node_rank() * num_devices + environment.local_rank()
    told = os.environ.get("RANK", str(counted))
    if told != str(counted):
        raise RecipeError(
            f"RANK is {told}, but NODE_RANK {environment.node_rank()} and LOCAL_RANK {environment.local_rank()} of "
            f"run.devices: {num_devices} make it rank {counted}. Set NODE_RANK, counted from 0, on every machine."
        )


def _choose_precision(wanted: str, *, on_cuda: bool) -> Precision:
    if wanted == "auto":
        return "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Fabric's advice about devices it was not asked to use."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
