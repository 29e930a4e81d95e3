"""Configs of RWKV-infctx-trainer as recipes: every key of a config has one place."""

import json
from typing import Any

import pytest
import yaml

from infctx.recipe.infctx_trainer.keys import PLAIN, TRANSLATED

# As a whole


def test_a_whole_config(config: Any) -> None:
    translation = config.raw(
        """\
# comments, once
# comments, twice
seed_everything: 3941088705
trainer:
  accelerator: gpu
  devices: auto
  strategy: deepspeed_stage_2_offload
  precision: bf16
  logger: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: mine}}
  callbacks:
    class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: ../checkpoint/x/, save_top_k: 5, monitor: step, every_n_train_steps: 50, save_last: True}
  max_epochs: 2
  max_steps: -1
  target_batch_size: 64
  microbatch_size: 4
  gradient_clip_val: 0.5
model:
  load_model: ../model/base.pth
  ctx_len: 4096
  lr_init: 6e-4
  lr_final: 4e-4
  lr_period: 2
  lr_period_type: epoch
  bptt_learning: true
  bptt_learning_range: -1
  bptt_truncated_learning: false
  beta1: 0.9
  beta2: 0.95
  adam_eps: 1.0e-08
  n_layer: 24
  strange: 1
data:
  data_path: ../datapath/x/
  source: "some/set"
  tokenizer: world
  custom_text_key: code
  min_token_size: 1024
  max_token_size: 8192
  test_split: 0.001
  test_split_shuffle: true
  packing_enable: False
  packing_batchsize: 128
ckpt_path: null
""",
    )
    assert yaml.safe_load(translation.text) == {
        "model": {"path": "../model/base.pth"},
        "data": {
            "path": "some/set",
            "format": "huggingface",
            "fields": {"text": "code"},
            "min_tokens": 1025,
            "max_tokens": 8193,
            "on_long": "skip",
            "on_empty_row": "skip",
            "tokenizer": "world",
            "validation": 0.001,
        },
        "bptt": {"chunk_tokens": 4096},
        "optimizer": {
            "lr": 6e-4,
            "warmup_steps": 0,
            "schedule": "cosine",
            "lr_final": 4e-4,
            "clip": 0.5,
            "betas": [0.9, 0.95],
            "l2_wrap": 1e-4,
        },
        "run": {
            "folder": "../checkpoint/x/",
            "epochs": 2,
            "rows": 4,
            "accumulate": 16,
            "strategy": "deepspeed_2",
            "offload": "optimizer",
            "precision": "bf16",
            "seed": 3941088705,
            "checkpoint_every": 50,
            "keep_checkpoints": 5,
        },
    }
    config.load(translation)
    account = translation.to_json()
    assert [one["key"] for one in account["without_counterpart"]] == [
        "trainer.logger",
        "model.n_layer",
        "data.data_path",
    ]
    assert [one["key"] for one in account["unknown"]] == ["model.strange"]
    assert {"key": "model.ctx_len", "value": 4096, "to": "bptt.chunk_tokens: 4096"} in account["translated"]
    assert {one["key"] for one in account["no_effect"]} >= {"trainer.max_steps", "ckpt_path", "data.packing_batchsize"}
    assert sum(len(account[kind]) for kind in ("translated", "without_counterpart", "unknown", "no_effect")) == 42
    assert translation.to_fill_in == {}


def test_the_comments_name_the_source_and_every_key_that_is_left_out(config: Any) -> None:
    translation = config.translate(trainer={"strategy": "tpu"}, model={"position_loss_bias": 0.5, "odd": "é"})
    head = translation.text[: translation.text.index("\nmodel:")]
    assert all(line.startswith("#") and len(line) <= 120 for line in head.splitlines())
    assert head.startswith("# Translated from config.yaml, a config of RWKV-infctx-trainer")
    for one in translation.outcomes:
        if one.kind in ("without_counterpart", "unknown"):
            assert f"# - {one.key}: {one.value}. " in head
            assert one.text.split()[0] in head
    words = " ".join(head.replace("#", " ").split())
    for text in (*translation.notes, *translation.assumed):
        assert " ".join(text.split()) in words


