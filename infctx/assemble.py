"""From a recipe to live objects: the only file that knows every part, and therefore one of the longest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import infctx
from infctx.adapters.adapter import Adapter
from infctx.adapters.quantized_base import quantize_, stored_bytes
from infctx.checkpoint.atomic import remove_tree, remove_unfinished, write_file_atomically
from infctx.checkpoint.model_file import ModelFile, read_model_file
from infctx.checkpoint.run_lock import RunLock
from infctx.checkpoint.writers import together
from infctx.errors import MachineError, RecipeError, machine_fault
from infctx.free_memory import free_bytes, free_host_bytes
from infctx.model.config import FinchConfig
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.model.time_parallel import TimeGroup
from infctx.planning.before_training import RunShape, least_room, plan_before_training, room_here
from infctx.planning.from_recipe import tokens_cached
from infctx.recipe.load import RECIPE_FILE, write_recipe
from infctx.recipe.optimizer_section import DECAY_FRACTION
from infctx.recipe.schema import Recipe
from infctx.run_adapter import adapter_writer, attach_adapter, keep_start, read_start, start_digest, start_of
from infctx.run_data import RunData, Say, open_data, step_source
from infctx.run_folder import (
    RESULT_FILE,
    RESULT_KEYS,
    as_begun,
    as_kept,
    beside,
    finished_result,
    from_anywhere,
    last_checkpoint,
)
from infctx.run_report import RunReport
from infctx.spread import check_alone, check_model_spread, check_spread, data_ranks, is_spread
from infctx.token_trace import RunToTrace, Stop, trace_token, without_files
from infctx.training.activation_memory import should_recompute
from infctx.training.averaged_weights import AveragedWeights
from infctx.training.boundary_store import BoundaryPlan, choose_store, state_bytes
from infctx.training.bptt import ChunkObjective
from infctx.training.cache_place import cache_bytes, cache_goes_to_host
from infctx.training.fabric_run import FabricEngine, open_engine
from infctx.training.gradient_check import GradientCheck, check_gradient
from infctx.training.host_memory import HeapTrimmer
from infctx.training.logger_writers import WandbOptions, writer_openers
from infctx.training.loggers import NO_LOGGERS, Loggers, check_loggers
from infctx.training.loop import train
from infctx.training.loss import LossTerms
from infctx.training.metrics import MetricsLog
from infctx.training.optim import LearningRate, make_optimizer, moment_bytes, parameter_groups
from infctx.training.progress import LoggedProgress, Progress, SilentProgress
from infctx.training.ranks import ALONE, Ranks
from infctx.training.run import LoopSettings, Run
from infctx.training.signals import StopRequested
from infctx_kernels import BackendError, choose_backend

LOG_FILE = "run.log"
LEDGER_FILE = "ledger.json"
BOUNDARY_FOLDER = "boundaries"


def run_recipe(recipe: Recipe, progress: Progress, *, fresh: bool = False) -> dict[str, Any]:
    """Train a recipe to its end, or continue it where its folder left off; every process of a run calls this.

    Args:
        fresh: leave a used run folder alone and begin beside it.
    Returns:
        steps, train_loss, val_loss, first_val_loss, tokens, folder; already_finished, True where nothing was done;
        speaks, True in the process that tells people.
    Raises:
        MachineError: the disk or the memory failed; names the last good checkpoint.
    """
    recipe = from_anywhere(recipe.resolved())
    if not is_spread(recipe):
        check_alone(os.environ)
    # Who the others are has to be known before anything is looked at together.
    last_words = _LastWords()
    engine = _open_engine(recipe, last_words) if is_spread(recipe) else None
    ranks = ALONE if engine is None else engine.ranks
    try:
        shown = progress if ranks.is_first else SilentProgress()
        result = _run_as_rank(recipe, engine, ranks, shown, last_words, fresh=fresh)
    except BaseException as error:
        if isinstance(error, StopRequested) or getattr(error, "is_shared", False):
            error.is_told = not ranks.is_first  # type: ignore[union-attr]
            ranks.close()
        else:
            ranks.fail(error)
        raise
    ranks.close()
    return {**result, "speaks": ranks.is_first}


class _LastWords:
    """What a run ends with that has lost a rank. folder: where it has come to be; None = nowhere yet."""

    folder: Path | None = None

    def __call__(self) -> str:
        return "" if self.folder is None else last_checkpoint(self.folder)


def _open_engine(recipe: Recipe, last_words: Callable[[], str]) -> FabricEngine:
    check_spread(recipe)
    run = recipe.run
    return open_engine(
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=run.strategy,
        precision=run.precision,
        time_parallel=run.time_parallel,
        offload=run.offload,
        deepspeed=run.deepspeed,
        hang_seconds=run.hang_seconds,
        last_words=last_words,
    )


def _run_as_rank(
    recipe: Recipe,
    engine: FabricEngine | None,
    ranks: Ranks,
    progress: Progress,
    last_words: _LastWords,
    *,
    fresh: bool,
) -> dict[str, Any]:
    folder = Path(recipe.run.folder)
    lock = contextlib.ExitStack()
    try:
        with together(ranks) as share:
            sections = recipe.to_mapping()
            keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
            _check_same("recipe", share(keys))
            begun = _begin(recipe, fresh=fresh) if ranks.is_first else None
            recipe, finished = share(begun)[0]
            if finished is not None:
                return {**finished, "already_finished": True}
            folder = last_words.folder = Path(recipe.run.folder)
            # Everything that can be wrong with the recipe, the model or the data is found before the folder is made.
            # On every machine one rank goes first: what it prepares on the disk, the others find there.
            parts, engine = None, engine or _open_engine(recipe, last_words)
            for goes_first in (True, False):
                if (ranks.local_rank == 0) == goes_first:
                    with ranks.patient("opening the model and the data"):
                        parts = _open_parts(recipe, engine, _quietly(progress.message))
                share(None)
            assert parts is not None
            _check_same("model and data", share(_fingerprints(parts)))
            rooms = share(room_here(parts.model_file.model, parts.engine.device, folder))
            plan_lines = plan_before_training(recipe, _shape_of(parts), least_room(rooms))
            if ranks.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                lock.enter_context(RunLock(folder))
                finished = _enter_folder(recipe, parts, folder)
            finished = share(finished)[0]
            if finished is not None:
                return {**finished, "already_finished": True}
        return _run_in_folder(recipe, parts, progress, folder, plan_lines)
    except Exception as error:
        fault = str(error) if isinstance(error, MachineError) else machine_fault(error)
        if fault is not None:
            said = MachineError(f"{fault}\n{last_checkpoint(folder)}")
            if isinstance(error, MachineError):
                said.is_shared, said.is_told = error.is_shared, error.is_told
            raise said from error
        raise
    finally:
        lock.close()


def _begin(recipe: Recipe, *, fresh: bool) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe as it goes on in its folder, and the result where it has come to its end there."""
    if fresh:
        recipe = beside(recipe)
    folder = Path(recipe.run.folder)
    return as_begun(folder, recipe), finished_result(folder)


