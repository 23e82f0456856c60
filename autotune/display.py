"""What a person sees of a tuning run: what it does now, how far it is, the best so far, and the time left."""
from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class Display:
    """A line that moves on a terminal; elsewhere a line for each phase, when it ends."""

    def __init__(self, console: Console | None = None, budget: float = 0.0) -> None:
        self.console = console or Console()
        self.end = time.monotonic() + budget
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
                                 TextColumn("{task.fields[best]}"), TextColumn("{task.fields[left]}"), console=self.console,
                                 transient=True, disable=not self.console.is_terminal)
        self.task: TaskID | None = None
        self.what, self.best, self.done, self.total = "", "", 0, 0

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def phase(self, what: str, total: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.what, self.done, self.total = what, 0, total
        self.task = self.progress.add_task(what, total=total, best=self.best, left=self.left())

    def step(self, count: int = 1, best: str | None = None) -> None:
        self.done += count
        self.best = self.best if best is None else best
        if self.task is not None:
            self.progress.update(self.task, completed=self.done, best=self.best, left=self.left())

    def left(self) -> str:
        seconds = max(0, round(self.end - time.monotonic()))
        return f"{seconds // 60}:{seconds % 60:02} left"

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
