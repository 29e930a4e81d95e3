"""read_tensors and the two writers: round trips, files that are not what they claim, disks that fill up."""

import errno
import gc
import json
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from infctx.checkpoint import weights
from infctx.checkpoint.weights import read_tensors, write_pth, write_safetensors
from infctx.errors import CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    base = torch.randn(4, 6)
    return {
        "z.bf16": torch.randn(3, 5).bfloat16(),
        "a.half": torch.randn(3).half(),
        "nan": torch.tensor([float("nan"), -0.0, float("-inf")]),
        "double": torch.randn(2).double(),
        "parameter": torch.nn.Parameter(base),
        "same": base,
        "row": base[1],
        "transposed": base.T,
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "rng": torch.get_rng_state()[:16],
        "bool": torch.tensor([True, False]),
        "long": torch.arange(3),
    }


def assert_equal_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        left, right = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(left, right), name


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = {f"key{i}": f"värde {i}" for i in range(9)}
    write_safetensors(path, some_tensors(), metadata)
    found, found_metadata = read_tensors(path)
    assert_equal_bits(found, some_tensors())
    assert found_metadata == metadata
    assert_equal_bits(safetensors.torch.load_file(path), some_tensors())
    assert files_in(tmp_path) == ["model.safetensors"]


def test_safetensors_bytes_depend_on_the_contents_only(tmp_path):
    tensors = some_tensors()
    backwards = dict(reversed(tensors.items()))
    write_safetensors(tmp_path / "a", tensors, {"x": "1", "y": "2", "z": "3"})
    write_safetensors(tmp_path / "b", backwards, {"z": "3", "y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # Without metadata the library's order is fixed too; with one type of each width it is ours.
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.dtype in (torch.float32, torch.bfloat16)}
    write_safetensors(tmp_path / "c", wanted)
    separate = {name: tensor.detach().clone().contiguous() for name, tensor in wanted.items()}
    assert (tmp_path / "c").read_bytes() == safetensors.torch.save(separate)


def test_pth_round_trip(tmp_path):
    tensors = some_tensors()
    write_pth(tmp_path / "model.pth", tensors)
    found, metadata = read_tensors(str(tmp_path / "model.pth"))
    assert_equal_bits(found, tensors)
    assert metadata == {}
    assert list(found) == list(tensors)
    theirs = torch.load(tmp_path / "model.pth", weights_only=True)
    assert type(theirs) is dict
    assert_equal_bits(theirs, tensors)
    assert all(type(tensor) is torch.Tensor for tensor in theirs.values())
    storages = [tensor.untyped_storage() for tensor in theirs.values()]
    assert all(s.nbytes() == t.numel() * t.element_size() for s, t in zip(storages, theirs.values(), strict=True))
    assert len({s.data_ptr() for s in storages if s.nbytes()}) == len([s for s in storages if s.nbytes()])
    assert files_in(tmp_path) == ["model.pth"]


def test_reading_safetensors_maps_the_file_and_never_changes_it(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(64 << 18)})
    gc.collect()

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before_bytes, before = resident_bytes(), path.stat().st_mtime_ns
    found, _ = read_tensors(path)
    assert resident_bytes() - before_bytes < 8 << 20
    found["a"][:4] = 7.0
    del found
    gc.collect()
    assert read_tensors(path)[0]["a"][0] == 1.0
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model", "model.ckpt"])
def test_other_suffixes_are_read_by_content(tmp_path, name):
    write_safetensors(tmp_path / name, {"a": torch.ones(2)}, {"k": "v"})
    assert read_tensors(tmp_path / name)[1] == {"k": "v"}
    write_pth(tmp_path / name, {"a": torch.ones(2)})
    assert read_tensors(tmp_path / name)[1] == {}
    (tmp_path / name).write_bytes(b"GGML and more")
    with pytest.raises(CheckpointError, match=r"neither a \.pth nor a \.safetensors"):
        read_tensors(tmp_path / name)


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    first, second = {"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.arange(4.0)}
    write_safetensors(folder / "model-00001-of-00002.safetensors", first, {"format": "pt"})
    write_safetensors(folder / "model-00002-of-00002.safetensors", second, {"format": "pt"})
    shard_of = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    shard_of |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    write_index(folder, shard_of)
    return first | second


def write_index(folder: Path, shard_of: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def test_folders(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        read_tensors(tmp_path)
    expected = write_shards(tmp_path)
    found, metadata = read_tensors(tmp_path)
    assert_equal_bits(found, expected)
    assert metadata == {"format": "pt"}
    write_safetensors(tmp_path / "model.safetensors", {"single": torch.ones(1)})
    assert list(read_tensors(tmp_path)[0]) == ["single"]


@pytest.mark.parametrize(
    "shard_of",
    [
        {"a": "../secret.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "model-00001-of-00002.pth"},
        {"a": 3},
        {},
        ["a"],
        {"a": "model-00001-of-00002.safetensors"},
        {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "x": "gone.safetensors"},
    ],
)
def test_bad_indexes(tmp_path, shard_of):
    write_shards(tmp_path)
    write_index(tmp_path, shard_of)
    with pytest.raises(CheckpointError, match=r"index\.json|gone\.safetensors"):
        read_tensors(tmp_path)


def header_file(header: object, *, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(start: int, end: int, *, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header of 2**60 bytes": header_file({}, length=2**60),
    "header longer than the file": header_file({}, length=50),
    "not JSON": header_file(b"{nonsense"),
    "not UTF-8": header_file(b'{"\xff": 1}'),
    "a list": header_file([1, 2]),
    "deep": header_file(b'{"a":' * 100_000),
    "data cut": header_file({"a": row(0, 8)}, data=bytes(7)),
    "data left over": header_file({"a": row(0, 8)}, data=bytes(9)),
    "overlap": header_file({"a": row(0, 8), "b": row(4, 12)}, data=bytes(12)),
    "hole": header_file({"a": row(4, 12)}, data=bytes(12)),
    "shape and size differ": header_file({"a": row(0, 8, shape=(3,))}, data=bytes(8)),
    "shape that wraps": header_file({"a": row(0, 8, shape=(2**62, 4))}, data=bytes(8)),
    "negative offsets": header_file({"a": row(-8, 0)}),
    "offsets of text": header_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["x", "y"]}}),
    "huge offset": header_file({"a": row(0, 10**400)}),
    "unknown dtype": header_file({"a": row(0, 8, dtype="Q99")}, data=bytes(8)),
    "no offsets": header_file({"a": {}}),
    "name twice": header_file(b'{"a":%s,"a":%s}' % ((json.dumps(row(0, 8)).encode(),) * 2), data=bytes(8)),
    "metadata of numbers": header_file({"__metadata__": {"a": 3}}),
    "a zip": b"PK\x03\x04" + bytes(90),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_SAFETENSORS[case])
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 700


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20) + b"{")
        file.truncate(91 << 20)
    with pytest.raises(CheckpointError, match="refused: a header of"):
        read_tensors(path)


