"""read_gguf: what the gguf package writes comes back bit for bit; what a header claims is never believed."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from infctx.checkpoint import gguf_reader, gguf_types
from infctx.checkpoint.gguf_reader import SkippedArray, read_gguf
from infctx.checkpoint.weights import read_stored, read_tensors
from infctx.errors import CheckpointError

U32, U64, STRING, ARRAY = 4, 10, 8, 9
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, code: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", code) + value


def array(code: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, length) + data


def info(name: str | bytes, shape: tuple[int, ...], code: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, offset)


ARCHITECTURE = key("general.architecture", STRING, text("rwkv6"))


def file_of(
    keys: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    num_tensors, num_keys = counts or (len(infos), len(keys))
    header = start + struct.pack("<QQ", num_tensors, num_keys) + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


# What is read


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_metadata_and_tensors_as_they_were_written(tmp_path: Path, version: int, alignment: int) -> None:
    data = np.arange(6, dtype=np.float32).tobytes()
    second = -(-len(data) // alignment) * alignment
    content = file_of(
        [
            ARCHITECTURE,
            key("general.alignment", U32, struct.pack("<I", alignment)),
            key("byte", 1, struct.pack("<b", -3)),
            key("large", U64, struct.pack("<Q", 2**64 - 1)),
            key("half", 6, struct.pack("<f", 0.5)),
            key("double", 12, struct.pack("<d", 0.1)),
            key("yes", 7, b"\1"),
            key("long text", STRING, text("x" * 5000)),
            key("numbers", ARRAY, array(U32, 3, bytes(12))),
            key("words", ARRAY, array(STRING, 2, text("a") + text("ééé"))),
            key("last", STRING, text("é")),
        ],
        [info("a", (2, 3)), info("b", (1, 1, 1, 2), 28, second)],
        data.ljust(second, b"\0") + np.array([1.0, 0.1]).tobytes(),
        start=b"GGUF" + struct.pack("<I", version),
        alignment=alignment,
    )
    tensors, metadata = read_gguf(written(tmp_path, content))
    assert metadata == {
        "general.architecture": "rwkv6",
        "general.alignment": alignment,
        "byte": -3,
        "large": 2**64 - 1,
        "half": 0.5,
        "double": 0.1,
        "yes": True,
        "long text": "",
        "numbers": SkippedArray(3),
        "words": SkippedArray(2),
        "last": "é",
    }
    assert list(tensors) == ["a", "b"]
    assert torch.equal(tensors["a"].read(), torch.arange(6.0).view(2, 3))
    assert tensors["b"].read().tolist() == [[[[1.0, 0.1]]]]
    assert (tensors["b"].shape, tensors["b"].dtype) == ((1, 1, 1, 2), torch.float64)


def test_the_sizes_of_the_types_are_those_of_the_gguf_package() -> None:
    assert len(gguf_types.TYPES) > 25
    for code, kind in gguf_types.TYPES.items():
        theirs = gguf.GGMLQuantizationType(code)
        assert (kind.name, kind.block_elements, kind.block_bytes) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])


QUANTISED = [
    kind.name for kind in gguf_types.TYPES.values() if kind.dtype is None and kind.name not in ("Q8_1", "Q8_K")
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *QUANTISED])
def test_types_are_what_the_gguf_package_makes_of_them(tmp_path: Path, name: str, is_streamed: bool) -> None:
    code = gguf.GGMLQuantizationType[name]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[code]
    row_elements = max(block_elements * 2, 32)
    generator = np.random.default_rng(0)
    values = generator.standard_normal((6, row_elements), dtype=np.float32)
    values[1, :block_elements] = 0
    try:
        raw = gguf.quants.quantize(values, code)
    except NotImplementedError:
        raw = generator.integers(0, 60, (6, row_elements // block_elements * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv6")
    writer.add_tensor("first", np.ones(3, dtype=np.float32))
    writer.add_tensor("matrix", raw, raw_shape=raw.shape if name != "F16" else None, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors, _ = read_gguf(tmp_path / "m.gguf", is_streamed=is_streamed)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, code).copy())
    stored = tensors["matrix"]
    found = stored.read()
    assert (tuple(found.shape), found.dtype) == (stored.shape, stored.dtype)
    assert stored.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
    assert torch.equal(found.float().view(torch.int32), expected.view(torch.int32))
    assert torch.equal(stored.read(), found)


def test_only_quantised_types_need_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    blocks = np.float16(0.5).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    tensors, _ = read_gguf(written(tmp_path, file_of([ARCHITECTURE], [info("a", (1, 32), Q8_0)], blocks)))
    assert torch.equal(tensors["a"].read(), torch.arange(-16, 16)[None] * 0.5)
    path = written(tmp_path, file_of([ARCHITECTURE], [info("a", (1, 32), 2)], bytes(18)))
    with pytest.raises(CheckpointError, match=r"tensor a of type Q4_0.*pip install 'infctx\[gguf\]'"):
        read_gguf(path)


def test_types_that_the_gguf_package_cannot_read_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, file_of([ARCHITECTURE], [info("a", (1, 32), 9)], bytes(40)))
    with pytest.raises(CheckpointError, match=r"tensor a of type Q8_1.*cannot turn Q8_1 into numbers"):
        read_gguf(path)


def test_it_is_told_by_its_first_bytes_and_read_as_tensors_too(tmp_path: Path) -> None:
    content = file_of([ARCHITECTURE, key("size", U32, b"\7\0\0\0")], [info("a", (2,))], struct.pack("<2f", 1, 2))
    (tmp_path / "unnamed").write_bytes(content)
    tensors, metadata = read_tensors(tmp_path / "unnamed")
    assert tensors["a"].tolist() == [1, 2]
    assert metadata == {"general.architecture": "rwkv6", "size": "7"}
    stored, metadata = read_stored(tmp_path / "unnamed", is_streamed=True)
    assert stored["a"].read().tolist() == [1, 2]
    assert metadata["size"] == "7"


@pytest.mark.parametrize(("length", "tokenizer"), [(65536, "world"), (257, "bytes"), (300, None)])
def test_the_tokenizer_follows_from_the_vocabulary(tmp_path: Path, length: int, tokenizer: str | None) -> None:
    words = key("tokenizer.ggml.tokens", ARRAY, array(STRING, length, text("a") * length))
    for model, expected in (("rwkv", tokenizer), ("gpt2", None)):
        path = written(tmp_path, file_of([ARCHITECTURE, words, key("tokenizer.ggml.model", STRING, text(model))], []))
        assert read_stored(path)[1].get("infctx.tokenizer") == expected
    recorded = key("infctx.tokenizer", STRING, text("mine.json"))
    path = written(
        tmp_path, file_of([ARCHITECTURE, words, key("tokenizer.ggml.model", STRING, text("rwkv")), recorded], [])
    )
    assert read_stored(path)[1]["infctx.tokenizer"] == "mine.json"


def test_nothing_is_read_before_it_is_asked_for_and_nothing_written(tmp_path: Path) -> None:
    path = written(tmp_path, file_of([ARCHITECTURE], [info("a", (2,))], struct.pack("<2f", 1, 2)))
    content = path.read_bytes()
    tensors, _ = read_gguf(path)
    tensors["a"].read().fill_(9)
    assert path.read_bytes() == content
    streamed, _ = read_gguf(path, is_streamed=True)
    streamed["a"].read().fill_(9)
    assert streamed["a"].read().tolist() == [1, 2]


# What is refused

TWO = [info("a", (8,)), info("b", (8,), F32, 32)]
BAD = {
    "empty": (b"", "is empty"),
    "magic alone": (b"GGUF", "truncated: the version"),
    "another magic": (b"GGML" + bytes(60), "starts with b'GGML'; expected b'GGUF'"),
    "version 1": (file_of([], [], start=b"GGUF\1\0\0\0"), "GGUF of version 1; expected"),
    "version 4": (file_of([], [], start=b"GGUF\4\0\0\0"), "GGUF of version 4"),
    "big-endian": (file_of([], [], start=b"GGUF\0\0\0\3"), "big-endian"),
    "2**60 tensors": (file_of([ARCHITECTURE], [], counts=(2**60, 1)), "refused: 1152921504606846976 tensors"),
    "2**60 keys": (file_of([ARCHITECTURE], [], counts=(0, 2**60)), "refused: .* keys of metadata"),
    "more tensors than bytes": (file_of([ARCHITECTURE], TWO, bytes(64), counts=(8000, 1)), "truncated: 8000 tensors"),
    "more keys than bytes": (file_of([ARCHITECTURE], [], counts=(0, 4000)), "truncated: 4000 keys"),
    "one key too few": (file_of([ARCHITECTURE], TWO, bytes(64), counts=(2, 0)), "no general.architecture"),
    "no architecture": (file_of([], []), "no general.architecture"),
    "a key of 2**63 bytes": (file_of([struct.pack("<Q", 2**63) + bytes(80)], []), "a key of 9223372036854775808 bytes"),
    "a key that is not UTF-8": (file_of([text(b"\xff") + bytes(12)], []), "a key is not UTF-8"),
    "a key twice": (file_of([ARCHITECTURE, ARCHITECTURE], []), "general.architecture' is given twice"),
    "a text that goes on": (file_of([key("k", STRING, struct.pack("<Q", 2**50))], []), "truncated: the value of 'k'"),
    "a value of type 99": (file_of([key("k", 99, bytes(80))], []), "unknown type 99"),
    "an array of type 99": (file_of([key("k", ARRAY, array(99, 1, bytes(80)))], []), "unknown or nested type 99"),
    "nested arrays": (file_of([key("k", ARRAY, array(ARRAY, 1) * 9000)], []), "nested type 9"),
    "2**60 numbers": (file_of([key("k", ARRAY, array(U64, 2**60))], []), "truncated: the value of 'k' needs 9223"),
    "2**60 texts": (file_of([key("k", ARRAY, array(STRING, 2**60))], []), "has 1152921504606846976 texts"),
    "texts that go on": (
        file_of([key("k", ARRAY, array(STRING, 9, text("a") * 2))], []),
        "truncated: the value of 'k'",
    ),
    "a text of 2**63 in an array": (
        file_of([key("k", ARRAY, array(STRING, 2, struct.pack("<Q", 2**63) + bytes(90)))], []),
        "truncated: the value of 'k'",
    ),
    "alignment 0": (file_of([ARCHITECTURE, key("general.alignment", U32, bytes(4))], []), "alignment is 0"),
    "alignment 4": (file_of([ARCHITECTURE, key("general.alignment", U32, b"\4\0\0\0")], []), "alignment is 4"),
    "alignment 24": (file_of([ARCHITECTURE, key("general.alignment", U32, b"\x18\0\0\0")], []), "alignment is 24"),
    "alignment 2**31": (file_of([ARCHITECTURE, key("general.alignment", U32, b"\0\0\0\x80")], []), "alignment is 21"),
    "alignment of text": (file_of([ARCHITECTURE, key("general.alignment", STRING, text("8"))], []), "alignment is '8'"),
    "no axes": (file_of([ARCHITECTURE], [info("a", ())], bytes(64)), "'a' has 0 axes"),
    "five axes": (file_of([ARCHITECTURE], [info("a", (1,) * 5)], bytes(64)), "'a' has 5 axes"),
    "2**32 axes": (file_of([ARCHITECTURE], [text("a") + b"\xff" * 4], bytes(64)), "'a' has 4294967295 axes"),
    "no elements": (file_of([ARCHITECTURE], [info("a", (3, 0))], bytes(64)), "has no elements"),
    "a removed type": (file_of([ARCHITECTURE], [info("a", (8,), 4)], bytes(64)), "'a' has the unknown type 4"),
    "type 2**32 - 1": (file_of([ARCHITECTURE], [info("a", (8,), 2**32 - 1)], bytes(64)), "unknown type 4294967295"),
    "half a block": (file_of([ARCHITECTURE], [info("a", (2, 16), Q8_0)], bytes(64)), "not whole blocks of Q8_0"),
    "a size that wraps": (file_of([ARCHITECTURE], [info("a", (2**32, 2**32))], bytes(64)), r"ends at byte 7378697"),
    "an offset that wraps": (
        file_of([ARCHITECTURE], [info("a", (8,), F32, 2**64 - 32)], bytes(64)),
        "ends at byte 1844",
    ),
    "an odd offset": (file_of([ARCHITECTURE], [info("a", (8,), F32, 4)], bytes(64)), "starts at 4, no multiple of 32"),
    "numbers cut off": (file_of([ARCHITECTURE], TWO, bytes(63)), "'b' of shape .8. ends at byte"),
    "no numbers": (file_of([ARCHITECTURE], TWO), "'a' of shape .8. ends at byte"),
    "overlap": (file_of([ARCHITECTURE], [info("a", (9,)), TWO[1]], bytes(64)), "'a' and 'b' overlap"),
    "the same place": (file_of([ARCHITECTURE], [info("a", (8,)), info("b", (8,))], bytes(64)), "'a' and 'b' overlap"),
    "a name twice": (file_of([ARCHITECTURE], [TWO[0], info("a", (8,), F32, 32)], bytes(64)), "'a' is given twice"),
    "a name of a MB": (file_of([ARCHITECTURE], [info("a" * (1 << 20), (8,))], bytes(64)), "name of 1048576 bytes"),
    "a name that is not UTF-8": (file_of([ARCHITECTURE], [info(b"\xff", (8,))], bytes(64)), "name is not UTF-8"),
    "a part of a model": (
        file_of([ARCHITECTURE, key("split.count", 2, b"\3\0")], [], bytes(64)),
        "one of 3 parts.*llama-gguf-split --merge",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = written(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(CheckpointError, match="is a folder; expected a GGUF file"):
        read_gguf(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensors(tmp_path / "gone.gguf")


READ_ALL = """
import json, sys, time
from pathlib import Path
from infctx.checkpoint.gguf_reader import read_gguf
from infctx.errors import CheckpointError

