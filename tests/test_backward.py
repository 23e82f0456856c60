"""The derived backward as it is lowered: plans in the interpreter, what each rewrite saves, refusals, and emitted kernels."""
from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import replace

import pytest
import torch

from gdn_ir.bench.errors import worst
from gdn_ir.bench.gradients import FULL, backward_of, check
from gdn_ir.analysis import cost
from gdn_ir.autodiff import backward
from gdn_ir.backends.base import Kernel
from gdn_ir.backends.triton import cross_compile
from gdn_ir.build import Tensor, Tracer, dot, exp, reduce_sum, zeros
from gdn_ir.compiler import Instance, variant
from gdn_ir.coverage import LAYOUTS, Cell, Layout, table
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.legalize import ungrouped
from gdn_ir.nodes import IRError, Member, Node, Op, Tile
from gdn_ir.padding import pad
from gdn_ir.printer import dump, evaluate
from gdn_ir.program import Program, ScanView, tile_axes
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.prune import prune
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import default, whole_scans
from gdn_ir.schedules.plans import backward_plan
from gdn_ir.schedules.schedule import Schedule
from gdn_ir.split import parts
from gdn_ir.verify import verify
from tests.differential import executed, interpreted

FAMILY = list(itertools.product(("scalar", "none"), (True, False)))
AXES, CU = {"C": 16, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 37, 37, 53]
STATES = {"initial_state": True, "final_state": True}
GRADS = ("q", "k", "v", "g", "beta")


def memory(p: Program, sizes: Sizes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {n: 0.3 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator, dtype=torch.float64)
             for n, t in p.tensors().items() if n in p.read() and not t.temp}
    return found | ({"g": -found["g"].abs()} if "g" in found else {})


def in_f64(plan: tuple[tuple[str | int, ...], ...]) -> tuple[tuple[str | int, ...], ...]:
    return tuple((*s[:-1], "f64") if s[0] == "merge" else s for s in plan)


def compare(p: Program, plan: tuple[tuple[str | int, ...], ...], padded: bool = False,
            heads: tuple[int, int] = (1, 2)) -> None:
    """The pipeline of a plan writes what the program writes. heads: H and HV."""
    axes = AXES | dict(zip(("H", "HV"), heads, strict=True))
    sizes = Sizes(axes, CU)
    given = memory(p, sizes)
    want = run(p, given, sizes, {"scale": 0.7})
    kernels = list(steps.apply(p, in_f64(plan)))
    if padded:
        kernels = [pad(k, frozenset({"C", "K", "V"})) for k in kernels]
    got = run_pipeline(kernels, given, Sizes(axes, CU, {"K": 8, "V": 8} if padded else {}), {"scale": 0.7}, padded=padded)
    asked = [n for n, t in p.tensors().items() if n in p.written() and not t.temp]
    assert asked
    for n in asked:
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


@pytest.mark.parametrize("flags", [{}, STATES | {"l2norm": True}, STATES | {"beta_sigmoid": True, "neg_eigval": True}])
@pytest.mark.parametrize("name", ["naive", "fused", "states", "grouped", "inside", "merged", "gathered", "gathered-merged"])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_plans_are_exact(name: str, decay: str, erase: bool, flags: dict[str, bool]) -> None:
    p = backward(build(Switches(decay=decay, erase=erase, **flags)))           # type: ignore[arg-type]
    plan = backward_plan(name, p, chunk=16, block=4)
    compare(p, plan)
    if name not in ("naive", "fused"):
        compare(p, plan, padded=True)


