"""The sections trainer and model of RWKV-infctx-trainer: gradients, learning rate, batch, checkpoints."""

from typing import Any

import pytest
import yaml

BPTT = [
    ({}, "document", None, True),
    ({"bptt_learning_range": -1}, "document", None, True),
    ({"bptt_learning_range": -1, "bptt_truncated_learning": False}, "document", None, True),
    ({"bptt_truncated_learning": True}, 1, "document", False),
    ({"bptt_learning_range": 4, "bptt_truncated_learning": True}, 1, "document", False),
    ({"bptt_learning_range": 3}, 3, "document", True),
    ({"bptt_learning_range": 1}, 1, "document", False),
    ({"bptt_learning": False, "bptt_learning_range": 2}, "document", None, False),
]


@pytest.mark.parametrize(("keys", "window", "mode", "warns"), BPTT)
def test_bptt(config: Any, keys: dict[str, Any], window: object, mode: str | None, warns: bool) -> None:
    translation = config.translate(model=keys)
    recipe = config.load(translation)
    assert recipe.bptt.window == window
    # A number of chunks alone would mean a stream, whose rows do not begin with a document.
    assert recipe.data.mode == (mode or "auto")
    assert recipe.resolved().data.mode == "document"
    assert any("RWKV-v6 cut gradients" in note for note in translation.notes) == warns
    says_last = any("only the last" in note for note in translation.notes)
    assert says_last == (keys.get("bptt_learning_range", -1) > 0 and keys.get("bptt_learning", True))


