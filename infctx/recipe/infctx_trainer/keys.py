"""The keys of RWKV-infctx-trainer that have no counterpart, with that trainer's defaults and the reason.

A key that stands at its default (or at null) changed nothing there, and is not worth a reason.
"""

from typing import NamedTuple


class Plain(NamedTuple):
    """A key that is never translated. defaults: values that need no word; an empty tuple = only null."""

    defaults: tuple[object, ...]
    reason: str


_RANKS = "Each device has rows of its own; there is nothing to set."
_LIGHTNING = "A setting of Lightning's Trainer, which does not run here."
_STEPS = "Checkpoints are counted in steps (run.checkpoint_every) and minutes (run.checkpoint_minutes)."
_NEWEST = "The newest checkpoints are kept, as many as run.keep_checkpoints says; none is chosen by its loss."
_SIZES = "Sizes are read from the model file."
_LOGGING = "Every step is in metrics.jsonl of the run folder; there is nothing to set."
_NO_WARM_CONTEXT = "Documents are never cut at random places; every token is trained in every pass."
_PLACES = "Tokens are weighted by column, role, row and set, not by their place."
_CACHE = "Tokens are prepared as they are needed (data.cache, data.workers)."
_PART = "No part of a set by number or share of rows; give a shorter file, or several files of which one is left out."

TOP: dict[str, Plain] = {
    "ckpt_path": Plain((), "A checkpoint of DeepSpeed: export it there and give the .pth as model.path. Runs started "
                       "again in their folder continue by themselves."),
}  # fmt: skip

TRAINER: dict[str, Plain] = {
    "accelerator": Plain(("gpu", "cuda", "auto"), "A GPU where there is one, else the CPU; nothing else is chosen."),
    "logger": Plain((True, False), _LOGGING),
    "min_epochs": Plain((1,), "A run has one length: run.epochs or run.steps."),
    "min_steps": Plain((), "A run has one length: run.epochs or run.steps."),
    "max_time": Plain((), "No end by the clock; a run that is stopped continues when it is started again."),
    "gradient_clip_algorithm": Plain(("norm",), "The gradient is clipped by its norm."),
    "val_check_interval": Plain((1.0,), "Validation is counted in steps: run.validate_every."),
    "check_val_every_n_epoch": Plain((1,), "Validation is counted in steps: run.validate_every."),
    "num_sanity_val_steps": Plain((0, 2), "The held-out loss is measured before the first step anyway."),
    "log_every_n_steps": Plain((1, 50), _LOGGING),
    "limit_train_batches": Plain((1.0,), "No share of an epoch; run.steps ends a run early."),
    "limit_val_batches": Plain((1.0,), "All held-out documents are measured; data.validation says how many they are."),
    "limit_test_batches": Plain((1.0,), _LIGHTNING),
    "limit_predict_batches": Plain((1.0,), _LIGHTNING),
    "fast_dev_run": Plain((False,), "infctx check tries a recipe; run.steps=2 makes a run short."),
    "overfit_batches": Plain((0.0,), "No share of the data; give a smaller file as data.path."),
    "enable_checkpointing": Plain((True,), "A checkpoint is always written at the end."),
    "enable_progress_bar": Plain((True, False), _LOGGING),
    "enable_model_summary": Plain((True, False), _LOGGING),
    "deterministic": Plain((False,), "run.seed decides a run; there is nothing else to set."),
    "benchmark": Plain((False,), _LIGHTNING),
    "inference_mode": Plain((True,), _LIGHTNING),
    "use_distributed_sampler": Plain((True, False), _RANKS),
    "profiler": Plain((), "There is no profiler."),
    "detect_anomaly": Plain((False,), "A step with an infinite or NaN gradient is left out (run.max_nonfinite_steps)."),
    "barebones": Plain((False,), _LIGHTNING),
    "plugins": Plain((), _LIGHTNING),
    "sync_batchnorm": Plain((False,), "There is no batch norm in these models."),
    "reload_dataloaders_every_n_epochs": Plain((0,), _LIGHTNING),
    "default_root_dir": Plain((), "run.folder holds everything a run writes."),
    "callbacks": Plain(([], {}), "Of callbacks only ModelCheckpoint has a counterpart."),
    "callbacks.init_args": Plain(({},), _LIGHTNING),
    "callbacks.class_path": Plain(
        ("lightning.pytorch.callbacks.ModelCheckpoint", "pytorch_lightning.callbacks.ModelCheckpoint",
         "ModelCheckpoint"), "Of callbacks only ModelCheckpoint has a counterpart."),
    "callbacks.init_args.filename": Plain((), "Checkpoints are folders named after their step."),
    "callbacks.init_args.monitor": Plain(("step",), _NEWEST),
    "callbacks.init_args.mode": Plain(("max", "min"), _NEWEST),
    "callbacks.init_args.save_last": Plain((True, False), _NEWEST),
    "callbacks.init_args.save_weights_only": Plain((False,), "A checkpoint is always whole, so that a run can go on."),
    "callbacks.init_args.every_n_epochs": Plain((), _STEPS),
    "callbacks.init_args.train_time_interval": Plain((), _STEPS),
    "callbacks.init_args.save_on_train_epoch_end": Plain((True, False), _STEPS),
    "callbacks.init_args.verbose": Plain((True, False), _LOGGING),
    "callbacks.init_args.auto_insert_metric_name": Plain((True, False), "Checkpoints are named after their step."),
}  # fmt: skip