@pytest.mark.parametrize("wrt", [("q",), ("v",), ("k", "beta"), ("g",), ("q", "k"), ("initial_state",), ("v", "initial_state")])
@pytest.mark.parametrize("erase", [True, False])
def test_only_what_is_asked_for(wrt: tuple[str, ...], erase: bool) -> None:
    """Dead gradients drop out, of the program and of the plan: what is left is exact and does less."""
    whole = build(Switches(erase=erase, **STATES))         # type: ignore[arg-type]
    p = backward(whole, wrt)
    assert {n for n, t in p.tensors().items() if n in p.written() and not t.temp} == {f"d_{n}" for n in wrt}
    for name in ("states", "gathered", "gathered-merged"):
        compare(p, backward_plan(name, p, chunk=16, block=4))
    sizes = {"C": 64, "K": 128, "V": 128}
    assert cost(p, sizes).flops < cost(backward(whole), sizes).flops


def test_a_head_each_sums_nothing() -> None:
    """With HV = H every sum over heads is one value; the program without them writes the same."""
    p = backward(build(Switches(**STATES)))                # type: ignore[arg-type]
    q = ungrouped(p)
    sizes = Sizes(AXES | {"H": 2}, CU)
    given = memory(p, sizes)
    want, got = (run(x, given, sizes, {"scale": 0.7}) for x in (p, q))
    assert not any(n["sum"] for n in q.nodes() if n.op is Op.STORE) and any(n["sum"] for n in p.nodes() if n.op is Op.STORE)
    assert all(torch.equal(want[n], got[n]) for n in want if n.startswith("d_"))
    assert "heads" not in [k.name for k in steps.apply(q, backward_plan("states", q))]


# ---- sums of a group in one block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("again", [(), ("q,k",)])
def test_a_block_owns_a_group(heads: tuple[int, int], again: tuple[str, ...]) -> None:
    """Groups of 1, 2 and 3; what members share held, or read again by each. No part of a gradient is in memory."""
    p = backward(build(Switches(**STATES)))                # type: ignore[arg-type]
    local = ("sum_inside", "local")
    plan = tuple((*s, *again) if s == local else s for s in backward_plan("inside", p, chunk=16, block=4))
    for padded in (False, True):
        compare(p, plan, padded, heads)
    for k in steps.apply(p, plan):
        assert evaluate(dump(k)) == k
        assert not any(n["sum"] or "parts" in n["tensor"].name for n in k.nodes() if n.op is Op.STORE)
        inside = {n["tensor"].name for n in k.nodes() if n.op is Op.LOAD and Member("H", "HV", True) in n["index"]}
        assert inside == (set("qk") if again and k.name == "local" else set())


def test_parts_of_a_group_in_fewer_bits() -> None:
    p = backward(build())
    plan = tuple((*s, "bf16") if s[0] == "sum_after" else s for s in backward_plan("states", p, chunk=16, block=4))
    compare(p, plan)
    assert {t.dtype for t in steps.apply(p, plan)[-1].tensors().values() if t.temp} == {"bf16"}


@pytest.mark.parametrize(("taken", "message"), [
    (("sum_inside", "back"), r"sum_inside: back is a serial scan, whose carries are each grid point's own\n  in d_k = .*:\d+"),
    (("sum_inside", "again"), "sum_inside: again stores nothing that is summed over grid points"),
    (("sum_inside", "local"), "sum_inside: no kernel is called local; there are again, back"),
])
def test_sums_that_no_block_can_own(taken: tuple[str, str], message: str) -> None:
    with pytest.raises(steps.IllegalStep, match=message):
        steps.apply(backward(build()), (("separate", "d_S", "again", "back"), taken))


def test_what_members_do_not_share() -> None:
    p = backward(build())
    plan = backward_plan("inside", p)
    with pytest.raises(steps.IllegalStep, match="sum_inside: grads reads no q, u that its members share"):
        steps.apply(p, (*plan[:-1], ("sum_inside", "grads", "q,k,u")))


def test_a_member_stands_in_the_scan_over_its_group() -> None:
    p = steps.apply(backward(build()), backward_plan("inside", backward(build())))[-1]
    (inner,) = (ScanView.of(s) for s in p.scans() if ScanView.of(s).group)
    with pytest.raises(IRError, match="varies with scan HV but stands outside it"):
        verify(replace(p, roots=(ScanView.of(p.roots[0]).with_parts(effects=inner.effects),)))
    off = inner.with_parts(group="V#")
    with pytest.raises(IRError, match="steps through the members of V#, which is not on the grid"):
        verify(p.rebuild(lambda n, args: off if n is inner.node else None))


