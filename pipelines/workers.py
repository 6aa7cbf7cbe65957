"""Training processes: forks of a server that has imported torch, lightning and transformers once.

A trial trains in a fresh child: main thread, its own memory, gone with everything it held when it ends. Importing what it
needs costs about 7 s of CPU in a fresh process; a fork has it for nothing (PERFORMANCE D). No Ray here, and no torch in
the process that asks for workers.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pipelines.store import TrialFolder

PRELOAD = ["pipelines.trial", "transformers.models.bert.modeling_bert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one worker of a trial is to do."""

    storage: Path
    trial_id: str
    prepared: Path
    threads: int = 1
    gpu: bool = False
    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """What a worker says: ``report`` (values), ``done``, or ``failed`` (values: type, message, traceback, retry)."""

    kind: str
    values: Mapping[str, Any]


class WorkerPool:
    """Starts workers as forks of one preloaded server; the server starts with the first of them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def warm(self) -> None:
        """Start the server and wait until its imports are done, so that no trial pays for them."""
        process = self._context.Process(target=_nothing)
        with _without_main():
            process.start()
        process.join()

    def start(self, job: Job) -> "Worker":
        """Fork a worker for ``job``."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(theirs, job), name=f"{job.trial_id}-rank{job.rank}")
        with _without_main():
            process.start()
        theirs.close()
        return Worker(process, ours)


class Worker:
    """A running worker, seen from the process that started it."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process, self._connection = process, connection
        self._over = False

    def next_event(self, timeout: float) -> Event | None:
        """The next thing the worker says, None if it is silent for ``timeout`` seconds. A worker that dies without a word has
        ``failed`` with its signal or exit status."""
        ready = wait([self._connection, self._process.sentinel], timeout)
        if not ready:
            return None
        if self._connection in ready:
            try:
                event = self._connection.recv()
                self._over = event.kind in ("done", "failed")
                return event
            except EOFError:
                pass  # it closed its end: what it has to say is in its exit status
        self._process.join()
        return None if self._over else self._dead()

    def _dead(self) -> Event:
        self._over = True
        code = self._process.exitcode
        how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return Event("failed", {"type": "WorkerDied", "message": f"the training process {how}", "traceback": "", "retry": True})

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    def stop(self) -> None:
        """Kill the worker if it still runs; returns when it is gone."""
        self._process.kill()
        self._process.join()
        self._connection.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep the child from running the parent's main script again (Ray's worker script costs seconds; a test runner's has
    side effects): multiprocessing does that for the sake of functions defined there, and ours are not."""
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__["__spec__"] = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)


def _nothing() -> None:
    pass


def _work(connection: Connection, job: Job) -> None:
    """The body of a worker process."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then stops us
    folder = TrialFolder(job.storage, job.trial_id)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        connection.send(_train(connection, job, folder))
    except BaseException as error:
        print(_traceback(error), file=sys.stderr, flush=True)  # before we tell: whoever listens may end us at once
        connection.send(_failure(error))
        sys.exit(1)


def _train(connection: Connection, job: Job, folder: TrialFolder) -> Event:
    from lightning_modules.gang import Gang
    from pipelines.trial import run_trial

    gang = Gang(rank=job.rank, world_size=job.world_size, address=job.address, port=job.port)
    run_trial(
        folder.read_config(),
        folder,
        job.prepared,
        gang=gang,
        report=lambda values: connection.send(Event("report", values)),
        threads=job.threads,
        gpu=job.gpu,
        provenance=job.provenance,
    )
    return Event("done", {})


def _failure(error: BaseException) -> Event:
    from lightning_modules.building import ConfigError
    from pipelines.trial import DivergedError

    retry = not isinstance(error, (ConfigError, DivergedError))
    values = {"type": type(error).__name__, "message": str(error), "traceback": _traceback(error)[-4000:], "retry": retry}
    return Event("failed", values)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _end_with_parent() -> None:
    """Die when the process that started us dies, however it does. (Our forking parent, the server, may live on: the pipe
    tells us of the process behind it.)"""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
