"""The shape of the project: imports, folders, the README's tree, and what importing it costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"train.py", "pyproject.toml", "infctx", "kernels", "recipes", "datasets", "tests"}
BESIDE_THEM = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci", "benchmarks", "docs"}
HOUSEKEEPING = {".git", ".gitignore", ".gitattributes", ".pre-commit-config.yaml"}
TEXT_ENDINGS = {".py", ".md", ".yaml", ".yml", ".toml", ".cpp", ".h", ".cu", ".sh", ""}
FILE_NAME = re.compile(r"[\w.*/{},-]+(\.(py|pyi|cpp|h|cu|md|yaml|toml|json|jsonl|txt|css|js|html)|/)")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


def ignored(name: str) -> bool:
    patterns = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    return any(fnmatch(name, pattern) for pattern in patterns if pattern and not pattern.startswith("#"))


def top_level() -> set[str]:
    """The entries of the checkout that git has, or would have; of the folder where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        return {line.split("/")[0].strip('"') for line in listed.stdout.splitlines()}
    return {path.name for path in ROOT.iterdir() if not ignored(path.name)} - {".git"}


def text_files() -> list[Path]:
    found = []
    for name in sorted((PARTS | BESIDE_THEM) & top_level()):
        entry = ROOT / name
        paths = [entry] if entry.is_file() else sorted(entry.rglob("*"))
        found += [
            path
            for path in paths
            if path.is_file()
            and path.suffix in TEXT_ENDINGS
            and not any(ignored(part) for part in path.relative_to(ROOT).parts)
        ]
    return found


def test_imports_go_one_way_only() -> None:
    done = run_python(
        "from importlinter.cli import lint_imports; import sys;"
        " sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout), done.stdout


@pytest.mark.parametrize("folder", ["kernels", "recipes", "datasets"])
def test_folders_that_must_not_hide_packages_of_their_name(folder: str) -> None:
    # As a package, kernels/ or datasets/ would be found before the installed package of that name.
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_code_among_recipes_and_datasets() -> None:
    assert [str(path) for folder in ("recipes", "datasets") for path in (ROOT / folder).rglob("*.py")] == []


def test_top_level_is_fixed() -> None:
    present = top_level()
    assert present - PARTS - BESIDE_THEM - HOUSEKEEPING == set()
    assert PARTS - present == set()


# The README's tree


def readme_tree(text: str) -> list[str]:
    """The paths of the first fenced block under the heading `## The tree`.

    A line is indented by its depth, names one entry or several ({a,b} stands for both), then tells what they are.
    """
    section = re.search(r"^## The tree\s*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no heading '## The tree'"
    block = re.search(r"^```\w*\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert block, "no fenced block follows '## The tree'"
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        entry = re.sub(r"[│├└─]", " ", line)
        if not entry.strip():
            continue
        depth = len(entry) - len(entry.lstrip())
        folders = [(at, folder) for at, folder in folders if at < depth]
        base = folders[-1][1] if folders else ""
        names = list(leading_names(entry.split()))
        paths += [base + name for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            folders.append((depth, base + names[0]))
    return paths


def leading_names(words: list[str]) -> Iterator[str]:
    """The first word, and those after it that are names of files too, with their braces written out."""
    for position, word in enumerate(words):
        if position and not FILE_NAME.fullmatch(word):
            return
        pieces = [piece.split(",") for piece in re.split(r"[{}]", word)] if "{" in word else [[word]]
        yield from ("".join(choice) for choice in product(*pieces))


def test_the_reader_of_trees() -> None:
    text = """
## Other
```
wrong.py
```
## The tree
Words.
```text
train.py                 hands argv on
infctx/                  the package
  cli.py                 see train.py
  recipe/
    schema.py  load.py   two of them: x.py
kernels/
├── pkg/
│   └── cpu.{cpp,py}     fused
Makefile                 make help
tests/data/test_{a,b}.py
```
```
also_wrong.py
```
"""
    assert readme_tree(text) == [
        "train.py",
        "infctx/",
        "infctx/cli.py",
        "infctx/recipe/",
        "infctx/recipe/schema.py",
        "infctx/recipe/load.py",
        "kernels/",
        "kernels/pkg/",
        "kernels/pkg/cpu.cpp",
        "kernels/pkg/cpu.py",
        "Makefile",
        "tests/data/test_a.py",
        "tests/data/test_b.py",
    ]


def test_readme_tree_is_true() -> None:
    listed = readme_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    files = [path for path in listed if not path.endswith("/")]
    assert len(files) > 20, "the tree was not read"
    assert [path for path in listed if not any(ROOT.glob(path.rstrip("/")))] == [], "listed but not there"


def test_every_module_is_in_the_readme_tree() -> None:
    listed = set(readme_tree((ROOT / "README.md").read_text(encoding="utf-8")))
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in ("infctx", "kernels/infctx_kernels")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".cpp"} and path.name != "__init__.py"
    ]
    assert len(modules) > 20
    assert [path for path in modules if path not in listed] == [], "there but not listed"


# What must not be in it


def test_nothing_points_to_the_machine_it_was_written_on() -> None:
    # Put together here, so that this file does not hold them itself.
    words = ["/" + "work/", "/" + "root/", "TO" + "DO"]
    files = text_files()
    assert len(files) > 40
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for word in words
        if word in line
    ]
    assert found == []


def test_importing_infctx_is_cheap() -> None:
    heavy = ["torch", "lightning", "peft", "numpy", "transformers", "rich", "pydantic", "yaml"]
    done = run_python("import sys, infctx; print(*[name for name in sys.argv[1:] if name in sys.modules])", *heavy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_trainer_of_lightning() -> None:
    """Its Trainer runs all chunks of a step inside one forward pass of the engine: with ZeRO-3 the gradient of all but
    one chunk is lost without a word. Fabric calls the engine for each chunk."""
    imported = set()
    for path in sorted((ROOT / "infctx").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name for name in names if name.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert imported
    assert all(name.startswith("lightning.fabric") for name in imported), imported
