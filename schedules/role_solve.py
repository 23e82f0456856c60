"""What makes the inverses of all chunks before the scans that read them, as cooperating roles: of the forward and of the
derived backward alike."""
from __future__ import annotations

from dataclasses import replace

from gdn_ir.schedules.roles import REGISTERS, Roles
from gdn_ir.schedules.schedule import KernelOptions, Schedule

KERNEL = "solve"
WALK, SHORT = 8, 2                                         # chunks of a sequence that a block goes through
MANY = 1500                                                # inverses from which long walks win on an H100


def solving(scaled: bool, stored: tuple[str, ...], fades: bool = False) -> Roles:
    """The inverses of all chunks at once, of which a block walks through several: aux multiplies K K^T and makes M, two warps
    invert its blocks of 16 rows and join them, as in FUSED. A chunk is one chain, in which most warps wait: four blocks beside
    each other fill a multiprocessor, so k, which is read once, where that chain begins, has one slot. scaled: the inverses'
    columns are, by beta. stored: what else of rows is, of G, total and beta_kept. fades: so is a bound of what a chunk does to
    a state, which needs the norms of keys, the diagonal of K K^T (the step `forget`)."""
    inverse, blocks = "A_beta" if scaled else "A", 4
    registers = REGISTERS // (2 * 128 * blocks)
    bound = {"norms": "reduce(select(index() == index(), kk, 0.0))", "along": "1.0 - (beta * norms)",
             "growth": "reduce(log(max(1.0, max(along, neg(along)))))"} if fades else {}
    bounds = ["compute growth", "compute fade", "store fade"] if fades else []
    return Roles.of({
        "names": {"M": "select(index() > index(), (beta * D) * kk, 0.0)", "A16": f"bf16({inverse})", **bound},
        "roles": [
            {"name": "load", "registers": registers, "events": [
                "load k", "compute G", "fetch g early", "compute beta", "fetch beta early"]},
            {"name": "store", "registers": registers, "events": [
                "compute total", *(f"store {n}" for n in stored), *bounds, f"store {inverse}"]},
            {"name": "inverse", "warps": 2, "registers": registers, "events": ["solve A", "join A16"]},
            {"name": "aux", "rows": "C", "warps": 4, "registers": registers, "events": [
                "issue kk", "complete kk", *(["compute norms"] if fades else []), "compute M"]}],
        "rings": [{"values": ["k"], "depth": 1}, {"values": ["M"], "depth": 2}, {"values": ["A"], "depth": 1},
                  {"values": ["A16"], "depth": 1}, {"values": ["G", "beta"], "depth": 4},
                  *([{"values": ["norms"], "depth": 2}] if fades else [])],
        "blocks": blocks})


def walk(inverses: int) -> int:
    """Chunks of a block's walk: to start one takes about half as long as a chunk, so that walks should be long where there are
    blocks enough for all multiprocessors then."""
    return WALK if inverses >= MANY else SHORT


def solve_as_roles(base: Schedule, chunks: int = WALK) -> Schedule:
    """A schedule whose kernel solve is roles too; each block walks through so many chunks of a sequence. They join an inverse's
    blocks in fp16, as roles that make it beside the scan do: as fine as tf32, but over 65504 it overflows, which takes keys
    that make states grow (beta |k|^2 over 2). Raises ValueError for a schedule that does not make all chunks' inverses in such
    a kernel."""
    if not any(s[0] == "hoist" and s[-1] == KERNEL for s in base.steps):
        raise ValueError(f"solve_as_roles: got {base.name}; accepts a schedule that makes the inverses of all chunks at once")
    joined = ((*s[:-1], "f16") if s[0] == "merge" else s for s in base.steps)
    kernels = {**dict(base.kernels), KERNEL: KernelOptions(None, roles=roles_of(base), backend="tilelang")}
    return replace(base, name=f"{base.name}-{KERNEL}" + f"-{chunks}" * (chunks != WALK), kernels=tuple(kernels.items()),
                   steps=(*joined, ("walk", KERNEL, chunks)))


def roles_of(base: Schedule) -> Roles:
    """The roles that store what a schedule hoists there."""
    hoisted = [str(s[1]) for s in base.steps if s[0] == "hoist" and s[-1] == KERNEL]
    stored = tuple(n if n != "beta" else "beta_kept" for n in hoisted if n in ("G", "total", "beta"))
    return solving("A_beta" in hoisted, stored, any(s[0] == "forget" for s in base.steps))
