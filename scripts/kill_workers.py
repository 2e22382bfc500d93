"""Kill a running server's processes at random while it streams: no request may be lost or changed.

    python scripts/kill_workers.py smollm2 --kills 50 -- -pcp 2 --executor processes

What follows `--` are options of `longspan serve`. Greedy texts are first generated undisturbed, then again and again
under fire; the exit code is 1 if one of them differs or is not finished. It owns the server it starts and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

_START_SECONDS = 120.0
_MAIN = "from longspan.cli.main import main; main()"


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--port", type=int, default=8790)
    parser.add_argument("--seed", type=int, default=0)
    own = sys.argv[1:]
    rest = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    command = [sys.executable, "-c", _MAIN, "serve", options.model, "--port", str(options.port)]
    server = subprocess.Popen([*command, *rest])
    try:
        return asyncio.run(_Ordeal(options, server.pid).run())
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


class _Ordeal:
    def __init__(self, options: argparse.Namespace, server: int) -> None:
        self._options = options
        self._server = server
        self._url = f"http://127.0.0.1:{options.port}"
        self._random = random.Random(options.seed)
        self._done = asyncio.Event()
        self._finished = 0
        self._wrong: list[str] = []
        self._notice: list[float] = []
        self._back: list[float] = []

    async def run(self) -> int:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as self._http:
            await self._healthy(True)
            prompts = [f"Count from {number} to a hundred: {number}," for number in range(self._options.streams)]
            expected = [await self._complete(prompt) for prompt in prompts]
            streams = [asyncio.create_task(self._repeat(*pair)) for pair in zip(prompts, expected, strict=True)]
            for kill in range(self._options.kills):
                await asyncio.sleep(self._random.uniform(0.3, 2.0))
                await self._kill(kill)
            self._done.set()
            await asyncio.gather(*streams)
            state = await (await self._http.get(f"{self._url}/internal/state")).json()
        used = sum(shard["used"] for shard in state["shards"])
        print(
            f"{self._options.kills} kills, {self._finished} requests finished, {len(self._wrong)} lost or changed, "
            f"{used} pages held after it; noticed after {_spread(self._notice)}, back after {_spread(self._back)}"
        )
        for text in self._wrong[:5]:
            print(text)
        return int(bool(self._wrong or used))

    async def _repeat(self, prompt: str, expected: str) -> None:
        while not self._done.is_set():
            try:
                text = await self._complete(prompt)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            self._finished += 1
            if text != expected:
                self._wrong.append(f"{prompt!r} gave {text!r}, not {expected!r}")

    async def _complete(self, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": self._options.tokens, "temperature": 0, "stream": True}
        text, ended = "", False
        async with self._http.post(f"{self._url}/v1/completions", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    text += event["choices"][0]["text"]
                ended = ended or line.startswith(b"data: [DONE]")
        return text if ended else f"{text} (cut)"

    async def _kill(self, number: int) -> None:
        victim = self._random.choice(_descendants(self._server))
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        await self._healthy(False)
        self._notice.append(time.monotonic() - killed)
        await self._healthy(True)
        self._back.append(time.monotonic() - killed)
        print(
            f"kill {number + 1}: process {victim}, noticed after {self._notice[-1]:.2f} s, back after "
            f"{self._back[-1]:.2f} s, {self._finished} requests finished",
            flush=True,
        )

    async def _healthy(self, wanted: bool) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                async with self._http.get(f"{self._url}/health") as answer:
                    if (answer.status == 200) == wanted:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.01)
        raise TimeoutError(f"the server's health was not {wanted} within {_START_SECONDS} s")


def _descendants(parent: int) -> list[int]:
    """Processes below a process, of any generation."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found = [child for child, owner in parents.items() if owner == parent]
    return [*found, *(below for child in found for below in _descendants(child))]


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2]:.2f} s (median), {ordered[-1]:.2f} s (worst)"


if __name__ == "__main__":
    sys.exit(main())