def test_truncated_safetensors_says_both_sizes(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(100)})
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"expected {len(content)} bytes, found {len(content) - 10}"):
        read_tensors(path)


def test_missing_files(tmp_path):
    for name in ("gone.pth", "gone.safetensors", "gone.bin", "gone"):
        with pytest.raises(CheckpointError, match="No such file"):
            read_tensors(tmp_path / name)


def test_tensors_the_format_cannot_hold(tmp_path):
    for tensors in ({"a": torch.ones(2, dtype=torch.complex64)}, {"__metadata__": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="cannot hold tensor"):
            write_safetensors(tmp_path / "model.safetensors", tensors)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("write", [write_pth, write_safetensors])
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, write, broken):
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.EIO, "the disk failed")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="the disk failed"):
            write(path, {"a": torch.ones(3)})
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["model"]
    write(path, {"a": torch.ones(3)})
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("limit_bytes", [0, 10, 5_000, 100_000, 390_000])
@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_a_full_disk_is_an_oserror(tmp_path, write, limit_bytes):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, old_limit[1]))
        with pytest.raises(OSError, match="File too large"):
            write(path, {"a": torch.ones(50_000), "b": torch.ones(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["model"]


def test_public_names():
    assert set(weights.__all__) == {"read_stored", "read_tensors", "write_pth", "write_safetensors"}


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux's account of the memory")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """As a 28 GB model is on a machine of 24 GB; the file has a hole where its numbers would be."""
    with open("/proc/meminfo") as file:
        memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    num_elements = (memory["MemTotal"] + memory["SwapTotal"]) // 2 + (1 << 30)
    path = tmp_path / "large.safetensors"
    facts = {"dtype": "BF16", "shape": [num_elements], "data_offsets": [0, 2 * num_elements]}
    header = json.dumps({"a": facts}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 2 * num_elements)
    tensor = read_tensors(path)[0]["a"]
    assert tensor.shape == (num_elements,)
    assert float(tensor[num_elements // 2]) == 0.0