@pytest.mark.parametrize(
    ("model", "trainer", "optimizer", "without"),
    [
        ({}, {}, {}, []),
        ({"lr_final": "1e-4"}, {}, {}, []),
        ({"lr_final": -1.0, "lr_period": 3}, {}, {}, []),
        ({"lr_final": "1e-5"}, {}, {"schedule": "cosine", "lr_final": 1e-5}, []),
        ({"lr_final": 2e-4, "lr_type": "linear"}, {}, {"schedule": "linear", "lr_final": 2e-4}, []),
        ({"lr_final": 1e-5, "lr_period": -1}, {}, {"schedule": "cosine", "lr_final": 1e-5}, []),
        ({"lr_final": 1e-5, "lr_period": 1}, {}, {"schedule": "cosine", "lr_final": 1e-5}, []),
        ({"lr_final": 1e-5, "lr_period": 2}, {}, {"schedule": "cosine", "lr_final": 1e-5}, ["model.lr_period"]),
        (
            {"lr_final": 1e-5, "lr_period": 10, "lr_period_type": "step"},
            {"max_steps": 10, "max_epochs": -1},
            {"schedule": "cosine", "lr_final": 1e-5},
            [],
        ),
        # Without an end there, its one epoch is a stand-in here, and no schedule can have been meant to fit it.
        (
            {"lr_final": 1e-5, "lr_period": 1},
            {"max_epochs": -1},
            {"schedule": "cosine", "lr_final": 1e-5},
            ["trainer.max_epochs", "model.lr_period"],
        ),
        ({"lr_final": 1e-5, "lr_period": 0}, {}, {"lr": 1e-5}, ["model.lr_init"]),
        ({"warmup_steps": 20}, {}, {"warmup_steps": 20}, []),
        (
            {"warmup_steps": 20, "lr_final": 1e-5, "lr_period": -1},
            {},
            {"warmup_steps": 20},
            ["model.lr_final", "model.lr_period"],
        ),
        ({"warmup_steps": -1}, {}, {}, []),
        ({"beta1": 0.8}, {}, {"betas": [0.8, 0.99]}, []),
        ({"beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8}, {}, {}, []),
        ({"adam_eps": "1e-9"}, {}, {"eps": 1e-9}, []),
        ({"weight_decay": 0.01}, {}, {"weight_decay": 0.01}, []),
        ({"layerwise_lr": False}, {}, {"decay_lr_multiplier": 1.0}, []),
        ({"layerwise_lr": True}, {}, {}, []),
        ({}, {"gradient_clip_val": 1.0}, {"clip": ...}, []),
        ({}, {"gradient_clip_val": 2}, {"clip": 2.0}, []),
        ({}, {"gradient_clip_val": 0}, {}, []),
        ({"dropout": 0.1}, {}, {}, ["model.dropout"]),
        ({"token_loss_threshold": 0.5}, {}, {"min_token_loss": 0.5}, []),
        ({"token_dropout_rate": 0.25}, {}, {"token_dropout": 0.25}, []),
        ({"token_loss_threshold": 0.0, "token_dropout_rate": 0}, {}, {}, []),
    ],
)
def test_optimizer(
    config: Any, model: dict[str, Any], trainer: dict[str, Any], optimizer: dict[str, Any], without: list[str]
) -> None:
    translation = config.translate(model=model, trainer=trainer)
    wanted = {"lr": 1e-4, **config.always, **optimizer}
    assert yaml.safe_load(translation.text)["optimizer"] == {k: v for k, v in wanted.items() if v is not ...}
    assert [one.key for one in translation.of_kind("without_counterpart")] == without
    notes = " ".join(translation.notes)
    assert ("had no effect" in notes) == ("weight_decay" in model)
    assert ("the bonus did too" in notes) == (model.get("layerwise_lr") is True)
    assert ("tokens that are left here" in notes) == ("token_dropout" in optimizer)
    assert ("from 20 % there" in notes) == (optimizer.get("warmup_steps", 0) > 0)


@pytest.mark.parametrize(
    ("trainer", "run"),
    [
        ({"max_steps": 10}, {"steps": 10, "epochs": ...}),
        ({"max_steps": "1e3", "max_epochs": -1}, {"steps": 1000, "epochs": ...}),
        ({"max_epochs": 5}, {"epochs": 5}),
        ({"precision": "bf16-mixed"}, {"precision": "bf16"}),
        ({"precision": 32}, {"precision": "fp32"}),
        ({"precision": 16}, {}),
    ],
)
def test_length_and_precision(config: Any, trainer: dict[str, Any], run: dict[str, Any]) -> None:
    translation = config.translate(trainer=trainer)
    wanted = {"folder": "runs/config", "epochs": 1, **run}
    recipe = yaml.safe_load(translation.text)
    assert recipe["run"] == {key: value for key, value in wanted.items() if value is not ...}
    is_told = [config.of(translation, f"trainer.{key}")[0] in ("translated", "without_counterpart") for key in trainer]
    assert all(is_told) or -1 in trainer.values()


def checkpoint(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}


def test_callbacks_in_a_list(config: Any) -> None:
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        checkpoint(dirpath="here", every_n_train_steps=7, save_top_k=-1, monitor="val_loss", every_n_epochs=1),
        checkpoint(dirpath="elsewhere"),
    ]
    translation = config.translate(trainer={"callbacks": callbacks})
    run = config.load(translation).run
    assert (run.folder, run.checkpoint_every, run.keep_checkpoints) == ("here", 7, 2)
    without = [one.key for one in translation.of_kind("without_counterpart")]
    assert without == [
        "trainer.callbacks[0].class_path",
        "trainer.callbacks[1].init_args.save_top_k",
        "trainer.callbacks[1].init_args.monitor",
        "trainer.callbacks[1].init_args.every_n_epochs",
        "trainer.callbacks[2].class_path",
        "trainer.callbacks[2].init_args.dirpath",
    ]


@pytest.mark.parametrize("value", [True, False, None, "yes"])
def test_state_tuning(config: Any, value: object) -> None:
    translation = config.translate(model={"state_tuning": value, "weight_decay": 0.01, "layerwise_lr": True})
    assert config.load(translation).adapter.kind == ("state" if value is True else "full")
    kind = {True: "translated", "yes": "without_counterpart"}.get(value, "no_effect")  # type: ignore[call-overload]
    assert config.of(translation, "model.state_tuning")[0] == kind
    assert any("optimizer.state_lr" in note for note in translation.notes) == (value is True)


def test_activations_and_seed(config: Any) -> None:
    assert config.recipe(model={"grad_cp": False}).bptt.activations == "keep"
    assert config.recipe(model={"grad_cp": True}).bptt.activations == "auto"
    translation = config.translate(seed_everything=True)  # type: ignore[arg-type]
    assert config.of(translation, "seed_everything")[0] == "without_counterpart"
    assert config.load(translation).run.seed == 0
