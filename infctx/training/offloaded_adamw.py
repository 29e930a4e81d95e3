"""AdamW whose moments and update are in host memory; only new weights go to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW over copies of the weights in host memory, with the result of `make_adamw` on them.

    A device keeps the weights and their gradients. The host keeps master copies, two moments and, while it steps, the
    gradients: 16 bytes a parameter in float32. On a CPU run everything is in host memory anyway, and this costs the
    copies.

    Args:
        groups: `parameter_groups`, of float32 or float64 parameters, on any device and moved to any before the first
            step.
        is_fused: as of `make_adamw`, on the host.
    Source: ZeRO-Offload, arXiv 2101.06840, section 4; without its delayed update.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        is_fused: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        of_groups = []
        for group in self.param_groups:
            assert all(p.dtype in (torch.float32, torch.float64) for p in group["params"]), (
                "trained weights are float32"
            )
            masters = [nn.Parameter(p.detach().to("cpu", copy=True)) for p in group["params"]]
            of_groups.append({**group, "params": masters})
        self._on_host = torch.optim.AdamW(of_groups, lr=lr, betas=betas, eps=eps, fused=is_fused)
        # Weights may be put in place from outside before the first step, as those of a checkpoint are.
        self._masters_are_current = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the masters by the gradients, and the weights by the masters; waits for the device."""
        assert closure is None, "the gradient is complete when a step is taken"
        pairs: list[tuple[Tensor, Tensor]] = []
        for group, of_host in zip(self.param_groups, self._on_host.param_groups, strict=True):
            of_host.update({key: value for key, value in group.items() if key != "params"})
            pairs += zip(group["params"], of_host["params"], strict=True)
        for parameter, master in pairs:
            if not self._masters_are_current:
                master.copy_(parameter)
            master.grad = None if parameter.grad is None else parameter.grad.to("cpu")
        self._masters_are_current = True
        self._on_host.step()
        for parameter, master in pairs:
            if parameter.grad is not None:
                parameter.copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The moments; the masters are not in it, they equal the weights."""
        return self._on_host.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with these moments, which stay in host memory, and the weights as they will be at the next step."""
        self._on_host.load_state_dict(state_dict)
        self._masters_are_current = False
