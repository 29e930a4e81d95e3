"""The sections trainer and model of RWKV-infctx-trainer's configs: length, checkpoints, optimizer, BPTT, states."""

import re

from infctx.recipe.infctx_trainer.draft import Part, count, real
from infctx.recipe.infctx_trainer.spread import translate_spread

_MODEL_CHECKPOINT = "ModelCheckpoint"
_PRECISIONS = {
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), "bf16"),
    **dict.fromkeys(("32", "32-true"), "fp32"),
}
_WARM_UP_ONLY = "That trainer keeps lr_init after a warm-up, and so does this recipe; optimizer.schedule can lower it."


def translate_trainer(trainer: Part, *, stem: str) -> None:
    """Translate the section trainer. stem: of the config's name, for a run folder where there is none."""
    _length(trainer)
    translate_spread(trainer)
    _checkpoints(trainer, stem)
    clip = real(trainer.get("gradient_clip_val", 0))
    if clip is not None and clip >= 0:
        trainer.to("gradient_clip_val", {"optimizer.clip": clip or None}, there="null")
    precision = str(trainer.get("precision", ""))
    if precision in _PRECISIONS:
        trainer.to("precision", {"run.precision": _PRECISIONS[precision]})
    else:
        trainer.without("precision", "Computed in fp32, or in bf16 with weights and states in fp32 (run.precision).")


def _length(trainer: Part) -> None:
    steps, epochs = count(trainer.get("max_steps")), count(trainer.get("max_epochs"), most=65_536)
    if steps:
        trainer.to("max_steps", {"run.steps": steps})
        if epochs:
            trainer.without("max_epochs", "A run ends by steps or by epochs, not by whichever comes first.")
    elif epochs:
        trainer.to("max_epochs", {"run.epochs": epochs})
    else:
        trainer.draft.fill_in("run.epochs", 1, "that run had no end; a run here has one, in epochs or steps")
        trainer.without("max_epochs", "A run has an end here: run.epochs or run.steps.")
    for name in ("max_steps", "max_epochs"):
        if trainer.get(name) == -1 and (steps or epochs or name == "max_steps"):
            trainer.no_effect(name)


def _checkpoints(trainer: Part, stem: str) -> None:
    """The first ModelCheckpoint; other callbacks have no counterpart."""
    found = None
    for name in trainer.names("callbacks"):
        match = re.match(r"(callbacks(\[\d+\])?)\.class_path$", name)
        if match and str(trainer.get(name)).endswith(_MODEL_CHECKPOINT) and found is None:
            found = match[1]
    for name in trainer.names("callbacks"):
        if not name.startswith(f"{found}.") and trainer.get(name):
            trainer.without(name, "Of callbacks only the first ModelCheckpoint has a counterpart.")
    init = f"{found}.init_args."
    folder = trainer.get(f"{init}dirpath")
    if isinstance(folder, str) and folder:
        trainer.to(f"{init}dirpath", {"run.folder": folder})
    else:
        trainer.draft.assume("There is no folder for checkpoints", {"run.folder": f"runs/{stem}"})
    every, kept = count(trainer.get(f"{init}every_n_train_steps")), count(trainer.get(f"{init}save_top_k"))
    if every:
        trainer.to(f"{init}every_n_train_steps", {"run.checkpoint_every": every})
    elif trainer.get(f"{init}every_n_train_steps") == 0:
        trainer.no_effect(f"{init}every_n_train_steps")
    if kept:
        trainer.to(f"{init}save_top_k", {"run.keep_checkpoints": kept})
    else:
        trainer.without(
            f"{init}save_top_k", "run.keep_checkpoints says how many are kept, at least 1; there is no word for all."
        )


def translate_model(model: Part) -> None:
    """Translate the section model, after the trainer."""
    path = model.get("load_model")
    if isinstance(path, str) and path and "$init_model$" not in path:
        model.to("load_model", {"model.path": path})
    else:
        model.draft.fill_in("model.path", "FILL-IN.pth", "the model to start from; infctx model new makes a fresh one")
    chunk_tokens = count(model.get("ctx_len", 2048))
    if chunk_tokens:
        model.to("ctx_len", {"bptt.chunk_tokens": chunk_tokens}, there=2048)
    _bptt(model)
    _learning_rate(model)
    _adam(model)
    _left_out_tokens(model)
    if model.get("grad_cp", True) is False:
        model.to("grad_cp", {"bptt.activations": "keep"})
    elif model.get("grad_cp") is True:
        model.to("grad_cp", {"bptt.activations": "auto"})
    _tuned_states(model)


def _tuned_states(model: Part) -> None:
    """The initial state alone, a key of that trainer's branch rwkv-x5-stateTune."""
    tunes = model.get("state_tuning")
    if tunes is True:
        model.to("state_tuning", {"adapter.kind": "state"})
        model.draft.note(
            "model.state_tuning: adapter.kind: state trains the initial state and no weight, as that key was meant; "
            "the code of the branch that had it does not freeze the weights, which adapter.kind: full with "
            "adapter.initial_state: true says. optimizer.state_lr is a learning rate of the states' own."
        )
    elif tunes is False:
        model.no_effect("state_tuning")
    else:
        model.without("state_tuning", "Expected true or false; adapter.kind: state trains initial states alone.")