def test_what_is_missing_is_to_be_filled_in_and_still_loads(config: Any) -> None:
    translation = config.raw("trainer:\nmodel:\ndata:\n")
    recipe = config.load(translation)
    assert set(translation.to_fill_in) == {"model.path", "optimizer.lr", "run.epochs", "data.path"}
    assert recipe.model.path == "FILL-IN.pth"
    assert recipe.data.path == "FILL-IN.jsonl"
    assert recipe.run.folder == "runs/config"
    assert all(f"# - {key}: " in translation.text for key in translation.to_fill_in)


# Every key has one place


def all_keys() -> list[tuple[str, str]]:
    return sorted({(part, name) for table in (PLAIN, TRANSLATED) for part, names in table.items() for name in names})


def with_key(part: str, name: str, value: object) -> tuple[str, dict[str, Any]]:
    """The dotted name of a key, and a config that has it."""
    base: dict[str, Any] = {"trainer": {"max_epochs": 1}, "model": {"load_model": "m.pth", "lr_init": 1e-4}, "data": {}}
    if part == "datapack":
        base = {"datapack": {}, "default": {}, "dataset": [{"source": "a"}]}
    if part == "data" and name in ("name", "dataset_name", "dataset_weight", "dataset_index", "is_random_datapack"):
        return f"dataset[0].{name}", {"datapack": {}, "default": {}, "dataset": [{"source": "a", name: value}]}
    if name.startswith("callbacks."):
        callback: dict[str, Any] = {"class_path": "ModelCheckpoint", "init_args": {}}
        (callback["init_args"] if name.count(".") > 1 else callback)[name.rpartition(".")[2]] = value
        base["trainer"]["callbacks"] = callback
    else:
        (base if part == "" else base[part])[name] = value
    return f"{part}.{name}".lstrip("."), base


@pytest.mark.parametrize(("part", "name"), all_keys())
@pytest.mark.parametrize("value", ["?!", -7, True, None, {"a": "b"}])
def test_every_known_key_with_any_value_has_one_place(config: Any, part: str, name: str, value: object) -> None:
    key, mapping = with_key(part, name, value)
    if isinstance(value, dict) and name in ("callbacks", "callbacks.init_args"):
        key, mapping = with_key(part, name, {})
    translation = config.raw(mapping)
    config.load(translation)
    kind, text = config.of(translation, key)
    assert kind != "unknown"
    if value is None:
        assert kind in ("no_effect", "translated")
    if kind == "without_counterpart":
        assert text.endswith("."), text
    json.dumps(translation.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, table in PLAIN.items() for name, key in table.items() if key.defaults]
)
def test_defaults_of_that_trainer_need_no_reason(config: Any, part: str, name: str) -> None:
    for default in PLAIN[part][name].defaults:
        key, mapping = with_key(part, name, default)
        assert config.of(config.raw(mapping), key)[0] == "no_effect"


