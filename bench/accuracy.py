"""What a row's numbers should be. The recurrence is causal, so the first tokens of each sequence are compared with float64 at
any length; whole rows too long for that, with our own float32 kernels, whose distance from float64 is given beside."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gdn_ir import registry
from gdn_ir.bench.cases import Row
from gdn_ir.bench.contenders import LEAVES, Tensors, instance
from gdn_ir.bench.errors import relative
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.reference import recurrence

FORWARD_TOKENS, FORWARD_EACH = 3072, 768                   # compared in all, and of each sequence
TRAIN_BYTES = 6 << 30                                      # of states that a differentiated recurrence keeps
STATES = 6                                                 # of size [HV, K, V], float64, that it keeps for each token


@dataclass
class Reference:
    """exact: float64, of the first `each` tokens of every sequence (rows of `prefix`, indices into T). whole: float32, of all
    tokens, where there is one; else why not. about: what the numbers mean, for the page."""
    each: int
    prefix: torch.Tensor
    exact: Tensors
    complete: bool                                         # whether the prefix is all there is
    whole: Tensors = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def errors(self, found: Tensors) -> dict[str, float]:
        """Relative L2. "o", "dq", ...: of the prefix, against float64; "... of all": of all tokens, against float32.
        The final state is compared with float64 where the prefix is complete."""
        errors = {n: relative(found[n] if self.complete else found[n][self.prefix], t) for n, t in self.exact.items()
                  if n in found}
        return errors | {f"{n} of all": relative(found[n], t) for n, t in self.whole.items() if n in found}


def tokens_of_each(row: Row, train: bool) -> int:
    """How many tokens of each sequence are compared with float64: what a few seconds and some gigabytes allow."""
    longest, total = FORWARD_EACH, FORWARD_TOKENS
    if train:
        total = TRAIN_BYTES // (STATES * row.HV * row.K * row.V * 8)
    return max(1, min(longest, total // len(row.lengths), max(row.lengths)))


def reference(row: Row, x: Tensors, train: bool) -> Reference:
    """x: `inputs.make`'s, and with train also "do", which is zeroed past the prefix: then the gradients of the prefix are those
    of the prefix alone."""
    device, each = x["q"].device, tokens_of_each(row, train)
    lengths = [min(n, each) for n in row.lengths]
    starts = x["cu_seqlens"].tolist()[:-1]
    prefix = torch.cat([torch.arange(s, s + n, device=device) for s, n in zip(starts, lengths, strict=True)])
    complete = list(row.lengths) == lengths
    if train and not complete:
        kept = torch.zeros(row.tokens, 1, 1, dtype=torch.bool, device=device)
        kept[prefix] = True
        x["do"].mul_(kept)
    part = {n: x[n][prefix].double().requires_grad_(train) for n in LEAVES}
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    with torch.set_grad_enabled(train):
        q, k, v, g, beta = (part[n][None] for n in LEAVES)
        o, state = recurrence(q, k, v, g, beta, cu_seqlens=ends)
        exact = {"o": o[0].detach()} | ({"final_state": state.detach()} if complete and not train else {})
        if train:
            leaves = list(part.values())
            gradients = torch.autograd.grad(o[0], leaves, x["do"][prefix].double())
            exact |= dict(zip((f"d{n}" for n in LEAVES), gradients, strict=True))
    found = Reference(each, prefix, exact, complete)
    found.about["exact"] = "the token recurrence in float64" + ("" if complete else f", first {each} tokens of each sequence")
    if not (complete or train):
        whole(row, x, found)
    return found


def whole(row: Row, x: Tensors, found: Reference) -> None:
    """Adds our float32 kernels' o and final state of the whole row, or the reason why there are none."""
    wide = {n: t.float() if n in LEAVES else t for n, t in x.items()}
    chosen = None
    try:
        chosen = registry.choose(instance(row, torch.float32, False), registry.architecture(x["q"].device), len(row.lengths),
                                 row.HV, row.tokens)
        with torch.no_grad():
            q, k, v, g, beta = (wide[n][None] for n in LEAVES)
            o, state = chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=x["cu_seqlens"], output_final_state=True)
        assert state is not None
    except Exception as e:                                 # out of memory, or a kernel that does not fit
        found.about["whole"] = f"none: {type(e).__name__}: {e}"[:200]
        return
    found.whole = {"o": o[0], "final_state": state}
    found.about |= {"whole": f"gdn-ir {chosen.backend} in float32, all tokens",
                    "error of whole": relative(o[0][found.prefix], found.exact["o"])}
