"""Kill, terminate and stop a running server's processes at random under mixed load: no request may be lost or changed.

    python scripts/kill_workers.py smollm2 --kills 200 -- -pcp 2 --executor processes

What follows `--` are options of `longspan serve`; the model `tiny` is the tests' own. Every kind of request is first
answered undisturbed, then again and again under fire. The exit code is 1 if an answer differs, is cut or is an error,
if `/health` says something untrue, or if pages, processes or files are left. It owns the server it starts and nothing
else; the HTTP process is never harmed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from server_process import ServerProcess, descendants, held, served, split_options

_BACK_SECONDS = 600.0  # from a harm to the next healthy moment
_NOTICE_SECONDS = 5.0  # from a death to 503
_LATE, _DEAD = 3.0, 10.0  # seconds of silence: after these `/health` says 503, and the process is replaced
_MARGIN = 2.0  # a process that stops so much before a limit need not be noticed, and one so much behind it must
_PROBE = {"prompt": "Are you there?", "max_tokens": 3, "temperature": 0}
# what is done to a process, and how often relative to the others
_HARMS = {"kill": 10, "kill twice": 2, "terminate": 2, "stop and continue": 4, "stop": 2}


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as for `longspan serve`; `tiny` is the tests' model")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--long", type=int, default=1500, help="characters of the long prompts")
    parser.add_argument("--seed", type=int, default=0)
    options, rest = split_options(parser)
    with served(options.model, rest) as server:
        ordeal = _Ordeal(options, server)
        faults = ordeal.faults
        try:
            asyncio.run(ordeal.run())
        except (KeyboardInterrupt, SystemExit, TimeoutError) as error:  # what is known by then is told
            faults.append(f"ended early: {type(error).__name__} {error}")
        seen = ordeal.seen_processes
        code = server.end()
        if code != 0:
            faults.append(f"the server ended with {code}, not 0")
        if left := [pid for pid in seen if _exists(pid)]:
            faults.append(f"processes are left: {left}")
        if files := server.left_files():
            faults.append(f"files are left: {files}")
        ordeal.report()
        for fault in faults:
            print(fault[:1000])
        if faults:
            print(server.log.read_text()[-6000:])
    print(f"{len(faults)} faults")
    return int(bool(faults))


def requests(tokens: int, long: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(kind, path, body) of each request of the load."""
    text = "The quick brown fox jumps over the lazy dog; then it sleeps. " * (long // 60 + 1)
    greedy, sampled = {"temperature": 0, "max_tokens": tokens}, {"temperature": 0.9, "max_tokens": tokens}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 12}},
              "required": ["n", "s"], "additionalProperties": False}  # fmt: skip
    form = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    plain: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {**greedy, "prompt": "Count to a hundred: 1,"}),
        ("sampled", {**sampled, "prompt": "Once upon a time", "seed": 5, "top_p": 0.9, "frequency_penalty": 0.3}),
        ("two of one prompt", {**sampled, "prompt": "There was", "seed": 6, "n": 2}),
        ("long prompt", {**greedy, "prompt": text[:long]}),
        ("prefix hit", {**greedy, "prompt": text[: long - 40] + "And now for something else:"}),
        ("prefix hit, sampled", {**sampled, "prompt": text[: long - 60] + "Or else:", "seed": 7}),
        ("grammar", {**greedy, **form, "prompt": "An object: "}),
        ("grammar, sampled", {**sampled, **form, "prompt": "Another object: ", "seed": 8}),
        ("log-probabilities", {**greedy, "prompt": "Lorem ipsum", "logprobs": 2}),
    ]
    return [
        (kind, "/v1/completions", {**body, "stream": stream, "return_token_ids": True})
        for kind, body in plain
        for stream in (True, False)
    ]