def _check_same(what: str, of_ranks: Sequence[Mapping[str, object]]) -> None:
    """Refuse ranks that would train something else than the first."""
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[0]:
            keys = dict.fromkeys([*of_ranks[0], *other])
            differing = [key for key in keys if of_ranks[0].get(key) != other.get(key)]
            pairs = [f"{key}: {of_ranks[0].get(key)} on rank 0, {other.get(key)} on rank {rank}" for key in differing]
            raise RecipeError(
                f"The {what} of rank {rank} differs from that of rank 0: {'; '.join(pairs)}. Give every machine the "
                "same recipe, files and packages."
            )


def _fingerprints(parts: _Parts) -> dict[str, object]:
    """What has to be the same on all ranks, in short."""
    validation = parts.data.validation
    return {
        "model file": parts.model_file.fingerprint,
        "start of the adapter": start_digest(start_of(parts.adapter)),
        "training documents": parts.data.training.fingerprint,
        "held-out documents": validation.fingerprint if validation else None,
        "tokenizer": parts.data.tokenizer,
        "infctx": infctx.__version__,
        "torch": torch.__version__,
    }


def _enter_folder(recipe: Recipe, parts: _Parts, folder: Path) -> dict[str, Any] | None:
    """Write what a run folder begins with; the result where another process has brought the run to its end."""
    # Another process may have been here between the first look and the lock.
    as_begun(folder, recipe)
    if (finished := finished_result(folder)) is not None:
        return finished
    remove_unfinished(folder)
    write_recipe(as_kept(folder, _with_choices(recipe, parts)), folder / RECIPE_FILE)
    _write_json(folder / LEDGER_FILE, parts.data.account())
    keep_start(parts.adapter, folder, base_fingerprint=parts.model_file.fingerprint)
    # A killed run's boundaries are worth nothing to the next one.
    remove_tree(folder / BOUNDARY_FOLDER)
    return None


