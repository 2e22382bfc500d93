"""What people can touch changes on purpose only: flags, endpoints, metrics, models, machines, names, tested layouts."""

from difflib import unified_diff

import pytest
from scripts.snapshot import SNAPSHOT, snapshot


def test_what_people_can_touch_is_what_the_snapshot_says():
    known, found = (text.splitlines(keepends=True) for text in (SNAPSHOT.read_text(), snapshot()))
    changed = "".join(unified_diff(known, found, "tests/snapshot.txt", "the code", n=0))
    if changed:
        pytest.fail(f"if this is meant, run: python scripts/snapshot.py\n{changed}", pytrace=False)
