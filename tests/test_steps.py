"""Plans and their steps against the interpreter; refusals; the Schedule record; lowerings of the triangular solve."""
from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdn_ir.autodiff import backward
from gdn_ir.compiler import Instance, variant
from gdn_ir.interp import Sizes, run, run_pipeline
from gdn_ir.program import Program
from gdn_ir.precision import precision, storage
from gdn_ir.programs.gated_delta import Switches, build
from gdn_ir.reference import recurrence
from gdn_ir.schedules import steps
from gdn_ir.schedules.defaults import default
from gdn_ir.schedules.plans import plan
from gdn_ir.schedules.schedule import KernelOptions, Schedule
from gdn_ir.split import split
from tests import inputs
from tests.differential import interpreted

PLANS = ("naive", "fused", "solve", "states", "wy")
FAMILY = list(itertools.product(("scalar", "none"), (True, False)))


def memory(p: Program, sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {n: 0.3 * torch.randn([sizes.dim(d) for d in t.dims], generator=generator, dtype=torch.float64)
             for n, t in p.tensors().items() if n in p.read()}
    return found | ({"g": -found["g"].abs()} if "g" in found else {})


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("decay", "erase"), FAMILY)
def test_plans_are_exact(name: str, decay: str, erase: bool, sums: bool) -> None:
    """Every plan of every member computes what the unscheduled program does, V whole and split over the grid."""
    if sums and decay == "none":
        pytest.skip("there is no log decay to sum")
    p = build(Switches(decay=decay, erase=erase, initial_state=True, final_state=True, l2norm=True))
    axes, cu = {"C": 16, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 37, 37, 53]
    sizes = Sizes(axes, cu)
    given = memory(p, sizes)
    want = run(p, given, sizes, {"scale": 0.7})
    merged = tuple((*s[:-1], "f64") if s[0] == "merge" else s for s in plan(name, erase, chunk=16, block=4, sums=sums))
    kernels = list(steps.apply(p, merged))
    tiled = [split(k, "V") if all("V" in n.args[0].axes for n in k.nodes() if n.op.name == "STORE") else k for k in kernels]
    assert sum("V#" in k.grid for k in tiled) >= 1
    for pipeline in (kernels, tiled):
        got = dict(given)
        for k in pipeline:                                 # only a kernel that is split has smaller tiles
            got |= run_pipeline([k], got, Sizes(axes, cu, {"V": 4} if "V#" in k.grid else {}), {"scale": 0.7})
        for n in ("o", "final_state"):
            assert float((got[n] - want[n]).abs().max()) < 1e-10, n


@pytest.mark.parametrize("erase", [True, False])
def test_sums_in_base_two(erase: bool) -> None:
    """The same values; the sum is scaled where it is made, and no exponential scales anything."""
    p = build(Switches(erase=erase, initial_state=True, final_state=True))
    (q,) = steps.apply(p, (("base_two", "G"),))
    functions = [n["fn"] for n in q.nodes() if n.op.name == "ELEM"]
    assert "exp" not in functions and functions.count("exp2") >= 3
    assert q.named("G").args[0].op.name == "ELEM" and q.named("G").args[0].args[1].const == pytest.approx(1 / math.log(2))
    sizes = Sizes({"C": 16, "K": 5, "V": 6, "H": 1, "HV": 2}, [0, 37, 37, 53])
    given = memory(p, sizes)
    want, got = (run(x, given, sizes, {"scale": 0.7}) for x in (p, q))
    for n in ("o", "final_state"):
        assert float((got[n] - want[n]).abs().max()) < 1e-12, n
    back, of_two = backward(p), backward(q)                # the derivative of exp2 too
    given = memory(back, sizes)
    want, got = (run(x, given, sizes, {"scale": 0.7}) for x in (back, of_two))
    assert float((got["d_g"] - want["d_g"]).abs().max()) < 1e-12 < float(want["d_g"].abs().max())


