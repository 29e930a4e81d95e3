"""DeepSpeed's ZeRO under our loop: stages 1 to 3, with optimizer and weights in host memory where wanted.

A step has many backward passes, and only the last of them may finish the step's gradient: `expect` says which one is
next. DeepSpeed keeps gradients, the weights that are updated, and moments in pieces of its own, so that clipping,
updates and whole tensors go through here and never through `.grad`.

What DeepSpeed gets wrong without a word, so that nobody does it here: several backward passes without `expect` in
stages 1 and 2; a call of the engine's inner module in stage 3; a first backward pass that does not reach a parameter
in stage 3 (what follows is added to the gradient of the step before); a last one that does not with the optimizer
offloaded in stages 2 and 3 (an older gradient is used in its place).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infctx.errors import RecipeError
from infctx.training.deepspeed_config import OURS

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class DeepSpeedStages:
    """One ZeRO stage under Fabric.

    Everything but `expect` is a collective: every rank calls it, in the same order. Every backward pass has to reach
    every trained parameter.

    Args:
        config: of `deepspeed_config`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        missing = [f"{key}: {value}" for key, value in OURS.items() if config.get(key) != value]
        assert not missing, f"not a config of deepspeed_config: {missing}"
        self._config = dict(config)
        self._stage: int = config["zero_optimization"]["stage"]

    def put_in_place_(self, module: nn.Module, device: torch.device) -> None:
        """Divide the parameters of a part of the model, of which the others will have theirs then; or move them."""
        if self._stage < 3:
            module.to(device)
            return
        import deepspeed

        # One parameter at a time from host memory, so that no device ever holds the whole model. Then nobody else
        # moves what is no parameter.
        deepspeed.zero.Init(module=module, config_dict_or_path=self._config)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)

    def setup(
        self, fabric: Fabric, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Divide weights and optimizer among the ranks.

        Args:
            fabric: launched with a DeepSpeedStrategy of the same config, and a precision plugin that says 32-true.
            objective: after `put_in_place_`, in the dtypes of the run; trained weights float32.
            optimizer: over the trained parameters, without a state.
        Returns:
            What is called for each chunk, and the optimizer, whose groups carry the learning rates. Their "params" are
            DeepSpeed's flat pieces.
        """
        _check_optimizer(optimizer)
        fabric.setup(objective, optimizer, move_to_device=False)
        # Not Fabric's wrapper, which refuses every backward pass but its own.
        self._engine = fabric.strategy.model
        self._zero = self._engine.optimizer
        return self._engine, self._zero

    def expect(self, *, is_last: bool) -> None:
        """Say before the forward pass of a chunk whether its backward pass is the last of the step."""
        self._engine.set_gradient_accumulation_boundary(is_last)

    def backward(self, scalar: Tensor) -> None:
        """Backward pass of one chunk's objective; the mean over ranks is what counts."""
        self._engine.backward(scalar)

    def update(self, clip: float | None) -> float:
        """Clip, step, and forget the gradient; where it is not finite, forget it and change nothing else.

        Returns:
            The norm of the whole gradient before it was clipped; inf where it was inf or NaN.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "no backward pass was expected to be the last"
        self._zero.clip_grad = 0.0 if clip is None else clip
        self._engine.step()
        return math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm())

    def forget_gradient(self) -> None:
        """Begin a step, or begin it again; between two chunks."""
        zero = self._zero
        zero.zero_grad()
        if self._stage == 3:
            return
        # As DeepSpeed does where it skips a step; its zero_grad leaves what earlier passes have summed up.
        zero.micro_step_id = -1
        for index in range(len(zero.bit16_groups)):
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter, on the CPU; of a trained one, what the optimizer updates, float32."""
        import deepspeed

        if parameter.requires_grad:
            return deepspeed.utils.safe_get_full_fp32_param(parameter).detach().cpu()
        with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().cpu().clone()

    def full_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient that the next update would use, on the CPU; after the last backward pass of the step."""
        import deepspeed

        return deepspeed.utils.safe_get_full_grad(parameter).detach().float().cpu().clone()

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor | int | float | None]:
        """What the optimizer keeps for a trained parameter; empty before its first step. No collective.

        None stands for a tensor that is divided among the ranks, see `full_state`. The number of steps is that of the
        parameter's group.
        """
        flat = self._flat(parameter)
        state = self._zero.optimizer.state.get(flat, {})
        pieces = {key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape}
        return {key: None if key in pieces else value for key, value in state.items() if value is not None}

    def full_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The whole of a tensor that the optimizer keeps for a parameter, "exp_avg", on the CPU."""
        return self._whole(parameter, self._zero.optimizer.state[self._flat(parameter)][key], key)

    @torch.no_grad()
    def load_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Put a whole tensor in the place of a trained parameter, for the model and for the optimizer."""
        import deepspeed

        whole = whole.to(device=self._engine.device, dtype=torch.float32)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
            parameter.data.copy_(whole)
        self._put(parameter, whole, self._flat(parameter), None)

    @torch.no_grad()
    def load_optimizer_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor | int | float]) -> None:
        """Put back what `optimizer_state` and `full_state` gave; a group's parameters have one number of steps."""
        flat = self._flat(parameter)
        pieces = self._zero.optimizer.state[flat]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                pieces.setdefault(key, torch.zeros_like(flat))
                self._put(parameter, value, pieces[key], key)
            else:
                pieces[key] = value.clone() if isinstance(value, Tensor) else value

    def _whole(self, parameter: nn.Parameter, flat: Tensor, key: str) -> Tensor:
        if self._stage == 3:
            return self._zero.get_full_hp_param(parameter, key).detach().cpu()
        # DeepSpeed's own getter finds the state of the first group of parameters alone.
        whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=self._engine.device)
        mine = parameter._hp_mapping
        if mine is not None:
            to, at = mine.lp_fragment_address, mine.hp_fragment_address
            whole.narrow(0, to.start, to.numel).copy_(flat.narrow(0, at.start, at.numel))
        torch.distributed.all_reduce(whole, group=parameter._dp_group)
        return whole.view(parameter.shape).cpu()

    def _put(self, parameter: nn.Parameter, whole: Tensor, flat: Tensor, key: str | None) -> None:
        whole = whole.to(dtype=torch.float32).flatten()
        if self._stage != 3:
            mine = parameter._hp_mapping
            if mine is not None:
                at, to = mine.lp_fragment_address, mine.hp_fragment_address
                flat.narrow(0, to.start, to.numel).copy_(whole.narrow(0, at.start, at.numel))
            return
        # DeepSpeed's own setter of whole tensors fails where elements do not divide evenly among the ranks.
        size = parameter.ds_tensor.ds_numel
        own = torch.zeros(size, dtype=torch.float32, device=whole.device)
        part = whole[size * self._zero._get_param_partition_rank(parameter) :][:size]
        own[: part.numel()] = part
        self._zero.set_local_hp_param(own, parameter, key)

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        """The piece of the optimizer's own that holds this rank's part of the parameter, or of its group's."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat[self._zero.grad_position[parameter.ds_id][0]]
        for group, flat in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            if any(parameter is one for one in group):
                return flat
        raise AssertionError("not a trained parameter")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeed updates flat pieces of several tensors: only what treats each number alone gives the same."""
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.SGD):
        raise RecipeError(
            f"optimizer.name: expected adamw with a DeepSpeed strategy, got {type(optimizer).__name__}: DeepSpeed "
            "divides the moments among the ranks, and keeps them in host memory where run.offload says so."
        )


def quieten() -> None:
    """For as long as the process lives: what DeepSpeed's use of torch warns about at every step helps nobody."""
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
