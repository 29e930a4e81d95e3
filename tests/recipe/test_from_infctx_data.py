"""The section data of RWKV-infctx-trainer, and its datapacks: files, lengths, packing, order, what is held out."""

import json
from typing import Any

import pytest
import yaml


@pytest.mark.parametrize(
    ("keys", "path", "format", "more"),
    [
        ({"source": "a/b"}, "a/b", "huggingface", {}),
        ({"source": "a/b", "source_dataset_split": "part"}, "a/b", "huggingface", {"split": "part"}),
        ({"source": "a/b", "source_dataset_params": {"name": "sub"}}, "a/b", "huggingface", {"subset": "sub"}),
        ({"source": "text", "source_data_dir": "../t/"}, "../t/**/*", "text", {"rechunk_tokens": 4096}),
        ({"source": "json", "source_data_dir": "../j"}, "../j/**/*", "jsonl", {}),
        ({"source": "csv", "source_dataset_params": {"data_files": "a.csv"}}, "a.csv", "csv", {}),
        (
            {"source": "json", "source_data_dir": "d", "source_dataset_params": {"data_files": ["a", "b"]}},
            ["d/a", "d/b"],
            "jsonl",
            {},
        ),
        ({"source": "parquet", "source_dataset_params": {"data_files": {"train": "x"}}}, "x", "parquet", {}),
        ({"source": "json"}, "FILL-IN.jsonl", "jsonl", {}),
        ({"source": "../wiki_document", "tokenizer": "binidx"}, "../wiki_document", "binidx", {}),
        ({"source": None, "data_path": "../prepared"}, "FILL-IN.jsonl", "auto", {}),
    ],
)
def test_files(config: Any, keys: dict[str, Any], path: object, format: str, more: dict[str, Any]) -> None:
    data = config.load(config.raw({"trainer": config.trainer, "model": config.model, "data": keys})).data
    assert (data.path, data.format) == (path, format)
    assert {key: getattr(data, key) for key in ("split", "subset", "rechunk_tokens")} == {
        "split": "train",
        "subset": None,
        "rechunk_tokens": None,
        **more,
    }


def test_parameters_of_a_set_that_have_no_counterpart(config: Any) -> None:
    translation = config.translate(data={"source_dataset_params": {"name": "sub", "language": "en"}})
    kind, reason = config.of(translation, "data.source_dataset_params")
    assert kind == "without_counterpart"
    assert reason == "No counterpart: language. name became data.subset: sub."
    assert config.load(translation).data.subset == "sub"


def test_secrets_are_not_copied(config: Any) -> None:
    translation = config.translate(
        data={
            "data_path_storage_options": {"key": "AKIA1", "secret": "s3cr3t", "endpoint_url": "https://x"},
            "source_dataset_params": {"use_auth_token": "hf_abc"},
        },
        trainer={"logger": {"init_args": {"api_key": "w4ndb"}}},
        store={"secret": "t0p"},
    )
    everything = translation.text + json.dumps(translation.to_json()) + " ".join(translation.account)
    assert not any(secret in everything for secret in ("AKIA1", "s3cr3t", "hf_abc", "https://x", "w4ndb", "t0p"))
    assert config.of(translation, "data.data_path_storage_options")[0] == "without_counterpart"


@pytest.mark.parametrize(
    ("keys", "tokens", "unsaid"),
    [
        ({"source": "text", "source_data_dir": "d"}, 4096, []),
        ({"source": "text", "source_data_dir": "d", "text_rechunk_size": 1024}, 1024, []),
        ({"source": "text", "source_data_dir": "d", "text_rechunk_auto": False}, None, ["text_rechunk_auto"]),
        ({"source": "text", "source_data_dir": "d", "text_rechunk_size": -1}, None, ["text_rechunk_size"]),
        ({"source": "a/b", "text_rechunk_size": 1024}, None, ["text_rechunk_size"]),
        ({"source": "a/b", "text_rechunk_size": 512, "text_rechunk_force": True}, 512, []),
        ({"source": "a/b", "text_rechunk_size": 0, "text_rechunk_force": True}, None, ["text_rechunk_size"]),
    ],
)
def test_rechunking(config: Any, keys: dict[str, Any], tokens: int | None, unsaid: list[str]) -> None:
    translation = config.raw({"model": config.model, "data": keys})
    assert config.load(translation).data.rechunk_tokens == tokens
    for name in keys.keys() & {"text_rechunk_size", "text_rechunk_force"}:
        assert config.of(translation, f"data.{name}")[0] == ("translated" if tokens else "no_effect")
    assert all(config.of(translation, f"data.{name}")[0] == "no_effect" for name in unsaid)


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({}, 4096),
        ({"packing_chunksize": 2048, "packing_min_ctx_len": -1}, 2048),
        ({"packing_chunksize": 2048, "packing_min_ctx_len": 16384}, 16384),
        ({"packing_chunksize": 4096, "packing_min_ctx_len": 5000}, 8192),
        ({"packing_chunksize": 4096, "packing_min_ctx_len": 100}, 4096),
        ({"packing_enable": False, "packing_chunksize": 2048}, None),
        # That trainer does not pack what it has cut to one length.
        ({"text_rechunk_force": True}, None),
    ],
)
def test_packing(config: Any, keys: dict[str, Any], tokens: int | None) -> None:
    translation = config.translate(data={"packing_enable": True, **keys})
    recipe = config.load(translation)
    assert recipe.data.pack_tokens == tokens
    assert recipe.resolved().data.mode == "document"
    assert config.of(translation, "data.packing_enable")[0] == ("translated" if tokens else "no_effect")
    assert any("the state ran on" in note for note in translation.notes) == bool(tokens)