SAVED = """
seed_everything: true
trainer:
  {accelerator: gpu, strategy: deepspeed_stage_2_offload, devices: auto, num_nodes: 1, precision: bf16-mixed,
   logger: null, callbacks: null, fast_dev_run: false, max_epochs: 1, min_epochs: null, max_steps: -1, min_steps: null,
   max_time: null, limit_train_batches: null, limit_val_batches: null, limit_test_batches: null,
   limit_predict_batches: null, overfit_batches: 0.0, val_check_interval: null, check_val_every_n_epoch: 1,
   num_sanity_val_steps: 0, log_every_n_steps: null, enable_checkpointing: null, enable_progress_bar: null,
   enable_model_summary: null, accumulate_grad_batches: 1, gradient_clip_val: null, gradient_clip_algorithm: null,
   deterministic: null, benchmark: null, inference_mode: true, use_distributed_sampler: false, profiler: null,
   detect_anomaly: false, barebones: false, plugins: null, sync_batchnorm: false,
   reload_dataloaders_every_n_epochs: 0, default_root_dir: null, target_batch_size: -1, microbatch_size: 1}
model:
  {load_model: m.pth, n_embd: -1, n_layer: -1, vocab_size: -1, ctx_len: 2048, ctx_len_cutoffs: [],
   ctx_len_warmup_steps: [], lr_init: 1.0e-4, lr_final: -1.0, lr_period: -1, lr_period_type: epoch, lr_type: cosine,
   dropout: 0.0, beta1: 0.9, beta2: 0.99, adam_eps: 1.0e-08, weight_decay: 0.0, warmup_steps: -1,
   position_loss_bias: 1.0, position_loss_bias_in_validation: false, token_loss_threshold: 0.0,
   token_dropout_rate: 0.0, grad_cp: true, bptt_learning: true, bptt_learning_range: -1, bptt_truncated_learning: true,
   layerwise_lr: true, dim_att: null, dim_ffn: null, substep_cuda_cache_clear: false, substep_logging: false,
   torch_set_float32_matmul_precision: high, consolidated_logging: true}
data:
  {skip_datapath_setup: true, datapack_config_path: null, data_path: null, data_path_storage_options: null,
   source: some/set, source_data_dir: null, source_dataset_params: null, test_split: 0.01, test_split_shuffle: false,
   text_rechunk_size: 4096, text_rechunk_auto: true, text_rechunk_force: false, tokenizer: world, autoTokenizer: null,
   world_add_endoftext_token: true, min_token_size: 2, max_token_size: -1, sort_by_length: false, sort_asc: true,
   dataset_offset: -1, dataset_length: -1, custom_text_key: null, multi_column_keys: null, multi_column_prefix: null,
   multi_column_suffix: null, multi_column_train_mask: null, multi_column_separator: null, conversation_format: null,
   conversation_key: null, conversation_input_key_prefix_map: null, conversation_input_key_mask: null,
   conversation_sender_key: null, conversation_sender_value_map: null, conversation_input_key_map: null,
   conversation_sender_suffix: null, conversation_sender_mask: null, conversation_end_of_conversation: null,
   disable_prompt_completion_mask: false, data_prefix_skip_mask: 0, packing_enable: false, packing_batchsize: 20160,
   packing_chunksize: 4096, packing_min_ctx_len: -1, packing_in_sequence: false,
   reverse_train_dataset_before_save: false, processing_max_batch_size: 100000, dataloader_shuffle_training: false,
   dataloader_prefetch_factor: 4, dataloader_pin_memory: true, dataloader_swap_train_test_split: false}
ckpt_path: null
"""
"""As LightningCLI saves a config: every key, nearly all at that trainer's defaults."""


def test_a_saved_config_with_every_key(config: Any) -> None:
    translation = config.raw(SAVED)
    assert [one.key for one in translation.of_kind("without_counterpart")] == [
        "seed_everything",
        "data.world_add_endoftext_token",
    ]
    assert translation.of_kind("unknown") == []
    assert yaml.safe_load(translation.text) == {
        "model": {"path": "m.pth"},
        "data": {
            "path": "some/set",
            "format": "huggingface",
            "on_empty_row": "skip",
            "tokenizer": "world",
            "mode": "document",
            "order": "file",
            "validation": 0.01,
        },
        "bptt": {"chunk_tokens": 2048, "window": 1},
        "optimizer": {"lr": 1e-4, **config.always},
        "run": {
            "folder": "runs/config",
            "epochs": 1,
            "strategy": "deepspeed_2",
            "offload": "optimizer",
            "precision": "bf16",
        },
    }


def test_unknown_keys_are_named_with_the_nearest(config: Any) -> None:
    translation = config.translate(data={"multi_column_masking": [True]}, extra={"a": 1}, trainer={"max_epoch": 3})
    assert config.of(translation, "data.multi_column_masking") == (
        "unknown",
        "That trainer has no such key. Did you mean multi_column_train_mask?",
    )
    assert config.of(translation, "trainer.max_epoch")[1].endswith("Did you mean max_epochs?")
    assert config.of(translation, "extra") == ("unknown", "That trainer has no such key.")
    assert "data.multi_column_masking: [true]" in translation.text
