"""The list of faults of `scripts/mutate.py` fits today's source, and no fault of it goes unnoticed."""

import subprocess
import sys
from pathlib import Path

import pytest
from scripts.mutations import FAULTS

ROOT = Path(__file__).parents[2]


def test_every_fault_changes_one_place_of_the_source():
    for fault in FAULTS:
        text = (ROOT / "src" / "longspan" / fault.file).read_text()
        assert text.count(fault.old) == 1, f"{fault.name}: {text.count(fault.old)} times in {fault.file}"
        assert fault.new != fault.old
        compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_there_are_many_faults_and_no_two_of_a_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 24


def test_every_test_that_a_fault_names_exists():
    for fault in FAULTS:
        for test in fault.tests:
            path, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test


@pytest.mark.mutation
@pytest.mark.timeout(3600)
def test_no_fault_goes_unnoticed():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "mutate.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