def test_tilelang_says_what_it_lacks() -> None:
    instance = backward_of(Cell("x", FULL, "bf16", LAYOUTS["GVA"]))
    schedule = Schedule("x", steps=backward_plan("grouped", instance.program))
    with pytest.raises(ValueError, match="tilelang does not lower a loop over the HV that share one H yet"):
        variant(instance, schedule, "tilelang", "sm_90")


# ---- what each rewrite saves ------------------------------------------------------------------------------------------------


def units(taken: tuple[tuple[str | int, ...], ...]) -> float:
    """Products of 2 x 64 x 64 x 128 flops a chunk and head, over all kernels (the inverse counts half of one)."""
    pipeline = steps.apply(backward(build()), taken)
    return sum(cost(p, {"C": 64, "K": 128, "V": 128}).flops for p in pipeline) / (2 * 64 * 64 * 128)


def test_what_each_rewrite_saves() -> None:
    """Reverse mode as it comes: 32 units. u kept with the states: 1 (its solve); sums over V and K exchanged: 4 (Q S and K S);
    symmetric adjoints of K K^T merged: 1. math's count is 25 and 5 for states that are computed again."""
    apart = (("separate", "d_S", "again", "back"),)
    kept = (*apart, ("keep", "u", "u_again"))
    factored = (*kept, ("factor",), ("regroup",))
    exchanged = (*factored, ("exchange",))
    assert units(()) == 32.0
    assert units(apart) == 33.0                            # K K^T in each kernel
    assert units(kept) == 32.0 and units(factored) == 32.0
    assert units(exchanged) == 28.0
    assert units((*exchanged, ("symmetric",))) == 27.0
    # one inverse for the solve and its adjoint: half a unit; Q K^T lying both ways, instead of transposed: one
    assert units(tuple(s for s in backward_plan("states", backward(build())) if s[0] != "merge")) == 28.5


def test_the_serial_scan_carries_little() -> None:
    """Of the units, those in the reverse scan: d_S enters d_u, the inverse, and twice its own update."""
    p = backward(build())
    kernels = {k.name: cost(k, {"C": 64, "K": 128, "V": 128}).flops / (2 * 64 * 64 * 128)
               for k in steps.apply(p, tuple(s for s in backward_plan("states", p) if s[0] != "merge"))}
    assert kernels == {"solve": 1.5, "again": 5.0, "local": 7.0, "back": 7.0, "inner": 6.0, "grads": 2.0, "heads": 0.0}


def test_no_product_takes_what_was_just_computed_transposed() -> None:
    """Triton of 3.4 to 3.7 miscompiles dot(trans(computed)) for Hopper (flash-linear-attention issue 640): what lies across is
    loaded, or was turned."""
    p = backward(build(Switches(**STATES)))                # type: ignore[arg-type]
    for k in steps.apply(p, backward_plan("states", p)):
        for n in k.nodes():
            if n.op is Op.DOT and k.name != "solve":
                for x in n.args:
                    across = x.axes and x.axes[0] == n["over"] and x is n.args[n.axes[0] not in n.args[0].axes]
                    assert not across or x.op is Op.LOAD, (k.name, k.describe(n))


