"""A model through the fast kernels of a device: loss, states and every gradient as through plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.training.bptt import ChunkObjective
from infctx.training.loss import LossTerms

# Triton is interpreted where there is no GPU: the sizes are small.
IDS, TOKENS = 40, 20


def run(version: str, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Loss, new states and all gradients; two documents, one of which starts inside a row."""
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    model = Finch(
        new_config(version=version, n_layer=1, n_embd=32, vocab_size=IDS, head_size=16), has_initial_state=True
    )
    initialise_(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model = model.to(device, dtype)
    model.use_backend(backend)
    # On a CPU nobody but this test wants the operators around the recurrence in Triton.
    model.surrounding_backend = backend
    for block in model.blocks:
        block.time_mix.surrounding_backend = block.channel_mix.surrounding_backend = backend
    tokens, targets = torch.randint(IDS, (2, 2, TOKENS), generator=generator).to(device).unbind(0)
    weights = torch.rand(2, TOKENS, generator=generator).to(device, dtype)
    starts = torch.zeros(2, TOKENS, dtype=torch.bool, device=device)
    starts[1, 7] = True
    objective = ChunkObjective(model, terms=LossTerms(l2_wrap=1e-2))
    loss, *state = objective(tokens, targets, weights, starts, *model.fresh_state(2), with_loss=True)
    (loss + sum(part.square().sum() for part in state)).backward()
    results = {"loss": loss.detach()} | {f"state {index}": part.detach() for index, part in enumerate(state)}
    results |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.double().cpu() for name, x in results.items()}


@pytest.mark.parametrize("version", ["6", "5.2"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_equals_plain_torch_in_float64(backend: str, version: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is for Linux")
    expected = run(version, torch.float64, "torch")
    found = run(version, torch.float32, backend)
    assert len(found) > 20
    for name, exact in expected.items():
        # Matrix products of a GPU may round to TF32.
        bound = 1e-5 if backend == "cpp" or not torch.cuda.is_available() else 5e-3
        assert float((found[name] - exact).abs().max()) <= bound * float(exact.abs().max()), name
