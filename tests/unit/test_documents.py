"""The Markdown files: links lead somewhere, files and tests that are named exist, and the index has every page."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from scripts.count_trips import SOURCE, run_by_a_decode_token, trips

from longspan.cli.main import build_app
from tests.oracle import tiny_folder

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for folder in ("", "docs", "examples") for page in (ROOT / folder).glob("*.md"))
HISTORY = ("LOG.md", "CHANGELOG.md")
"""They may name files that are gone; a `mine.py` is the reader's own."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`([\w./-]+\.(?:py|toml|csv|sh|html|yaml))`")
FOLDERS = ("src", "tests", "scripts", "docs", "examples", "demo")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def links(page: Path) -> list[str]:
    """The relative links of a page, but for those in code."""
    return [link for link in LINK.findall(CODE.sub("", page.read_text())) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page):
    for link in links(page):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    files = ["/" + str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
    for name in FILE.findall(page.read_text()):
        assert name.endswith("/mine.py") or any(file.endswith("/" + name) for file in files), name


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `longspan` command in a page's blocks of code, but for those that leave some out."""
    text = page.read_text().replace("\\\n", " ")
    blocks = [*re.findall(r"```.*?\n(.*?)```", text, re.DOTALL), *re.findall(r"^ {4}.*$", text, re.MULTILINE)]
    lines = re.findall(r"^(?:.*[$|])?\s*longspan (.*)$", "\n".join(blocks), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if not line.endswith(" ...")]


def leaves(command: Any) -> Iterator[Any]:
    """A command's subcommands that have none themselves."""
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        yield command
    for one in subcommands.values():
        yield from leaves(one)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_command_that_a_page_prints_is_understood(page):
    program = typer.main.get_command(build_app())
    for leaf in leaves(program):
        leaf.callback = None  # arguments are read, nothing is run
    for arguments in commands(page):
        program.main(arguments, standalone_mode=False)


def test_commands_are_found_in_the_pages():
    assert sum(len(commands(page)) for page in PAGES if page.name not in HISTORY) > 25


def test_the_index_has_a_line_for_every_file_of_the_documents():
    documents = {page.name for page in (ROOT / "docs").iterdir()} - {"index.md"}
    assert documents == {link for link in links(ROOT / "docs" / "index.md") if "/" not in link}


def test_the_readme_links_the_index():
    assert "docs/index.md" in links(ROOT / "README.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    files = (ROOT / "tests").rglob("test_*.py")
    defined = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert set(re.findall(r"`(test_\w+)`", page.read_text())) - defined == set()


def test_every_invariant_names_what_would_notice_that_it_is_broken():
    lines = re.findall(r"^\d+\. .*$", (ROOT / "docs" / "invariants.md").read_text(), re.MULTILINE)
    assert len(lines) > 40
    for line in lines:
        assert re.search(r"`(test_\w+|tests/[\w/.]+|scripts/\w+\.py)`", line), line


def test_the_trips_name_files_of_the_package():
    assert len(trips()) == 5
    for title, files in trips().items():
        assert files, title
        assert [file for file in files if not (SOURCE / file).exists() and not file.endswith("/mine.py")] == [], title


def test_a_decode_token_runs_no_file_that_its_trip_does_not_name():
    assert run_by_a_decode_token(tiny_folder("llama")) <= set(next(iter(trips().values())))
