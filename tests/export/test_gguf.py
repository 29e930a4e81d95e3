"""GGUF files: the gguf package, which nobody here wrote, finds what llama.cpp wants; we find the model again."""

from __future__ import annotations

import errno
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from infctx.checkpoint.model_file import load_model, official_tensors, open_model, tensors_of
from infctx.data.tokenizer import tokenizer_by_name
from infctx.errors import CheckpointError
from infctx.export import gguf as gguf_export
from infctx.export.gguf import as_read_back, prepare_gguf, write_gguf, write_prepared_gguf
from infctx.export.options import ExportOptions
from infctx.model.finch import Finch
from infctx.model.tensors import ModelTensors

Official = Mapping[str, Tensor]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", "q8_0": "Q8_0"}
TOKENS = torch.arange(30)[None] % 50
SIZES = {"n_layer": 3, "n_embd": 32, "head_size": 8, "dim_ffn": 96, "lerp_rank": 4, "decay_rank": 6}

# From llama.cpp's side: what each tensor is, and the lengths of its axes there, in the letters of infctx.shapes.
TABLE: dict[str, tuple[Callable[[Official, int], Tensor], str]] = {
    "token_embd.weight": (lambda o, i: o["emb.weight"], "C V"),
    "token_embd_norm.weight": (lambda o, i: o["blocks.0.ln0.weight"], "C"),
    "token_embd_norm.bias": (lambda o, i: o["blocks.0.ln0.bias"], "C"),
    "output_norm.weight": (lambda o, i: o["ln_out.weight"], "C"),
    "output_norm.bias": (lambda o, i: o["ln_out.bias"], "C"),
    "output.weight": (lambda o, i: o["head.weight"], "C V"),
    "attn_norm.weight": (lambda o, i: o[f"blocks.{i}.ln1.weight"], "C"),
    "attn_norm.bias": (lambda o, i: o[f"blocks.{i}.ln1.bias"], "C"),
    "attn_norm_2.weight": (lambda o, i: o[f"blocks.{i}.ln2.weight"], "C"),
    "attn_norm_2.bias": (lambda o, i: o[f"blocks.{i}.ln2.bias"], "C"),
    "time_mix_w1.weight": (lambda o, i: o[f"blocks.{i}.att.time_maa_w1"].T, "C 5D"),
    "time_mix_w2.weight": (lambda o, i: o[f"blocks.{i}.att.time_maa_w2"].permute(0, 2, 1), "D C 5"),
    "time_mix_lerp_x.weight": (lambda o, i: o[f"blocks.{i}.att.time_maa_x"].flatten(), "C"),
    "time_mix_lerp_fused.weight": (
        lambda o, i: torch.cat([o[f"blocks.{i}.att.time_maa_{mix}"] for mix in "wkvrg"])[:, None],
        "C 1 1 5",
    ),
    "time_mix_first.weight": (lambda o, i: o[f"blocks.{i}.att.time_faaaa"], "N H"),
    "time_mix_decay.weight": (lambda o, i: o[f"blocks.{i}.att.time_decay"].flatten(), "C"),
    "time_mix_decay_w1.weight": (lambda o, i: o[f"blocks.{i}.att.time_decay_w1"].T, "C E"),
    "time_mix_decay_w2.weight": (lambda o, i: o[f"blocks.{i}.att.time_decay_w2"].T, "E C"),
    "time_mix_key.weight": (lambda o, i: o[f"blocks.{i}.att.key.weight"], "C C"),
    "time_mix_value.weight": (lambda o, i: o[f"blocks.{i}.att.value.weight"], "C C"),
    "time_mix_receptance.weight": (lambda o, i: o[f"blocks.{i}.att.receptance.weight"], "C C"),
    "time_mix_gate.weight": (lambda o, i: o[f"blocks.{i}.att.gate.weight"], "C C"),
    "time_mix_output.weight": (lambda o, i: o[f"blocks.{i}.att.output.weight"], "C C"),
    "time_mix_ln.weight": (lambda o, i: o[f"blocks.{i}.att.ln_x.weight"], "C"),
    "time_mix_ln.bias": (lambda o, i: o[f"blocks.{i}.att.ln_x.bias"], "C"),
    "channel_mix_lerp_k.weight": (lambda o, i: o[f"blocks.{i}.ffn.time_maa_k"].flatten(), "C"),
    "channel_mix_lerp_r.weight": (lambda o, i: o[f"blocks.{i}.ffn.time_maa_r"].flatten(), "C"),
    "channel_mix_key.weight": (lambda o, i: o[f"blocks.{i}.ffn.key.weight"], "C F"),
    "channel_mix_receptance.weight": (lambda o, i: o[f"blocks.{i}.ffn.receptance.weight"], "C C"),
    "channel_mix_value.weight": (lambda o, i: o[f"blocks.{i}.ffn.value.weight"], "F C"),
}
OF_THE_MODEL = list(TABLE)[:6]
# In llama.cpp these are kept in float32 whatever the others are.
MATRICES = {
    *("token_embd.weight", "output.weight"),
    *(f"time_mix_{name}.weight" for name in ("key", "value", "receptance", "gate", "output")),
    *(f"channel_mix_{name}.weight" for name in ("key", "receptance", "value")),
}


