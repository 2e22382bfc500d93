"""A whole server in this process, on a free port, with a tiny model that reads and writes ASCII."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Event, Thread
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longspan.config import (
    CacheConfig,
    CostConstants,
    EngineConfig,
    LivenessConfig,
    OffloadConfig,
    ParallelConfig,
    SchedulerConfig,
    Speculation,
    TransferConfig,
)
from longspan.server.app import Service
from longspan.server.async_engine import AsyncEngine
from longspan.server.options import ServeOptions
from longspan.server.run import Server, make_service, serve
from tests.folders import shared_folder
from tests.oracle import VOCAB, greedy, oracle, tiny_folder

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('no such talk') }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PATIENCE = 60.0


@cache
def ascii_tokenizer() -> Any:
    """One token for each printable ASCII byte, then newline, then one that is no byte."""
    letters = ["Ġ", *map(chr, range(33, 127)), "Ċ"]
    built = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    assert len(tokenizer) == VOCAB
    return tokenizer


@cache
def ascii_folder() -> str:
    """The tiny Llama with that tokenizer."""
    path = shared_folder("ascii") / "model"
    shutil.copytree(tiny_folder("llama"), path)
    ascii_tokenizer().save_pretrained(path)
    return str(path)


def expected(prompt: str, tokens: int) -> str:
    """What transformers says the greedy continuation is."""
    tokenizer = ascii_tokenizer()
    ids, _ = greedy(oracle("llama"), tokenizer.encode(prompt), tokens)
    return tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop
    client: httpx.Client

    @property
    def engine(self) -> AsyncEngine:
        return self.service.engine

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def complete(self, prompt: Any, tokens: int, **fields: Any) -> dict[str, Any]:
        """A greedy completion."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **fields}
        answer = self.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def used_pages(self) -> int:
        """Pages that requests hold, as the core itself says."""
        state = self.client.get("/internal/state").json()
        return sum(shard["used"] for shard in state["shards"])


@contextmanager
def running(
    pages: int = 400,
    options: ServeOptions | None = None,
    executor: str = "threads",
    offload: OffloadConfig | None = None,
    transfer: TransferConfig | None = None,
    liveness: LivenessConfig | None = None,
    speculative: Speculation | None = None,
    **parallel: int,
) -> Iterator[Running]:
    """Started, and ended with everything it started."""
    config = EngineConfig(
        ascii_folder(), executor=executor, num_threads=1, dtype="float32", parallel=ParallelConfig(**parallel),
        cache=CacheConfig(page_size=4, pages_per_shard=None, memory_bytes=pages * 4 * 2 * 2 * 4 * 4 * 4,
                          offload=offload or OffloadConfig()),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=64, max_num_seqs=16, local_context=8, speculative=speculative
        ),
        cost=CostConstants(), transfer=transfer, liveness=liveness or LivenessConfig(),
    )  # fmt: skip
    options = options or ServeOptions(port=0, served_model_name="tiny")
    service = make_service(config, options)
    started, found, failed = Event(), {}, []

    def ready(server: Server) -> None:
        found.update(server=server, loop=asyncio.get_running_loop())
        started.set()

    def run() -> None:
        try:
            asyncio.run(serve(service, ready))
        except BaseException as error:
            failed.append(error)
            started.set()

    thread = Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    if failed:
        raise failed[0]
    url = f"{options.tls.scheme}://127.0.0.1:{found['server'].port}"
    trusted = True if options.tls.certfile is None else ssl.create_default_context(cafile=options.tls.certfile)
    key = {"Authorization": f"Bearer {options.keys[0].key}"} if options.keys else {}
    with httpx.Client(base_url=url, timeout=PATIENCE, headers=key, verify=trusted) as client:
        yield Running(url, service, found["server"], found["loop"], client)
    found["server"].should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()
