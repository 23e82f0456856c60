"""Speed on whatever machine runs this, to be tracked by pytest-benchmark: `python -m pytest bench`, then
`--benchmark-autosave` and `--benchmark-compare` (its own documentation says how)."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn_ir.backends.base import TORCH
from gdn_ir.bench import inputs
from gdn_ir.bench.cases import FORWARD_CORE, Row
from gdn_ir.bench.contenders import CONTENDERS, SERVED, NotTimed
from gdn_ir.bench.errors import bound, relative
from gdn_ir.reference import recurrence

GPU = torch.cuda.is_available()
SMALL = [Row((1,), 2, 4, 64, 64), Row((256,), 2, 4, 64, 64), Row((100, 156), 2, 4, 64, 64)]
ROWS = [Row(tuple(lengths), H, HV) for lengths, H, HV in FORWARD_CORE if sum(lengths) <= 8192] if GPU else SMALL
SLOW = ["gdn-ir torch"] if GPU else []
OURS = [n for n, c in CONTENDERS.items() if c.kind == "gdn-ir" and n not in (*SLOW, f"gdn-ir {SERVED}")]
DTYPES = ("bf16", "f32") if GPU else ("f32",)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_forward(benchmark: Any, row: Row, dtype: str, backend: str) -> None:
    """A warm call, the host's time included; its first tokens are checked against the recurrence."""
    x = inputs.make(list(row.lengths), row.H, row.HV, row.K, row.V, TORCH[dtype], "cuda" if GPU else "cpu", "real")
    try:
        call = CONTENDERS[backend].prepare(row, x, False)
    except NotTimed as reason:
        pytest.skip(str(reason))
    some = min(64, row.lengths[0])
    q, k, v, g, beta = (x[n][None, :some].cpu() for n in ("q", "k", "v", "g", "beta"))
    o, _ = recurrence(q, k, v, g, beta)
    assert relative(call()["o"][:some].cpu(), o[0]) <= bound(dtype)

    def timed() -> None:
        call()
        if GPU:
            torch.cuda.synchronize()
    benchmark.extra_info |= {"tokens": row.tokens, "dtype": dtype}
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
