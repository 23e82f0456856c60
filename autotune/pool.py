"""The tuner's side of worker.py: processes that are given jobs, watched, killed when they hang, and replaced."""
from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

Json = dict[str, Any]
START = 120.0                                              # seconds in which a worker must have imported all it needs


class Worker:
    """One process, made at the first job and again after it was lost."""

    def __init__(self, modules: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        self.modules, self.environment = tuple(modules), environment or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.said: Any = None
        self.rest = b""

    def run(self, job: Json, limit: float) -> Json:
        """The answer to a job: "done" or "failed"; or "lost", with why, where the process crashed, or gave no sign of life for
        `limit` seconds (it is killed then). "at": the last candidate that it said it would touch."""
        at: int | None = None
        try:
            if self.process is None or self.process.poll() is not None:
                self.start()
            assert self.process is not None and self.process.stdin is not None
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            while True:
                answer = self.read(limit)
                if answer.get("leaving"):
                    self.stop()
                if "at" not in answer:
                    return answer | ({} if at is None else {"at": at})
                at = answer["at"]
        except (TimeoutError, EOFError, OSError) as e:
            hung = isinstance(e, TimeoutError)
            why = f"hung: nothing heard of it for {limit:g} s" if hung else f"crashed: {self.last_words()}"
            self.stop()
            return {"lost": why} | ({} if at is None else {"at": at})

    def start(self) -> None:
        self.stop()
        self.said = tempfile.TemporaryFile()             # noqa: SIM115 (closed by stop)
        command = [sys.executable, "-m", "gdn_ir.autotune.worker", *self.modules]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
                                        env={**os.environ, **self.environment}, start_new_session=True)
        self.rest = b""
        self.read(START)

    def read(self, limit: float) -> Json:
        """The next answer."""
        assert self.process is not None and self.process.stdout is not None
        end = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    raise EOFError
                self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        found: Json = json.loads(line)
        return found

    def last_words(self) -> str:
        """How the process ended, and the last line that it printed."""
        assert self.process is not None
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        return f"{how}{': ' + lines[-1][-200:] if lines else ''}"

    def kill(self) -> None:
        """End the process and all that it started; another thread may be waiting for it."""
        process = self.process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """The same, and forget it."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)    # what it started too, where it has ended itself
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self.process = None


class Pool:
    """Workers side by side; leaving the `with` block ends them all. Each has a thread of its own for as long as the pool lasts:
    a worker is killed by the system when the thread that started it ends."""

    def __init__(self, count: int, modules: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        self.workers = [Worker(modules, environment) for _ in range(count)]
        self.inboxes: list[queue.SimpleQueue[Callable[[Worker], None] | None]] = [queue.SimpleQueue() for _ in self.workers]
        self.threads = [threading.Thread(target=_serve, args=x, daemon=True) for x in zip(self.workers, self.inboxes)]
        self.stopping = threading.Event()

    def __enter__(self) -> Pool:
        for t in self.threads:
            t.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopping.set()
        for w, inbox in zip(self.workers, self.inboxes):
            w.kill()                                       # its thread finds it gone, and ends
            inbox.put(None)
        for t in self.threads:
            t.join(10)

    def begin(self, job: Json, limit: float) -> Callable[[], Json]:
        """Give the first worker a job; returns what waits for its answer, as `Worker.run` has it."""
        answer: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self.inboxes[0].put(lambda worker: answer.put(worker.run(job, limit)))
        return answer.get

    def map(self, jobs: Sequence[Json], limit: float, go_on: Callable[[], bool] = lambda: True) \
            -> Iterator[tuple[int, Json]]:
        """(index, answer) of jobs as they end; those not begun when `go_on` turns false are left out."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        ended: queue.SimpleQueue[tuple[int, Json] | None] = queue.SimpleQueue()
        for i in range(len(jobs)):
            waiting.put(i)

        def serve(worker: Worker) -> None:
            try:
                while not self.stopping.is_set() and go_on():
                    i = waiting.get_nowait()
                    ended.put((i, worker.run(jobs[i], limit)))
            except queue.Empty:
                pass
            finally:
                ended.put(None)
        left = min(len(self.workers), len(jobs))
        for inbox in self.inboxes[:left]:
            inbox.put(serve)
        while left:
            found = ended.get()
            if found is None:
                left -= 1
            else:
                yield found


def _serve(worker: Worker, inbox: queue.SimpleQueue[Callable[[Worker], None] | None]) -> None:
    try:
        while (task := inbox.get()) is not None:
            task(worker)
    finally:
        worker.stop()