# ---- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taken", "message"), [
    ((("separate", "d_S", "one"),), "separate: gated_delta_rule_backward has 2 scans for 1 names"),
    ((("separate", "d_S", "again", "back"), ("keep", "r", "u_again")), "keep: it is not what again computes as u_again"),
    ((("separate", "d_S", "again", "back"), ("lift", "d_k", "local")), "lift: d_k needs d_S, which the scan carries"),
    ((("separate", "d_S", "again", "back"), ("lift", "qk", "local")), "lift: qk is not stored"),
    ((("separate", "d_S", "again", "back"), ("sink", "d_v")), "sink: d_v feeds d_S"),
    ((("separate", "d_S", "again", "back"), ("hoist", "kk", "io", "first"), ("hoist", "d_qk", "io", "first")),
     "hoist: first runs before S_kept is written"),
    ((("peel", "d_r", "x"),), "peel: d_r is not a sum of what needs a carry and what does not"),
    ((("turn", "d_k"),), "turn: d_k has no product with a computed tile that lies across"),
])
def test_refusals_name_node_and_line(taken: tuple[tuple[str | int, ...], ...], message: str) -> None:
    if taken[0][0] == "turn":
        p = backward(build(Switches(decay="none", erase=False)), ["v"])
        taken = (("turn", "d_v"), ("turn", "d_v"))
        message = message.replace("d_k", "d_v")
    else:
        p = backward(build())
    with pytest.raises(steps.IllegalStep, match=message + r"(.|\n)*gated_delta.py:\d+"):
        steps.apply(p, taken)


def test_refusals_without_a_node() -> None:
    with pytest.raises(steps.IllegalStep, match="store_as: no kernel has a temporary named 'u'"):
        steps.apply(build(), (("store_as", "u", "io"),))
    with pytest.raises(steps.IllegalStep, match="sum_after: nothing is stored that is summed"):
        steps.apply(build(), (("sum_after", "heads"),))
    with pytest.raises(ValueError, match="plan: got 'best'; accepts naive, fused, states, grouped, inside, merged"):
        backward_plan("best", backward(build()))
    with pytest.raises(ValueError, match="grads: got w; accepts g, k, beta, v, q"):
        Instance(Switches(), 64, 64, "f32", "f32", True, ("w",))


def test_prune_drops_carries_and_scans() -> None:
    t = Tracer("p", grid=("N", "HV"))

    def body(a: Node, b: Node, c: Node) -> tuple[Node, ...]:
        x = t.load(Tensor("x", ("T", "HV", "V")))
        t.store(Tensor("unread", ("T", "HV", "V"), temp=True), exp(x) * dot(x, b, over="V") if "V" not in b.axes else exp(x))
        return a + reduce_sum(x, "C"), b + a, c * 2.0
    with t.recording():
        _, b, _ = t.scan(body, a=zeros("V"), b=zeros("V"), c=zeros("V"))
        t.store(Tensor("y", ("N", "HV", "V")), b)
    p = prune(t.program())
    (scan,) = p.scans()
    assert scan["carries"] == ("a", "b") and p.written() == ("y",)
    sizes = Sizes({"C": 4, "V": 3, "HV": 1}, [0, 9])
    given = {"x": torch.randn(9, 1, 3, dtype=torch.float64)}
    assert torch.equal(run(p, given, sizes)["y"], run(t.program(), given, sizes)["y"])


# ---- backends ---------------------------------------------------------------------------------------------------------------


SMALL = Layout((40, 0, 70, 1), varlen=True, H=1, HV=2, K=16, V=32)


@pytest.mark.parametrize("name", ["naive", "states", "grouped", "merged", "gathered", "gathered-merged", "gathered-turns"])
@pytest.mark.parametrize("io", ["f64", "f32"])
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_torch(decay: str, erase: bool, io: str, name: str) -> None:
    for flags in ({}, STATES | {"state_v_first": True, "l2norm": True}, {"final_state": True, "beta_sigmoid": True,
                                                                         "neg_eigval": True}):
        cell = Cell("x", Switches(decay=decay, erase=erase, **flags), io, SMALL)               # type: ignore[arg-type]
        schedule = Schedule("x", steps=backward_plan(name, backward_of(cell).program, io))
        assert worst(check(cell, "torch", "torch", schedule=schedule)["errors"].values()) < {"f64": 1e-12, "f32": 1e-5}[io]