def by_table(official: Official, n_layer: int) -> dict[str, Tensor]:
    """Every tensor of the file, by its name there."""
    of_model = {name: TABLE[name][0](official, 0) for name in OF_THE_MODEL}
    of_layers = {
        f"blk.{i}.{name}": TABLE[name][0](official, i)
        for i in range(n_layer)
        for name in TABLE
        if name not in OF_THE_MODEL
    }
    return of_model | of_layers


def short(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def write_by_table(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, int | float | str]) -> Path:
    """As other programs write: all in memory, by the gguf package alone."""
    writer = gguf.GGUFWriter(path, str(metadata.get("general.architecture", "rwkv6")))
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        if key != "general.architecture":
            add(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(make_finch: Callable[..., Finch]) -> Finch:
    return make_finch(**SIZES)


# What is written


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gguf_package_finds_every_tensor(model: Finch, tmp_path: Path, dtype, stored: torch.dtype) -> None:
    model = model.to(stored)
    write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = by_table(official_tensors(model), 3)
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    lengths = {"C": 32, "V": 50, "D": 4, "5D": 20, "5": 5, "1": 1, "N": 8, "H": 4, "E": 6, "F": 96}
    for tensor in reader.tensors:
        name = short(tensor.name)
        assert tensor.shape.tolist() == [lengths[letter] for letter in TABLE[name][1].split()], tensor.name
        kind = DTYPES[dtype] if name in MATRICES else "F32"
        assert tensor.tensor_type.name == kind, tensor.name
        values = expected[tensor.name].contiguous()
        if kind == "BF16":
            raw = values.to(dtype).view(torch.int16).numpy().view(np.uint8)
        else:
            raw = gguf.quants.quantize(values.float().numpy(), tensor.tensor_type)
        assert tensor.data.tobytes() == raw.tobytes(), tensor.name
        assert tensor.data_offset % 32 == 0
    last = reader.tensors[-1]
    assert (tmp_path / "m.gguf").stat().st_size == -(-(last.data_offset + last.n_bytes) // 32) * 32


def test_the_metadata_that_llama_cpp_wants(model: Finch, tmp_path: Path) -> None:
    for dtype, file_type in ((torch.float32, 0), (torch.float16, 1), ("q8_0", 7), (torch.bfloat16, 32)):
        write_gguf(tensors_of(model), tmp_path / "small.gguf", dtype=dtype)
        reader = gguf.GGUFReader(tmp_path / "small.gguf")
        assert field(reader, "general.file_type") == file_type
        assert gguf.LlamaFileType(file_type).name.endswith(DTYPES[dtype])
    sizes = {
        "context_length": 1048576,
        "embedding_length": 32,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 0,
        "wkv.head_size": 8,
        "time_mix_extra_dim": 4,
        "time_decay_extra_dim": 6,
        "rescale_every_n_layers": 0,
        "token_shift_count": 2,
        "vocab_size": 50,
    }
    for name, value in sizes.items():
        assert field(reader, f"rwkv6.{name}") == value
        assert reader.fields[f"rwkv6.{name}"].types == [gguf.GGUFValueType.UINT32]
    assert field(reader, "rwkv6.attention.layer_norm_epsilon") == np.float32(1e-5)
    assert field(reader, "general.architecture") == "rwkv6"
    assert field(reader, "general.name") == "small"
    assert field(reader, "general.quantization_version") == 2


def test_the_world_vocabulary(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    source = tensors_of(make_finch(n_layer=1, vocab_size=65536), tokenizer="world")
    assert write_gguf(source, tmp_path / "m.gguf", dtype=torch.float16) == []
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "tokenizer.ggml.model") == "rwkv"
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 65536
    assert (tokens[0], tokens[65530], tokens[65535]) == ("<s>", "[PAD65530]", "[PAD65535]")
    assert [kinds[i] for i in (0, 1, 65529, 65530, 65535)] == [3, 1, 1, 5, 5]
    assert [tokens[i] for i in (1, 10, 11, 14, 33, 93, 256, 261)] == [
        *("\\x00", "\\t", "\\n", "\\r", " ", "\\\\", "\\xff", "\\n\\n")
    ]
    world, ids = tokenizer_by_name("world"), range(1, 65530)
    found = [unescaped(token) for token in tokens[1:65530]]
    assert [len(token) for token in found] == world.byte_lengths(ids).tolist()
    assert b"".join(found) == world.decode_bytes(ids)
    assert field(reader, "tokenizer.ggml.eot_token_id") == 261
    assert field(reader, "tokenizer.ggml.eos_token_id") == 0
    assert field(reader, "tokenizer.chat_template") == "rwkv-world"
    assert reader.fields["tokenizer.ggml.token_type"].types[1] == gguf.GGUFValueType.INT32
    assert open_model(tmp_path / "m.gguf").tokenizer == "world"


def unescaped(token: str) -> bytes:
    """As llama.cpp reads a token: \\xNN, \\n, \\t, \\r, and a backslash before any other character is only that."""
    found, position = b"", 0
    while position < len(token):
        character = token[position]
        position += 1
        if character != "\\":
            found += character.encode()
            continue
        character = token[position]
        position += 1
        if character == "x":
            found += bytes([int(token[position : position + 2], 16)])
            position += 2
        else:
            found += {"n": b"\n", "t": b"\t", "r": b"\r"}.get(character, character.encode())
    return found


def test_the_vocabulary_of_bytes(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    notes = write_gguf(tensors_of(make_finch(n_layer=1, vocab_size=257)), tmp_path / "m.gguf", dtype=torch.float16)
    assert len(notes) == 1
    assert "its 257 ids are those of 'bytes'" in notes[0]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert [unescaped(token) for token in tokens] == [b"<s>", *(bytes([i]) for i in range(256))]
    assert "tokenizer.ggml.eot_token_id" not in reader.fields
    assert field(reader, "tokenizer.ggml.eos_token_id") == 0
    assert open_model(tmp_path / "m.gguf").tokenizer == "bytes"


def test_a_vocabulary_with_padding_and_a_tokenizer_of_another_name(
    make_finch: Callable[..., Finch], tmp_path: Path
) -> None:
    source = tensors_of(make_finch(n_layer=1, vocab_size=300), tokenizer="bytes")
    assert write_gguf(source, tmp_path / "m.gguf", dtype=torch.float16) == []
    assert field(gguf.GGUFReader(tmp_path / "m.gguf"), "tokenizer.ggml.tokens")[257:] == [
        f"[PAD{i}]" for i in range(257, 300)
    ]
    assert open_model(tmp_path / "m.gguf").tokenizer == "bytes"
    for tokenizer, what in (("pile.json", "'pile.json' has no GGUF form"), (None, "does not name its tokenizer")):
        source = tensors_of(make_finch(n_layer=1, vocab_size=300), tokenizer=tokenizer)
        notes = write_gguf(source, tmp_path / "m.gguf", dtype=torch.float16)
        assert len(notes) == 1
        assert what in notes[0]
        assert "token ids only" in notes[0]
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        assert field(reader, "tokenizer.ggml.model") == "no_vocab"
        assert "tokenizer.ggml.tokens" not in reader.fields
        assert open_model(tmp_path / "m.gguf").tokenizer == tokenizer


def test_rows_that_are_not_whole_blocks_stay_in_float16(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    notes = write_gguf(tensors_of(make_finch(dim_ffn=101)), tmp_path / "m.gguf", dtype="q8_0")
    assert any("3 matrices, first blk.0.channel_mix_value.weight, are stored as F16" in note for note in notes)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.2.channel_mix_value.weight"] == "F16"
    assert kinds["blk.2.channel_mix_key.weight"] == "Q8_0"
    load_model(tmp_path / "m.gguf")


def test_large_matrices_are_written_in_pieces(model: Finch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=dtype)
        whole = (tmp_path / "m.gguf").read_bytes()
        for elements in (1, 32 * 7):
            monkeypatch.setattr(gguf_export, "BLOCK_ELEMENTS", elements)
            write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=dtype)
            assert (tmp_path / "m.gguf").read_bytes() == whole


WRITE_LARGE = """
import sys
from pathlib import Path
import gguf, torch
from infctx.checkpoint.model_file import tensors_of
from infctx.export.gguf import write_gguf
from infctx.model.finch import Finch
from infctx.model.init import new_config
from infctx.model.tensors import ModelTensors, StoredTensor

def stored(like):
    return StoredTensor(like.shape, torch.float32, lambda: torch.ones(like.shape))

config = new_config(version="6", n_layer=2, n_embd=512, vocab_size=16384, head_size=64, dim_ffn=16384)
with torch.device("meta"):
    tensors = tensors_of(Finch(config)).tensors
source = ModelTensors(config=config, tensors={name: stored(tensor) for name, tensor in tensors.items()})
peak_bytes = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak_bytes()
write_gguf(source, Path(sys.argv[1]), dtype=torch.float32)
print(peak_bytes() - before)
"""


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    done = subprocess.run([sys.executable, "-c", WRITE_LARGE, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 200 << 20
    print(f"{int(done.stdout) / 2**20:.0f} MB more at the peak")
    assert int(done.stdout) < 2 * (32 << 20)


# What comes back


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_round_trip_is_bit_equal(model: Finch, tmp_path: Path, dtype: torch.dtype, is_streamed: bool) -> None:
    model = model.to(dtype).float()
    write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=dtype)
    found, expected = open_model(tmp_path / "m.gguf", is_streamed=is_streamed), official_tensors(model)
    assert found.config == model.config
    assert list(found.tensors) == list(expected)
    for name, tensor in found.tensors.items():
        assert tensor.shape == tuple(expected[name].shape), name
        assert torch.equal(tensor.read().float(), expected[name]), name
    assert found.tensors["emb.weight"].dtype == dtype
    assert found.tensors["blocks.0.att.time_faaaa"].dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m.gguf")(TOKENS)[0], model(TOKENS)[0])


def test_q8_0_comes_back_as_the_gguf_package_rounds(model: Finch, tmp_path: Path) -> None:
    write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype="q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    found, expected = open_model(tmp_path / "m.gguf"), official_tensors(model)
    rounded = 0
    for name, tensor in found.tensors.items():
        values = expected[name]
        if values.dim() == 2 and ".time_" not in name:
            values = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))
            rounded += 1
        assert torch.equal(tensor.read(), values), name
    assert rounded == 2 + 3 * 8
    with torch.no_grad():
        difference = float((load_model(tmp_path / "m.gguf")(TOKENS)[0] - model(TOKENS)[0]).abs().max())
    assert 0 < difference < 0.3


def by_other_means(
    model: Finch, *, layers_a_halving: int = 0, is_fused: bool = True
) -> tuple[dict[str, Tensor], dict[str, int | float | str]]:
    """Tensors and metadata as other versions of other converters write them."""
    tensors = by_table(official_tensors(model), model.config.n_layer)
    for i in range(model.config.n_layer):
        if layers_a_halving:
            for name in ("time_mix_output", "channel_mix_value"):
                tensors[f"blk.{i}.{name}.weight"] = tensors[f"blk.{i}.{name}.weight"] / 2 ** (i // layers_a_halving)
        if not is_fused:
            fused = tensors.pop(f"blk.{i}.time_mix_lerp_fused.weight")
            for j, mix in enumerate("wkvrg"):
                tensors[f"blk.{i}.time_mix_lerp_{mix}.weight"] = fused[j].flatten()
    metadata: dict[str, int | float | str] = {"rwkv6.block_count": model.config.n_layer, "rwkv6.wkv.head_size": 8}
    if layers_a_halving:
        metadata["rwkv6.rescale_every_n_layers"] = layers_a_halving
    return tensors, metadata


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("layers_a_halving", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_others_are_read(
    make_finch: Callable[..., Finch], tmp_path: Path, layers_a_halving: int, is_fused: bool, dtype: torch.dtype
) -> None:
    model = make_finch(**SIZES | {"n_layer": 5}).to(dtype).float()
    tensors, metadata = by_other_means(model, layers_a_halving=layers_a_halving, is_fused=is_fused)
    tensors = {name: x.to(dtype) if short(name) in MATRICES else x for name, x in tensors.items()}
    path = write_by_table(tmp_path / "m.gguf", tensors, metadata)
    bound = 0.0 if dtype == torch.float32 else 1e-6  # a value below the normal numbers of float16 may lose a bit
    for name, tensor in open_model(path).tensors.items():
        expected = official_tensors(model)[name]
        assert float((tensor.read().float() - expected).abs().max()) <= bound, name


def test_halved_float16_values_may_be_larger_than_float16_holds(model: Finch, tmp_path: Path) -> None:
    with torch.no_grad():
        model.blocks[2].time_mix.output.weight[0, 0] = 4 * 45056.0
    tensors, metadata = by_other_means(model, layers_a_halving=1)
    tensors["blk.2.time_mix_output.weight"] = tensors["blk.2.time_mix_output.weight"].half()
    found = open_model(write_by_table(tmp_path / "m.gguf", tensors, metadata))
    assert float(found.tensors["blocks.2.att.output.weight"].read()[0, 0]) == 4 * 45056.0


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "llama", "of the architecture 'llama'; expected 'rwkv6'"),
        ("general.architecture", "rwkv7", "of the architecture 'rwkv7'"),
        ("rwkv6.wkv.head_size", 64, "wkv.head_size is 64, but the tensors have head_size = 8"),
        ("rwkv6.embedding_length", 33, "embedding_length is 33, but the tensors have n_embd = 32"),
        ("rwkv6.block_count", 4, "block_count is 4, but the tensors have n_layer = 3"),
        ("rwkv6.feed_forward_length", 95, "feed_forward_length is 95, but the tensors have dim_ffn = 96"),
        ("rwkv6.time_mix_extra_dim", 32, "time_mix_extra_dim is 32, but the tensors have lerp_rank = 4"),
        ("rwkv6.time_decay_extra_dim", 64, "time_decay_extra_dim is 64, but the tensors have decay_rank = 6"),
        ("rwkv6.vocab_size", 51, "vocab_size is 51, but the tensors have vocab_size = 50"),
        ("rwkv6.vocab_size", "fifty", "vocab_size is 'fifty'; expected a whole number"),
        ("rwkv6.token_shift_count", 1, "token_shift_count is 1; expected 2"),
        ("rwkv6.attention.layer_norm_epsilon", 1e-6, r"layer_norm_epsilon is 9.99.*e-07; expected 1e-05"),
        ("rwkv6.attention.layer_norm_epsilon", float("nan"), "layer_norm_epsilon is nan"),
        ("rwkv6.attention.layer_norm_epsilon", "small", "layer_norm_epsilon is small"),
        ("rwkv6.rescale_every_n_layers", "-1", "rescale_every_n_layers is -1"),
    ],
)
def test_metadata_that_disagrees_is_refused(model: Finch, tmp_path: Path, key: str, value: Any, message: str) -> None:
    tensors, metadata = by_other_means(model)
    with pytest.raises(CheckpointError, match=f"m.gguf.*{message}"):
        open_model(write_by_table(tmp_path / "m.gguf", tensors, metadata | {key: value}))


def test_tensors_that_do_not_belong_are_refused(model: Finch, tmp_path: Path) -> None:
    tensors, metadata = by_other_means(model)
    one_less = {name: x for name, x in tensors.items() if name != "blk.1.time_mix_key.weight"}
    old, _ = by_other_means(model, is_fused=False)
    mixed = tensors | {"blk.1.time_mix_lerp_w.weight": old["blk.1.time_mix_lerp_w.weight"]}
    lerps = "blk.0.time_mix_lerp_fused.weight"
    cases = [
        (one_less, "missing, first blk.1.time_mix_key.weight"),
        (tensors | {"blk.1.extra.weight": torch.ones(2)}, "do not belong to the GGUF layout, first blk.1.extra.weight"),
        (mixed, "missing, first blk.0.time_mix_lerp_g.weight"),
        ({name: x for name, x in tensors.items() if not name.startswith("blk.1.")}, "missing, first blk.1"),
        (tensors | {lerps: torch.ones(6, 1, 1, 32)}, r"lerp_fused.weight: found shape \[6, 1, 1, 32\]"),
        (tensors | {lerps: torch.ones(32)}, r"lerp_fused.weight: found shape \[32\]"),
        (tensors | {"blk.0.time_mix_w1.weight": torch.ones(640)}, r"time_mix_w1.weight: found shape \[640\]"),
        (tensors | {"blk.0.time_mix_w1.weight": torch.ones(32, 20)}, "time_maa_w1: expected shape"),
        (tensors | {"output.weight": torch.ones(50, 31)}, "head.weight: expected shape"),
        ({"output.weight": torch.ones(50, 32)}, "are missing"),
    ]
    for changed, message in cases:
        with pytest.raises(CheckpointError, match=f"m.gguf: .*{message}"):
            open_model(write_by_table(tmp_path / "m.gguf", changed, metadata))


def test_names_of_many_layers_do_not_make_many_rows(model: Finch, tmp_path: Path) -> None:
    tensors, metadata = by_other_means(model)
    hollow = {f"blk.{i}.attn_norm.weight": torch.ones(1) for i in range(3000)}
    with pytest.raises(CheckpointError, match="missing"):
        open_model(write_by_table(tmp_path / "m.gguf", tensors | hollow, metadata | {"rwkv6.block_count": 3003}))
    halved = metadata | {"rwkv6.rescale_every_n_layers": 1}
    with pytest.raises(CheckpointError, match="rescale_every_n_layers is 1 in a model of 129 layers"):
        open_model(write_by_table(tmp_path / "m.gguf", tensors | hollow, halved))


def test_flipped_bits_give_a_model_or_an_error(model: Finch, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tensors_of(model), path, dtype="q8_0")
    content = path.read_bytes()
    header_bytes = gguf.GGUFReader(path).data_offset
    source = random.Random(1)
    refused = 0
    for _ in range(150):
        changed = bytearray(content)
        changed[source.randrange(header_bytes)] ^= 1 << source.randrange(8)
        path.write_bytes(changed)
        try:
            found = open_model(path)
            assert found.config.n_layer == 3
            for tensor in found.tensors.values():
                tensor.read()
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_models_that_have_no_place_in_gguf(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    narrow = make_finch()
    source = tensors_of(narrow)
    with_width = ModelTensors(
        config=type(narrow.config)(
            **{name: getattr(narrow.config, name) for name in narrow.config.__slots__} | {"n_head": 2}
        ),
        tensors=source.tensors,
    )
    cases = [
        (tensors_of(make_finch("5.2")), "no architecture for version 5.2 .*infctx model upgrade"),
        (tensors_of(make_finch(has_initial_state=True)), "tuned initial state.*pth or safetensors"),
        (with_width, "2 heads of 8 at width 32"),
        (tensors_of(make_finch(vocab_size=300), tokenizer="world"), "'world' has 65530 ids, the model 300"),
    ]
    for source, message in cases:
        with pytest.raises(CheckpointError, match=message):
            write_gguf(source, tmp_path / "m.gguf", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"dtype torch.float64: expected float32"):
        write_gguf(tensors_of(narrow), tmp_path / "m.gguf", dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 65520.0), ("q8_0", 8.4e6), (torch.float32, float("nan"))])