@pytest.mark.parametrize(("name", "grids"), [("fused", ("H", "HV")), ("solve", ("H", "HV", "HV")),
                                             ("cut", ("H", *6 * ("HV",)))])
def test_rows_of_a_key_head_are_normalised_once(name: str, grids: tuple[str, ...]) -> None:
    """In a kernel over key heads, whose stores the others read; the same values, and no other square."""
    p = build(Switches(l2norm=True, initial_state=True, final_state=True))
    wanted = plan(name, chunk=16, block=4, sums=name != "fused", segment=2, io="f64", norm=True)
    kernels = list(steps.apply(p, wanted))
    assert kernels[0].name == "norm" and tuple(k.grid[-1] for k in kernels) == grids
    assert [n["fn"] for k in kernels for n in k.nodes() if n.op.name == "ELEM"].count("rsqrt") == 2
    assert {"q_kept", "k_kept"} <= set(kernels[-1].read()) and not {"q", "k"} & set(kernels[-1].read())
    sizes = Sizes({"C": 16, "K": 5, "V": 6, "H": 1, "HV": 2, "X": 2}, [0, 37, 37, 101])
    given = memory(p, sizes)
    want, got = run(p, given, sizes, {"scale": 0.7}), dict(given)
    for k in kernels:
        got |= run_pipeline([k], got, sizes, {"scale": 0.7})
    for n in ("o", "final_state"):
        assert float((got[n] - want[n]).abs().max()) < 1e-12, n


def test_what_cannot_be_made_once_for_a_key_head() -> None:
    for tensors, l2norm, why in (
            ("q,k", False, "q is no row that grid points share, of which"), ("v", True, "v is no row"),
            ("w", True, "got tensors w; accepts some that one serial kernel reads, each once: "),
            ("q,q", True, "got tensors q,q")):
        with pytest.raises(steps.IllegalStep, match=f"hoist_shared: {why}"):
            steps.apply(build(Switches(l2norm=l2norm)), (("hoist_shared", tensors, "io", "norm"),))
    with pytest.raises(steps.IllegalStep, match="there is a kernel norm already"):
        steps.apply(build(Switches(l2norm=True)), 2 * (("hoist_shared", "q,k", "io", "norm"),))


@pytest.mark.parametrize(("taken", "message"), [
    ((("base_two", "kk"),), "base_two: kk is not a running sum"),
    ((("base_two", "G"), ("base_two", "G")), "base_two: no exponential is of a sum of G's elements"),
    ((("hoist", "u", "io", "solve"),), "hoist: u needs S, which the scan carries"),
    ((("hoist", "S", "io", "x"),), "hoist: S needs S"),
    ((("sink", "u"),), "sink: u feeds S"),
    ((("invert", "kk", "A"),), "invert: kk is not a triangular solve"),
    ((("merge", "u", 64, 16),), "merge: u is not the inverse of a whole I \\+ M"),
    ((("invert", "u", "A"), ("merge", "A", 64, 24)), "merge: blocks of 24 do not double up to 64 rows"),
    ((("absorb", "u", "A_beta"),), "absorb: u is not a product"),
    ((("absorb", "kk", "x"),), "absorb: kk's right operand is not scaled along K"),
    ((("distribute", "G", "a", "b"),), "distribute: G must depend on one carry"),
])
def test_refusals_name_node_and_line(taken: tuple[tuple[str | int, ...], ...], message: str) -> None:
    with pytest.raises(steps.IllegalStep, match=message + r"(.|\n)*gated_delta.py:\d+"):
        steps.apply(build(), taken)


def test_a_schedule_must_fit_its_program() -> None:
    def lowered(s: Schedule) -> None:
        variant(Instance(Switches(), 64, 64, "f32", "f32", False), s, "torch", "cpu").sources      # noqa: B018
    with pytest.raises(steps.IllegalStep, match="merge: doubles blocks up to 64 rows, but a chunk has 128"):
        lowered(Schedule("x", 128, plan("fused")))
    with pytest.raises(steps.IllegalStep, match="kernels: no kernel is called best; the plan makes solve, scan"):
        lowered(Schedule("x", steps=plan("solve")).with_options(best=KernelOptions()))
    with pytest.raises(steps.IllegalStep, match=r"invert: got 1 arguments, \['u'\]; accepts \(name, inverse\)"):
        steps.apply(build(), (("invert", "u"),))