def test_torch_in_bfloat16() -> None:
    assert worst(check(Cell("x", FULL, "bf16", LAYOUTS["GVA"]), "torch", "torch")["errors"].values()) < 6e-3


def test_triton_executed() -> None:
    """By Triton's interpreter: every member, every layout with zero lengths, groups, ragged tails, K != V."""
    names = [c.name for c in table() if c.io == "f32" and (c.name.startswith("gated delta rule,") or "varlen" in c.name
                                                           or "V, K" in c.name or "sigmoid" in c.name or "l2norm" in c.name)]
    names += ["gated delta rule, f16, varlen", "gated delta rule, f16, GVA"]
    found = interpreted([*(["backward", n] for n in names), ["backward", "gated delta rule, f32, GVA", 32],
                         *(["backward", f"gated delta rule, {layout}", None, plan, heads]
                           for layout, plan, heads in (("f32, varlen", "grouped", (1, 2)), ("f32, ragged", "inside", (1, 3)),
                                                       ("f32, dense", "merged", (1, 2)), ("f16, varlen", "grouped", (1, 2)),
                                                       ("f32, varlen", "gathered", (1, 2)))),
                         *(["backward", f"gated delta rule, {layout}", None, "grouped", (1, 2), True]
                           for layout in ("f32, varlen", "f16, varlen"))])
    bad = {k: v for k, v in found.items()
           if "error" not in v or not float(v["error"]) < (2e-5 if "f32" in k else 4.5e-3)}     # type: ignore[arg-type]
    assert not bad, json.dumps(bad, indent=1)[:3000]


def test_native_code_executed() -> None:
    """TileLang's C: packed with zero lengths, states either way; groups and a ragged tail; K != V without a solve. (More
    inputs, by way of the op: test_op.py.)"""
    names = ["states [V, K], f32", "gated delta rule, f32, GVA", "linear attention, f32, K != V"]
    found = executed([["backward", n] for n in names], "tilelang", "cpu")
    bad = {k: v for k, v in found.items() if "error" not in v or not float(v["error"]) < 2e-5}         # type: ignore[arg-type]
    assert not bad, json.dumps(bad, indent=1)[:3000]


@pytest.mark.parametrize(("K", "V"), [(128, 128), (96, 96), (256, 160), (16, 16)])
@pytest.mark.parametrize("erase", [True, False])
def test_every_subset_of_gradients_lowers(erase: bool, K: int, V: int) -> None:
    names = ("q", "k", "v", "g", "beta", "initial_state")
    subsets = [g for r in (1, 2, 6) for g in itertools.combinations(names, r)] if (K, V) == (96, 96) else [(n,) for n in names]
    for grads in subsets:
        instance = Instance(replace(FULL, erase=erase), K, V, "bf16", "bf16", True, grads)
        variant(instance, default("sm_90", instance, 1, 8, 100)[0], "triton", "sm_90").sources         # noqa: B018


@pytest.mark.parametrize("tile", [2, 3, 4])
@pytest.mark.parametrize("wrt", [None, ("q",), ("k", "g"), ("beta",)])
def test_v_in_tiles(wrt: tuple[str, ...] | None, tile: int) -> None:
    """Kernels that sum over V keep a part for each tile, in the interpreter: what reads them is exact."""
    p = backward(build(Switches(**STATES)), wrt)           # type: ignore[arg-type]
    sizes = Sizes(AXES, CU, {"V": tile})
    given = memory(p, sizes)
    want = run(p, given, Sizes(AXES, CU), {"scale": 0.7})
    kernels = steps.apply(p, in_f64(backward_plan("states", p, chunk=16, block=4)))
    tiled = parts(kernels, "V", {k.name: tile for k in kernels if "V" in tile_axes(k)})
    assert not any("V#" in n["sum"] for k in tiled for n in k.nodes() if n.op is Op.STORE)
    assert ("tiles" in [k.name for k in tiled]) == (wrt != ("q",))
    got = dict(given)
    for k in tiled:
        got |= run_pipeline([k], got, sizes if "V#" in k.grid else Sizes(AXES, CU), {"scale": 0.7})
    for n in (f"d_{name}" for name in wrt or ("q", "k", "v", "g", "beta", "initial_state")):
        assert float((got[n] - want[n]).abs().max()) < 1e-10, n