class _Ordeal:
    def __init__(self, options: argparse.Namespace, server: ServerProcess) -> None:
        self.faults: list[str] = []
        self.seen_processes: set[int] = set()
        self._options = options
        self._server = server
        self._url = server.url
        self._victim = ""  # command line of the process harmed last
        self._slowest = 0.0  # seconds, of the polls of `/health` in one `_until`
        self._random = random.Random(options.seed)
        self._done = asyncio.Event()
        self._finished: Counter[str] = Counter()
        self._harms: Counter[str] = Counter()
        self._given_up = 0
        self._notice: dict[str, list[float]] = {}
        self._back: dict[str, list[float]] = {}
        self._begun = time.monotonic()

    async def run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as self._http:
            load = requests(self._options.tokens, self._options.long)
            expected = [await self._answer(path, body) for _, path, body in load]
            self._probe = await self._answer("/v1/completions", _PROBE)
            clients = [asyncio.create_task(self._repeat(*each)) for each in zip(load, expected, strict=True)]
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=Console(stderr=True)) as progress:
                bar = progress.add_task("processes harmed", total=self._options.kills)
                for _ in range(self._options.kills):
                    await asyncio.sleep(self._random.uniform(0.1, 1.5))
                    kind = self._random.choices(list(_HARMS), list(_HARMS.values()))[0]
                    await self._harm(kind)
                    print(self._line(kind))
                    progress.update(bar, advance=1, description=f"{self._finished.total()} answers, "
                                    f"{len(self.faults)} faults")  # fmt: skip
            self._done.set()
            await asyncio.gather(*clients)
            await self._check_rest()

    def _line(self, kind: str) -> str:
        noticed, back = (found.get(kind, [])[-1:] for found in (self._notice, self._back))
        return (
            f"{time.monotonic() - self._begun:.1f} s: {kind}, noticed {noticed}, back {back}, "
            f"{self._finished.total()} answers, {len(self.faults)} faults"
        )

    def report(self) -> None:
        """Print what was done and how long it took."""
        table = Table("what was done", "times", "503 after, s: median / most", "back after, s: median / most")
        for name, count in self._harms.items():
            table.add_row(name, str(count), _spread(self._notice.get(name, [])), _spread(self._back.get(name, [])))
        Console(width=120).print(table)
        print(
            f"{self._harms.total()} harms in {time.monotonic() - self._begun:.0f} s, "
            f"{self._finished.total()} requests finished ({dict(self._finished)}), {self._given_up} given up after "
            "three failures without a token"
        )

    async def _repeat(self, request: tuple[str, str, dict[str, Any]], expected: Any) -> None:
        kind, path, body = request
        while not self._done.is_set():
            try:
                answer = await self._answer(path, body)
            except _GivenUp:  # documented: a request must not end the engine for ever
                self._given_up += 1
                continue
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            self._finished[kind] += 1
            if answer != expected:
                self.faults.append(f"{kind} {'stream' if body['stream'] else 'whole'}: {answer!r}, not {expected!r}")

    async def _answer(self, path: str, body: dict[str, Any]) -> Any:
        """For each choice its text, token ids and end."""
        async with self._http.post(f"{self._url}{path}", json=body) as answer:
            if not body.get("stream"):
                return _whole(answer.status, await answer.json())
            ended, choices = False, {}
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    _raise_error(event)
                    for choice in event["choices"]:
                        said = choices.setdefault(choice["index"], ["", [], None])
                        said[0] += choice["text"]
                        said[1] += choice.get("token_ids", [])
                        said[2] = choice["finish_reason"] or said[2]
                ended = ended or line.startswith(b"data: [DONE]")
        return sorted(choices.items()) if ended else f"{choices} (cut)"

    async def _harm(self, kind: str) -> None:
        processes = descendants(self._server.pid)
        self.seen_processes |= set(processes)
        living = [pid for pid, state in processes.items() if state not in "Z"]
        if not living:
            self.faults.append("the server says 200 and there is no core")
            return
        victim = self._random.choice(living)
        self._victim = _command(victim)
        self._harms[kind] += 1
        if kind == "terminate":  # signals of the whole process group are the HTTP process's to act on
            os.kill(victim, signal.SIGTERM)
            await self._stays_healthy(2.0)
        elif kind == "stop and continue":
            await self._pause(victim, self._random.choice([0.3, 1.0, 6.0, 7.0]))
        elif kind == "stop":
            os.kill(victim, signal.SIGSTOP)
            await self._recover(kind, _DEAD + _MARGIN)
        else:
            os.kill(victim, signal.SIGKILL)
            await self._recover(kind, _NOTICE_SECONDS)

    async def _pause(self, victim: int, seconds: float) -> None:
        """Stop a process for less time than counts as dead; only longer pauses are to be seen."""
        begun = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        if seconds < _LATE - _MARGIN / 2:
            await self._stays_healthy(seconds)
        else:
            noticed = await self._until(False, seconds)
            if noticed:
                self._notice.setdefault("stop and continue", []).append(time.monotonic() - begun)
            elif seconds > _LATE + _MARGIN:
                self.faults.append(f"a process was stopped for {seconds} s, and /health said 200 all the while")
            await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGCONT)
        continued = time.monotonic()
        await self._is_back()
        self._back.setdefault("stop and continue", []).append(time.monotonic() - continued)

    def _kill_one_more(self) -> None:
        living = [pid for pid, state in descendants(self._server.pid).items() if state not in "Z"]
        self.seen_processes |= set(living)
        if living:
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(living), signal.SIGKILL)

    async def _recover(self, kind: str, limit: float) -> None:
        begun = time.monotonic()
        if not await self._until(False, limit):
            self.faults.append(
                f"after {kind}, /health said 200 for {limit} s; the slowest of its answers took {self._slowest:.2f} s"
            )
        self._notice.setdefault(kind, []).append(time.monotonic() - begun)
        if kind == "kill twice":  # the second time while it starts
            await asyncio.sleep(self._random.uniform(0.0, 3.0))
            self._kill_one_more()
        await self._is_back()
        self._back.setdefault(kind, []).append(time.monotonic() - begun)

    async def _is_back(self) -> None:
        """Wait for 200, and see that it is true: a request is answered."""
        if not await self._until(True, _BACK_SECONDS):
            raise TimeoutError(f"the server was not healthy again within {_BACK_SECONDS} s")
        try:
            answer = await self._answer("/v1/completions", _PROBE)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        if answer != self._probe:
            self.faults.append(f"/health said 200, and a request gave {answer!r}, not {self._probe!r}")

    async def _stays_healthy(self, seconds: float) -> None:
        if await self._until(False, seconds):
            self.faults.append("/health said 503 after a harm that changes nothing")

    async def _until(self, wanted: bool, seconds: float) -> bool:
        """Whether `/health` says so within some seconds."""
        deadline = time.monotonic() + seconds
        self._slowest = 0.0
        while (begun := time.monotonic()) < deadline:
            async with self._http.get(f"{self._url}/health") as answer:
                self._slowest = max(self._slowest, time.monotonic() - begun)
                if (answer.status == 200) == wanted:
                    return True
            await asyncio.sleep(0.02)
        return False

    async def _check_rest(self) -> None:
        """What is left once all requests are answered."""
        await asyncio.sleep(1.0)
        state = await (await self._http.get(f"{self._url}/internal/state")).json()
        if held(state) or state["requests_total"]:
            self.faults.append(f"{held(state)} pages held, {state['requests_total']} requests unfinished at the end")
        processes = descendants(self._server.pid)
        self.seen_processes |= set(processes)
        if dead := [pid for pid, process_state in processes.items() if process_state == "Z"]:
            self.faults.append(f"zombie processes: {dead}")


class _GivenUp(Exception):
    """The server answered that its engine has failed three times during this request."""


def _whole(status: int, answer: dict[str, Any]) -> Any:
    _raise_error(answer)
    choices = answer["choices"]
    return [(each["index"], [each["text"], each.get("token_ids", []), each["finish_reason"]]) for each in choices]


def _raise_error(event: dict[str, Any]) -> None:
    message = event.get("error", {}).get("message")
    if message is not None:
        raise (_GivenUp if "failed 3 times" in message else RuntimeError)(message)


def _exists(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def _command(pid: int) -> str:
    """The command line of a process; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[-200:]
    return ""


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2]:.2f} / {ordered[-1]:.2f}" if ordered else ""


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
