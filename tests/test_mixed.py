"""Pipelines of two backends' kernels: the inverse by Triton before a scan of roles by TileLang, and when that serves."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import gdn_ir
from gdn_ir import artifacts, registry
from gdn_ir.artifacts import Store
from gdn_ir.compiler import Instance, Unsupported, variant
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import CROWDED, of_roles, roles_fit, roles_in_one
from gdn_ir.schedules.roles import Event, Role
from gdn_ir.schedules.schedule import KernelOptions, Schedule

PACKED = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)


def roles(instance: Instance = PACKED) -> Schedule:
    return of_roles(norm=instance.switches.l2norm).with_options(solve=KernelOptions(None, 1, 1, backend="triton"))


def test_each_kernel_is_made_by_its_own_backend() -> None:
    chosen = variant(PACKED, roles(), "tilelang", "sm_90")
    assert [b.name for b in chosen.compiled.makers] == ["triton", "tilelang"]
    assert "import triton" in chosen.sources[0].text and "tilelang" in chosen.sources[1].text
    assert Schedule.from_json(roles().to_json()) == roles()
    assert str(roles().options("solve")) == "1 warp, 1 stage, by triton"
    with pytest.raises(Unsupported, match="cannot hand memory to each other"):
        variant(PACKED, roles().with_options(solve=KernelOptions(backend="torch")), "tilelang", "sm_90")
    with pytest.raises(Unsupported, match="backend: got 'cuda'; accepts"):
        variant(PACKED, roles().with_options(solve=KernelOptions(backend="cuda")), "tilelang", "sm_90")


def test_rows_of_no_sequence_are_cleared_by_the_kernel_that_has_a_block_for_each_chunk() -> None:
    """What torch would else read and write whole."""
    made = variant(PACKED, roles(), "tilelang", "sm_90").compiled
    solve, scan = made.kernels
    assert solve.owns_tail and not scan.owns_tail and made.tails == ()
    assert [t.name for t in solve.tensors()].count("o") == 1
    clears = made.sources[0].text.partition("# rows that no sequence owns")[2].splitlines()
    assert clears[1].strip().startswith("tl.store(o_ptr + ") and "0.0, mask=in_C" in clears[1] and clears[2].strip() == "return"
    dense = replace(PACKED, varlen=False)
    made = variant(dense, roles(dense), "tilelang", "sm_90").compiled
    assert not made.kernels[0].sweeps and "o_ptr" not in made.sources[0].text
    alone = variant(PACKED, roles_in_one(), "tilelang", "sm_90").compiled
    assert alone.kernels[0].owns_tail and alone.tails == () and "tail + beyond + C" in alone.sources[0].text
    assert not variant(dense, roles_in_one(), "tilelang", "sm_90").compiled.kernels[0].owns_tail


def test_roles_serve_where_there_are_blocks_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def served(sequences: int, HV: int = 32, **more: object) -> str:
        said = gdn_ir.explain(H=8, HV=HV, T=8192, sequences=sequences, arch="sm_90", **({"final_state": True} | more))    # type: ignore[arg-type]
        return next(c.backend for c in said.choices if c.state == "chosen")
    registry.forget()
    assert served(8) == served(1) == served(1, 64) == "tilelang"                            # many, or long ones cut
    assert served(4, 8) == "triton"                        # neither
    assert served(8, final_state=False) == "tilelang"      # of a forward whose gradient is wanted, or o alone
    assert served(8, l2norm=True) == "tilelang"            # after a kernel of Triton's
    for other in ({"K": 64}, {"dtype": "f16"}, {"recurrent": True}, {"decay": "none"},
                  {"state_v_first": True}):
        assert served(8, **other) == "triton", other
    with gdn_ir.use("triton"):
        assert served(8) == "triton"
    with gdn_ir.forbid("tilelang"):
        assert served(8) == "triton"
    with gdn_ir.forbid("triton"):
        assert served(8) == "tilelang"                     # one kernel, all of it TileLang's
        assert served(1) == "torch"                        # here Triton has a part in it
    said = str(gdn_ir.explain(H=8, HV=32, T=8192, sequences=8, arch="sm_90", final_state=True))
    assert "roles in one block for each of 256 sequences and heads" in said
    registry.forget()
    with monkeypatch.context() as m:
        m.setenv("GDN_IR_NO_JIT", "1")                     # and no pack has them
        assert served(8) == "triton"
        registry.forget()
    with monkeypatch.context() as m:
        m.setattr(artifacts, "PACKS", [Store(tmp_path)])   # who loads a pack wants nothing compiled that it lacks
        assert served(8) == "triton"
        registry.forget()
    assert served(8) == "tilelang"
    assert roles_fit("sm_90", PACKED, 1, CROWDED, 1024) and not roles_fit("sm_90", PACKED, 1, CROWDED - 1, 1024)
    assert not roles_fit("sm_80", PACKED, 8, 64, 8192)


@pytest.mark.parametrize("order", [("complete SK", None), ("compute R", "complete SK"), ("read v", "compute R")])
def test_an_order_of_events_that_computes_something_else_is_refused(order: tuple[str, str | None]) -> None:
    """An event left out, or moved behind the one that needs it."""
    event, behind = (Event.of(e) if e else None for e in order)
    options = roles().options("scan")
    assert options.roles

    def moved(r: Role) -> Role:
        if event not in r.events:
            return r
        rest = [e for e in r.events if e != event]
        if behind == Event.of("complete SK"):              # R before what it is computed from
            rest.insert(rest.index(behind), event)
        elif behind:
            rest.insert(rest.index(behind) + 1, event)
        return replace(r, events=tuple(rest))
    wrong = replace(options.roles, roles=tuple(map(moved, options.roles.roles)))
    assert wrong != options.roles
    with pytest.raises(Unsupported, match="roles"):
        variant(PACKED, roles().with_options(scan=replace(options, roles=wrong)), "tilelang", "sm_90")