def _run_in_folder(
    recipe: Recipe, parts: _Parts, progress: Progress, folder: Path, plan_lines: Sequence[str]
) -> dict[str, Any]:
    ranks = parts.engine.ranks
    logged = LoggedProgress(progress, folder / LOG_FILE) if ranks.is_first else progress
    run = _assemble(recipe, parts, logged, plan_lines)
    divides = parts.engine.divides_weights or ranks.time_size > 1
    report = RunReport(recipe, run, parts.data, engine_divides=divides, headline=run.headline)
    report.before()
    try:
        done = train(run)
    except StopRequested:
        report.write("stopped")
        raise
    finally:
        remove_tree(_boundary_folder(folder, ranks))
    # Nobody else is inside of it any more.
    ranks.wait()
    values = (done.step, done.train_loss, done.val_loss, done.first_val_loss, done.tokens, str(folder))
    result = dict(zip(RESULT_KEYS, values, strict=True))
    if ranks.is_first:
        remove_tree(folder / BOUNDARY_FOLDER)
        _write_json(folder / RESULT_FILE, result)
    report.after()
    return {**result, "already_finished": False}


def _boundary_folder(folder: Path, ranks: Ranks) -> Path:
    return folder / BOUNDARY_FOLDER if ranks.size == 1 else folder / BOUNDARY_FOLDER / f"rank-{ranks.rank}"


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_file_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def check_recipe(
    recipe: Recipe,
    *,
    with_gradient: bool = False,
    gradient_tokens: int | None = None,
    say: Say = lambda line: None,
) -> tuple[list[str], GradientCheck | None]:
    """Open everything a run of the recipe needs, without training or writing anything.

    Args:
        with_gradient: also compare gradients, see `check_gradient`; gradient_tokens is its num_tokens.
        say: told how far a long preparation of the data is.
    Returns:
        What would be printed at the start of the run, and the comparison where it was asked for.
    """
    recipe = from_anywhere(recipe.resolved())
    recipe = as_begun(Path(recipe.run.folder), recipe)
    # One process finds what is wrong with the recipe, and its gradient is that of many.
    parts = _open_parts(recipe, open_engine(devices=1, strategy="single", precision=recipe.run.precision), say)
    lines = _headline(recipe, parts)
    if not with_gradient:
        return lines, None
    objective = _set_up(recipe, parts)
    _choose_activations(recipe, parts, objective)
    measured = check_gradient(
        objective,
        parts.model_file.model,
        parts.data.training,
        chunk_tokens=recipe.bptt.chunk_tokens,
        window=recipe.bptt.window,
        precision=parts.engine.precision,
        backward=parts.engine.backward,
        num_tokens=gradient_tokens,
    )
    return lines, measured


