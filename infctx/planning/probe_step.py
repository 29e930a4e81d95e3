"""The process of a probe step: reads what to do from stdin, and prints what it measured as one line of JSON."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infctx.adapters.quantized_base import quantize_
from infctx.checkpoint.model_file import read_model_file
from infctx.data.document import Document
from infctx.data.stream import DocumentSource
from infctx.errors import InfctxError
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.init import initialise_, new_config
from infctx.model.state import ModelState
from infctx.planning.live_bytes import LiveBytes
from infctx.planning.planned_model import adapter_of_the_same_sizes
from infctx.recipe.schema import Recipe
from infctx.run_adapter import attach_adapter
from infctx.training.boundary_store import BoundaryPlan
from infctx.training.bptt import ChunkObjective, draws_random_numbers
from infctx.training.fabric_run import FabricEngine, open_engine
from infctx.training.host_memory import trim_heap
from infctx.training.loss import LossTerms
from infctx.training.optim import make_optimizer, parameter_groups
from infctx.training.step import run_step

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_STEPS = 3


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    try:
        found = measure(Recipe.model_validate(request["recipe"]), request["config"], num_tokens=request["tokens"])
    except InfctxError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


def measure(recipe: Recipe, config: dict[str, Any] | None, *, num_tokens: int) -> dict[str, Any]:
    """Memory and time of a step, the second of three, so that the optimizer has its moments and libraries are loaded.

    Args:
        recipe: of one process, with nothing left to auto that decides memory.
        config: sizes of a model of random weights; None = the model of model.path.
        num_tokens: of each row.
    """
    recipe = recipe.resolved()
    engine = open_engine(devices=1, strategy="single", precision=recipe.run.precision)
    is_cpu = engine.device.type == "cpu"
    _warm_up(recipe, engine)
    before = _resident_bytes("VmRSS") if is_cpu else 0
    model, objective = _set_up(recipe, _model(recipe, config), engine)
    with tempfile.TemporaryDirectory(prefix="infctx-probe-") as folder:
        run = _Steps(recipe, model, objective, engine, folder=Path(folder) / "boundaries", num_tokens=num_tokens)
        run.step()
        _forget_peak(is_cpu)
        seconds = run.step()
        resident = _resident_bytes("VmHWM") - before if is_cpu and before else 0
        device_bytes = 0 if is_cpu else torch.cuda.max_memory_allocated(engine.device)
        return {
            "device": "cpu" if is_cpu else torch.cuda.get_device_name(engine.device),
            "device_bytes": device_bytes,
            "live_bytes": run.live_bytes() if is_cpu else 0,
            "resident_bytes": max(0, resident),
            "seconds": seconds,
        }


class _Steps:
    """Steps of a run on random tokens."""

    def __init__(
        self,
        recipe: Recipe,
        model: Finch,
        objective: nn.Module,
        engine: FabricEngine,
        *,
        folder: Path,
        num_tokens: int,
    ) -> None:
        self._recipe, self._model, self._objective, self._engine = recipe, model, objective, engine
        self._boundaries = BoundaryPlan(
            where=recipe.bptt.boundaries,  # type: ignore[arg-type]
            is_thinned=recipe.bptt.thin_boundaries,
            folder=folder,
        )
        drawn = np.random.default_rng(0)
        ids = drawn.integers(0, model.config.vocab_size, size=(recipe.run.rows, num_tokens), dtype=np.int32)
        weights = np.ones(num_tokens, dtype=np.float32)
        weights[0] = 0.0
        self._source = DocumentSource(
            [Document(tokens=row, weights=weights, origin=f"row {place}") for place, row in enumerate(ids)],
            rows=recipe.run.rows,
            accumulate=1,
            chunk_tokens=recipe.bptt.chunk_tokens,
            seed=0,
            epochs=None,
            steps=_STEPS,
            rank=0,
            world=1,
        )

    def step(self) -> float:
        """Take one; returns its seconds."""
        data = self._source.next_step()
        assert data is not None, f"there are {_STEPS} steps"
        model, device = self._model, self._engine.device
        zeros = ModelState.zeros(model.config, self._recipe.run.rows, dtype=model.state_dtype, device=device)
        began = time.perf_counter()
        run_step(
            self._objective,
            data,
            [zeros],
            window=self._recipe.bptt.window,
            engine=self._engine,
            clip=self._recipe.optimizer.clip,
            keeps_random_state=draws_random_numbers(model),
            boundaries=self._boundaries,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def live_bytes(self) -> int:
        """Of all tensors alive at the busiest moment of another step."""
        self._engine.forget_gradient()
        moments = [
            value
            for state in self._engine.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        with LiveBytes([*self._model.parameters(), *self._model.buffers(), *moments]) as live:
            self.step()
        return live.largest


def _model(recipe: Recipe, config: dict[str, Any] | None) -> Finch:
    if config is None:
        return read_model_file(recipe.model.path, dtype=None).model
    with torch.device("meta"):
        model = Finch(FinchConfig(**config)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # The values decide nothing, as long as they are finite.
            parameter.normal_(std=0.02, generator=generator)
    return model


def _set_up(recipe: Recipe, model: Finch, engine: FabricEngine) -> tuple[Finch, nn.Module]:
    """The model as a run trains it, and the objective as its engine wraps it."""
    torch.manual_seed(recipe.run.seed)
    if recipe.model.quantize != "none":
        quantize_(model, recipe.model.quantize, device=engine.device)
    frozen_dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    attach_adapter(adapter_of_the_same_sizes(recipe.adapter), model, frozen_dtype=frozen_dtype)
    section = recipe.optimizer
    terms = LossTerms(l2_wrap=section.l2_wrap, z_loss=section.z_loss, min_token_loss=section.min_token_loss)

    def optimizer() -> torch.optim.Optimizer:
        groups = parameter_groups(model.named_parameters(), weight_decay=section.weight_decay, decay_lr_multiplier=1.0)
        return make_optimizer(
            groups,
            name=section.name,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            device=engine.device,
            is_fused=None if section.fused == "auto" else section.fused,
        )

    objective = engine.setup(ChunkObjective(model, terms=terms), optimizer)
    model.recompute_layers(recipe.bptt.activations == "recompute")
    return model.train(), objective


def _warm_up(like: Recipe, engine: FabricEngine) -> None:
    """A step of a tiny model with the same kinds of parts: the code of libraries, and what they take once for
    themselves, is no part of the step that is measured."""
    model = Finch(new_config(version="6", n_layer=1, n_embd=64, vocab_size=64))
    initialise_(model, seed=0)
    recipe = Recipe.model_validate(
        {
            "model": {"path": "none", "quantize": like.model.quantize},
            "data": {"path": "none"},
            "adapter": {"kind": like.adapter.kind},
            "optimizer": {"lr": 1e-5, "name": like.optimizer.name},
            "bptt": {"chunk_tokens": 64, "activations": "keep", "boundaries": "device"},
            "run": {"folder": "none", "steps": 1, "precision": engine.precision},
        }
    ).resolved()
    tiny, objective = _set_up(recipe, model, engine)
    _Steps(recipe, tiny, objective, engine, folder=Path("none"), num_tokens=128).step()
    gc.collect()
    trim_heap()


def _forget_peak(is_cpu: bool) -> None:
    gc.collect()
    if not is_cpu:
        torch.cuda.reset_peak_memory_stats()
        return
    trim_heap()
    if _CLEAR.exists():
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            # Some containers forbid it; then the peak is that of the first step, too.
            return


def _resident_bytes(field: str) -> int:
    """Of this process, now (VmRSS) or at most (VmHWM); 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


if __name__ == "__main__":
    main()
