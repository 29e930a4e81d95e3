"""Plain text and source code: a file, or a folder, as one document."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infctx.data.sources.catalog import find_files, scan
from infctx.data.sources.records import Record, Rejection
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]


def test_a_text_file_is_one_document_kept_verbatim(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbf one\r\ntwo\x00\n\n")
    records, rejected = read_all(file)
    assert [(record.fields, record.origin) for record in records] == [({"text": " one\r\ntwo\x00\n\n"}, f"{file}:1")]
    assert rejected == []


def test_a_text_file_that_is_not_utf8_names_the_byte(tmp_path: Path, read_all: ReadAll) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"fine\ncaf\xe9 ")
    records, rejected = read_all(file)
    assert records == []
    assert rejected == [
        Rejection(file=str(file), line=1, reason="not valid UTF-8: byte 0xE9 at byte offset 8 of the file")
    ]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_empty_text_and_no_code(tmp_path: Path, read_all: ReadAll, content: bytes) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(content)
    ((record,), rejected) = read_all(file)
    assert (record.fields, rejected) == ({"text": ""}, [])
    assert read_all(file, "code") == ([], [])


# Source code


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    contents = {
        "src/main.py": b"\xef\xbb\xbfprint(1)\r\n",
        "src/__init__.py": b"",
        "a.c": b"int a;",
        ".gitignore": b"*.o\n",
        "bytes.py": b"x" * 8191 + b"\x00",
        "late_zero.py": b"x" * 8192 + b"\x00",
        "latin.py": b"# caf\xe9\n",
        "archive.gz": b"\x1f\x8b\x08\x00\x00",
        ".git/config": b"secret",
        ".venv/lib.py": b"secret",
        "node_modules/x/y.js": b"secret",
        "src/__pycache__/main.py": b"secret",
        "env/pyvenv.cfg": b"secret",
        "env/lib/site.py": b"secret",
        "venv/kept.py": b"kept",
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (tmp_path / "outside.py").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "more.py").write_text("secret")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root)
    (root / "broken.py").symlink_to(tmp_path / "nothing")
    return root


def test_a_folder_of_code_is_a_document_for_each_file(repository: Path, read_all: ReadAll) -> None:
    records, rejected = [], []
    for file in find_files([str(repository)], format="code"):
        found, refused = read_all(file, "code")
        records += found
        rejected += refused
    assert {record.fields["repository"] for record in records} == {"project"}
    assert {record.fields["path"]: record.fields["text"] for record in records} == {
        ".gitignore": "*.o\n",
        "a.c": "int a;",
        "late_zero.py": "x" * 8192 + "\x00",
        "src/main.py": "print(1)\r\n",
        "venv/kept.py": "kept",
    }
    assert [(Path(record.file).read_bytes() != b"", record.line) for record in records] == [(True, 1)] * 5
    assert rejected == [
        Rejection(
            file=f"{repository}/./latin.py", line=1, reason="not valid UTF-8: byte 0xE9 at byte offset 5 of the file"
        )
    ]


def test_a_file_of_code_by_itself_is_of_its_folder(
    repository: Path, read_all: ReadAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    for path, name, folder in [("src/main.py", "main.py", "src"), ("a.c", "a.c", "project")]:
        ((record,), _) = read_all(path, "code")
        assert (record.fields["path"], record.fields["repository"]) == (name, folder)


def test_a_repository_is_one_document(repository: Path, read_all: ReadAll) -> None:
    ((record,), rejected) = read_all(repository, "code_repository", exclude=("*/late_*", "*/venv/*"))
    assert record.origin == f"{repository}:1"
    assert record.fields == {
        "repository": "project",
        "text": "# .gitignore\n*.o\n\n# a.c\nint a;\n# src/__init__.py\n\n# src/main.py\nprint(1)\r\n\n",
    }
    assert [(row.file, row.line) for row in rejected] == [(str(repository), 1)]
    assert rejected[0].reason == "latin.py: not valid UTF-8: byte 0xE9 at byte offset 5 of the file"


def test_a_repository_without_text_gives_nothing(tmp_path: Path, read_all: ReadAll) -> None:
    (tmp_path / "image.png").write_bytes(b"\x00")
    assert read_all(tmp_path, "code_repository") == ([], [])


def test_a_name_that_is_not_utf8_costs_its_file_only(tmp_path: Path, read_all: ReadAll) -> None:
    (tmp_path / "a.py").write_text("one")
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.py"), "w") as file:
        file.write("two")
    ((record,), (rejected,)) = read_all(tmp_path, "code_repository")
    assert record.fields["text"] == "# a.py\none\n"
    assert rejected.reason == "'caf\\udce9.py': the name of the file is not valid UTF-8"
    scan(str(tmp_path), format="code_repository", unit_bytes=1)


def test_the_digest_of_a_repository_is_of_its_paths_and_contents(repository: Path) -> None:
    def digest() -> str:
        found = scan(str(repository), format="code_repository", unit_bytes=1)
        assert len(found.units) == 1
        assert found.num_bytes > 16_000
        return found.digest

    before = digest()
    (repository / ".git" / "config").write_bytes(b"changed")
    assert digest() == before
    (repository / "a.c").rename(repository / "a.h")
    renamed = digest()
    (repository / "a.h").write_bytes(b"int b;")
    assert len({before, renamed, digest()}) == 3


def test_a_folder_that_is_gone_is_named(tmp_path: Path, read_all: ReadAll) -> None:
    with pytest.raises(DataError, match="gone: expected a readable file, got: No such file"):
        read_all(tmp_path / "gone", "code_repository")


def test_a_file_that_vanishes_from_a_folder_while_it_is_listed(
    repository: Path, read_all: ReadAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = os.lstat

    def vanish(path: str) -> os.stat_result:
        if path.endswith("a.c"):
            os.unlink(path)
        return look(path)

    monkeypatch.setattr(os, "lstat", vanish)
    with pytest.raises(DataError, match=r"a\.c: expected a readable file, got: No such file"):
        read_all(repository, "code_repository")