def _bptt(model: Part) -> None:
    """How far the gradient reaches, and that every document begins from a fresh state."""
    reach = count(model.get("bptt_learning_range"))
    truncated = model.get("bptt_truncated_learning")
    if model.get("bptt_learning", True) is False:
        model.to("bptt_learning", {"bptt.window": "document"})
        for name in ("bptt_learning_range", "bptt_truncated_learning"):
            model.no_effect(name)
        return
    window = 1 if truncated is True else (reach or "document")
    ours = {"bptt.window": window}
    for name in ("bptt_learning", "bptt_learning_range", "bptt_truncated_learning"):
        if model.has(name):
            model.to(name, ours)
    model.draft.put(ours)
    if window != "document":
        model.draft.assume("Every sample begins from a fresh state", {"data.mode": "document"})
    if window != 1:
        model.draft.note(
            "RWKV-v6 cut gradients at every ctx_len there whatever bptt_truncated_learning said, RWKV-v5 did so unless "
            f"it was false, RWKV-v4neo did not. Here they go through bptt.window: {window}; 1 cuts them at every chunk."
        )
    if reach:
        model.draft.note(
            f"model.bptt_learning_range: {reach}: there, only the last {reach} x ctx_len tokens of a document were "
            "trained, those before were read. Here all are, and bptt.window says how far their gradient reaches."
        )


def _learning_rate(model: Part) -> None:
    first, last = real(model.get("lr_init")), real(model.get("lr_final"))
    warmup = count(model.get("warmup_steps"))
    if not warmup and real(model.get("lr_period")) == 0 and last is not None and last > 0:
        first = last
        model.to("lr_final", {"optimizer.lr": last})
        model.to("lr_period", {"optimizer.schedule": "constant"})
        model.without("lr_init", "With lr_period 0 the rate is lr_final from the first step on.")
    elif first is None or first <= 0:
        model.draft.fill_in("optimizer.lr", 1.0e-5, "the learning rate")
    else:
        model.to("lr_init", {"optimizer.lr": first})
    if warmup:
        model.to("warmup_steps", {"optimizer.warmup_steps": warmup})
        model.draft.note("The warm-up rises from 1 % of optimizer.lr here, from 20 % there.")
        for name in ("lr_final", "lr_period", "lr_period_type", "lr_type"):
            model.without(name, _WARM_UP_ONLY)
        return
    model.to("warmup_steps", {"optimizer.warmup_steps": 0}, there=-1)
    if last is None or last < 0 or last == first:
        model.to("lr_final", {"optimizer.schedule": "constant"})
        for name in ("lr_period", "lr_period_type", "lr_type"):
            model.no_effect(name)
    else:
        _decay(model, last)


def _decay(model: Part, last: float) -> None:
    """From lr_init to lr_final."""
    kind = model.get("lr_type", "cosine")
    if kind in ("cosine", "linear"):
        model.to("lr_type", {"optimizer.schedule": kind}, there="cosine (linear in RWKV-v4neo)")
    else:
        model.draft.put({"optimizer.schedule": "cosine"})
        model.without("lr_type", "Schedules are constant, cosine, linear and exponential.")
    model.to("lr_final", {"optimizer.lr_final": last})
    period, unit = real(model.get("lr_period", -1)), model.get("lr_period_type", "epoch")
    length = model.draft.said("run.steps" if unit == "step" else "run.epochs")
    if period == -1 or (period is not None and period == length and "run.epochs" not in model.draft.to_fill_in):
        for name in ("lr_period", "lr_period_type"):
            if model.has(name):
                model.to(name, {}, text="the whole run, as every schedule here")
        return
    for name in ("lr_period", "lr_period_type"):
        model.without(
            name, "A schedule ends with the run; for a shorter one, set run.steps or run.epochs to its length."
        )


def _adam(model: Part) -> None:
    betas = [real(model.get("beta1", 0.9)), real(model.get("beta2", 0.99))]
    if all(beta is not None and 0 <= beta < 1 for beta in betas):
        for name in ("beta1", "beta2"):
            model.to(name, {"optimizer.betas": betas})
    eps, decay = real(model.get("adam_eps")), real(model.get("weight_decay"))
    if eps is not None and eps > 0:
        model.to("adam_eps", {"optimizer.eps": eps})
    if decay is not None and decay >= 0:
        model.to("weight_decay", {"optimizer.weight_decay": decay})
    if decay is not None and decay > 0:
        model.draft.note(
            "model.weight_decay acts on the matrices here, as in RWKV-v5; in RWKV-v4neo and RWKV-v6 it had no effect, "
            "since every group of parameters was given 0."
        )
    layerwise = model.get("layerwise_lr")
    if isinstance(layerwise, bool):
        model.to("layerwise_lr", {"optimizer.decay_lr_multiplier": 2.0 if layerwise else 1.0})
    if layerwise is True:
        model.draft.note("model.layerwise_lr: here the decay alone learns twice as fast, in RWKV-v6 the bonus did too.")
    model.draft.assume("The largest logits are held back (L2Wrap) in every run", {"optimizer.l2_wrap": 1.0e-4})


def _left_out_tokens(model: Part) -> None:
    """Tokens that are not trained, by their loss or at random."""
    for name, key in (("token_loss_threshold", "min_token_loss"), ("token_dropout_rate", "token_dropout")):
        value = real(model.get(name))
        if value == 0 or value is None:
            model.no_effect(name)
        elif value > 0 and (name == "token_loss_threshold" or value < 1):
            model.to(name, {f"optimizer.{key}": value})
            if name == "token_dropout_rate":
                model.draft.note(
                    "model.token_dropout_rate: the loss is divided by the weight of the tokens that are left here, of "
                    "all tokens there."
                )
