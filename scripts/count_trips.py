"""Counts the files that one change or one question takes a reader through, from the lists in docs/architecture.md.

python scripts/count_trips.py            # files of each trip
python scripts/count_trips.py --trace    # and which files a decode token runs that its list does not name
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "longspan"


def trips() -> dict[str, list[str]]:
    """The lists under "Five trips": by title the files named, relative to the package."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("\n## Five trips\n")[1].split("\n## ")[0]
    found: dict[str, list[str]] = {}
    for part in section.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        found[title] = sorted(set(re.findall(r"`([\w/]+\.py)`", body)))
    return found


def run_by_a_decode_token(model: str) -> set[str]:
    """Files whose functions run for tokens of `model`, a folder, over two ranks, from the scheduler to the text."""
    files: set[str] = set()
    tracing = threading.Event()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and tracing.is_set() and frame.f_code.co_filename.startswith(str(SOURCE)):
            files.add(str(Path(frame.f_code.co_filename).relative_to(SOURCE)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        from longspan import LLM, SamplingParams

        llm = LLM(
            model, tensor_parallel_size=2, decode_context_parallel_size=2, page_size=4, local_context=0,
            kv_cache_memory_bytes=1 << 20, schedule="gather_q", executor="threads", num_threads=1,
        )  # fmt: skip
        with llm:
            for number, _ in enumerate(llm.stream(list(range(3, 12)), SamplingParams(max_tokens=9, temperature=0))):
                tracing.set() if 2 <= number < 7 else tracing.clear()  # past the prompt, and before the end
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]  # as its documentation says
        sys.setprofile(None)
    return files - {"llm.py", "engine/engine.py"}  # a server has its own in their place


def main() -> None:
    """Print the counts; with --trace what is missing, and fail if anything is."""
    found = trips()
    for title, files in found.items():
        print(f"{len(files):4}  {title}")
    if "--trace" in sys.argv:
        from tests.oracle import tiny_folder

        missing = run_by_a_decode_token(tiny_folder("llama")) - set(next(iter(found.values())))
        sys.exit(f"run, but not listed: {', '.join(sorted(missing))}" if missing else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