def peak_bytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before, found = peak_bytes(), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        read_gguf(path)
        message = "read"
    except CheckpointError as error:
        message = str(error)
    found[path.name] = [time.process_time() - start, message]
print(json.dumps([peak_bytes() - before, found]))
"""


def test_huge_headers_take_neither_time_nor_memory(tmp_path: Path) -> None:
    """Sparse files: whatever the header promises is there, as zeros."""
    most = gguf_reader.MAX_ARRAY_STRINGS
    promised = {
        "texts": (array(STRING, 10_000_000), 400 << 20, "at most 1048576 are read"),
        "most texts": (array(STRING, most), 400 << 20, "no general.architecture"),
        "one text more": (array(STRING, most + 1), 400 << 20, "at most 1048576 are read"),
        "numbers": (array(U32, 10_000_000), 400 << 20, "no general.architecture"),
        "too many numbers": (array(U64, 10_000_000), 400 << 20, "at most 67108864 is read"),
    }
    for name, (value, num_bytes, _) in promised.items():
        with (tmp_path / name).open("wb") as file:
            file.write(file_of([key("k", ARRAY, value)], [])[:-1])
            file.truncate(num_bytes)
    with (tmp_path / "tensors").open("wb") as file:
        infos = [info("n" * 900 + str(i), (1 << 18,), F32, i << 20) for i in range(gguf_reader.MAX_TENSORS)]
        file.write(file_of([ARCHITECTURE], infos))
        file.truncate(20 << 30)
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    grown_bytes, found = json.loads(done.stdout)
    for name, (_, _, message) in promised.items():
        assert message in found[name][1], name
    assert found["tensors"][1] == "read"
    assert max(seconds for seconds, _ in found.values()) < 1
    assert grown_bytes < 200 << 20


def small_file() -> bytes:
    """A whole file with every kind of entry."""
    keys = [
        ARCHITECTURE,
        key("general.alignment", U32, struct.pack("<I", 32)),
        key("size", U32, struct.pack("<I", 7)),
        key("flag", 7, b"\1"),
        key("numbers", ARRAY, array(U32, 9, bytes(36))),
        key("words", ARRAY, array(STRING, 20, text("word") * 20)),
    ]
    infos = [info(f"tensor.{i}", (3, 32), code, i * 384) for i, code in enumerate([0, 1, 8, 30, 0, 24])]
    return file_of(keys, infos, bytes(6 * 384))


def test_cut_off_anywhere(tmp_path: Path) -> None:
    content = small_file()
    path = written(tmp_path, content)
    read_gguf(path)
    last = len(content) - (384 - 96)
    lengths = sorted({*range(0, last, 97), *range(700), last - 1})
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)
    path.write_bytes(content[:last])
    read_gguf(path)


def test_flipped_bits_are_read_or_refused(tmp_path: Path) -> None:
    content = small_file()
    header_bytes = content.index(b"tensor.5") + 60
    source = random.Random(0)
    path = tmp_path / "model.gguf"
    messages = []
    for _ in range(1500):
        changed = bytearray(content)
        for _ in range(source.choice([1, 1, 1, 3])):
            changed[source.randrange(header_bytes)] ^= 1 << source.randrange(8)
        path.write_bytes(changed)
        start = time.process_time()
        try:
            tensors, _ = read_gguf(path)
            for tensor in tensors.values():
                assert tuple(tensor.read().shape) == tensor.shape
        except CheckpointError as error:
            messages.append(str(error))
        assert time.process_time() - start < 1
    assert 200 < len(messages) < 1500
    assert max(map(len, messages)) < 700
