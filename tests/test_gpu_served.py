"""What a GPU serves when nobody asks for a backend: gradients too, on Hopper without a warning."""
from __future__ import annotations

import warnings

import pytest
import torch

from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.reference import recurrence
from tests.inputs import error, make

pytestmark = pytest.mark.gpu


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDN_IR_UNVERIFIED", raising=False)
    x = {n: t.requires_grad_() for n, t in make(K=96, V=32, device="cuda").items()}
    o = chunk_gated_delta_rule(**x)[0]                     # type: ignore[arg-type]
    slow = torch.cuda.get_device_capability()[0] == 8      # where Triton's have not run on all they ship for
    with pytest.warns(RuntimeWarning, match="torch does") if slow else warnings.catch_warnings():
        if not slow:
            warnings.simplefilter("error")
        grads = torch.autograd.grad(o.sum(), list(x.values()))
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in x.items()}
    wanted = torch.autograd.grad(recurrence(**exact)[0].sum(), list(exact.values()))        # type: ignore[arg-type]
    for name, a, b in zip(x, grads, wanted, strict=True):
        assert error(a.cpu(), b) <= 1e-4, name
