"""Programs unlike the gated delta rule: four fixed ones, and random ones."""
from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from gdn_ir.build import (Node, Tensor, Tracer, broadcast, cumsum, dot, elem, exp, floordiv, index, log, lower, maximum,
                          reduce_max, reduce_sum, rsqrt, select, sigmoid, strict_lower, tri_solve, zeros)
from gdn_ir.interp import Sizes
from gdn_ir.program import Program


@dataclass(frozen=True)
class Case:
    """A program, the extents of its axes beside the tokens' (C = 16), and the sequences it runs on."""
    program: Program
    axes: dict[str, int]
    lengths: tuple[int, ...] = (20, 0, 16, 7)
    heads: tuple[int, int] = (1, 2)

    @property
    def cu(self) -> list[int]:
        return [0, *torch.tensor(self.lengths).cumsum(0).tolist()]

    def sizes(self) -> Sizes:
        return Sizes({**self.axes, "C": 16, "H": self.heads[0], "HV": self.heads[1]}, self.cu)

    def inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs in float64, each a float32 value."""
        generator, sizes = torch.Generator().manual_seed(seed), self.sizes()
        return {n: 0.5 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator).double()
                for n, t in self.program.tensors().items() if n in self.program.read() and not t.temp}

    def outputs(self) -> dict[str, list[int]]:
        sizes = self.sizes()
        return {n: [sizes.dim(d) for d in t.dims] for n, t in self.program.tensors().items() if n in self.program.written()}


def tracer(name: str) -> Tracer:
    return Tracer(name, grid=("N", "HV"), shared={"H": "HV"})


def matmul() -> Case:
    """x [T, HV, K] times a weight [HV, K, V]."""
    t = tracer("matmul")

    def body() -> None:
        x = t.load(Tensor("x", ("T", "HV", "K")))
        w = t.load(Tensor("w", ("HV", "K", "V")))
        t.store(Tensor("y", ("T", "HV", "V")), dot(x, w, over="K"))
    with t.recording():
        t.scan(body)
    return Case(t.program(), {"K": 32, "V": 48})


def softmax() -> Case:
    """A softmax over each row of V: its padding is not neutral."""
    t = tracer("softmax")

    def body() -> None:
        x = t.load(Tensor("x", ("T", "HV", "V")))
        e = exp(x - reduce_max(x, "V"))
        t.store(Tensor("y", ("T", "HV", "V")), e / reduce_sum(e, "V"))
    with t.recording():
        t.scan(body)
    return Case(t.program(), {"V": 40})


def cumulative_mean() -> Case:
    """The mean of all tokens so far; a shared (GVA) input."""
    t = tracer("cumulative_mean")

    def body(total: Node, seen: Node) -> tuple[Node, Node]:
        x = t.load(Tensor("x", ("T", "H", "V")))
        count = cumsum(1.0, "C") + seen
        t.store(Tensor("y", ("T", "HV", "V")), (cumsum(x, "C") + total) / count)
        return total + reduce_sum(x, "C"), seen + reduce_sum(broadcast(1.0, ("C",)), "C")
    with t.recording():
        t.scan(body, total=zeros("V"), seen=zeros())
    return Case(t.program(), {"V": 32})


def two_states() -> Case:
    """A recurrence over chunks with two states, one feeding the other, both stored at the end."""
    t = tracer("two_states")

    def body(A: Node, B: Node) -> tuple[Node, Node]:
        k = t.load(Tensor("k", ("T", "H", "K")))
        v = t.load(Tensor("v", ("T", "HV", "V")))
        scores = lower(dot(k, k.twin("C"), over="K"))
        t.store(Tensor("y", ("T", "HV", "V")), dot(k, A, over="K") + dot(scores, v.twin("C"), over="C'"))
        return 0.9 * A + 0.1 * dot(k, v, over="C"), 0.5 * B + 0.1 * A
    with t.recording():
        A, B = t.scan(body, A=zeros("K", "V"), B=zeros("K", "V"))
        t.store(Tensor("A_end", ("N", "HV", "K", "V"), "f32"), A)
        t.store(Tensor("B_end", ("N", "HV", "K", "V"), "f32"), B)
    return Case(t.program(), {"K": 16, "V": 32})


FIXED = {"matmul": matmul, "softmax": softmax, "cumulative mean": cumulative_mean, "two-state recurrence": two_states}


def rand(seed: int) -> Case:
    """A random program: loads (some shared between heads), arithmetic, masks, running and whole sums, products, solves, and a
    scan with one or two carries. Values stay of order one, so that float32 can be compared."""
    r = random.Random(seed)
    t = tracer(f"random_{seed}")
    axes = {"K": r.choice([16, 24, 32]), "V": r.choice([16, 40, 32])}
    carried = r.random() < 0.7
    square = r.random() < 0.3

    def grow(pool: list[Node], steps: int) -> None:
        for _ in range(steps):
            x = r.choice(pool)
            match r.randrange(12):
                case 0:
                    pool.append(0.5 * (x + r.choice([y for y in pool if set(y.axes) <= set(x.axes)])))
                case 1:
                    pool.append(sigmoid(x) * r.choice([y for y in pool if set(y.axes) <= set(x.axes)]))
                case 2 if "C" in x.axes:
                    pool.append(0.2 * cumsum(x, "C", reverse=r.random() < 0.5))
                case 3 if "C" in x.axes and len(x.axes) > 1:
                    pool.append(0.2 * reduce_sum(x, "C"))
                case 4 if x.axes:
                    pool.append(select(elem("gt", x, 0.2), x, maximum(-x, 0.1)) - 0.3)
                case 5 if x.axes == ("C", "K"):
                    y = r.choice([y for y in pool if y.axes == ("C", "K")])
                    m = 0.1 * strict_lower(dot(x, y.twin("C"), over="K"))
                    v = [y for y in pool if y.axes in (("C", "V"), ("C", "K"))]
                    u = r.choice(v)
                    pool.append(tri_solve(m, u) if r.random() < 0.5 else dot(lower(m), u.twin("C"), over="C'"))
                case 6 if x.axes == ("C", "K"):
                    v = [y for y in pool if y.axes == ("C", "V")]
                    pool.append(0.2 * dot(x, r.choice(v), over="C"))
                case 7 if x.axes == ("K", "V"):
                    k = [y for y in pool if y.axes == ("C", "K")]
                    pool.append(0.2 * dot(r.choice(k), x, over="K"))
                case 8 if x.axes:
                    e = exp(0.1 * x)
                    pool.append(e / (1.0 + reduce_sum(e, x.axes[-1])))
                case 9:                                    # not finite where an input is zero, as it is in the padding
                    x = r.choice(pool[:3])
                    pool.append(exp(-0.05 * log(x * x)) if r.random() < 0.5 else x * rsqrt(x * x))
                case 10 if len(x.axes) == 2:               # a mask on positions along both axes
                    i, j = (index(a) for a in r.sample(x.axes, 2))
                    pool.append(select(elem(r.choice(["ge", "gt", "lt"]), floordiv(i, 2), floordiv(j, 2)), x + 0.1, 0.2))
                case 11 if len(x.axes) == 2:
                    pool.append(reduce_sum(0.1 * cumsum(sigmoid(x), x.axes[0]) - 0.2, x.axes[1]) * x)
                case _:
                    pool.append(0.7 * x - 0.1)

    def body(*carries: Node) -> tuple[Node, ...]:
        pool = [t.load(Tensor("k", ("T", "H", "K"))), t.load(Tensor("v", ("T", "HV", "V"))),
                t.load(Tensor("g", ("T", "HV"), "f32")), *carries]
        grow(pool, r.randrange(8, 16))
        by_axes: dict[tuple[str, ...], Node] = {}
        for x in pool:                                     # all of each kind, the last counting most
            by_axes[x.axes] = x + 0.5 * by_axes[x.axes] if x.axes in by_axes else x
        t.store(Tensor("y", ("T", "HV", "V")), by_axes[("C", "V")])
        t.store(Tensor("z", ("T", "HV", "K")), by_axes[("C", "K")])
        if not carries:
            return ()
        update = by_axes.get(("K", "V"), carries[0])
        nexts = [0.5 * c + 0.2 * (update if i == 0 else carries[0]) for i, c in enumerate(carries)]
        return tuple(nexts)
    with t.recording():
        if not carried:
            t.scan(lambda: body() or None)
        else:
            names = ("A", "B") if square else ("A",)
            finals = t.scan(body, **{n: zeros("K", "V") for n in names})
            for n, x in zip(names, finals, strict=True):
                t.store(Tensor(f"{n}_end", ("N", "HV", "K", "V"), "f32"), x)
    heads = r.choice([(1, 2), (2, 2), (1, 3)])
    lengths = r.choice([(20, 0, 16, 7), (33,), (1, 15, 32)])
    return Case(t.program(), axes, lengths, heads)
