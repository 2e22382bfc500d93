"""Private folders: nobody else's, and gone with their process, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longspan.private_folder import PrivateFolder

MAKE = "from longspan.private_folder import PrivateFolder; f = PrivateFolder(); print(f.name, flush=True); input()"


@pytest.fixture(autouse=True)
def parent(tmp_path, monkeypatch) -> Path:
    """Where folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def other_process(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """One that has a folder, with something in it, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(parent)},
    )  # fmt: skip
    folder = Path(process.stdout.readline().strip())
    (folder / "inner").mkdir()
    return process, folder


def test_only_its_user_can_open_it_and_it_is_gone_after_the_block():
    with PrivateFolder() as name:
        assert Path(name).stat().st_mode & 0o777 == 0o700
    assert not Path(name).exists()


def test_a_killed_processs_folder_is_gone_once_the_next_is_made_and_a_living_ones_is_not(parent):
    killed, left = other_process(parent)
    living, used = other_process(parent)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.exists()
    with PrivateFolder():
        assert not left.exists()
        assert used.exists()
    living.communicate("\n")
    assert not used.exists()


def test_what_only_looks_like_one_is_left_alone(parent, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "lock").touch()
    (parent / "longspan-link").symlink_to(elsewhere)
    (parent / "longspan-without-lock").mkdir()
    (parent / "other").mkdir()
    (parent / "other" / "lock").touch()
    (parent / "longspan-file").touch()
    with PrivateFolder():
        pass
    assert (elsewhere / "lock").exists()
    assert {file.name for file in parent.iterdir()} == {
        "longspan-link", "longspan-without-lock", "other", "longspan-file",
    }  # fmt: skip


def test_a_folder_of_another_user_is_left_alone(parent, monkeypatch):
    (parent / "longspan-theirs").mkdir()
    (parent / "longspan-theirs" / "lock").touch()
    monkeypatch.setattr(os, "getuid", lambda: parent.stat().st_uid + 1)
    with PrivateFolder():
        assert (parent / "longspan-theirs").exists()
