"""One of several processes: runs every case it is given and writes what came out. Started by test_strategies.py."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from exactness_cases import (
    VOCAB_SIZE,
    Case,
    make_model,
    make_objective,
    make_optimizer,
    make_source,
    reference_name,
    run_alone,
    take_steps,
)

from infctx.data.chunking import Chunk
from infctx.training import bptt, fabric_run, loss
from infctx.training.bptt import ChunkObjective
from infctx.training.fabric_run import FabricEngine, open_engine


def main() -> None:
    """Arguments: the cases as JSON, and the folder to write to."""
    torch.use_deterministic_algorithms(True)
    cases = [Case(**case) for case in json.loads(sys.argv[1])]
    folder = Path(sys.argv[2])
    for case in cases:
        found, losses = run_case(case)
        if torch.distributed.get_rank() == 0:
            save(folder / case.name, found, losses)
    references = {reference_name(case): case for case in cases}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, case in list(references.items())[rank::ranks]:
        save(folder / name, *run_alone(case))


def save(path: Path, tensors: dict[str, Tensor], losses: dict[str, list[float | None]]) -> None:
    save_file(tensors, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(losses))


def run_case(case: Case) -> tuple[dict[str, Tensor], dict[str, list[float | None]]]:
    """Steps of one case on this rank; the whole gradient of the first, and the weights behind the last."""
    model = make_model(case)
    is_divided = case.strategy == "deepspeed_3"
    engine = open_engine(
        precision="bf16" if case.dtype == "bf16" else "fp32",
        devices=torch.distributed.get_world_size() if torch.distributed.is_initialized() else case.ranks,
        strategy=case.strategy,
        time_parallel=case.time_parallel,
        offload=case.offload,
        # Small parameters, too, are gathered when they are used, by all ranks at once.
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if is_divided else None,
        hang_seconds=120.0,
    )
    with _without_casts() if case.dtype == "fp64" else contextlib.nullcontext():
        objective = engine.setup(make_objective(case, model), lambda: make_optimizer(case, model))
    if engine.ranks.time_group is not None:
        from infctx.model.time_parallel import TimeGroup

        model.use_time_group(
            TimeGroup(engine.ranks.time_group, rank=engine.ranks.time_rank, size=engine.ranks.time_size)
        )
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, Tensor] = {}

    def keep_gradient() -> None:
        if not any(name.startswith("gradient.") for name in found):
            found.update({f"gradient.{name}": whole_gradient(engine, p) for name, p in names.items()})

    source = make_source(case, engine.ranks)
    buckets = {name: parameter.grad.data_ptr() for name, parameter in names.items() if case.strategy == "ddp"}
    # Of slices of 6 and 7 tokens, in pieces of 6; in bf16 the gradient of each would be rounded.
    piece = 6 if is_divided and case.dtype == "fp32" else 1000
    in_pieces = mock.patch.object(loss, "LOGITS_AT_ONCE", piece * VOCAB_SIZE)
    with _states_are_unrounded(), in_pieces:
        report = take_steps(case, model, objective, engine, source, before_update=keep_gradient)
    found.update({f"weight.{name}": engine.whole(part) for name, part in engine.trained().items()})
    # Gradients are kept once, in the buckets they are sent from.
    assert buckets == {name: names[name].grad.data_ptr() for name in buckets}
    engine.ranks.close()
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}, report


def whole_gradient(engine: FabricEngine, parameter: torch.nn.Parameter) -> Tensor:
    """The gradient that the update will use."""
    gradient = engine.whole_gradient(parameter)
    assert gradient is not None
    # The update clips it where it lies.
    return gradient.clone()


@contextlib.contextmanager
def _states_are_unrounded() -> Iterator[None]:
    """What a chunk is given as its state is what the model gets, to the bit and in its dtype."""
    run_chunk, forward = bptt.run_chunk, ChunkObjective._forward
    given: list[Sequence[Tensor]] = []

    def note(objective: object, chunk: Chunk, state: Sequence[Tensor], **settings: object) -> object:
        given.append(state)
        outputs = run_chunk(objective, chunk, state, **settings)
        assert not given, "the model was not called"
        assert [tensor.dtype for tensor in outputs.state] == [tensor.dtype for tensor in state]
        return outputs

    def look(self: ChunkObjective, *inputs: object) -> object:
        state = inputs[4]
        wanted = given.pop()
        for found, tensor in zip(state, wanted, strict=True):
            # The tokens of a cache are whole numbers.
            assert found.dtype == tensor.dtype in (torch.float32, torch.float64, torch.int32), found.dtype
            assert torch.equal(found, tensor)
        return forward(self, *inputs)

    with mock.patch.object(bptt, "run_chunk", note), mock.patch.object(ChunkObjective, "_forward", look):
        yield


def _without_casts() -> contextlib.AbstractContextManager[object]:
    """A run computes in float32; in float64 what differs is no rounding."""
    casts = {"apply_precision_": lambda model, precision: None, "cast_parameters_": lambda module, precision: None}
    return mock.patch.multiple(fabric_run, **casts)


if __name__ == "__main__":
    main()
