"""read_pth: what torch.save writes comes back bit for bit; nothing else does, and nothing a file says ever runs."""

import gc
import io
import os
import pickle
import random
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from infctx.checkpoint import pth_reader, tensor_pickle
from infctx.checkpoint.pth_reader import read_pth
from infctx.errors import CheckpointError

FAST_SECONDS = 5.0


def bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (left, right))
    return bool(torch.equal(left, right))


def memory_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


# ---------------------------------------------------------------- what torch.save writes


def many_kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    return {
        "bf16": torch.randn(5, 3).bfloat16(),
        "fp16": torch.randn(7).half(),
        "fp32": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45]),
        "fp64": torch.randn(2, 1, 3).double(),
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
        "frozen": torch.nn.Parameter(torch.randn(4).bfloat16(), requires_grad=False),
        "view_row": base[2],
        "view_transposed": base.T,
        "view_strided": base[1::2, ::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0),
        "empty_matrix": torch.empty(3, 0, dtype=torch.bfloat16),
        "int64": torch.arange(5),
        "int32": torch.arange(5, dtype=torch.int32),
        "int16": torch.arange(5, dtype=torch.int16),
        "int8": torch.arange(5, dtype=torch.int8),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "emb.weight é 中": torch.ones(1),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_round_trip(tmp_path, protocol, container):
    tensors = container(many_kinds())
    torch.save(tensors, tmp_path / "model.pth", pickle_protocol=protocol)
    found = read_pth(tmp_path / "model.pth")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert bits_equal(found[name], tensor), name
        assert found[name].stride() == tensor.stride() or tensor.numel() == 0, name
        assert type(found[name]) is torch.Tensor
        assert not found[name].requires_grad


