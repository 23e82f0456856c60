"""Every bad argument raises before anything runs, naming the argument, what it got and what it accepts."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn_ir.ops import chunk_gated_delta_rule
from tests.inputs import make

CU = torch.tensor([0, 40, 100])


def changed(**kwargs: Any) -> dict[str, Any]:
    return make() | kwargs


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    (changed(q=torch.zeros(100, 2, 32)), ValueError,
     r"q: got float32 \[100, 2, 32\] on cpu; accepts 4 dimensions, \[B, T, H, K\]"),
    (changed(q=[1.0]), TypeError, r"q: got \[1\.0\]; accepts a tensor"),
    (changed(q=torch.zeros(1, 100, 2, 32, dtype=torch.int32)), TypeError, "q: got int32 .*accepts dtype bfloat16 or float16"),
    (changed(k=torch.zeros(1, 100, 2, 32, dtype=torch.bfloat16)), TypeError, "k: got bfloat16 .*accepts dtype float32"),
    (changed(k=torch.zeros(1, 100, 4, 32)), ValueError, "k: got .*H = 2"),
    (changed(k=torch.zeros(1, 99, 2, 32)), ValueError, "k: got .*T = 100"),
    (changed(v=torch.zeros(1, 100, 3, 32), g=torch.zeros(1, 100, 3), beta=torch.zeros(1, 100, 3)), ValueError,
     "v: got .*accepts HV a multiple of H = 2"),
    (changed(v=torch.zeros(2, 100, 2, 32)), ValueError, "v: got .*B = 1"),
    (changed(g=torch.zeros(1, 100)), ValueError, r"g: got .*3 dimensions, \[B, T, HV\]"),
    (changed(g=torch.zeros(1, 100, 2, dtype=torch.int64)), TypeError, "g: got int64"),
    (changed(beta=torch.zeros(1, 100, 4)), ValueError, "beta: got .*HV = 2"),
    (changed(beta=torch.zeros(1, 100, 2, dtype=torch.bool)), TypeError, "beta: got bool"),
    (changed(beta=torch.zeros(1, 100, 2, device="meta")), ValueError, "beta: got .*on meta; accepts a dense tensor"),
    (make(K=24), ValueError, "q: got .*accepts K a multiple of 16 from 16 to 256"),
    (make(K=272), ValueError, "q: got .*accepts K a multiple of 16 from 16 to 256"),
    (make(V=8), ValueError, "v: got .*accepts V a multiple of 16 from 16 to 256"),
    (changed(initial_state=torch.zeros(2, 2, 32, 32)), ValueError, "initial_state: got .*N = 1"),
    (changed(initial_state=torch.zeros(1, 2, 32, 32).bfloat16()), TypeError,
     "initial_state: got bfloat16 .*accepts dtype float32"),
    (make(V=48) | {"initial_state": torch.zeros(1, 2, 32, 48), "state_v_first": True}, ValueError,
     "initial_state: got .*V = 48"),
    (changed(cu_seqlens=CU, initial_state=torch.zeros(1, 2, 32, 32)), ValueError, "initial_state: got .*N = 2"),
    (changed(cu_seqlens=torch.tensor([0, 60, 40, 100])), ValueError, "cu_seqlens: got .*decreases at entry 2"),
    (changed(cu_seqlens=torch.tensor([1, 100])), ValueError, "cu_seqlens: got .*starts at 1"),
    (changed(cu_seqlens=torch.tensor([0, 101])), ValueError, "cu_seqlens: got .*T = 100"),
    (changed(cu_seqlens=torch.tensor([0.0, 100.0])), TypeError, "cu_seqlens: got float32"),
    (changed(cu_seqlens=CU[None]), ValueError, "cu_seqlens: got .*1 dimensions"),
    (changed(cu_seqlens=CU[:0]), ValueError, "cu_seqlens: got .*at least one entry"),
    (changed(cu_seqlens=CU, cu_seqlens_cpu=CU[:2]), ValueError, "cu_seqlens_cpu: got"),
    (changed(cu_seqlens=CU, cu_seqlens_cpu=torch.tensor([0, 20, 100])), ValueError,
     r"cu_seqlens_cpu: got \[0, 20, 100\]; accepts the values of cu_seqlens, \[0, 40, 100\]"),
    (changed(cu_seqlens_cpu=CU), ValueError, "cu_seqlens_cpu: got .*None where cu_seqlens is None"),
    (make(B=2) | {"cu_seqlens": CU}, ValueError, "q: got .*B = 1 with cu_seqlens"),
    (changed(use_gate_in_kernel=True), TypeError, "A_log: got None; accepts a tensor with use_gate_in_kernel"),
    (changed(use_gate_in_kernel=True, g=None, A_log=torch.zeros(2)), TypeError, "g: got None; accepts a tensor with use_gate"),
    (changed(use_gate_in_kernel=True, A_log=torch.zeros(3)), ValueError, r"A_log: got float32 \[3\] .*HV = 2"),
    (changed(use_gate_in_kernel=True, A_log=torch.zeros(2), dt_bias=torch.zeros(2, 1)), ValueError, "dt_bias: got .*1 dimen"),
    (changed(A_log=torch.zeros(2)), ValueError, "A_log: got .*accepts None without use_gate_in_kernel"),
    (changed(dt_bias=torch.zeros(2)), ValueError, "dt_bias: got .*accepts None without use_gate_in_kernel"),
    (changed(gk=torch.zeros(1)), NotImplementedError, "gk: got"),
    (changed(chunk_size=64), TypeError, "unknown keyword 'chunk_size', got 64; accepts q, k, v"),
    (changed(scale="a"), TypeError, "scale: got 'a'; accepts a Python number"),
    (changed(scale=torch.tensor(1.0)), TypeError, "scale: got float32"),
    (changed(output_final_state="yes"), TypeError, "output_final_state: got 'yes'; accepts True or False"),
    (changed(q=torch.zeros(1, 100, 2, 32, device="meta")), ValueError, "q: got .*accepts a dense tensor on cpu or cuda"),
    (changed(q=torch.zeros(1, 100, 2, 32).to_sparse()), ValueError, "q: got .*accepts a dense tensor .*not torch.sparse_coo"),
    (changed(q=torch.zeros(1, 100, 0, 32), k=torch.zeros(1, 100, 0, 32)), ValueError, "q: got .*accepts at least one head"),
    (changed(allow_neg_eigval=True), ValueError, "allow_neg_eigval: got True"),
])
def test_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chunk_gated_delta_rule(**kwargs)


def test_flags_that_ask_for_nothing_pass() -> None:
    chunk_gated_delta_rule(**make(), use_gate_in_kernel=False, A_log=None)


@pytest.mark.gpu
def test_boundaries_on_a_gpu_are_read_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unread, a bad boundary must not reach outside the tensors; under GDN_IR_CHECK=1 it is refused."""
    x = make(device="cuda", dtype=torch.bfloat16)
    bad = torch.tensor([0, 60, 40, 100000], device="cuda")
    with torch.no_grad():
        chunk_gated_delta_rule(**x, cu_seqlens=bad)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=r"cu_seqlens_cpu: got .*decreases"):
            chunk_gated_delta_rule(**x, cu_seqlens=bad, cu_seqlens_cpu=bad.cpu())
        monkeypatch.setenv("GDN_IR_CHECK", "1")
        with pytest.raises(ValueError, match=r"cu_seqlens: got .*decreases"):
            chunk_gated_delta_rule(**x, cu_seqlens=bad)
