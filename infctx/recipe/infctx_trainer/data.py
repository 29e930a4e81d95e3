"""The section data of RWKV-infctx-trainer's configs, or one set of a datapack: files, lengths, order, validation."""

import math
from collections.abc import Mapping

from infctx.recipe.infctx_trainer.draft import Part, count, in_words, real, shown
from infctx.recipe.infctx_trainer.templates import translate_template

_FORMATS = {"text": "text", "json": "jsonl", "csv": "csv", "parquet": "parquet"}
"""Format of each of Hugging Face's loaders of local files."""


def translate_data(data: Part, *, is_shuffled: bool | None = None) -> None:
    """Translate the section data, or one set of a datapack.

    Args: is_shuffled: whether the datapack is, after which no set has an order of its own; None = there is none.
    """
    if data.has("datapack_config_path"):
        data.without("datapack_config_path", "Another file: translate it too, and put its data section here.")
        for name in data.names():
            data.without(name, "That trainer reads the datapack instead.")
        data.fill_in_path("the sets of the datapack, as data.sets")
        return
    _files(data)
    translate_template(data)
    _lengths(data)
    is_rechunked = _rechunking(data)
    is_packed = _packing(data, is_rechunked=is_rechunked)
    _order(data, is_packed=is_packed, is_shuffled=is_shuffled)
    _held_out(data)
    _tokenizer(data)
    data.assume("Rows without text, or without anything to train on, are left out", {"data.on_empty_row": "skip"})


# Files


def _files(data: Part) -> None:
    source, prepared = data.get("source"), data.get("data_path")
    if not isinstance(source, str) or not source:
        data.fill_in_path("the files that the prepared set was made from" if prepared else "the files")
        data.without("data_path", "Holds tokens, not text; data.path names the files that they were made from.")
        data.no_effect("source_data_dir", "source_dataset_params", "source_dataset_split")
        return
    data.without("data_path", "Tokens are prepared as they are needed (data.cache, data.workers).")
    if data.get("tokenizer") == "binidx":
        data.to("source", {"data.path": source, "data.format": "binidx"})
        data.no_effect("source_data_dir", "source_dataset_params", "source_dataset_split")
    elif source in _FORMATS:
        _local_files(data, source)
    else:
        _hub(data, source)


def _local_files(data: Part, source: str) -> None:
    folder, params = data.get("source_data_dir"), data.get("source_dataset_params")
    format = {"data.format": _FORMATS[source]}
    files = _paths(params.get("data_files") if isinstance(params, Mapping) else None, folder)
    if files:
        _params(data, {"data_files": {"data.path": files[0] if len(files) == 1 else files}})
        data.to("source", format)
        data.to("source_data_dir", {}, text="data.path")
    elif isinstance(folder, str) and folder:
        data.to("source_data_dir", {"data.path": f"{folder.rstrip('/')}/**/*"})
        data.to("source", format)
        _params(data, {})
        data.draft.note(
            "data.path takes every file of the folder. There, files named test or validation were held out instead: "
            "leave them out with data.exclude, or name them as data.validation."
        )
    else:
        data.fill_in_path(f"the {source} files")
        data.to("source", format)
        _params(data, {})
    data.without("source_dataset_split", "Files have no splits; data.path says which of them are trained.")
    if source == "text":
        data.draft.note("With source text every line was a document there; here every file is one.")


def _hub(data: Part, source: str) -> None:
    params, split = data.get("source_dataset_params"), data.get("source_dataset_split")
    data.to("source", {"data.path": source, "data.format": "huggingface"})
    if isinstance(split, str) and split:
        data.to("source_dataset_split", {"data.split": split})
    subset = params.get("name") if isinstance(params, Mapping) else None
    _params(data, {"name": {"data.subset": subset}} if isinstance(subset, str) and subset else {})
    data.without("source_data_dir", "A set of the hub is read whole; give a local folder of it as data.path.")


def _paths(files: object, folder: object) -> list[str]:
    """What data_files says of the training files."""
    if isinstance(files, Mapping):
        files = files.get("train")
    found = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    inside = f"{folder.rstrip('/')}/" if isinstance(folder, str) and folder else ""
    return [f"{inside}{path}" for path in found if isinstance(path, str) and path]


def _params(data: Part, used: Mapping[str, Mapping[str, object]]) -> None:
    """Parameters of load_dataset: those that are used, by name, as recipe keys; where others are left, say which."""
    params = data.get("source_dataset_params", {})
    left = [str(name) for name in params if name not in used] if isinstance(params, Mapping) else ["all of it"]
    for ours in used.values():
        if left:
            data.put(ours)
        else:
            data.to("source_dataset_params", ours)
    if left:
        told = "".join(f" {name} became {in_words(ours)}." for name, ours in used.items())
        data.without("source_dataset_params", f"No counterpart: {shown(', '.join(left))}.{told}")
    elif not used:
        data.no_effect("source_dataset_params")


# Lengths


