"""From a recipe to live objects: the only file that knows every part, and therefore one of the longest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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
from infctx.errors import MachineError, RecipeError, machine_fault
from infctx.model.finch import Finch
from infctx.model.state import ModelState
from infctx.recipe.load import RECIPE_FILE, load_recipe, recipe_differences, write_recipe
from infctx.recipe.optimizer_section import DECAY_FRACTION
from infctx.recipe.schema import Recipe
from infctx.run_adapter import adapter_writer, attach_adapter, keep_start, read_start, start_digest, start_of
from infctx.run_data import RunData, Say, data_from_anywhere, open_data, step_source
from infctx.training.activation_memory import should_recompute
from infctx.training.averaged_weights import AveragedWeights
from infctx.training.boundary_store import BoundaryPlan, choose_store, free_bytes, free_host_bytes, state_bytes
from infctx.training.bptt import ChunkObjective
from infctx.training.fabric_run import FabricEngine, open_engine
from infctx.training.gradient_check import GradientCheck, check_gradient
from infctx.training.host_memory import HeapTrimmer
from infctx.training.loop import train
from infctx.training.loss import LossTerms
from infctx.training.metrics import MetricsLog
from infctx.training.optim import LearningRate, make_optimizer, moment_bytes, parameter_groups
from infctx.training.progress import LoggedProgress, Progress
from infctx.training.run import LoopSettings, Run
from infctx_kernels import BackendError, choose_backend

RESULT_FILE = "result.json"
LOG_FILE = "run.log"
LEDGER_FILE = "ledger.json"
BOUNDARY_FOLDER = "boundaries"
# Where things are kept and for how long; nothing that is computed.
FREE_KEYS = (
    "bptt.activations",
    "bptt.boundaries",
    "bptt.thin_boundaries",
    "data.cache",
    "data.workers",
    "run.checkpoint_minutes",
    "run.keep_checkpoints",
)
RESULT_KEYS = ("steps", "train_loss", "val_loss", "first_val_loss", "tokens", "folder")


def run_recipe(recipe: Recipe, progress: Progress, *, fresh: bool = False) -> dict[str, Any]:
    """Train a recipe to its end, or continue it where its folder left off.

    Args:
        fresh: leave a used run folder alone and begin beside it.
    Returns:
        steps, train_loss, val_loss, first_val_loss, tokens, folder; and already_finished, True where nothing was done.
    Raises:
        MachineError: the disk or the memory failed; names the last good checkpoint.
    """
    recipe = _from_anywhere(recipe.resolved())
    if fresh:
        recipe = _beside(recipe)
    folder = Path(recipe.run.folder)
    recipe = _as_begun(folder, recipe)
    if (finished := _result(folder)) is not None:
        return {**finished, "already_finished": True}
    try:
        # Everything that can be wrong with the recipe, the model or the data is found before the folder is made.
        parts = _open_parts(recipe, _quietly(progress.message))
        folder.mkdir(parents=True, exist_ok=True)
        with RunLock(folder):
            return _run_in_folder(recipe, parts, progress, folder)
    except Exception as error:
        fault = str(error) if isinstance(error, MachineError) else machine_fault(error)
        if fault is not None:
            raise MachineError(f"{fault}\n{_last_checkpoint(folder)}") from error
        raise


def _run_in_folder(recipe: Recipe, parts: _Parts, progress: Progress, folder: Path) -> dict[str, Any]:
    # Another process may have been here between the first look and the lock.
    _as_begun(folder, recipe)
    if (finished := _result(folder)) is not None:
        return {**finished, "already_finished": True}
    remove_unfinished(folder)
    write_recipe(_with_choices(recipe, parts), folder / RECIPE_FILE)
    _write_json(folder / LEDGER_FILE, parts.data.account())
    keep_start(parts.adapter, folder, base_fingerprint=parts.model_file.fingerprint)
    # A killed run's boundaries are worth nothing to the next one.
    remove_tree(folder / BOUNDARY_FOLDER)
    try:
        done = train(_assemble(recipe, parts, LoggedProgress(progress, folder / LOG_FILE)))
    finally:
        remove_tree(folder / BOUNDARY_FOLDER)
    values = (done.step, done.train_loss, done.val_loss, done.first_val_loss, done.tokens, str(folder))
    result = dict(zip(RESULT_KEYS, values, strict=True))
    _write_json(folder / RESULT_FILE, result)
    return {**result, "already_finished": False}


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
    recipe = _from_anywhere(recipe.resolved())
    recipe = _as_begun(Path(recipe.run.folder), recipe)
    parts = _open_parts(recipe, say)
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


def _open_parts(recipe: Recipe, say: Say) -> _Parts:
    engine = open_engine(devices=recipe.run.devices, strategy=recipe.run.strategy, precision=recipe.run.precision)
    model_file = read_model_file(recipe.model.path, dtype=None)
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
        boundaries=_boundaries(recipe, model_file.model, data, engine.device),
    )


def _with_choices(recipe: Recipe, parts: _Parts) -> Recipe:
    """The recipe with what the model file and this machine decided."""
    chosen = {"precision": parts.engine.precision, "devices": 1, "strategy": parts.engine.strategy}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tokenizer": parts.data.tokenizer}),
            "run": recipe.run.model_copy(update=chosen),
            "kernel": recipe.kernel.model_copy(update={"backend": parts.backend}),
        }
    )


def _filled_in(recipe: Recipe, begun: Recipe) -> Recipe:
    """The recipe with what `_with_choices` chose when the run began, where it says auto."""
    sections = {}
    for name, keys in (("data", ["tokenizer"]), ("run", ["precision", "devices", "strategy"]), ("kernel", ["backend"])):
        now, then = getattr(recipe, name), getattr(begun, name)
        open_keys = {key: getattr(then, key) for key in keys if getattr(now, key) == "auto"}
        sections[name] = now.model_copy(update=open_keys)
    return recipe.model_copy(update=sections)


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
    section = recipe.optimizer
    return make_optimizer(
        _parameter_groups(recipe, model),
        name=section.name,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        device=device,
        is_fused=None if section.fused == "auto" else section.fused,
    )


def _assemble(recipe: Recipe, parts: _Parts, progress: Progress) -> Run:
    model, optimizer_section = parts.model_file.model, recipe.optimizer
    objective = _set_up(recipe, parts)
    # Once the weights are on their device, and before the memory that is left there is asked for.
    decay = optimizer_section.ema_decay
    averaged = None if decay is None else AveragedWeights(model, decay=decay)
    is_recomputed = _choose_activations(recipe, parts, objective)
    source = step_source(recipe, parts.data)
    folder = Path(recipe.run.folder)
    return Run(
        folder=folder,
        model=model,
        objective=objective,
        engine=parts.engine,
        device=parts.engine.device,
        source=source,
        validation=parts.data.validation or (),
        set_names=parts.data.set_names,
        validation_set_names=parts.data.validation.set_names if parts.data.validation else None,
        learning_rate=LearningRate(
            lr=optimizer_section.lr,
            lr_final=optimizer_section.lr if optimizer_section.lr_final is None else optimizer_section.lr_final,
            schedule=optimizer_section.schedule,
            warmup_steps=optimizer_section.warmup_steps,
            total_steps=source.total_steps,
            decay_fraction=optimizer_section.decay_fraction or DECAY_FRACTION,
        ),
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
        headline=[*_headline(recipe, parts), _memory_in_words(parts, is_recomputed=is_recomputed)],
        facts={
            "tokenizer": parts.data.tokenizer,
            "base_fingerprint": parts.model_file.fingerprint,
            "adapter_start": start_digest(start_of(parts.adapter)),
            "infctx": infctx.__version__,
            "torch": torch.__version__,
        },
        save_adapter=adapter_writer(
            parts.adapter,
            folder / "adapter",
            base_fingerprint=parts.model_file.fingerprint,
            averaged=averaged,
        ),
        trimmer=HeapTrimmer(parts.engine.device),
        averaged=averaged,
    )


def _boundaries(recipe: Recipe, model: Finch, data: RunData, device: torch.device) -> BoundaryPlan:
    """Where boundary states go, for the longest window of the run; refuses one that has no room."""
    bptt, folder = recipe.bptt, Path(recipe.run.folder)
    longest = max(data.longest, recipe.data.pack_tokens or 0)
    num_chunks = -(-longest // bptt.chunk_tokens) if bptt.window == "document" else bptt.window
    one_state = state_bytes(ModelState.zeros(model.config, recipe.run.rows, dtype=torch.float32, device="meta"))
    plan = BoundaryPlan(is_thinned=bptt.thin_boundaries, folder=folder / BOUNDARY_FOLDER)
    needed = one_state * plan.most_kept(num_chunks)
    where = choose_store(needed, device) if bptt.boundaries == "auto" else bptt.boundaries
    above = next(path for path in folder.absolute().parents if path.exists())
    free = {"device": free_bytes(device), "host": free_host_bytes(), "disk": shutil.disk_usage(above).free}[where]
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
    model, wanted = parts.model_file.model, recipe.bptt.activations
    if wanted == "auto":
        longest = parts.data.longest
        # A stream has documents one after another, however short.
        chunk = recipe.bptt.chunk_tokens if recipe.data.mode == "stream" else min(recipe.bptt.chunk_tokens, longest)
        model.train()
        is_recomputed = should_recompute(
            objective,
            model,
            tokens_at_once=recipe.run.rows * chunk,
            device=parts.engine.device,
            moment_bytes=moment_bytes(recipe.optimizer.name, parts.engine.device),
        )
    else:
        is_recomputed = wanted == "recompute"
    model.recompute_layers(is_recomputed)
    return is_recomputed


def _memory_in_words(parts: _Parts, *, is_recomputed: bool) -> str:
    activations = "recomputed layer by layer" if is_recomputed else "kept"
    places = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
    thinned = ", thinned" if parts.boundaries.is_thinned else ""
    return f"memory     activations of a chunk {activations}; boundary states {places[parts.boundaries.where]}{thinned}"


def _headline(recipe: Recipe, parts: _Parts) -> list[str]:
    """What a run is, in words, before it starts."""
    model, data = parts.model_file.model, parts.data
    config = model.config
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    name = {"6": "Finch (RWKV-6)", "5.2": "Eagle (RWKV-5.2)"}[config.version]
    documents = f"{len(data.training):,} document{'' if len(data.training) == 1 else 's'}"
    train_tokens = data.training.num_tokens
    held_out = data.validation.num_tokens if data.validation else 0
    rejected = f", {len(data.loaded.rejected):,} rows skipped" if data.loaded.rejected else ""
    return [
        f"model      {name}, {config.n_layer} layers × {config.n_embd} channels, "
        f"{parts.num_base_parameters:,} parameters",
        *([f"stored     {parts.base_in_words}"] if parts.base_in_words else []),
        f"trained    {trained:,} parameters ({recipe.adapter.in_words()})",
        f"data       {documents}, {train_tokens:,} tokens ({data.tokenizer}); held out {held_out:,} tokens{rejected}",
        f"gradient   {window_in_words(recipe)}",
        f"machine    {parts.engine.device}, {parts.engine.precision}, WKV6 backend {parts.backend}"
        + (" (the fastest here)" if recipe.kernel.backend == "auto" else ""),
        f"folder     {recipe.run.folder}",
    ]


def window_in_words(recipe: Recipe) -> str:
    """How far the gradient reaches."""
    window, chunk = recipe.bptt.window, recipe.bptt.chunk_tokens
    if window == "document":
        return f"exact: crosses the whole document, in chunks of {chunk:,} tokens"
    if window == 1:
        return f"truncated at every chunk of {chunk:,} tokens; the state is carried on"
    return f"crosses {window} chunks = {window * chunk:,} tokens; the state is carried on"


def _from_anywhere(recipe: Recipe) -> Recipe:
    """The same recipe with paths that mean the same file from every working directory."""

    def located(path: str) -> str:
        path = os.path.expanduser(path)
        return path if path.startswith("{") else os.path.abspath(path)

    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": located(recipe.model.path)}),
            "data": data_from_anywhere(recipe.data),
            "run": recipe.run.model_copy(update={"folder": os.path.expanduser(recipe.run.folder)}),
        }
    )


def _as_begun(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe as it goes on in this folder; refuses a folder of another recipe, or of something else.

    What the recipe leaves open (precision, backend, tokenizer) stays what it was when the run began. What changes no
    number (FREE_KEYS) may be changed: a run whose disk was full has to go on with other ones.
    """
    used = folder / RECIPE_FILE
    if used.is_file():
        begun = load_recipe(used)
        recipe = _filled_in(recipe, begun)
        # The folder may have been moved, or be spelt in another way.
        in_its_folder = recipe.run.model_copy(update={"folder": begun.run.folder})
        differences = recipe_differences(begun, recipe.model_copy(update={"run": in_its_folder}), but_not=FREE_KEYS)
        if differences:
            raise RecipeError(
                f"{folder}: this run folder was made with another recipe:\n  "
                + "\n  ".join(differences)
                + "\nGive another run.folder, use the old values, or start beside it with --fresh."
            )
        return recipe
    if folder.exists() and (not folder.is_dir() or any(entry.name != ".lock" for entry in folder.iterdir())):
        raise RecipeError(f"run.folder: {folder} exists and is not a run folder. Give a new one.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RecipeError(f"run.folder: {folder} cannot be made: {above} is not a folder that can be written.")
    return recipe


def _last_checkpoint(folder: Path) -> str:
    """A sentence that names the checkpoint a run would go on from."""
    try:
        latest = (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return "There is no checkpoint of this run yet."
    return f"The last good checkpoint is {folder / 'checkpoints' / latest}; the same command continues from it."


def _beside(recipe: Recipe) -> Recipe:
    folder = Path(recipe.run.folder)
    number = 2
    while folder.exists():
        folder = Path(f"{recipe.run.folder}-{number}")
        number += 1
    run = recipe.run.model_copy(update={"folder": str(folder)})
    return recipe.model_copy(update={"run": run})


def _result(folder: Path) -> dict[str, Any] | None:
    try:
        result = json.loads((folder / RESULT_FILE).read_text())
    except (OSError, ValueError):
        result = None
    # Missing or damaged: the run goes on from its last checkpoint and writes it again.
    return result if isinstance(result, dict) and result.keys() == set(RESULT_KEYS) else None