def test_values_that_the_type_cannot_hold(model: Finch, tmp_path: Path, dtype, value: float) -> None:
    (tmp_path / "m.gguf").write_bytes(b"old")
    with torch.no_grad():
        model.blocks[1].channel_mix.value.weight[7, 3] = -value
    with pytest.raises(CheckpointError, match=f"blk.1.channel_mix_value.weight: {DTYPES[dtype]} cannot hold"):
        write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=dtype)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.gguf", b"old")]


def test_without_the_gguf_package(model: Finch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"writing GGUF needs the gguf package.*pip install 'infctx\[gguf\]'"):
        write_gguf(tensors_of(model), tmp_path / "m.gguf", dtype=torch.float32)


@pytest.mark.parametrize("limit_bytes", [0, 10, 1_000, 6_000, 40_000])
def test_a_full_disk_is_an_oserror(model: Finch, tmp_path: Path, limit_bytes: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, old_limit[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            write_gguf(tensors_of(model), path, dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert caught.value.errno == errno.EFBIG
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("m.gguf", b"old")]


def test_what_a_quantised_file_is_read_as_is_known_beforehand(make_finch: Callable[..., Finch], tmp_path: Path) -> None:
    """The proof of an export compares with it: how far quantisation takes a model's logits is no measure of a file."""
    model = make_finch("6", n_embd=64, vocab_size=257, head_size=16, dim_ffn=101)
    options = ExportOptions(dtype="q8_0")
    prepared = prepare_gguf(tensors_of(model, tokenizer="bytes"), options)
    write_prepared_gguf(prepared, tmp_path / "m.gguf", options)
    expected, found = as_read_back(prepared, options), open_model(tmp_path / "m.gguf")
    assert expected.tensors.keys() == found.tensors.keys()
    for name, stored in expected.tensors.items():
        assert torch.equal(stored.read(), found.tensors[name].read()), name
    before = {name: stored.read() for name, stored in prepared.tensors.items()}
    assert sum(not torch.equal(before[name], found.tensors[name].read()) for name in before) == 2 + 3 * 8
