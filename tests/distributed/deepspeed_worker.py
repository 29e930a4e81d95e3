"""One of several processes: runs the checks it is given under DeepSpeed and writes what they measured.

Started by test_deepspeed.py. The oracle of each check is autograd over whole documents, or plain torch.optim.AdamW, in
this same process over the rows of all ranks.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import Precision
from torch import Tensor, nn

from infctx.data.chunking import Chunk
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective, Window, backward_through_windows, run_chunk
from infctx.training.deepspeed_config import deepspeed_config
from infctx.training.fabric_run import _deepspeed_strategy
from infctx.training.optim import parameter_groups
from infctx.training.precision import apply_precision_
from infctx.training.zero_stages import DeepSpeedStages, quieten
from tests.conftest import random_finch

WORLD = int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["LOCAL_RANK"])
# Row groups of a step, over all ranks.
NUM_GROUPS = 4
CLIP = 0.5
# Several buckets, parameters larger than one among them; in stage 3 matrices are divided, and vectors in every process.
SMALL_BUCKETS = {"reduce_bucket_size": 900, "allgather_bucket_size": 900}
STAGE_3 = {"reduce_bucket_size": 900, "stage3_prefetch_bucket_size": 500, "stage3_param_persistence_threshold": 200}
SETTINGS: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "1-optimizer": {"stage": 1, "offload": "optimizer"},
    "2-optimizer": {"stage": 2, "offload": "optimizer"},
    "3-optimizer": {"stage": 3, "offload": "optimizer"},
    "3-all": {"stage": 3, "offload": "all"},
}


class Run:
    """A model under DeepSpeed, and what its weights are called."""

    def __init__(self, setting: str, model: nn.Module, objective: nn.Module | None = None) -> None:
        keys = SETTINGS[setting]
        extra = {"zero_optimization": STAGE_3 if keys["stage"] == 3 else SMALL_BUCKETS}
        config = deepspeed_config(**keys, extra=extra)
        self.stages = DeepSpeedStages(config)
        strategy = _deepspeed_strategy(config, timeout=timedelta(seconds=120))
        fabric = Fabric(accelerator="cpu", devices=WORLD, strategy=strategy, plugins=[Precision()])
        fabric.launch()
        quieten()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = make_adamw(model)
        self.stages.put_in_place_(model, fabric.device)
        self.call, self.optimizer = self.stages.setup(fabric, objective or ChunkObjective(model), optimizer)
        self.config = model.config

    def gradients(self) -> dict[str, Tensor]:
        return {name: self.stages.full_gradient(p) for name, p in self.trained.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: self.stages.full_parameter(p) for name, p in self.trained.items()}

    def states(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                key: self.stages.full_state(p, key) if value is None else copy.deepcopy(value)
                for key, value in self.stages.optimizer_state(p).items()
            }
            for name, p in self.trained.items()
        }


@contextlib.contextmanager
def opened(setting: str, model: nn.Module, objective: nn.Module | None = None) -> Iterator[Run]:
    run = Run(setting, model, objective)
    yield run
    run.call.destroy()


def make_model(**settings: Any) -> Finch:
    return random_finch(n_layer=2, n_embd=16, dim_ffn=29, has_initial_state=True, **settings).train()


def make_adamw(model: nn.Module) -> torch.optim.AdamW:
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, decay_lr_multiplier=2.0)
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-4)


def set_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (step + 1) * group["lr_multiplier"]


def row_group(step: int, number: int) -> list[Chunk]:
    """Two rows of 20 tokens, documents beginning inside them, in chunks of 7, 7 and 6."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, 50, (2, 21), generator=generator)
    weights = torch.rand(2, 20, generator=generator)
    weights[:, ::5] = 0.0
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 0] = starts[0, 11] = starts[1, 17] = True
    return [
        Chunk(
            tokens=tokens[:, at : min(at + 7, 20)],
            targets=tokens[:, at + 1 : min(at + 7, 20) + 1],
            loss_weight=weights[:, at : at + 7],
            starts=starts[:, at : at + 7],
            index=index,
            has_loss=True,
        )
        for index, at in enumerate(range(0, 20, 7))
    ]