MODEL: dict[str, Plain] = {
    "n_embd": Plain((-1,), _SIZES),
    "n_layer": Plain((-1,), _SIZES),
    "vocab_size": Plain((-1,), _SIZES),
    "dim_att": Plain((), _SIZES),
    "dim_ffn": Plain((), _SIZES),
    "version": Plain((), "The version is read from the model file."),
    "ctx_len_cutoffs": Plain(([],), _NO_WARM_CONTEXT),
    "ctx_len_warmup_steps": Plain(([],), _NO_WARM_CONTEXT),
    "dropout": Plain((0.0,), "No dropout in full fine-tuning; adapter.dropout is that of LoRA."),
    "position_loss_bias": Plain((1.0,), _PLACES + " The later versions there ignored it too."),
    "position_loss_bias_in_validation": Plain((False,), _PLACES + " The later versions there ignored it too."),
    "substep_cuda_cache_clear": Plain((False,), "Memory is planned before a run; no cache is cleared within it."),
    "substep_logging": Plain((False,), _LOGGING),
    "consolidated_logging": Plain((True, False), _LOGGING),
    "torch_set_float32_matmul_precision": Plain(("high",), "run.precision decides how matrix products are computed."),
}

DATA: dict[str, Plain] = {
    "skip_datapath_setup": Plain((True, False), _CACHE),
    "datapack_config_path": Plain((), "Another file: translate it too, and put its data section here."),
    "data_path_storage_options": Plain((), "Stores are reached with the credentials of the environment; none belongs "
                                       "in a recipe."),
    "autoTokenizer": Plain((), "Tokenizers are world, bytes, neox, or the path of a tokenizer JSON."),
    "world_add_endoftext_token": Plain((False,), "The text <|endoftext|> stays text: id 0 is the end of a document and "
                                       "never comes from what a row says."),
    "dataset_offset": Plain((-1, 0), _PART),
    "dataset_length": Plain((-1, 0), _PART),
    "data_prefix_skip_mask": Plain((0,), "The first tokens of a document are trained like the others, but for the "
                                   "very first."),
    "packing_batchsize": Plain((), "Rows of a step may differ in length."),
    "reverse_train_dataset_before_save": Plain((False,), "No order from the last row to the first."),
    "processing_max_batch_size": Plain((-1, 100_000), _CACHE),
    "dataloader_prefetch_factor": Plain((4,), "Documents lie prepared in memory or in the cache."),
    "dataloader_pin_memory": Plain((True, False), "Documents lie prepared in memory or in the cache."),
    "dataloader_swap_train_test_split": Plain((False,), "Held-out documents are never trained."),
    "dataset_weight": Plain((1.0,), "Give the set a data.sets share, epochs or tokens; that trainer took 1.0 only."),
    "dataset_index": Plain((0,), "A set is known by its name."),
    "is_random_datapack": Plain((False,), "Sets are mixed by data.order and their share."),
}  # fmt: skip

DATAPACK: dict[str, Plain] = {
    "data_path": Plain((), _CACHE),
    "data_path_storage_options": DATA["data_path_storage_options"],
    "batchsize": Plain((), "Batches are not made of one set each; sets are dealt by tokens."),
    "packing_batchsize": DATA["packing_batchsize"],
    "mixed_batch_percentage": Plain((), "Batches are not made of one set each; that trainer did not do it either."),
    "distribution": Plain((), "Sets are dealt by tokens, in proportion to their share."),
    "preload_only": Plain((False,), _CACHE),
    "only_preload": Plain((False,), _CACHE),
}

PLAIN: dict[str, dict[str, Plain]] = {
    "": TOP,
    "trainer": TRAINER,
    "model": MODEL,
    "data": DATA,
    "datapack": DATAPACK,
}
"""By part of the config."""

TRANSLATED: dict[str, frozenset[str]] = {
    "": frozenset({"seed_everything"}),
    "trainer": frozenset({
        "devices", "num_nodes", "strategy", "precision", "max_epochs", "max_steps", "target_batch_size",
        "microbatch_size", "accumulate_grad_batches", "gradient_clip_val", "callbacks.init_args.dirpath",
        "callbacks.init_args.every_n_train_steps", "callbacks.init_args.save_top_k",
    }),
    "model": frozenset({
        "load_model", "ctx_len", "lr_init", "lr_final", "lr_period", "lr_period_type", "lr_type", "warmup_steps",
        "beta1", "beta2", "adam_eps", "weight_decay", "layerwise_lr", "grad_cp", "bptt_learning",
        "bptt_learning_range", "bptt_truncated_learning", "token_loss_threshold", "token_dropout_rate",
        "state_tuning",
    }),
    "data": frozenset({
        "data_path", "source", "source_data_dir", "source_dataset_params", "source_dataset_split", "test_split",
        "test_split_shuffle", "text_rechunk_size", "text_rechunk_auto", "text_rechunk_force", "tokenizer",
        "min_token_size", "max_token_size", "sort_by_length", "sort_asc", "custom_text_key", "multi_column_keys",
        "multi_column_prefix", "multi_column_suffix", "multi_column_train_mask", "multi_column_separator",
        "conversation_format", "conversation_key", "conversation_input_key_prefix_map", "conversation_input_key_mask",
        "conversation_sender_key", "conversation_sender_value_map", "conversation_input_key_map",
        "conversation_sender_suffix", "conversation_sender_mask", "conversation_end_of_conversation",
        "disable_prompt_completion_mask", "packing_enable", "packing_chunksize", "packing_min_ctx_len",
        "packing_in_sequence", "dataloader_shuffle_training", "name", "dataset_name",
    }),
    "datapack": frozenset({"mixing_mode"}),
}  # fmt: skip
"""The keys that are translated, by part of the config."""