def trace_recipe(recipe: Recipe, row: int, token: int, *, say: Say = lambda line: None) -> list[Stop]:
    """Follow one token of the first step of a run of the recipe, without training or writing anything.

    Args:
        row: of all rows of the step, those of other ranks too, from 0. token: in the row, from 0.
        say: told how far a long preparation of the data is.
    Raises:
        DataError: there is no such token; says which there are.
    """
    written, recipe = recipe, from_anywhere(recipe.resolved())
    recipe = as_begun(Path(recipe.run.folder), recipe)
    # One process has the rows of all of them, as more groups.
    run = recipe.run.model_copy(update={"accumulate": recipe.run.accumulate * data_ranks(recipe)})
    parts = _open_parts(recipe, open_engine(devices=1, strategy="single", precision=recipe.run.precision), say)
    objective = _set_up(recipe, parts)
    _choose_activations(recipe, parts, objective)
    source = step_source(recipe.model_copy(update={"run": run}), parts.data)
    return trace_token(
        RunToTrace(
            recipe=recipe,
            written=written,
            data=parts.data,
            model=parts.model_file.model,
            objective=objective,
            engine=parts.engine,
            step=source.next_step(),
            learning_rate=_learning_rate(recipe, total_steps=source.total_steps),
            make_optimizer=lambda groups: _optimizer_of(recipe, groups, parts.engine.device),
            boundaries=without_files(parts.boundaries),
        ),
        row,
        token,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    engine: FabricEngine
    model_file: ModelFile
    adapter: Adapter
    data: RunData
    backend: str
    num_base_parameters: int
    base_in_words: str
    boundaries: BoundaryPlan


def _quietly(say: Say) -> Say:
    """The same, but a terminal that is gone ends nothing."""

    def say_or_not(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            say(line)

    return say_or_not


def _open_parts(recipe: Recipe, engine: FabricEngine, say: Say) -> _Parts:
    check_loggers(recipe.run.loggers)
    model_file = read_model_file(recipe.model.path, dtype=None)
    check_model_spread(recipe, model_file.model.config)
    wanted = None if recipe.kernel.backend == "auto" else recipe.kernel.backend
    try:
        backend = choose_backend(wanted, device=engine.device, head_size=model_file.model.config.head_size)
    except BackendError as error:
        raise RecipeError(f"kernel.backend: {error}") from error
    model_file.model.use_backend(backend)
    data = open_data(recipe, model_file=model_file, say=say)
    num_base_parameters = sum(parameter.numel() for parameter in model_file.model.parameters())
    # New adapter weights are drawn from the global generator.
    torch.manual_seed(recipe.run.seed)
    base_in_words = _quantize(recipe, model_file.model, engine.device)
    start = read_start(recipe.adapter, Path(recipe.run.folder), base_fingerprint=model_file.fingerprint)
    frozen_dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    adapter = attach_adapter(recipe.adapter, model_file.model, start=start, frozen_dtype=frozen_dtype)
    # A rate for a weight that is not there is found before the folder is made.
    _parameter_groups(recipe, model_file.model)
    return _Parts(
        engine=engine,
        model_file=model_file,
        adapter=adapter,
        data=data,
        backend=str(backend),
        num_base_parameters=num_base_parameters,
        base_in_words=base_in_words,
        boundaries=_boundaries(recipe, model_file.model, data, engine),
    )


def _with_choices(recipe: Recipe, parts: _Parts) -> Recipe:
    """The recipe with what the model file and this machine decided."""
    engine = parts.engine
    chosen = {"precision": engine.precision, "devices": engine.num_devices, "strategy": engine.strategy}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tokenizer": parts.data.tokenizer}),
            "run": recipe.run.model_copy(update=chosen),
            "kernel": recipe.kernel.model_copy(update={"backend": parts.backend}),
        }
    )


def _quantize(recipe: Recipe, model: Finch, device: torch.device) -> str:
    """Store the base as the recipe says, and say how; "" for floats."""
    kind = recipe.model.quantize
    if kind == "none":
        return ""
    error = quantize_(model, kind, device=device)
    return (
        f"{kind} in the matrices of the blocks, relative error {error:.2g} at most; {stored_bytes(model) / 1e6:,.0f} MB"
    )


