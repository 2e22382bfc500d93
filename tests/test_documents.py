"""What the documents say of the source and the tests is so."""

import re
from pathlib import Path

from scripts.count_trips import SOURCE, run_by_a_decode_token, trips

from tests.oracle import tiny_folder

ROOT = SOURCE.parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OF_THE_PAST = {ROOT / "docs" / "LOG.md"}


def test_the_trips_name_files_that_exist():
    assert len(trips()) == 5
    for title, files in trips().items():
        assert files, title
        assert [file for file in files if not (SOURCE / file).exists() and "mine" not in file] == [], title


def test_a_decode_token_runs_no_file_that_its_trip_does_not_name():
    assert run_by_a_decode_token(tiny_folder("llama")) <= set(next(iter(trips().values())))


def test_tests_that_documents_name_exist():
    defined = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for document in set(DOCUMENTS) - OF_THE_PAST:
        named = set(re.findall(r"`(test_\w+)`", document.read_text()))
        assert named - defined == set(), document.name


def test_every_invariant_names_what_would_notice_that_it_is_broken():
    lines = re.findall(r"^\d+\. .*$", (ROOT / "docs" / "invariants.md").read_text(), re.MULTILINE)
    assert len(lines) > 40
    for line in lines:
        assert re.search(r"`(test_\w+|tests/[\w/.]+|scripts/\w+\.py)`", line), line


def test_paths_that_documents_name_exist():
    for document in set(DOCUMENTS) - OF_THE_PAST - {ROOT / "CHANGELOG.md"}:
        for path in re.findall(
            r"`((?:tests|scripts|docs|examples)/[\w/.-]+\.\w+|(?:tests|scripts)/[\w/]+/)`", document.read_text()
        ):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def package_paths(document: Path) -> set[str]:
    """Files of the package as documents write them: relative to it, with a folder."""
    packages = "|".join(child.name for child in SOURCE.iterdir() if child.is_dir())
    return set(re.findall(rf"`((?:{packages})/[\w/]+\.\w+)`", document.read_text()))


def test_files_of_the_package_that_documents_name_exist():
    for document in set(DOCUMENTS) - OF_THE_PAST - {ROOT / "CHANGELOG.md"}:
        gone = [path for path in package_paths(document) if not (SOURCE / path).exists() and "/mine." not in path]
        assert gone == [], document.name