def test_refusals_without_a_node() -> None:
    with pytest.raises(steps.IllegalStep, match="no step 'unroll'; there are invert, merge"):
        steps.apply(build(), (("unroll",),))
    with pytest.raises(steps.IllegalStep, match="hoist: no kernel has a value named 'w'"):
        steps.apply(build(), (("hoist", "w"),))
    with pytest.raises(steps.IllegalStep, match=r"sink: (.|\n)*is not stored"):
        steps.apply(build(), (("sink", "qk"),))


def test_not_affine_is_refused() -> None:
    p = build(Switches(final_state=True))
    r = p.named("r")
    squared = p.rebuild(lambda n, args: r * r if n is r else None)
    with pytest.raises(steps.IllegalStep, match=r"is not affine in S (.|\n)*gated_delta.py:23"):
        steps.apply(squared, (("distribute", "u", "u0", "w"),))


option = st.builds(KernelOptions, st.sampled_from([None, 16, 32, 64]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 8),
                   sparing=st.booleans())


@given(st.builds(Schedule, st.text(max_size=5), st.sampled_from([1, 16, 64, 128]),
                 st.sampled_from([plan(n) for n in PLANS]), st.dictionaries(st.sampled_from(["*", "scan"]), option).map(
                     lambda d: tuple(d.items())), st.sampled_from(["io", "bf16", "tf32"])))