def test_module_state_dict_with_metadata(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    found = read_pth(str(tmp_path / "model.pth"))
    assert all(bits_equal(found[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(found)


def test_views_still_share_one_storage(tmp_path):
    base = torch.arange(12.0)
    torch.save({"a": base[:6], "b": base[3:9]}, tmp_path / "model.pth")
    found = read_pth(tmp_path / "model.pth")
    found["a"][4] = 99.0
    assert found["b"][1] == 99.0


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_zip64_and_unaligned_records(tmp_path, monkeypatch, padding):
    tensors = many_kinds()
    torch.save(tensors, tmp_path / "model.pth")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)
    # zipfile does not align what it writes: the same records, zipped again, start anywhere.
    with zipfile.ZipFile(tmp_path / "model.pth") as old, zipfile.ZipFile(tmp_path / "again.pth", "w") as again:
        again.writestr("padding", bytes(padding))
        for name in old.namelist():
            again.writestr(zipfile.ZipInfo(name), old.read(name))
    assert b"PK\x06\x06" in (tmp_path / "again.pth").read_bytes()
    found = read_pth(tmp_path / "again.pth")
    assert all(bits_equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())
    found["view_row"][3] = 99.0
    assert found["view_transposed"][3, 2] == 99.0


# ---------------------------------------------------------------- mapped, private, alive


def test_reading_maps_the_file(tmp_path):
    num_bytes = 64 << 20
    torch.save({"big": torch.ones(num_bytes // 4)}, tmp_path / "model.pth")
    gc.collect()
    before = memory_bytes("VmRSS")
    found = read_pth(tmp_path / "model.pth")
    assert memory_bytes("VmRSS") - before < num_bytes // 8
    assert found["big"][-1] == 1.0


def test_changing_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(5000)}, path)
    before = path.read_bytes()
    found = read_pth(path)
    found["a"].mul_(3.0)
    assert found["a"][7] == 3.0
    del found
    gc.collect()
    assert path.read_bytes() == before


def test_a_tensor_keeps_the_map_alive_and_the_last_one_ends_it(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.arange(5000.0), "b": torch.ones(3)}, path)

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    kept = read_pth(path)["a"]
    gc.collect()
    assert is_mapped()
    path.unlink()
    assert torch.equal(kept, torch.arange(5000.0))
    del kept
    gc.collect()
    assert not is_mapped()


# ---------------------------------------------------------------- hostile pickles


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


class Storage:
    """Pickles as a persistent id, as torch.save does for a storage."""

    def __init__(self, *, kind=torch.FloatStorage, key="0", device="cpu", count=4):
        self.reference = ("storage", kind, key, device, count)


class Raw:
    def __init__(self, reference):
        self.reference = reference


def dumps(value, protocol=2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.reference if isinstance(obj, Storage | Raw) else None

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def tensor(offset=0, size=(4,), stride=(1,), storage=None, hooks=None, extra=()) -> Call:
    hooks = OrderedDict() if hooks is None else hooks
    return Call(torch._utils._rebuild_tensor_v2, storage or Storage(), offset, size, stride, False, hooks, *extra)


def write_archive(path: Path, pickled: bytes, **options) -> None:
    """A .pth whose only storage, "0", holds four float32."""
    records = {"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/data/0": bytes(16)}
    records |= options.pop("records", {})
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


MARKER = "ran"
RUN = f"open({MARKER!r}, 'w').close()"


def op_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def op_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def in_dict(value: bytes) -> bytes:
    """A pickle of {"a": value}, the value given as instructions."""
    return b"\x80\x02}" + op_text("a") + value + b"s."


FORBIDDEN_NAMES = {
    "os.system": dumps({"a": Call(os.system, f"touch {MARKER}")}),
    "os.system at the top": dumps(Call(os.system, f"touch {MARKER}")),
    "eval": dumps({"a": Call(eval, RUN)}),
    "exec": dumps({"a": tensor(), "b": Call(exec, RUN)}),
    "getattr": dumps({"a": Call(getattr, "text", "upper")}),
    "import": dumps({"a": Call(__import__, "os")}),
    "os.system by STACK_GLOBAL": b"\x80\x04"
    + op_text("os")
    + op_text("system")
    + b"\x93"
    + op_text("true")
    + b"\x85R.",
    "dotted STACK_GLOBAL": b"\x80\x04" + op_text("torch") + op_text("os.system") + b"\x93" + op_text("x") + b"\x85R.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "STACK_GLOBAL of a list": b"\x80\x04" + op_text("torch") + b"]\x93.",
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(" + op_global("os", "system") + op_text("true") + b"o.",
    "NEWOBJ": in_dict(op_global("subprocess", "Popen") + op_text("true") + b"\x85\x81"),
    "NEWOBJ_EX": in_dict(op_global("subprocess", "Popen") + b")}\x92"),
    "state of a call": dumps({"a": Call(eval, RUN, state={"x": 1})}),
    "torch.load": in_dict(op_global("torch", "load") + op_text("/etc/passwd") + b"\x85R"),
    "torch.hub.load": in_dict(op_global("torch.hub", "load") + op_text("x") + b"\x85R"),
    "_load_from_bytes": in_dict(op_global("torch.storage", "_load_from_bytes") + op_text("x") + b"\x85R"),
    "hooks that run": dumps({"a": tensor(hooks=Call(eval, RUN))}),
    "size that runs": dumps({"a": tensor(size=Call(eval, RUN))}),
    "storage key that runs": dumps({"a": tensor(storage=Storage(key=Call(eval, RUN)))}),
    "bytes": dumps({"a": b"\x00\x01"}),
    "a name with a line end": in_dict(op_text("os\nsystem") + op_text("x\n\x1b[2J") + b"\x93"),
    "untyped storage": dumps({"a": tensor(storage=Storage(kind=torch.UntypedStorage))}),
    "complex storage": dumps({"a": tensor(storage=Storage(kind=torch.ComplexFloatStorage))}),
}

DEEP = 450_000
MALFORMED = {
    "BUILD on a storage type": in_dict(op_global("torch", "FloatStorage") + b"}" + op_text("__call__") + b"Nsb"),
    "BUILD with slots": in_dict(op_global("collections", "OrderedDict") + b"N}\x86b"),
    "call of a storage type": in_dict(op_global("torch", "FloatStorage") + b"K\x04\x85R"),
    "call of a dict": in_dict(b"})R"),
    "call of a tensor": dumps({"a": 1})[:2] + in_dict(op_global("torch._utils", "_rebuild_parameter") + b"))R")[2:],
    "OrderedDict of something": dumps({"a": Call(OrderedDict, [("x", 1)])}),
    "_rebuild_parameter of text": dumps({"a": Call(torch._utils._rebuild_parameter, "x", True, OrderedDict())}),
    "_rebuild_tensor_v2 with 3 arguments": dumps({"a": Call(torch._utils._rebuild_tensor_v2, Storage(), 0, (4,))}),
    "conjugate": dumps({"a": tensor(extra=({"conj": True},))}),
    "huge size": dumps({"a": tensor(size=(2**60,))}),
    "size beyond 64 bits": dumps({"a": tensor(size=(2**200,))}),
    "size that wraps to zero": dumps({"a": tensor(size=(2**32, 2**32), stride=(2**32, 1))}),
    "negative size": dumps({"a": tensor(size=(-4,))}),
    "negative offset": dumps({"a": tensor(offset=-1, size=(2,))}),
    "negative stride": dumps({"a": tensor(offset=3, stride=(-1,))}),
    "offset past the end": dumps({"a": tensor(offset=4, size=(1,))}),
    "offset of a scalar past the end": dumps({"a": tensor(offset=4, size=(), stride=())}),
    "stride past the end": dumps({"a": tensor(size=(2,), stride=(4,))}),
    "one element too many": dumps({"a": tensor(size=(5,))}),
    "expanded": dumps({"a": tensor(size=(10**9,), stride=(0,))}),
    "overlapping rows": dumps({"a": tensor(size=(3, 2), stride=(1, 1))}),
    "stride missing": dumps({"a": tensor(size=(2, 2))}),
    "size of True": dumps({"a": tensor(size=(True,))}),
    "size of floats": dumps({"a": tensor(size=(4.0,))}),
    "size as a list": dumps({"a": tensor(size=[4])}),
    "offset of None": dumps({"a": tensor(offset=None)}),
    "17 dimensions": dumps({"a": tensor(size=(1,) * 17, stride=(1,) * 17)}),
    "empty but huge": dumps({"a": tensor(size=(0, 2**61, 2**61), stride=(1, 1, 1))}),
    "record missing": dumps({"a": tensor(storage=Storage(key="7"))}),
    "record outside": dumps({"a": tensor(storage=Storage(key="../../x"))}),
    "storage larger than its record": dumps({"a": tensor(storage=Storage(count=5))}),
    "storage smaller than its record": dumps({"a": tensor(storage=Storage(count=3))}),
    "storage of negative size": dumps({"a": tensor(storage=Storage(count=-4))}),
    "storage of 2**62": dumps({"a": tensor(storage=Storage(count=2**62))}),
    "storage of another type": dumps({"a": tensor(storage=Storage(kind=torch.DoubleStorage))}),
    "storage given as text": dumps({"a": Call(torch._utils._rebuild_tensor_v2, "0", 0, (4,), (1,), False, {})}),
    "persistent id as text": dumps({"a": Raw("storage")}),
    "persistent id of one field": dumps({"a": Raw(("storage",))}),
    "persistent id with a number as record": dumps({"a": Raw(("storage", torch.FloatStorage, 0, "cpu", 4))}),
    "persistent id that is another thing": dumps({"a": Raw(("module", torch.FloatStorage, "0", "cpu", 4))}),
    "persistent id of protocol 0": b"Pstorage\n.",
    "a bare storage": dumps({"a": Storage()}),
    "memo never given": in_dict(b"h\x09"),
    "memo index of 2**32": b"\x80\x02Nr\xff\xff\xff\xff.",
    "text of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "bytes of 2**60 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "text that is not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a number of 300,000 digits": b"I" + b"9" * 300_000 + b"\n.",
    "nested tuple as key": b"\x80\x02})" + b"\x85" * DEEP + b"Ns.",
    "nested lists": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "endless instructions": b"\x80\x02" + b"N" * (tensor_pickle.MAX_INSTRUCTIONS + 5) + b".",
    "number as key": dumps({1: tensor()}),
    "same key twice": b"\x80\x02}" + op_text("a") + b"Ns" + op_text("a") + b"Ns.",
    "EXT1": b"\x80\x02\x82\x01.",
    "set": dumps({"a": {1}}, protocol=4),
    "frozen set": dumps({"a": frozenset((1,))}, protocol=4),
    "empty stack": b"\x80\x02.",
    "no STOP": b"\x80\x02}",
    "no bytes": b"",
    "zero bytes": bytes(64),
    "unknown instruction": b"\x80\x02\xfe.",
    "mark missing": b"\x80\x02Nt.",
    "item without a list": b"\x80\x02NNa.",
    "key without a value": b"\x80\x02}(" + op_text("a") + b"u.",
    "POP of nothing": b"\x80\x020.",
    "a zip in the pickle's place": b"PK\x03\x04" + bytes(26),
    "text": dumps("weights"),
    "a list of tensors": dumps([tensor()]),
    "a single tensor": dumps(tensor()),
    "wrapped": dumps({"state_dict": {"a": tensor()}}),
    "number among tensors": dumps({"a": tensor(), "step": 3}),
    "tensors in a list": dumps({"a": [tensor()]}),
    "None": dumps({"a": None}),
}


def refusal(path: Path) -> str:
    """Read a bad file; the message of the CheckpointError that must come, and soon."""
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_pth(path)
    assert time.perf_counter() - start < FAST_SECONDS
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 1000
    message.encode()
    return message


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", FORBIDDEN_NAMES)
def test_forbidden_names_are_refused_and_nothing_runs(in_empty_folder, case):
    write_archive(Path("bad.pth"), FORBIDDEN_NAMES[case])
    message = refusal(Path("bad.pth"))
    assert "refused: the file asks to run `" in message
    assert "\n" not in message
    assert not Path(MARKER).exists()


def test_the_marker_would_be_seen(in_empty_folder):
    """The attacks above are live: Python's own unpickler falls for them."""
    pickle.loads(FORBIDDEN_NAMES["eval"])
    assert Path(MARKER).exists()
    Path(MARKER).unlink()
    pickle.loads(FORBIDDEN_NAMES["os.system at the top"])
    assert Path(MARKER).exists()


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles_are_refused(in_empty_folder, case):
    before = memory_bytes("VmHWM")
    write_archive(Path("bad.pth"), MALFORMED[case])
    refusal(Path("bad.pth"))
    assert memory_bytes("VmHWM") - before < 300 << 20


def test_the_archives_above_are_good_but_for_their_pickle(in_empty_folder):
    write_archive(Path("good.pth"), dumps(OrderedDict(a=tensor(), b=tensor(2, (2, 1), (1, 5)))))
    assert {name: found.shape for name, found in read_pth("good.pth").items()} == {"a": (4,), "b": (2, 1)}


def test_messages_name_what_was_found(in_empty_folder):
    cases = {
        "os.system": (FORBIDDEN_NAMES["os.system"], "`posix.system`"),
        "tensor": (MALFORMED["one element too many"], "tensor 'a'"),
        "wrapped": (MALFORMED["wrapped"], "'state_dict' holds a dict with the keys 'a'"),
        "number": (MALFORMED["number among tensors"], "key 'step' holds a int"),
        "endless": (MALFORMED["endless instructions"], f"more than {tensor_pickle.MAX_INSTRUCTIONS} instructions"),
        "twice": (b"\x80\x02}" + (op_text("a") + dumps(tensor())[2:-1] + b"s") * 2 + b".", "two values for the key"),
        "rwkv": (dumps({"a": tensor(), "_strategy": "cpu fp32", "_version": 0.7}), "use the original .pth"),
    }
    for pickled, expected in cases.values():
        write_archive(Path("bad.pth"), pickled)
        assert expected in refusal(Path("bad.pth"))


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*")
@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.ones(3, dtype=torch.complex64)},
        {"a": torch.ones(3, device="meta")},
        {"a": torch.ones(3).to(torch.float8_e4m3fn)},
        torch.nn.Linear(2, 2),
    ],
    ids=["sparse", "complex", "meta", "float8", "module"],
)
def test_other_things_torch_saves_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "bad.pth")
    assert "refused: the file asks to run `" in refusal(tmp_path / "bad.pth")


