from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("gdn_ir", deadline=None, print_blob=True)
hypothesis.settings.load_profile("gdn_ir")


def pytest_configure() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def cache_folder() -> Iterator[None]:
    """Sources emitted by tests go to a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("GDN_IR_CACHE")
        os.environ["GDN_IR_CACHE"] = folder
        yield
        os.environ.pop("GDN_IR_CACHE") if before is None else os.environ.update(GDN_IR_CACHE=before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our public ops, in the order in which integrations call them."""
    from gdn_ir import ops
    found: list[str] = []

    def counted(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return op(*args, **kwargs)
        return seen
    for name in ops.__all__:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return found


TABLE: list[str] = []


@pytest.fixture(scope="session")
def printed() -> list[str]:
    """Lines added here are printed at the end of the run."""
    return TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.section("coverage table: executed / declined / failed")
        for line in TABLE:
            terminalreporter.write_line(line)
