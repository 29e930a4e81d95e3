"""The only file that knows Lightning Fabric: devices, precision, backward.

Fabric's own precision plugins cast every floating input of the wrapped call to the compute dtype. That would round the
recurrent state at every chunk border, and nobody would see it: the plugin here leaves inputs and outputs alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from infctx.errors import RecipeError
from infctx.training.precision import Precision

# Importing Lightning takes seconds, and it warns about things its users cannot change.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import Precision as FabricPrecision
    from lightning.fabric.plugins.environments import LightningEnvironment


class StatePreservingPrecision(FabricPrecision):
    """Autocast around the forward in bf16; tensors that go in or come out are never cast."""

    def __init__(self, precision: Precision, device_type: str) -> None:
        super().__init__()
        self.precision = "32-true" if precision == "fp32" else "bf16-mixed"
        self._device_type = device_type

    def forward_context(self) -> AbstractContextManager[None]:
        """Matrix products in bf16, whatever their weights are stored in."""
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self._device_type, dtype=torch.bfloat16)


class FabricEngine:
    """One process on one device. `device` and `precision` say what was chosen where the recipe says auto."""

    def __init__(self, *, devices: int | str, strategy: str, precision: str) -> None:
        available = torch.cuda.device_count()
        if devices not in ("auto", 1):
            raise RecipeError(f"run.devices: expected 1 or auto, got {devices}: this version trains on one device.")
        if strategy not in ("auto", "single"):
            raise RecipeError(f"run.strategy: expected single or auto, got {strategy}: this version knows no other.")
        accelerator = "cuda" if available else "cpu"
        self.precision: Precision = _choose_precision(precision, on_cuda=bool(available))
        with _quiet():
            self._fabric = Fabric(
                accelerator=accelerator,
                devices=1,
                strategy="auto",
                # One process, whatever a scheduler's variables in the environment say of others.
                plugins=[StatePreservingPrecision(self.precision, accelerator), LightningEnvironment()],
            )
            self._fabric.launch()
        self.strategy = "single" if strategy == "auto" else strategy

    @property
    def device(self) -> torch.device:
        """Where the model and the chunks go."""
        return self._fabric.device

    def setup(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap what is called for each chunk, and the optimizer; call the wrapped objects only."""
        with _quiet():
            return self._fabric.setup(objective, optimizer)

    def backward(self, scalar: Tensor) -> None:
        """Backward of one chunk's objective."""
        self._fabric.backward(scalar)


def _choose_precision(wanted: str, *, on_cuda: bool) -> Precision:
    if wanted == "auto":
        return "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Fabric's advice about devices it was not asked to use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