def test_tiles_that_are_summed_over_have_one_size() -> None:
    p = backward(build(), ["q"])
    last = steps.apply(p, backward_plan("states", p))[-2]
    with pytest.raises(IRError, match="split V: tiles that are summed over must have one size, got 32 in back, 64 in more"):
        parts((last, replace(last, name="more")), "V", {"back": 32, "more": 64})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("size", [128, 256])
def test_default_compiles_without_a_gpu(arch: str, size: int) -> None:
    """With heads of 256 sums over V are kept in parts, and summed."""
    cell = Cell("x", FULL, "bf16", replace(LAYOUTS["varlen"], H=1, HV=2, K=size, V=size))
    instance = backward_of(cell)
    chosen = variant(instance, default(arch, instance, 1, 32, 8192)[0], "triton", arch)
    turns = ["solve", "local", "again", "back", "grads"]
    states = ["solve", "again", "local", "back", "inner", "grads", "heads", *(["tiles"] if size > 128 else [])]
    assert [s.kernel for s in chosen.sources] == (turns if (arch, size) == ("sm_90", 128) else states)
    for kernel, source in zip(chosen.compiled.kernels, chosen.sources, strict=True):
        built = cross_compile(kernel, source, arch)
        assert built.metadata.shared <= {"sm_80": 166912, "sm_90": 232448}[arch]
        assert "atom" not in source.text


def tiles_of(kernel: Program) -> int:
    """Products of tiles over C and C' with each other, elementwise."""
    return sum(n.op is Op.ELEM and n["fn"] == "mul" and all(a.axes == ("C", "C'") for a in n.args) for n in kernel.nodes())


def test_what_sharing_saves() -> None:
    """inner multiplies two pairs of tiles where it would five, and makes no product of matrices more."""
    p = backward(build())
    plan = backward_plan("grouped", p)
    before, after = ({k.name: k for k in steps.apply(p, tuple(s for s in plan if s[0] != left))} for left in ("share", ""))
    assert (tiles_of(before["inner"]), tiles_of(after["inner"])) == (5, 2)
    assert all(before[n] == after[n] for n in before if n != "inner")
    products = [[n for n in k["inner"].nodes() if n.op is Op.DOT] for k in (before, after)]
    assert len(products[0]) == len(products[1])
    with pytest.raises(steps.IllegalStep, match="share: no kernel is named 'outer'; there are again, back"):
        steps.apply(p, (("separate", "d_S", "again", "back"), ("share", "outer")))


def test_sparing_holds_less() -> None:
    """The same statements in another order: the sums that a tile is for follow it, and what is read once is read late."""
    instance = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS)
    base = whole_scans("sm_90", instance, 1, 32, "triton")[0]
    schedule, sparing = (base.with_options(**{k: replace(o, sparing=x) for k, o in base.kernels}) for x in (False, True))
    for a, b in zip(*(variant(instance, s, "triton", "sm_90").sources for s in (schedule, sparing)), strict=True):
        lines = [[x for x in s.text.splitlines() if x.startswith("    ") and "#" not in x] for s in (a, b)]
        assert len(lines[0]) == len(lines[1])
        if a.kernel == "inner":
            first, then = ("\n".join(x) for x in lines)
            assert first.index("d_k_r_ptr + t0") < first.index("d_v_ptr + t0", first.index("u = tl.load"))
            assert then.index("d_v.to") < then.index("v = tl.load") < then.index("u = tl.load") < then.index("d_k_r_ptr + t0")