def _set_up(recipe: Recipe, parts: _Parts) -> nn.Module:
    """The objective as the engine wraps it, which has the optimizer then."""
    model, section = parts.model_file.model, recipe.optimizer
    model.add_embedding_noise(section.embedding_noise, chunk_tokens=recipe.bptt.chunk_tokens)
    ranks = parts.engine.ranks
    if ranks.time_group is not None:
        model.use_time_group(TimeGroup(ranks.time_group, rank=ranks.time_rank, size=ranks.time_size))
    terms = LossTerms(l2_wrap=section.l2_wrap, z_loss=section.z_loss, min_token_loss=section.min_token_loss)
    return parts.engine.setup(
        ChunkObjective(model, terms=terms), lambda: _optimizer(recipe, model, parts.engine.device)
    )


def _parameter_groups(recipe: Recipe, model: Finch) -> list[dict[str, Any]]:
    section = recipe.optimizer
    return parameter_groups(
        model.named_parameters(),
        weight_decay=section.weight_decay,
        decay_lr_multiplier=section.decay_lr_multiplier,
        lr_multipliers=section.lr_multipliers,
        state_lr_multiplier=None if section.state_lr is None else section.state_lr / section.lr,
    )


def _optimizer(recipe: Recipe, model: Finch, device: torch.device) -> torch.optim.Optimizer:
    return _optimizer_of(recipe, _parameter_groups(recipe, model), device)