@pytest.mark.parametrize(
    ("keys", "order", "without"),
    [
        ({}, "file", []),
        ({"test_split_shuffle": False}, "file", []),
        ({"test_split_shuffle": True}, "random", []),
        ({"dataloader_shuffle_training": True}, "random", []),
        ({"sort_by_length": True}, "length", []),
        ({"sort_by_length": True, "sort_asc": True, "test_split_shuffle": True}, "length", []),
        ({"sort_by_length": True, "sort_asc": False}, "random", ["data.sort_by_length", "data.sort_asc"]),
        ({"sort_by_length": True, "sort_asc": False, "reverse_train_dataset_before_save": True}, "length", []),
        ({"sort_by_length": True, "packing_enable": True}, "random", []),
        ({"sort_by_length": True, "packing_enable": True, "packing_in_sequence": True}, "length", []),
        ({"packing_enable": True, "packing_in_sequence": True}, "file", []),
        ({"packing_enable": True, "packing_in_sequence": False}, "random", []),
        ({"reverse_train_dataset_before_save": True}, "file", ["data.reverse_train_dataset_before_save"]),
    ],
)
def test_order(config: Any, keys: dict[str, Any], order: str, without: list[str]) -> None:
    translation = config.raw({"trainer": config.trainer, "model": config.model, "data": {"source": "a/b", **keys}})
    assert config.load(translation).data.order == order
    assert [one.key for one in translation.of_kind("without_counterpart")] == without


@pytest.mark.parametrize(
    ("keys", "validation", "is_told"),
    [
        ({}, 0.01, False),
        ({"test_split": 0.1}, 0.1, False),
        ({"test_split": "1e-3"}, 0.001, False),
        ({"test_split": 0}, None, True),
        ({"test_split": 50}, None, True),
    ],
)
def test_held_out(config: Any, keys: dict[str, Any], validation: float | None, is_told: bool) -> None:
    translation = config.translate(data=keys)
    assert config.load(translation).data.validation == validation
    assert [one.key for one in translation.of_kind("without_counterpart")] == ["data.test_split"] * is_told


@pytest.mark.parametrize(
    ("tokenizer", "ours", "kind"),
    [
        ("world", "world", "translated"),
        ("neox", "neox", "translated"),
        ("my/tok.json", "my/tok.json", "translated"),
        ("org/hub-tokenizer", "auto", "without_counterpart"),
    ],
)
def test_tokenizer(config: Any, tokenizer: str, ours: str, kind: str) -> None:
    translation = config.translate(data={"tokenizer": tokenizer})
    assert config.load(translation).data.tokenizer == ours
    assert config.of(translation, "data.tokenizer")[0] == kind


def test_the_end_of_text_as_text_is_told(config: Any) -> None:
    translation = config.translate(data={"world_add_endoftext_token": True})
    assert "<|endoftext|> stays text" in config.of(translation, "data.world_add_endoftext_token")[1]
    translation = config.translate(data={"world_add_endoftext_token": False})
    assert config.of(translation, "data.world_add_endoftext_token")[0] == "no_effect"


def test_a_named_datapack_takes_the_place_of_the_data(config: Any) -> None:
    translation = config.translate(data={"datapack_config_path": "pack.yaml", "tokenizer": "world"})
    assert config.load(translation).data.path == "FILL-IN.jsonl"
    assert {one.key for one in translation.of_kind("without_counterpart")} == {
        "data.datapack_config_path",
        "data.tokenizer",
        "data.source",
        "data.test_split_shuffle",
    }


