"""The documentation does what it says: commands run, recipes load, links lead somewhere, pictures are of the results.

Blocks of `sh` in README.md and docs/ are executed, each page in a folder of its own with a small World model,
documents, rows and conversations under the names that the pages use, unless a comment above says why not:

    <!-- not run: needs a GPU -->

A block of `yaml` whose first line is `# NAME.yaml` is written to that file first. `<!-- needs: PAGE -->` begins a page
with what the commands of another one left behind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import infctx
from infctx.cli import app, main
from infctx.recipe.load import parse_recipe
from infctx.recipe.problems import known_keys

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]
MODEL = "models/RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth"
FENCE = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. why_not: it is not to be run."""

    language: str
    text: str
    why_not: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [
        Block(language=one["language"], text=one["text"], why_not=one["why"])
        for one in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block.language in languages] if languages else found


def command_lines(block: Block) -> list[str]:
    """Commands without comments, continued lines in one."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [" ".join(shlex.quote(word) for word in shlex.split(line, comments=True)) for line in joined.splitlines()]
    return [line for line in lines if line]


def by_name(name: str) -> Path:
    return ROOT / name if name == "README.md" else ROOT / "docs" / name


# Commands


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, make_finch: Callable[..., Any]) -> Path:
    """A folder with what the pages suppose: a model named as a released one, documents, rows, conversations."""
    folder = tmp_path_factory.mktemp("docs") / "world"
    (folder / "models").mkdir(parents=True)
    model = make_finch(n_layer=2, n_embd=16, vocab_size=65_536, head_size=8, dim_ffn=32, decay_rank=4)
    infctx.save_model(model, folder / MODEL, dtype=torch.float32)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "datasets", folder / "datasets")
    instructions = ROOT / "datasets" / "instructions"
    (folder / "my_docs").mkdir()
    for number, line in enumerate((instructions / "long.jsonl").read_text("utf-8").splitlines()[:4]):
        (folder / "my_docs" / f"{number}.txt").write_text(json.loads(line)["input"][:500], encoding="utf-8")
    for name, source in (("my_rows", "instruct"), ("my_chats", "chat")):
        (folder / name).mkdir()
        lines = (instructions / f"{source}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / name / "rows.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    return folder


class Pages:
    """Runs pages, each in a copy of what the page that it needs left behind, or of the world.

    The copies take turns in one place, for run folders know where their data lies.
    """

    def __init__(self, world: Path) -> None:
        self._left_behind = {"": world}
        self._folder = world.parent / "here"

    def run(self, name: str) -> int:
        """Execute the commands of a page; returns how many."""
        page = by_name(name)
        found = re.search(r"<!-- needs: (\S+) -->", page.read_text(encoding="utf-8"))
        needed = found[1] if found else ""
        if needed not in self._left_behind:
            self.run(needed)
            self._left_behind[needed] = self._folder.rename(self._folder.with_name(f"after_{needed}"))
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._left_behind[needed], self._folder)
        before = Path.cwd()
        os.chdir(self._folder)
        try:
            return sum(self._run_block(block, name) for block in blocks(page))
        finally:
            os.chdir(before)

    def _run_block(self, block: Block, page: str) -> int:
        named = re.match(r"# (\S+\.yaml)\n", block.text)
        if block.language == "yaml" and named is not None:
            Path(named[1]).write_text(block.text, encoding="utf-8")
        if block.language == "python" and block.why_not is None:
            exec(compile(block.text, page, "exec"), {"__name__": page})
            return 1
        if block.language != "sh" or block.why_not is not None:
            return 0
        lines = command_lines(block)
        for line in lines:
            self._run_line(shlex.split(line), f"{page}: {line}")
        return len(lines)

    def _run_line(self, words: list[str], shown: str) -> None:
        assert words[0] == "infctx", f"{shown}: only infctx can be run here; say above the block why it is not run"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with pytest.raises(SystemExit) as end:
                main(words[1:])
        finally:
            torch.set_num_threads(threads)
        assert end.value.code == 0, shown


@pytest.fixture(scope="session")
def pages(world: Path) -> Pages:
    return Pages(world)


# The page that others need first is run for them: its own test would run it once more.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "index.md"])
def test_commands_of_the_page_run(name: str, pages: Pages) -> None:
    num_run = pages.run(name)
    of_page = [line for block in blocks(by_name(name), "sh") if block.why_not is None for line in command_lines(block)]
    assert num_run >= len(of_page)


def test_most_commands_are_run() -> None:
    run, not_run = [], []
    for page in PAGES:
        for block in blocks(page, "sh"):
            (run if block.why_not is None else not_run).extend(command_lines(block))
            assert block.why_not is None or len(block.why_not) > 8
    assert len(run) > 50
    assert len(run) > 1.5 * len(not_run), not_run


def test_shell_blocks_are_marked_as_such() -> None:
    """A block in another language would be passed over."""
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("sh", "yaml", "python", "text", ""), (page.name, block.language)
            assert block.language not in ("", "text") or not re.search(r"^\$? ?infctx ", block.text, re.M), block.text


def parsed(words: list[str]) -> None:
    """As the command line is read, without running it."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    parent = None
    while True:
        context = command.make_context(command.name, words, parent=parent)
        if not hasattr(command, "commands"):
            return
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        parent = context


def infctx_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of infctx in blocks, run or not, and in running text."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
                words = shlex.split(line.replace("$'", "'"), comments=True)
                if "infctx" in words:
                    yield f"{page.name}: {line}", words[words.index("infctx") + 1 :]
                elif ".venv/bin/infctx" in words:
                    yield f"{page.name}: {line}", words[words.index(".venv/bin/infctx") + 1 :]
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for line in re.findall(r"`infctx ([^`]+)`", text):
            words = shlex.split(line.replace("…", "").replace("\n", " "))
            # A command that is only named has no arguments; what is to be filled in stands in capitals.
            if any(word.isupper() or "." in word or "=" in word or "/" in word for word in words):
                yield f"{page.name}: infctx {line}", words


