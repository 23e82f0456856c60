"""The chunkwise gated delta rule (Yang, Kautz, Hatamizadeh, arXiv 2412.06464), written once.

`gated_delta_rule` is the algorithm for one chunk. Everything else in this file says what surrounds it: which tensors
there are, what is prepared in the op, and the scan over chunks. Switches make Gated DeltaNet, DeltaNet (no decay) and
Mamba2-style gated linear attention (no erase) the same program.
"""
from __future__ import annotations

from dataclasses import dataclass

from gdn_ir.build import (Node, Operand, Tensor, Tracer, as_node, cumsum, decay_mask, dot, elem, exp, last, reduce_sum, rsqrt,
                          select, sigmoid, strict_lower, tri_solve, zeros)
from gdn_ir.program import Program


def gated_delta_rule(p: Rule, q: Node, k: Node, v: Node, g: Operand, beta: Node, S: Node) -> tuple[Node, Node]:
    """One chunk: its output [C, V] and the state [K, V] after it, from the state S before it."""
    G = cumsum(g, "C")
    total = last(G)
    D = decay_mask(G)                                      # exp(G_i - G_j) for i >= j, 0 above
    if p.erase:
        kk = dot(k, k.twin("C"), over="K")
        r = beta * (v - exp(G) * dot(k, S, over="K"))
        u = tri_solve(strict_lower(beta * D * kk), r)
    else:
        u = beta * v
    qk = dot(q, k.twin("C"), over="K")
    o = p.scale * (exp(G) * dot(q, S, over="K") + dot(D * qk, u.twin("C"), over="C'"))
    S = exp(total) * S + dot(k * exp(total - G), u, over="C")
    return o, S


@dataclass(frozen=True)
class Switches:
    """Which member of the family, and what its surroundings ask for; hashable, so a compiled variant can be keyed by it."""
    decay: str = "scalar"              # "scalar": one log decay a token and head; "none"
    erase: bool = True                 # False drops the "- S^T k" term and with it the solve
    l2norm: bool = False               # normalise q and k over K in the op
    beta_sigmoid: bool = False         # beta comes as a logit
    neg_eigval: bool = False           # beta doubled, in (0, 2)
    initial_state: bool = False
    final_state: bool = False
    state_v_first: bool = False        # states lie as [V, K] in memory

    def __post_init__(self) -> None:
        if self.decay not in ("scalar", "none"):
            raise ValueError(f"decay must be 'scalar' or 'none', got {self.decay!r}")


@dataclass(frozen=True)
class Rule:
    """What the chunk function reads besides its tiles."""
    scale: Node
    erase: bool


def l2_normalised(x: Node) -> Node:
    """x / sqrt(sum x^2 + 1e-6) over K, as the layer does."""
    return x * rsqrt(reduce_sum(x * x, "K") + 1e-6)


def bounded(g: Node, least: float = -100.0) -> Node:
    """A log decay under -100 is a reset (its exp is 0 in float32); summed as it is, it would cost its neighbours digits."""
    return select(elem("lt", g, least), least, g)


def build(s: Switches = Switches(), chain: tuple[str, ...] = ("X",)) -> Program:
    """The program of one op: q, k [T, H, K]; v, o [T, HV, V]; g, beta [T, HV]; states [N, HV, K, V]; tokens packed.

    chain: the scan axes that step through the chunks, outermost first; two of them make segments of chunks.
    """
    name = {("scalar", True): "gated_delta_rule", ("none", True): "delta_rule",
            ("scalar", False): "gated_linear_attention", ("none", False): "linear_attention"}[s.decay, s.erase]
    t = Tracer(name, grid=("N", "HV"), shared={"H": "HV"}, chain=chain)
    state = ("N", "HV", "V", "K") if s.state_v_first else ("N", "HV", "K", "V")

    def chunk(S: Node) -> Node:
        q = t.load(Tensor("q", ("T", "H", "K")))
        k = t.load(Tensor("k", ("T", "H", "K")))
        v = t.load(Tensor("v", ("T", "HV", "V")))
        g = bounded(t.load(Tensor("g", ("T", "HV"), "f32"))) if s.decay == "scalar" else as_node(0.0)
        beta = t.load(Tensor("beta", ("T", "HV"), "beta"))
        if s.l2norm:
            q, k = l2_normalised(q), l2_normalised(k)
        if s.beta_sigmoid:
            beta = sigmoid(beta)
        if s.neg_eigval:
            beta = 2.0 * beta
        o, S = gated_delta_rule(Rule(t.param("scale"), s.erase), q, k, v, g, beta, S)
        t.store(Tensor("o", ("T", "HV", "V")), o)
        return S

    with t.recording():
        S0 = t.load(Tensor("initial_state", state, "f32")) if s.initial_state else zeros("K", "V")
        (S_end,) = t.scan_chunks(chunk, S=S0)
        if s.final_state:
            t.store(Tensor("final_state", state, "f32"), S_end)
    return t.program()