def test_schedules_survive_json(s: Schedule) -> None:
    assert Schedule.from_json(s.to_json()) == s


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Schedule("x", chunk=48), "Schedule.chunk: got 48; accepts 1 or a power of two from 16 to 256"),
    (lambda: Schedule("x", dot="int8"), "Schedule.dot: got 'int8'; accepts io"),
    (lambda: KernelOptions(v_tile=48), "KernelOptions.v_tile: got 48; accepts a power of two"),
    (lambda: KernelOptions(num_warps=3), "KernelOptions.num_warps: got 3"),
    (lambda: KernelOptions(num_stages=0), "KernelOptions.num_stages: got 0"),
    (lambda: KernelOptions(sparing="yes"), "KernelOptions.sparing: got 'yes'; accepts true or false"),       # type: ignore[arg-type]
    (lambda: Schedule.from_json('{"name": "x", "warps": 3}'), "Schedule: unknown field warps"),
    (lambda: Schedule.from_json("{}"), "Schedule.name: got None; accepts a string"),
    (lambda: Schedule.from_json("[1]"), "Schedule: got [1]; accepts an object with name, chunk"),
    (lambda: Schedule.from_json("chunk: 64"), "Schedule: not JSON"),
    (lambda: Schedule.from_json('{"name": "x", "chunk": "64"}'), "Schedule.chunk: got '64'; accepts 1 or"),
    (lambda: Schedule.from_json('{"name": "x", "steps": ["invert"]}'), "Schedule.steps: got ['invert']; accepts a list"),
    (lambda: Schedule.from_json('{"name": "x", "kernels": [["scan", {}]]}'), "Schedule.kernels: got [['scan', {}]]; accepts"),
    (lambda: Schedule.from_json('{"name": "x", "kernels": {"scan": {"warps": 4}}}'),
     "Schedule.kernels['scan']: unknown field warps; accepts v_tile, num_warps, num_stages"),
    (lambda: plan("best"), "plan: got 'best'; accepts naive, fused, solve, states, wy"),
])
def test_bad_schedules(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()                                             # type: ignore[operator]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "cpu", "torch"])
def test_defaults_exist_for_every_architecture(arch: str) -> None:
    instance = Instance(Switches(), 128, 128, "bf16", "bf16", True)
    schedule, reason = default(arch, instance, 1, 32, 8192)
    assert schedule.name and reason


# ---- the triangular solve, on keys that are nearly one another ---------------------------------------------------------------


MERGES = {"rows": None, "blocks merged in tf32": "tf32", "blocks merged in split tf32": "tf32x3"}
BOUNDS = {None: (1e-5, 1e-5), "tf32": (9e-4, 4e-3), "tf32x3": (1e-5, 1e-5)}


@pytest.mark.parametrize(("i", "top"), [(0, 1.0), (1, 1.9)])
@pytest.mark.parametrize("name", MERGES)
def test_inverses_of_correlated_keys(name: str, i: int, top: float) -> None:
    """Each lowering of the solve, rounded as machines round (the interpreter's faithful mode)."""
    x, merges = inputs.correlated(top), MERGES[name]
    taken = (("invert", "u", "A"), *((("merge", "A", 64, 16, merges),) if merges else ()), ("hoist", "A", "f32", "solve"))
    kernel, _ = steps.apply(build(Switches(decay="none")), taken)
    typed = precision(storage(kernel, io="f32", beta="f32"), "f32")
    sizes = Sizes({"C": 64, "K": 64, "V": 32, "H": 1, "HV": 1}, [0, 64])
    got = run(typed, {n: t.double() for n, t in x.items()}, sizes, {"scale": 0.125}, faithful=True)["A"][:, 0]
    k = x["k"][:, 0].double()
    want = torch.linalg.inv(torch.eye(64) + torch.tril(x["beta"] * (k @ k.T), -1))
    error = float((got - want).norm() / want.norm())
    assert error < BOUNDS[merges][i], error


@pytest.mark.parametrize("top", [1.0, 1.9])
def test_correlated_keys_by_torch(top: float) -> None:
    x = inputs.correlated(top, 200)
    instance = Instance(Switches(decay="none", final_state=True), 64, 32, "f32", "f32", False)
    o, S = recurrence(*(x[n][None] for n in ("q", "k", "v")), None, x["beta"][None], 0.125)
    for s in (Schedule("naive"), Schedule("fused", steps=plan("fused", io="f32"))):
        got = variant(instance, s, "torch", "cpu").apply(x, 0.125, 1)
        assert inputs.error(got["o"], o[0]) < 1e-4
        assert inputs.error(got["final_state"], S) < 1e-4


def test_correlated_keys_by_triton() -> None:
    """Both lowerings as emitted kernels: substitution row by row, and in blocks that products merge."""
    found = interpreted([["correlated", name, top] for name in ("naive", "fused", "states") for top in (1.0, 1.9)])
    assert all(float(str(v.get("error", "nan"))) < 1e-4 for v in found.values()), found


def test_the_illegal_product_fails_where_they_hold() -> None:
    """(I - M)(I + M^2)(I + M^4)... is the inverse on paper; in float32, on these very keys, it is nothing like it."""
    x = inputs.correlated(1.9)
    m = torch.tril(x["beta"] * (x["k"][:, 0] @ x["k"][:, 0].T), -1)
    eye = torch.eye(64)
    product, power = eye - m, m @ m
    while float(power.abs().max()) > 0:
        product, power = product @ (eye + power), power @ power
    true = torch.linalg.inv((eye + m).double())
    assert not float((product - true).norm() / true.norm()) < 1.0


def test_solve_in_blocks_means_diagonal_blocks() -> None:
    m = torch.tril(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), -1)
    from gdn_ir.backends.torch.runtime import solve
    r = torch.eye(8, dtype=torch.float64)
    got = solve(m, r, block=4)
    assert torch.allclose(got[:4, :4], torch.linalg.inv(r[:4, :4] + m[:4, :4])) and not got[4:, :4].any()
    assert torch.allclose(solve(m, r, transpose=True), torch.linalg.inv(r + m).T)
