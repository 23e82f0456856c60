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
    """Tests run side by side, on small tensors: where OpenMP's threads spin while they wait, they take more than they bring."""
    os.environ["OMP_NUM_THREADS"] = "1"                    # of processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_folder() -> Iterator[None]:
    """What tests emit and compile goes to a folder of their own, and nothing that was tuned changes what they see."""
    with tempfile.TemporaryDirectory() as folder:
        mine = {"GDN_IR_CACHE": folder, "GDN_IR_RECORDS": f"{folder}/records.jsonl", "GDN_IR_TUNED": "0"}
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        yield
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):            # one of several processes: the first one prints for all
        session.config.workeroutput["table"] = TABLE


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TABLE.extend(getattr(node, "workeroutput", {}).get("table", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.section("coverage table: executed / declined / failed")
        for line in sorted(TABLE):
            terminalreporter.write_line(line)