# ---------------------------------------------------------------- hostile archives


def test_legacy_formats(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert "torch >= 1.6" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "torch >= 1.6" in refusal(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "torch >= 1.6" in refusal(path)


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "empty.pth").touch()
    os.mkfifo(tmp_path / "pipe.pth")
    assert "0 bytes" in refusal(tmp_path / "empty.pth")
    assert "is a folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "missing.pth")
    assert "not a regular file" in refusal(tmp_path / "pipe.pth")


@pytest.mark.parametrize("content", [b"P", b"PK\x03\x04", bytes(5000), b"PK\x05\x06" + bytes(18), b"{}" * 99])
def test_not_an_archive(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    refusal(tmp_path / "bad.pth")


def test_truncated_anywhere(tmp_path):
    torch.save({"a": torch.ones(3000), "b": torch.ones(500).bfloat16()}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    lengths = [5, 25, 40, 300, 700, 1500, 6000, 12000, len(content) - 200, len(content) - 22, len(content) - 1]
    for length in [*lengths, *random.Random(3).sample(range(5, len(content)), 40)]:
        path.write_bytes(content[:length])
        message = refusal(path)
        assert "truncated" in message
        if 1500 <= length < 13000:
            assert f"expected more than 13000 bytes, found {length}" in message


def test_archives_that_lie(tmp_path):
    good = dumps({"a": tensor()})
    path = tmp_path / "bad.pth"
    write_archive(path, good, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
    write_archive(path, good, records={"archive/byteorder": b"big"})
    assert "b'big'" in refusal(path)
    write_archive(path, good, records={"other/data.pkl": good})
    assert "found 2" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", b"3")
    assert "found 0" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", good)
    assert "two records" in refusal(path)
    write_archive(path, dumps({"a": tensor(storage=Storage(count=5), size=(5,))}))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<2L", 16, 16), struct.pack("<2L", 20, 20)))
    assert "record 'archive/data/0' should end at byte" in refusal(path)
    write_archive(path, good)
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    refusal(path)
    path.write_bytes(b"PK\x03\x04" + content)
    refusal(path)
    with zipfile.ZipFile(tmp_path / "outer.pth", "w") as archive:
        archive.write(path, "inner.pth")
    assert "found 0" in refusal(tmp_path / "outer.pth")


def test_limits(tmp_path, monkeypatch):
    path = tmp_path / "bad.pth"
    write_archive(path, dumps({"a": tensor()}))
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    # 65,535 in the old field means: look in the zip64 end, which can promise any number.
    for count, table_bytes in ((200_001, 100), (2**60, 100), (3, 65 << 20), (3, 2**63)):
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, table_bytes, 0)
        pointer = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
        old = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        path.write_bytes(content[:end] + end64 + pointer + old)
        assert "refused" in refusal(path)
    path.write_bytes(content)
    monkeypatch.setattr(pth_reader, "MAX_PICKLE_BYTES", 20)
    assert "data.pkl has" in refusal(path)


def test_every_flip_in_the_zip_structure_is_seen_or_harmless(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.arange(3.0).bfloat16()}
    torch.save(tensors, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    path = tmp_path / "flipped.pth"
    num_refused = 0
    for position in range(content.index(b"PK\x01\x02"), len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            found = read_pth(path)
        except CheckpointError:
            num_refused += 1
        else:
            assert all(bits_equal(found[name], tensor) for name, tensor in tensors.items()), position
    assert num_refused > 300


def test_random_damage_raises_nothing_but_checkpoint_errors(in_empty_folder):
    torch.save(many_kinds(), "good.pth")
    content = Path("good.pth").read_bytes()
    pickle_end = content.index(b"PK\x03\x04", 4)
    random_source = random.Random(7)
    num_refused = 0
    for trial in range(1500):
        damaged = bytearray(content)
        for _ in range(random_source.randint(1, 4)):
            # Two in three in the pickle, where the damage can mean something.
            damaged[random_source.randrange(pickle_end if trial % 3 else len(content))] = random_source.randrange(256)
        Path("bad.pth").write_bytes(damaged)
        try:
            read_pth("bad.pth")
        except CheckpointError:
            num_refused += 1
    assert num_refused > 500
    assert sorted(path.name for path in Path().iterdir()) == ["bad.pth", "good.pth"]
