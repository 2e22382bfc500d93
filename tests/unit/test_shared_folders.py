"""Folders that tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MAKE = "from tests.folders import shared_folder; print(shared_folder('a'))"


def test_shared_folders_go_with_their_process(tmp_path: Path):
    made = subprocess.check_output([sys.executable, "-c", MAKE], env={**os.environ, "TMPDIR": str(tmp_path)}, text=True)
    assert made.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