def _lengths(data: Part) -> None:
    """Both trainers count tokens; here the closing end of text counts too."""
    least, most = count(data.get("min_token_size")), count(data.get("max_token_size"))
    if least and least > 2:
        data.to("min_token_size", {"data.min_tokens": least + 1})
    else:
        data.no_effect("min_token_size")
    if most:
        data.to("max_token_size", {"data.max_tokens": most + 1, "data.on_long": "skip"})
    elif (real(data.get("max_token_size")) or 0) <= 0:
        data.no_effect("max_token_size")


def _rechunking(data: Part) -> bool:
    size = count(data.get("text_rechunk_size", 4096))
    is_text, is_forced = data.get("source") == "text", data.get("text_rechunk_force", False) is True
    is_rechunked = bool(size) and (is_forced or (is_text and data.get("text_rechunk_auto", True) is True))
    if not is_rechunked:
        data.no_effect("text_rechunk_size", "text_rechunk_force", "text_rechunk_auto")
        return False
    ours = {"data.rechunk_tokens": size}
    data.to("text_rechunk_size", ours, there=4096)
    if is_forced:
        data.to("text_rechunk_force", ours)
    data.no_effect("text_rechunk_force", "text_rechunk_auto")
    return True


def _packing(data: Part, *, is_rechunked: bool) -> bool:
    names = ("packing_enable", "packing_chunksize", "packing_min_ctx_len", "packing_in_sequence", "packing_batchsize")
    chunk = count(data.get("packing_chunksize", 4096))
    if data.get("packing_enable", False) is not True or is_rechunked or not chunk:
        # That trainer does not pack what it has cut to one length either.
        data.no_effect(*names)
        return False
    least = count(data.get("packing_min_ctx_len")) or chunk
    ours = {"data.pack_tokens": math.ceil(max(least, chunk) / chunk) * chunk}
    data.to("packing_enable", ours)
    data.to("packing_chunksize", ours, there=4096)
    if count(data.get("packing_min_ctx_len")):
        data.to("packing_min_ctx_len", ours)
    else:
        data.no_effect("packing_min_ctx_len")
    if data.label:
        data.draft.note("data.pack_tokens packs the documents of all sets.")
    data.draft.note(
        "Packing is data.pack_tokens, not data.mode stream, since a pack began from a fresh state there. Here every "
        "document of a pack does; there the state ran on from one to the next."
    )
    return True


# Order, validation, tokenizer


def _order(data: Part, *, is_packed: bool, is_shuffled: bool | None) -> None:
    in_sequence = data.get("packing_in_sequence", False) is True
    is_sorted = data.get("sort_by_length", False) is True and (in_sequence or not is_packed)
    is_reversed = data.get("reverse_train_dataset_before_save", False) is True
    if is_packed:
        data.to("packing_in_sequence", {}, text="data.order")
    if is_shuffled:
        data.no_effect("sort_by_length", "sort_asc", "test_split_shuffle", "dataloader_shuffle_training")
        data.no_effect("reverse_train_dataset_before_save")
    elif is_sorted and (data.get("sort_asc", True) is True) != is_reversed:
        for name in ("sort_by_length", "sort_asc", *(["reverse_train_dataset_before_save"] if is_reversed else [])):
            data.to(name, {"data.order": "length"})
        data.no_effect("test_split_shuffle", "dataloader_shuffle_training")
    elif is_sorted:
        data.without("sort_by_length", "data.order: length is shortest first; here the order is random.")
        data.without("sort_asc", "data.order: length is shortest first.")
        data.no_effect("test_split_shuffle", "dataloader_shuffle_training")
    else:
        data.no_effect("sort_by_length", "sort_asc")
        _unsorted(data, is_random=is_packed and not in_sequence)


def _unsorted(data: Part, *, is_random: bool) -> None:
    if is_random:
        # Packs are filled in random order, whatever came before.
        data.to("packing_in_sequence", {"data.order": "random"})
        data.no_effect("test_split_shuffle", "dataloader_shuffle_training")
    elif data.get("dataloader_shuffle_training", False) is True:
        data.to("dataloader_shuffle_training", {"data.order": "random"})
        data.no_effect("test_split_shuffle")
    elif data.get("test_split_shuffle", False) is True:
        data.to("test_split_shuffle", {"data.order": "random"})
        data.no_effect("dataloader_shuffle_training")
    else:
        data.to("test_split_shuffle", {"data.order": "file"}, there=False)
        data.no_effect("dataloader_shuffle_training")


def _held_out(data: Part) -> None:
    share = real(data.get("test_split", 0.01))
    if share is not None and 0 < share < 1:
        data.to("test_split", {"data.validation": share}, there=0.01)
    else:
        data.without(
            "test_split",
            "A number of documents (0: one); data.validation is a share of them, or a file. Nothing is held out.",
        )


def _tokenizer(data: Part) -> None:
    name = data.get("tokenizer")
    if name in ("world", "neox") or (isinstance(name, str) and name.endswith(".json")):
        data.to("tokenizer", {"data.tokenizer": name})
    elif name == "binidx":
        data.to("tokenizer", {}, text="data.format: binidx")
    else:
        data.without("tokenizer", "Tokenizers are world, bytes, neox, or the path of a tokenizer JSON.")