@pytest.mark.parametrize(("kernel", "gathers", "spills"), [("inner", False, 64), ("local", False, 0), ("inner", True, 272)])
def test_four_warps_hold_what_is_sparing(kernel: str, gathers: bool, spills: int) -> None:
    """Bytes of the stack that ptxas takes, at two blocks a multiprocessor. (inner took 500 before share and sparing.)"""
    instance = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS)
    schedule = whole_scans("sm_90", instance, 1, 32, "triton", gathers)[0]
    s = schedule.with_options(**{kernel: replace(schedule.options(kernel), num_warps=4, sparing=True)})
    made = variant(instance, s, "triton", "sm_90")
    at = next(i for i, k in enumerate(made.sources) if k.kernel == kernel)
    ptx = cross_compile(made.compiled.kernels[at], made.sources[at], "sm_90").asm["ptx"]
    assert spilled(ptx) <= spills


def spilled(ptx: str) -> int:
    """What ptxas says of a kernel's stack, in bytes."""
    from triton import knobs
    found = subprocess.run([knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", "/dev/null", "-"], input=ptx, text=True,
                           capture_output=True, check=True).stderr
    return int(found.split(" bytes stack frame")[0].split()[-1])


def narrow_loads(kernel: Kernel) -> set[str]:
    """Tensors that a serial scan loads two bytes at a place."""
    return {n["tensor"].name for n in kernel.program.nodes() if n.op is Op.LOAD and kernel.parallel is None
            and n["tensor"].dtype in ("bf16", "f16") and not (isinstance(n["index"][-1], Tile) and n.axes)}


@pytest.mark.parametrize("keep", ["nothing", "inverse", "states"])
@pytest.mark.parametrize("beta", ["bf16", "f32"])
def test_serial_scans_load_no_two_bytes_at_a_place(beta: str, keep: str) -> None:
    """No hardware copies them ahead. Four bytes for each row and head are all that it takes, and none where beta has them."""
    back = Instance(Switches(), 128, 128, "bf16", beta, True, GRADS, keep=keep)
    for instance in (back, replace(back, grads=()))[:1 + (keep != "nothing")]:
        kernels = variant(instance, default("sm_90", instance, 1, 32, 8192)[0], "triton", "sm_90").compiled.kernels
        assert any(k.parallel is None for k in kernels) and not set().union(*map(narrow_loads, kernels))
        kept = {t for k in kernels for t in k.tensors() if t.name == "beta_kept"}
        assert [(t.dtype, t.dims, t.left) for t in kept] == [("f32", ("T", "HV"), False)] * (beta == "bf16")
    plain = Schedule("x", steps=backward_plan("states", back.program))
    assert keep != "nothing" or {n for k in variant(back, plain, "triton", "sm_90").compiled.kernels for n in narrow_loads(k)} \
        == ({"beta"} if beta == "bf16" else set())


@pytest.mark.parametrize("kernel", ["again", "back"])
def test_serial_scans_wait_for_no_load(kernel: str) -> None:
    """As Triton compiles them for Hopper: every load of the loop is a copy that was begun chunks before."""
    instance = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS)
    schedule = default("sm_90", instance, 1, 32, 8192)[0]
    alone = replace(schedule, steps=tuple(s for s in schedule.steps if s[:2] != ("hoist", "beta")))
    for s, waits in ((schedule, 0), (alone, 1)):
        made = variant(instance, s, "triton", "sm_90")
        at = next(i for i, k in enumerate(made.sources) if k.kernel == kernel)
        text = cross_compile(made.compiled.kernels[at], made.sources[at], "sm_90").asm["ttgir"]
        loop = text[text.index("scf.for"):]
        assert loop.count("async_copy_global_to_local") >= 5 and loop.count("tt.load") == waits


def test_plans_make_one_source() -> None:
    """Whatever lies where in this process's memory: a source's hash names a measurement."""
    seen, kept = set(), []
    for i in range(8):
        kept.append([object() for _ in range(1 + 1013 * i)])
        p = backward(build(Switches(final_state=True)))
        seen.add(dump(steps.apply(p, backward_plan("states", p))[4], notes=False))
    assert len(seen) == 1