# Datapacks


CHAT = {
    "conversation_format": "sender",
    "conversation_key": "conversations",
    "conversation_sender_key": "who",
    "conversation_input_key_map": {"says": "\n\n{sender}: "},
    "conversation_sender_value_map": {"human": "User", "gpt": "Assistant"},
    "conversation_sender_mask": {"human": False, "gpt": True},
    "conversation_sender_suffix": {},
}


def test_datapack(config: Any) -> None:
    translation = config.raw(
        {
            "datapack": {"data_path": "out", "mixing_mode": "shuffle", "batchsize": 64},
            "default": {
                "tokenizer": "world",
                "test_split": 0.001,
                "test_split_shuffle": True,
                "min_token_size": 64,
                "text_rechunk_size": 512,
                "data_path": "parts",
            },
            "dataset": [
                {"name": "plain", "source": "a/plain"},
                {"source": "a/long", "text_rechunk_force": True, "min_token_size": -1, "name": "plain"},
                {"name": "done", "data_path": "prepared", "data_prefix_skip_mask": 8},
                {**CHAT, "source": "a/chat", "sort_by_length": True, "test_split_shuffle": False},
            ],
        },
        name="my pack.yaml",
    )
    recipe = config.load(translation)
    assert yaml.safe_load(translation.text)["data"] == {
        "on_empty_row": "skip",
        "sets": [
            {"name": "plain", "path": "a/plain", "format": "huggingface", "min_tokens": 65},
            {"name": "plain_1", "path": "a/long", "format": "huggingface", "rechunk_tokens": 512},
            {"name": "done", "path": "FILL-IN-done.jsonl", "min_tokens": 65},
            {
                "name": "dataset_3",
                "path": "a/chat",
                "format": "huggingface",
                "template": "chat",
                "fields": {"sender": "who", "message": "says"},
                "roles": {"human": "user", "gpt": "assistant"},
                "min_tokens": 65,
            },
        ],
        "tokenizer": "world",
        "validation": 0.001,
    }
    assert recipe.run.folder == "runs/my_pack"
    assert set(translation.to_fill_in) == {"model.path", "optimizer.lr", "run.epochs", "data.sets, done, path"}
    # Taken by one set only, a default is translated all the same.
    assert config.of(translation, "default.text_rechunk_size") == ("translated", "data.rechunk_tokens: 512")
    assert config.of(translation, "default.min_token_size")[0] == "translated"
    assert config.of(translation, "dataset[1].min_token_size")[0] == "no_effect"
    # The whole is shuffled after it.
    assert config.of(translation, "dataset[3].sort_by_length")[0] == "no_effect"
    assert recipe.data.order == "random"
    assert config.of(translation, "dataset[2].data_prefix_skip_mask")[0] == "without_counterpart"


def test_what_all_sets_say_stands_once(config: Any) -> None:
    sets = [{"name": name, "source": f"a/{name}", "custom_text_key": "code"} for name in ("x", "y")]
    data = yaml.safe_load(config.raw({"datapack": {}, "default": {}, "dataset": sets}).text)["data"]
    assert data["sets"] == [{"name": "x", "path": "a/x"}, {"name": "y", "path": "a/y"}]
    assert data["fields"] == {"text": "code"}
    assert data["format"] == "huggingface"


def test_keys_that_are_one_for_all_sets(config: Any) -> None:
    sets = [
        {"source": "a", "tokenizer": "world", "test_split_shuffle": True},
        {"source": "b", "tokenizer": "neox", "test_split": 0.5},
    ]
    translation = config.raw({"datapack": {"mixing_mode": "concat"}, "default": {}, "dataset": sets})
    assert config.load(translation).data.tokenizer == "world"
    assert config.of(translation, "dataset[1].tokenizer") == (
        "without_counterpart",
        "data.tokenizer is one for all sets, and an earlier set decides.",
    )
    assert config.of(translation, "dataset[1].test_split")[0] == "without_counterpart"
    assert any("concat" in note for note in translation.notes)


def test_a_default_that_every_set_overrides(config: Any) -> None:
    sets = [{"source": "a", "max_token_size": 100}, {"source": "b", "max_token_size": 200}]
    translation = config.raw({"datapack": {}, "default": {"max_token_size": 9}, "dataset": sets})
    assert config.of(translation, "default.max_token_size")[0] == "no_effect"
    assert [source.max_tokens for _, source in config.load(translation).data.sources()] == [101, 201]