def weight_total(step: int) -> float:
    chunks = [chunk for number in range(NUM_GROUPS) for chunk in row_group(step, number)]
    return float(sum(chunk.loss_weight.double().sum() for chunk in chunks))


def fresh(run: Run | Finch) -> ModelState:
    return ModelState.zeros(run.config, 2, dtype=torch.float32, device="cpu")


def backward(
    run: Run,
    step: int,
    window: Window = "document",
    *,
    call: Callable[..., Any] | None = None,
    scalar: Callable[[int], float] = lambda number: 1.0,
    expects: bool = True,
) -> None:
    """The backward passes of this rank's groups. scalar: factor of the objective of the n-th pass."""
    groups = [row_group(step, NUM_GROUPS // WORLD * RANK + n) for n in range(NUM_GROUPS // WORLD)]
    num_chunks, done = sum(map(len, groups)), [0]

    def objective(*inputs: Any, **keys: Any) -> Any:
        if torch.is_grad_enabled() and expects:
            run.stages.expect(is_last=done[0] == num_chunks - 1)
        return (call or run.call)(*inputs, **keys)

    def one_backward(objective_value: Tensor) -> None:
        run.stages.backward(objective_value * scalar(done[0]))
        done[0] += 1

    for chunks in groups:
        total = weight_total(step) / WORLD
        backward_through_windows(
            objective, chunks, fresh(run), window=window, weight_total=total, backward=one_backward
        )


def oracle_gradients(model: Finch, step: int, window: Window = "document") -> dict[str, Tensor]:
    """Autograd over the rows of all ranks, each window as one graph."""
    model.zero_grad()
    loss = torch.zeros(())
    for number in range(NUM_GROUPS):
        state = fresh(model)
        for index, chunk in enumerate(row_group(step, number)):
            if window != "document" and index % window == 0:
                state = state.detach()
            chunk_loss, state, _ = run_chunk(ChunkObjective(model), chunk, state)
            loss = loss + chunk_loss / weight_total(step)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of an element, beside the largest element of its tensor."""
    assert found.keys() == expected.keys()
    assert all(tensor.isfinite().all() for tensor in found.values())
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in found)


def is_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> bool:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    return True


class Plain:
    """The same model with torch alone, which takes gradients it is given."""

    def __init__(self, model: Finch) -> None:
        self.model, self.optimizer = model, make_adamw(model)

    def update(self, gradients: dict[str, Tensor]) -> float:
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients[name].clone()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        self.optimizer.step()
        return norm

    def follow(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])


def check_steps(setting: str, folder: Path) -> dict[str, Any]:
    """Updates with other windows, a spoilt step and an abandoned one between them."""
    model = make_model()
    plain = Plain(copy.deepcopy(model))
    measured: dict[str, list[float]] = {"gradient": [], "norm": [], "weights": [], "moments": []}
    with opened(setting, model) as run:
        for step, window in enumerate((1, 2, "document")):
            set_rate(run.optimizer, step)
            set_rate(plain.optimizer, step)
            run.stages.forget_gradient()
            backward(run, step, window)
            gradients = run.gradients()
            measured["gradient"].append(largest_error(gradients, oracle_gradients(plain.model, step, window)))
            norm, expected_norm = run.stages.update(CLIP), plain.update(gradients)
            measured["norm"].append(abs(norm / expected_norm - 1.0))
            found, states = run.weights(), run.states()
            measured["weights"].append(largest_error(found, dict(plain.model.named_parameters())))
            expected = {name: plain.optimizer.state[p] for name, p in plain.model.named_parameters()}
            for key in ("exp_avg", "exp_avg_sq"):
                pair = [{name: of[name][key] for name in of} for of in (states, expected)]
                measured["moments"].append(largest_error(*pair))
            assert {float(state["step"]) for state in states.values()} == {step + 1.0}
            # From here on what comes is measured, not what has come together before.
            plain.follow(found)
            if step < 2:
                spoil(run, nan_or_inf=[float("nan"), float("inf")][step])
                is_same((run.weights(), run.states()), (found, states))
                abandon(run)
    return {name: max(values) for name, values in measured.items()}


def spoil(run: Run, *, nan_or_inf: float) -> None:
    """A step whose gradient is not finite, by one chunk of one rank."""
    run.stages.forget_gradient()
    backward(run, 7, scalar=lambda number: nan_or_inf if RANK == WORLD - 1 and number == 1 else 1.0)
    assert run.stages.update(CLIP) == float("inf")


def abandon(run: Run) -> None:
    """A step that is left in its second forward pass with a graph."""
    passes = [0]

    def leave(*inputs: Any, **keys: Any) -> Any:
        passes[0] += torch.is_grad_enabled()
        if passes[0] == 2:
            raise InterruptedError
        return run.call(*inputs, **keys)

    with contextlib.suppress(InterruptedError):
        backward(run, 8, call=leave)


def check_save(setting: str, folder: Path) -> dict[str, Any]:
    """Two steps, everything written, two more."""
    model = make_model()
    with opened(setting, model) as run:
        for part, steps in (("middle", (0, 1)), ("end", (2, 3))):
            go_on(run, steps)
            saved = {"weights": run.weights(), "states": run.states()}
            if RANK == 0:
                torch.save(saved, folder / f"{part}.pt")
        # The other ranks may read it next.
        torch.distributed.barrier()
    return {}


def go_on(run: Run, steps: tuple[int, ...]) -> None:
    for step in steps:
        set_rate(run.optimizer, step)
        backward(run, step)
        run.stages.update(CLIP)


def check_load(setting: str, folder: Path) -> dict[str, Any]:
    """What another number of ranks in another stage has written, read; then two more steps."""
    middle, end = (torch.load(folder / f"{part}.pt") for part in ("middle", "end"))
    with opened(setting, make_model(seed=7)) as run:
        for name, parameter in run.trained.items():
            run.stages.load_parameter(parameter, middle["weights"][name])
            run.stages.load_optimizer_state(parameter, middle["states"][name])
        is_same((run.weights(), run.states()), (middle["weights"], middle["states"]))
        go_on(run, (2, 3))
        assert {float(state["step"]) for state in run.states().values()} == {4.0}
        changed = {name: weight - middle["weights"][name] for name, weight in run.weights().items()}
        expected = {name: weight - middle["weights"][name] for name, weight in end["weights"].items()}
        weights = largest_error(run.weights(), end["weights"])
        return {"weights": weights, "change": largest_error(changed, expected)}


class Bf16Objective(ChunkObjective):
    """Looks at what it is given."""

    def forward(self, *inputs: Any, **keys: Any) -> Any:
        self.given = [tensor.detach().clone() for tensor in inputs[4:]]
        frozen = {p.dtype for p in self.model.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16}
        assert {p.dtype for p in self.model.parameters() if p.requires_grad} == {torch.float32}
        return super().forward(*inputs, **keys)


def check_bf16_lora(setting: str, folder: Path) -> dict[str, Any]:
    """Frozen bf16 beside trained float32, layers recomputed; the state goes through forward in float32, unrounded."""
    model = make_model()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["key", "value", "head"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("lora_", "lerp_key", "initial")))
    apply_precision_(model, "bf16")
    model.recompute_layers()
    alone = copy.deepcopy(model)
    objective, objective_alone = Bf16Objective(model), Bf16Objective(alone)
    with opened(setting, model, objective) as run:

        def call(*inputs: Any, **keys: Any) -> Any:
            outputs = run.call(*inputs, **keys)
            for given, passed, after in zip(objective.given, inputs[4:], outputs[1:], strict=True):
                assert given.dtype == after.dtype == torch.float32
                assert torch.equal(given, passed)
            return outputs

        backward(run, 0, call=call)
        for number in range(NUM_GROUPS):
            chunks, total = row_group(0, number), weight_total(0)
            backward_through_windows(objective_alone, chunks, fresh(alone), window="document", weight_total=total)
        expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
        error = largest_error(run.gradients(), expected)
        before, frozen = run.weights(), {n: p for n, p in model.named_parameters() if not p.requires_grad}
        run.stages.update(CLIP)
        for name, parameter in alone.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(run.stages.full_parameter(frozen[name]), parameter)
        moved = {name: float((weight - before[name]).abs().max()) for name, weight in run.weights().items()}
        return {"gradient": error, "moved": min(moved.values())}


def check_without_expect(setting: str, folder: Path) -> dict[str, Any]:
    """Nobody says which backward pass is the last."""
    model = make_model()
    alone = copy.deepcopy(model)
    with opened(setting, model) as run:
        backward(run, 0, expects=False)
        return {"gradient": largest_error(run.gradients(), oracle_gradients(alone, 0))}


def check_inner_module(setting: str, folder: Path) -> dict[str, Any]:
    """The chunks go through what the engine wraps, not through the engine."""
    model = make_model()
    alone = copy.deepcopy(model)
    with opened(setting, model) as run:
        backward(run, 0, call=run.call.module)
        return {"gradient": largest_error(run.gradients(), oracle_gradients(alone, 0))}


def check_unreached(setting: str, folder: Path) -> dict[str, Any]:
    """Two chunks; only the first one's backward pass reaches the head."""
    model = make_model()
    alone = copy.deepcopy(model)
    chunks = row_group(0, RANK)[:2]
    with opened(setting, model) as run:
        for index, chunk in enumerate(chunks):
            run.stages.expect(is_last=index == 1)
            loss, state, _ = run_chunk(run.call, chunk, fresh(run), with_loss=index == 0)
            run.stages.backward(loss + sum(tensor.sum() for tensor in state))
        head = run.stages.full_gradient(run.trained["head.weight"])
    for number in range(WORLD):
        loss, _, _ = run_chunk(ChunkObjective(alone), row_group(0, number)[0], fresh(alone))
        (loss / WORLD).backward()
    return {"gradient": largest_error({"head": head}, {"head": alone.head.weight.grad})}


def check_unreached_first(setting: str, folder: Path) -> dict[str, Any]:
    """The second step, of two chunks, of which only the second goes backward through head and last channel mix."""
    model = make_model()
    alone = copy.deepcopy(model)
    chunks = row_group(0, RANK)[:2]
    with opened(setting, model) as run:
        go_on(run, (0,))
        with torch.no_grad():
            for name, weight in run.weights().items():
                alone.get_parameter(name).copy_(weight)
        run.stages.forget_gradient()
        for index, chunk in enumerate(chunks):
            run.stages.expect(is_last=index == 1)
            loss, state, _ = run_chunk(run.call, chunk, fresh(run), with_loss=index == 1)
            run.stages.backward(loss + sum(tensor.sum() for tensor in state))
        gradients = run.gradients()
    for number in range(WORLD):
        for index, chunk in enumerate(row_group(0, number)[:2]):
            loss, state, _ = run_chunk(ChunkObjective(alone), chunk, fresh(alone), with_loss=index == 1)
            ((loss + sum(tensor.sum() for tensor in state)) / WORLD).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    return {"gradient": largest_error(gradients, expected)}


CHECKS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "steps": check_steps,
    "save": check_save,
    "load": check_load,
    "bf16_lora": check_bf16_lora,
    "without_expect": check_without_expect,
    "inner_module": check_inner_module,
    "unreached": check_unreached,
    "unreached_first": check_unreached_first,
}


def main() -> None:
    """Arguments: pairs of check and setting as JSON, and the folder for what is written."""
    torch.use_deterministic_algorithms(True)
    folder = Path(sys.argv[2])
    measured = {}
    began = time.perf_counter()
    for check, setting in json.loads(sys.argv[1]):
        measured[f"{check} {setting}"] = CHECKS[check](setting, folder)
        if RANK == 0:
            print(check, setting, f"done after {time.perf_counter() - began:.1f} s")
            (folder / f"measured-{WORLD}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
