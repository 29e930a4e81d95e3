"""The stops from the model to the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from infctx.model.finch import Finch
from infctx.token_trace.gradient import StepValues, TokenValues, first_update
from infctx.token_trace.place import TokenPlace
from infctx.token_trace.stop import Stop, code_place
from infctx.token_trace.traced_run import RunToTrace
from infctx.training.bptt import backward_through_windows, draws_random_numbers
from infctx.training.loss import weighted_loss_sum
from infctx.training.step import take_step
from infctx_kernels.wkv6.reference import wkv6_reference


def model_stop(run: RunToTrace, values: TokenValues) -> Stop:
    """7: what the model computes at the token."""
    seen = values.forward
    readable = code_place(wkv6_reference)
    told = {
        "embedding_norm": seen.embedding,
        "layer_norms": seen.layers,
        "head_input_norm": seen.head_input,
        "wkv6": {**seen.recurrence, "readable": f"{readable.file}:{readable.name}"},
        "state_before_chunk": seen.state_before,
        "state_behind_chunk": seen.state_after,
    }
    return Stop(number=7, title="the model", code=Finch.forward_hidden, values=told)


def loss_stop(run: RunToTrace, place: TokenPlace, values: TokenValues, step: StepValues | None) -> Stop:
    """8: what the model makes of the target, and the loss's part in the step's."""
    told: dict[str, Any] = {"loss": values.loss, "weight": place.target_weight}
    if place.target_id is not None:
        logs = values.forward.log_probabilities
        of_target = logs[place.target_id]
        told |= {
            "cross_entropy": -float(of_target),
            "probability": float(of_target.exp()),
            "rank": 1 + int((logs > of_target).sum()),
            "vocabulary": len(logs),
            "most_probable_id": int(logs.argmax()),
        }
    if run.step is not None:
        told["weight_total"] = run.step.weight_total
    if step is not None:
        told["step_loss"] = step.loss_sum / run.step.weight_total
        told["share_of_step_loss"] = None
        if values.loss is not None and step.loss_sum != 0:
            told["share_of_step_loss"] = place.target_weight * values.loss / step.loss_sum
    told["is_without_random_numbers"] = draws_random_numbers(run.model)
    return Stop(number=8, title="the loss", code=weighted_loss_sum, values=told)


def reach_stop(run: RunToTrace, place: TokenPlace, values: TokenValues) -> Stop:
    """9: the chunks that the gradient of the loss reaches, with its norm at their borders."""
    first, chunk_tokens = values.window_first, run.step.chunk_tokens if run.step else 1
    document_chunk = place.document_begin // chunk_tokens
    # A border at the document's first token has another document before it.
    starts_document = {at for at in values.borders if at * chunk_tokens <= place.document_begin}
    borders = [
        {"before_chunk": at, "before_token": at * chunk_tokens, "gradient_norm": values.borders[at]}
        for at in sorted(values.borders, reverse=True)
        if at not in starts_document
    ]
    is_cut = document_chunk < first or (document_chunk == first and place.document_begin < first * chunk_tokens)
    told = {
        "weight": place.target_weight,
        "window": [first, values.window_last],
        "reaches_chunks": list(range(max(first, document_chunk), place.chunk + 1)) if values.borders else [],
        "borders": borders,
        "stops_at_chunk": max(first, document_chunk),
        "stops_because": "the window begins" if is_cut else "the document begins",
    }
    return Stop(number=9, title="backpropagation", code=backward_through_windows, values=told)


def optimizer_stop(run: RunToTrace, place: TokenPlace, values: TokenValues, step: StepValues | None) -> Stop:
    """10: the step's gradient, and what becomes of one weight."""
    rate = run.learning_rate.at(0)
    told: dict[str, Any] = {"learning_rate": rate, "clip": run.recipe.optimizer.clip}
    if step is None:
        told["no_update"] = "nothing to learn in this step: all weights are 0"
        return Stop(number=10, title="the optimizer", code=take_step, values=told)
    assert run.step is not None
    parameter = dict(run.model.named_parameters())[step.name]
    scale = place.target_weight / run.step.weight_total
    told |= {
        "grad_norm": step.grad_norm,
        "clip_factor": step.clip_factor,
        "token_grad_norm": None if values.grad_norm is None else scale * values.grad_norm,
        "parameter": step.name,
        "parameter_grad_norm": float(step.gradient.norm()),
        "parameter_token_grad_norm": None,
        "parameter_token_share": None,
    }
    if values.gradient is not None:
        mine, all_of_it = scale * values.gradient.double(), step.gradient.double()
        told["parameter_token_grad_norm"] = float(mine.norm())
        told["parameter_token_share"] = float((mine * all_of_it).sum() / all_of_it.square().sum())
    if not np.isfinite(step.grad_norm):
        told["no_update"] = f"the gradient is not finite (norm {step.grad_norm})"
        return Stop(number=10, title="the optimizer", code=take_step, values=told)
    groups = run.engine.optimizer.param_groups
    update = first_update(
        parameter,
        step.gradient * step.clip_factor,
        group=next(group for group in groups if any(one is parameter for one in group["params"])),
        make_optimizer=run.make_optimizer,
        learning_rate=run.learning_rate,
    )
    told["update_norm"] = float(update.norm())
    told["update_largest"] = float(update.abs().max())
    told["parameter_norm"] = float(torch.linalg.vector_norm(parameter.detach()))
    return Stop(number=10, title="the optimizer", code=take_step, values=told)
