"""bench/model.py on a CPU, at toy size."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gdn_ir
from gdn_ir.bench import model


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    with gdn_ir.use("torch"):
        yield


def test_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours is timed and right, peers say why they are not timed; the op is as it was afterwards."""
    before = getattr(model.modeling(), model.RULE)
    model.main(["--toy", "--device", "cpu", "--rounds", "1", "--commit", "here", "--out", str(tmp_path / "page.json")])
    page = json.loads((tmp_path / "page.json").read_text())
    assert page["commit"] == "here" and page["gpu"] == "cpu" and page["shape"]["tokens"] == 24
    assert page["contenders"]["FLA"] == {"reason": "needs a CUDA GPU"}
    mine, theirs = (page["contenders"][n] for n in ("gdn-ir", "transformers"))
    for row in (mine, theirs):
        assert row["first_step_s"] > 0 and row["peak_bytes"] is None
        assert row["forward_tokens_per_s"] == pytest.approx(24e3 / row["forward_ms"])
        assert row["step_tokens_per_s"] == pytest.approx(24e3 / row["step_ms"])
    assert mine["errors"]["logits"] < 1e-5 and mine["errors"]["gradients"] < 1e-3
    assert theirs["errors"] == {"gradients": 0.0, "logits": 0.0}
    assert getattr(model.modeling(), model.RULE) is before
    assert "FLA          needs a CUDA GPU" in capsys.readouterr().out


def test_a_wrong_op_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do one that fails, and its reason."""
    def wrong() -> model.Op:
        return lambda q, k, v, **_: (0.0 * (q + k).sum() + v.clone(), None)

    def failing() -> model.Op:
        def op(*args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
            raise RuntimeError("no such kernel")
        return op
    monkeypatch.setattr(model, "contenders", lambda *_: {"wrong": wrong, "failing": failing})
    found = model.measure(model.TOY, "cpu", torch.float32, ["wrong", "failing"], 1)
    assert found["wrong"]["errors"]["gradients"] > 0.1
    assert found["failing"] == {"reason": "RuntimeError: no such kernel"}


@pytest.mark.parametrize(("words", "message"), [
    (["--dtype", "f64"], "--dtype: got 'f64'; accepts bf16, f16, f32"),
    (["--contenders", "gdn-ir,mine"], "--contenders: got 'mine'; accepts gdn-ir, FLA, FlashQLA, transformers"),
    (["--rounds", "0"], "--rounds: got 0; accepts a number from 1 on"),
    (["--tokens", "0"], "--tokens: got 0; accepts a number from 1 on")])
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model.main(["--toy", "--device", "cpu", "--out", "/nowhere/x.json", *words])
    assert message in capsys.readouterr().err