def test_every_command_line_can_be_read() -> None:
    lines = list(infctx_lines())
    assert len(lines) > 80
    for shown, words in lines:
        try:
            parsed(words)
        except Exception as error:
            pytest.fail(f"{shown}: {error}")


def test_the_reader_of_command_lines() -> None:
    parsed(["train", "my.yaml", "run.steps=3", "--fresh"])
    parsed(["model", "info", "x.pth", "--check"])
    for wrong in (["trane", "my.yaml"], ["train", "my.yaml", "--frsh"], ["model", "grow"], ["model", "old", "x"]):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parsed(wrong)


def test_commands_named_in_running_text_exist() -> None:
    command: Any = typer.main.get_command(app)
    named = {
        (page.name, word)
        for page in PAGES
        for word in re.findall(r"`infctx ([a-z][a-z-]+)", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 25
    assert {pair for pair in named if pair[1] not in command.commands} == set()


# Recipes and their keys

MINIMAL = {
    "model": {"path": "m.pth"},
    "data": {"path": "d.jsonl"},
    "optimizer": {"lr": 1e-4},
    "run": {"folder": "runs/x", "steps": 1},
}
OF_OTHERS = {"trainer"}
NO_KEYS = re.compile(r"\.(py|yaml|json|jsonl|log|html|md|pth|safetensors)$|^model\.(use_|pth)|^data\.(html|source)")


def test_recipes_in_the_pages_load() -> None:
    count = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            said = yaml.safe_load(block.text)
            if OF_OTHERS & set(said):
                continue
            whole = {name: {**MINIMAL.get(name, {}), **said.get(name, {})} for name in {**MINIMAL, **said}}
            if "sets" in whole["data"]:
                whole["data"].pop("path")
            if {"steps", "epochs"} <= set(whole["run"]):
                whole["run"].pop("steps")
            parse_recipe(yaml.safe_dump(whole), name=page.name)
            count += 1
    assert count >= 10


def test_recipe_keys_in_the_pages_exist() -> None:
    known = set(known_keys())
    sections = {key.split(".")[0] for key in known}
    found = []
    for page in PAGES:
        if page.name == "recipe.md":
            continue
        text = page.read_text(encoding="utf-8")
        if page.name == "from_infctx_trainer.md":
            # The first column is of the other trainer.
            text = re.sub(r"^\| [^|]*\|", "|", re.sub(r"```yaml.*?```", "", text, flags=re.S), flags=re.M)
        for inside in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
            for section, key in re.findall(r"(?<![\w/.])(\w+)\.([a-z]\w*)", inside):
                name = f"{section}.{key}"
                is_file = NO_KEYS.search(inside.split(" ")[0]) or NO_KEYS.search(name)
                if section in sections and not is_file:
                    found.append((page.name, name))
        for line in [line for block in blocks(page, "sh") for line in command_lines(block)]:
            found += [
                (page.name, word.split("=")[0])
                for word in shlex.split(line)
                if re.match(r"(" + "|".join(sections) + r")\.\w+=", word)
            ]
    assert len(found) > 120
    assert sorted({pair for pair in found if pair[1] not in known}) == []


# Links


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and as mkdocs make them; only what both call the same can be linked."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.M):
        plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        github = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
        if github == mkdocs:
            found.add(github)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if page.parent.name == "docs":
            # The site is made of this folder.
            assert (ROOT / "docs") in there.parents, f"{page.name}: {target} is not part of the site"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}: {sorted(anchors(there))}"


def test_every_page_can_be_reached() -> None:
    seen, waiting = set(), ["index.md"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting += re.findall(r"\]\((\w+\.md)", (ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert seen == {page.name for page in PAGES} - {"README.md"}
    nav = (ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"(\w+\.md)", nav)) == seen


def test_files_named_in_the_pages_exist() -> None:
    patterns = r"`((?:infctx|kernels|benchmarks|tests|recipes|datasets|training|data|model|recipe|adapters)/[\w/.]+)`"
    found = [(page.name, name) for page in PAGES for name in re.findall(patterns, page.read_text(encoding="utf-8"))]
    assert len(found) > 40
    missing = [
        (page, name)
        for page, name in found
        if not any((above / name).exists() for above in (ROOT, ROOT / "infctx")) and not fnmatch(name, "data/*.jsonl")
    ]
    assert missing == []


# Pictures


@pytest.fixture(scope="module")
def drawing() -> types.ModuleType:
    path = ROOT / "benchmarks" / "pictures.py"
    specification = importlib.util.spec_from_file_location("pictures", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    before = list(sys.path)
    specification.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.parametrize("name", ["memory.svg", "recall.svg", "house.svg", "step.svg", "live_view.svg"])
def test_pictures_are_of_what_there_is(name: str, drawing: types.ModuleType) -> None:
    drawn = drawing.pictures()[name]()
    kept = (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8")
    assert drawn == kept, "run: python benchmarks/pictures.py"
    assert len(kept.encode()) < 40_000
    assert "aria-label=" in kept
    assert "url(http" not in kept
    assert not re.search(r'(href|src)="http', kept)


def test_every_picture_is_shown_and_described(drawing: types.ModuleType) -> None:
    shown = {
        Path(target).name: words
        for page in PAGES
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+\.svg)\)", page.read_text(encoding="utf-8"))
    }
    assert set(shown) == set(drawing.pictures())
    assert all(len(words) > 20 for words in shown.values())