def _optimizer_of(recipe: Recipe, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    section = recipe.optimizer
    return make_optimizer(
        groups,
        name=section.name,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        device=device,
        is_fused=None if section.fused == "auto" else section.fused,
    )


def _learning_rate(recipe: Recipe, *, total_steps: int) -> LearningRate:
    section = recipe.optimizer
    return LearningRate(
        lr=section.lr,
        lr_final=section.lr if section.lr_final is None else section.lr_final,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        total_steps=total_steps,
        decay_fraction=section.decay_fraction or DECAY_FRACTION,
    )


def _assemble(recipe: Recipe, parts: _Parts, progress: Progress, plan_lines: Sequence[str]) -> Run:
    model, optimizer_section = parts.model_file.model, recipe.optimizer
    objective = _set_up(recipe, parts)
    # Once the weights are on their device, and before the memory that is left there is asked for.
    decay = optimizer_section.ema_decay
    averaged = None if decay is None else AveragedWeights(model, decay=decay)
    is_recomputed = _choose_activations(recipe, parts, objective)
    ranks = parts.engine.ranks
    if ranks.rank > 0:
        # What is drawn for dropout is drawn for tokens that no other rank has.
        torch.manual_seed(int(torch.randint(2**62, (ranks.size,))[ranks.rank]))
    source = step_source(recipe, parts.data, ranks=ranks)
    folder = Path(recipe.run.folder)
    return Run(
        folder=folder,
        model=model,
        objective=objective,
        engine=parts.engine,
        strategy=parts.engine.strategy,
        device=parts.engine.device,
        source=source,
        validation=parts.data.validation or (),
        set_names=parts.data.set_names,
        validation_set_names=parts.data.validation.set_names if parts.data.validation else None,
        learning_rate=_learning_rate(recipe, total_steps=source.total_steps),
        settings=LoopSettings(
            window=recipe.bptt.window,
            chunk_tokens=recipe.bptt.chunk_tokens,
            rows=recipe.run.rows,
            clip=optimizer_section.clip,
            checkpoint_every=recipe.run.checkpoint_every,
            validate_every=recipe.run.validate_every,
            checkpoint_minutes=recipe.run.checkpoint_minutes,
            keep_checkpoints=recipe.run.keep_checkpoints,
            max_nonfinite_steps=recipe.run.max_nonfinite_steps,
            boundaries=parts.boundaries,
            moment_bytes=moment_bytes(optimizer_section.name, parts.engine.device),
        ),
        metrics=MetricsLog(folder / "metrics.jsonl"),
        progress=progress,
        headline=[*_headline(recipe, parts), _memory_in_words(parts, is_recomputed=is_recomputed), *plan_lines],
        facts={
            "tokenizer": parts.data.tokenizer,
            "base_fingerprint": parts.model_file.fingerprint,
            "adapter_start": start_digest(start_of(parts.adapter)),
            "infctx": infctx.__version__,
            "torch": torch.__version__,
        },
        adapter_has_files=parts.adapter.has_files,
        save_adapter=adapter_writer(
            parts.adapter,
            model,
            folder / "adapter",
            base_fingerprint=parts.model_file.fingerprint,
            averaged=averaged,
        ),
        trimmer=HeapTrimmer(parts.engine.device),
        averaged=averaged,
        loggers=_loggers(recipe, progress) if ranks.is_first else NO_LOGGERS,
    )


def _loggers(recipe: Recipe, progress: Progress) -> Loggers:
    folder, section = Path(recipe.run.folder), recipe.run.wandb
    options = WandbOptions(**{**section.model_dump(), "name": section.name or folder.name})
    openers = writer_openers(recipe.run.loggers, folder, wandb=options, facts=recipe.to_mapping())
    return Loggers(openers, progress.message)


def _boundaries(recipe: Recipe, model: Finch, data: RunData, engine: FabricEngine) -> BoundaryPlan:
    """Where boundary states go, and what attention has cached, for the longest window of the run; refuses what has no
    room."""
    bptt, device = recipe.bptt, engine.device
    folder = _boundary_folder(Path(recipe.run.folder), engine.ranks)
    # Of the host and the disk, every rank of the machine wants as much.
    sharers = engine.ranks.local_size
    longest = max(data.longest, recipe.data.pack_tokens or 0)
    num_chunks = -(-longest // bptt.chunk_tokens) if bptt.window == "document" else bptt.window
    one_state = state_bytes(ModelState.zeros(model.config, recipe.run.rows, dtype=torch.float32, device="meta"))
    cache_on_host = False
    if model.config.n_attention:
        _, cached = tokens_cached(recipe, longest)
        cache_on_host = cache_goes_to_host(
            model.config, device, rows=recipe.run.rows, num_tokens=cached, sharers=sharers
        )
    plan = BoundaryPlan(is_thinned=bptt.thin_boundaries, folder=folder, cache_on_host=cache_on_host)
    needed = one_state * plan.most_kept(num_chunks)
    where = choose_store(needed, device, sharers=sharers) if bptt.boundaries == "auto" else bptt.boundaries
    above = next(path for path in folder.absolute().parents if path.exists())
    on_host = free_host_bytes() // sharers
    on_device = on_host if device.type == "cpu" else free_bytes(device)
    free = {"device": on_device, "host": on_host, "disk": shutil.disk_usage(above).free // sharers}[where]
    if needed > free:
        thinned = replace(plan, is_thinned=True)
        raise RecipeError(
            f"bptt.window: {bptt.window} does not fit: up to {plan.most_kept(num_chunks):,} boundary states of "
            f"{one_state / 1e6:,.1f} MB are {needed / 1e9:,.2f} GB, and {where} has {free / 1e9:,.2f} GB free. Use "
            f"bptt.thin_boundaries: true ({one_state * thinned.most_kept(num_chunks) / 1e9:,.2f} GB), a longer "
            "bptt.chunk_tokens, a window of fewer chunks, or another of bptt.boundaries: device, host, disk."
        )
    return replace(plan, where=where)


def _choose_activations(recipe: Recipe, parts: _Parts, objective: nn.Module) -> bool:
    """Whether each layer is computed again in the backward pass."""
    model, wanted, ranks = parts.model_file.model, recipe.bptt.activations, parts.engine.ranks
    if wanted == "auto" and parts.engine.divides_weights:
        # Whoever divides weights is short of memory, and no rank can measure on its own.
        is_recomputed = True
    elif wanted == "auto":
        longest = parts.data.longest
        # A stream has documents one after another, however short.
        chunk = recipe.bptt.chunk_tokens if recipe.data.mode == "stream" else min(recipe.bptt.chunk_tokens, longest)
        model.train()
        is_recomputed = should_recompute(
            # What an engine of many ranks wraps expects a backward pass after it.
            objective if ranks.size == 1 else ChunkObjective(model),
            model,
            tokens_at_once=-(-recipe.run.rows * chunk // ranks.time_size),
            device=parts.engine.device,
            moment_bytes=moment_bytes(recipe.optimizer.name, parts.engine.device),
        )
        # Ranks that share a chunk have to go through it alike.
        is_recomputed = bool(ranks.most(int(is_recomputed))[0])
    else:
        is_recomputed = wanted == "recompute"
    model.recompute_layers(is_recomputed)
    return is_recomputed


def _shape_of(parts: _Parts) -> RunShape:
    """What the plan of a run has to know of its open parts."""
    return RunShape(
        ranks=parts.engine.ranks.size,
        longest=parts.data.longest,
        device=parts.engine.device,
        model=parts.model_file.model,
    )


def _memory_in_words(parts: _Parts, *, is_recomputed: bool) -> str:
    activations = "recomputed layer by layer" if is_recomputed else "kept"
    places = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
    thinned = ", thinned" if parts.boundaries.is_thinned else ""
    cache = ""
    if parts.model_file.model.config.n_attention:
        cache = f"; cache {places['host' if parts.boundaries.cache_on_host else 'device']}"
    return (
        f"memory     activations of a chunk {activations}; boundary states {places[parts.boundaries.where]}{thinned}"
        f"{cache}"
    )


def _headline(recipe: Recipe, parts: _Parts) -> list[str]:
    """What a run is, in words, before it starts."""
    model, data = parts.model_file.model, parts.data
    config = model.config
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    name = {"6": "Finch (RWKV-6)", "5.2": "Eagle (RWKV-5.2)"}.get(config.version, config.name)
    documents = f"{len(data.training):,} document{'' if len(data.training) == 1 else 's'}"
    train_tokens = data.training.num_tokens
    held_out = data.validation.num_tokens if data.validation else 0
    rejected = f", {len(data.loaded.rejected):,} rows skipped" if data.loaded.rejected else ""
    return [
        f"model      {name}, {config.n_layer} layers × {config.n_embd} channels, "
        f"{parts.num_base_parameters:,} parameters",
        *([f"attention  {_attention_in_words(config)}"] if config.n_attention else []),
        *([f"stored     {parts.base_in_words}"] if parts.base_in_words else []),
        f"trained    {trained:,} parameters ({recipe.adapter.in_words()})",
        f"data       {documents}, {train_tokens:,} tokens ({data.tokenizer}); held out {held_out:,} tokens{rejected}",
        f"gradient   {window_in_words(recipe)}",
        f"machine    {parts.engine.device}, {parts.engine.precision}, WKV6 backend {parts.backend}"
        + (" (the fastest here)" if recipe.kernel.backend == "auto" else ""),
        *([f"ranks      {_ranks_in_words(recipe, parts.engine)}"] if parts.engine.ranks.size > 1 else []),
        f"folder     {recipe.run.folder}",
    ]


def _attention_in_words(config: FinchConfig) -> str:
    each = cache_bytes(config, rows=1, num_tokens=1)
    last = "the last layer attends" if config.n_attention == 1 else f"the last {config.n_attention} layers attend"
    layers = last if config.n_recurrent else "all layers attend"
    return f"{layers}; {each:,} bytes of every token are cached, and as much for the gradient"


def _ranks_in_words(recipe: Recipe, engine: FabricEngine) -> str:
    ranks, run = engine.ranks, recipe.run
    machines = f" on {run.num_nodes} machines" if run.num_nodes > 1 else ""
    offload = {"none": "", "optimizer": ", optimizer in host memory", "all": ", weights and optimizer in host memory"}
    shared = f", {ranks.time_size} share each chunk" if ranks.time_size > 1 else ""
    rows = run.rows * run.accumulate * ranks.data_size
    return f"{ranks.size}{machines}, {engine.strategy}{offload[run.offload]}{shared}; {rows} rows a step"


def window_in_words(recipe: Recipe) -> str:
    """How far the gradient reaches."""
    window, chunk = recipe.bptt.window, recipe.bptt.chunk_tokens
    if window == "document":
        return f"exact: crosses the whole document, in chunks of {chunk:,} tokens"
    if window == 1:
        return f"truncated at every chunk of {chunk:,} tokens; the state is carried on"
    return f"crosses {window} chunks = {window * chunk:,} tokens; the state is carried on"
