"""The main program of the core's process: `python -m longspan.server.core_process FOLDER PARENT`.

It owns the loop between messages and steps; it must not know of users, text or HTTP.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import msgspec
import zmq

from longspan.config import EngineConfig
from longspan.disaggregation.driver import Role, wait_for
from longspan.engine.driver.build import build_core
from longspan.engine.driver.core import EngineCore
from longspan.engine.driver.executors.processes import ProcessExecutor
from longspan.engine.setup import resolve
from longspan.engine.transport.heartbeat import Heartbeat
from longspan.engine.transport.lifetime import end_with_parent
from longspan.errors import StepTimeout
from longspan.scheduler.sequence import SequenceState
from longspan.server import messages
from longspan.server.logs import configure
from longspan.server.options import LogOptions

_IDLE_MS = 500  # interval of checks on the ranks while there is nothing to compute
_SEQUENCES_SHOWN = 64
Tell = Callable[[messages.FromCore], None]


def main(folder: Path, parent: int) -> None:
    """Serve until a `Stop` message, the parent's end or a failure of a rank."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the parent acts on them
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    configure(LogOptions(level="warning"))
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.connect(f"ipc://{folder}/to-core")
    outbox = context.socket(zmq.PUSH)
    outbox.connect(f"ipc://{folder}/from-core")
    vitals = _Vitals()

    def tell(message: messages.FromCore) -> None:
        outbox.send(msgspec.msgpack.encode(message))

    try:
        config = msgspec.json.decode((folder / "config").read_bytes(), type=EngineConfig)
        line = context.socket(zmq.PUSH)
        line.connect(f"ipc://{folder}/from-core")
        heartbeat = Heartbeat(line, vitals.word, config.liveness.heartbeat_interval)
        try:
            _serve(config, inbox, tell, vitals)
        finally:
            heartbeat.stop()
    except BaseException as error:
        tell(messages.CoreFailed(type(error).__name__, str(error)))
    finally:
        context.destroy(linger=1000)


class _Vitals:
    """The messages of the heartbeat thread, which do not depend on what the main thread does."""

    def __init__(self) -> None:
        self.core: EngineCore | None = None  # None until its ranks are ready

    def word(self) -> bytes:
        return msgspec.msgpack.encode(self._message())

    def _message(self) -> messages.FromCore:
        if self.core is None:
            return messages.Beat()
        try:
            self.core.watch.check()
        except StepTimeout as error:  # the main thread reports it too, unless it hangs
            return messages.CoreFailed(type(error).__name__, str(error))
        return messages.Beat(self.core.executor.late(), self.core.watch.pace)


def _serve(config: EngineConfig, inbox: zmq.Socket[bytes], tell: Tell, vitals: _Vitals) -> None:
    core = vitals.core = build_core(resolve(config))
    try:
        workers = core.executor.process_ids if isinstance(core.executor, ProcessExecutor) else []
        gc.collect()
        gc.freeze()  # later collections do not walk the objects that exist now
        tell(messages.CoreReady(workers, core.role.info if core.role else None, core.setup.memory))
        told, last = _load(core), None
        while _obey(core, inbox, tell):
            outputs, load = core.step(), _load(core)
            newest = core.recent[-1] if core.recent else None
            computed = 0 if newest is None or newest is last else newest.decode_rows + newest.prefill_tokens
            if outputs or computed or load != told:
                tell(messages.NewTokens(outputs, load, computed))
            told, last = load, newest
    finally:
        core.shutdown()


def _obey(core: EngineCore, inbox: zmq.Socket[bytes], tell: Tell) -> bool:
    """Handle all messages that have arrived; waits for one if there is nothing to compute. False after `Stop`."""
    for message in _messages(core, inbox):
        match message:
            case messages.Start():
                for request in message.requests:
                    core.add(request)
            case messages.Finish(request_ids):
                for request_id in request_ids:
                    core.finish(request_id)
            case messages.AskState():
                tell(_state(core))
            case messages.Stop():
                return False
    return True


def _messages(core: EngineCore, inbox: zmq.Socket[bytes]) -> Iterator[messages.ToCore]:
    role = core.role
    while not (inbox.poll(0) if core.has_unfinished else _wait(inbox, role)):
        if core.has_unfinished:
            return
        core.executor.check()
        if role:
            role.poll()
    while inbox.poll(0):
        yield msgspec.msgpack.decode(inbox.recv(), type=messages.ToCore)


def _wait(inbox: zmq.Socket[bytes], role: Role | None) -> bool:
    """Wait for messages of the server or of other instances; returns whether the server has sent one."""
    wait_for([inbox, *(role.sockets if role else ())], _IDLE_MS / 1000)
    return bool(inbox.poll(0))


def _load(core: EngineCore) -> messages.CoreLoad:
    used = tuple(core.cache.used(shard) for shard in range(core.cache.num_shards))
    transfer = replace(core.role.counters) if core.role else None
    offload = core.cache.offload.counters if core.cache.offload else None
    return messages.CoreLoad(used, core.scheduler.counters(), transfer, offload)


def _state(core: EngineCore) -> messages.CoreState:
    scheduler, cache = core.scheduler, core.cache
    reports = [_report(sequence, True) for sequence in scheduler.running[:_SEQUENCES_SHOWN]]
    room = _SEQUENCES_SHOWN - len(reports)
    reports += [_report(sequence, False) for sequence in list(scheduler.waiting)[:room]]
    cached = tuple(cache.available(shard) - cache.pools[shard].num_free for shard in range(cache.num_shards))
    return messages.CoreState(_load(core), cached, reports, list(core.recent), core.executor.traffic().bytes_by_label)


def _report(sequence: SequenceState, running: bool) -> messages.SequenceReport:
    shards = (page.shard for page in sequence.table.pages)
    runs = [(shard, len(list(pages))) for shard, pages in groupby(shards)]
    return messages.SequenceReport(sequence.request_id, running, sequence.computed, runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
