"""A role schedule: which warps of a block compute which values, and in what order. Plain data; nobody writes a barrier.

A role is some warps that run the same events, in order, once a chunk. A value that one role makes and another reads crosses
by a ring in shared memory. All synchronisation follows from the events' order and the rings' depths (protocol.py).

Events, as they are written in JSON:

    load x          ask for a tile of a tensor (by TMA); it is complete when its ring says so
    read x          copy a value from its ring to registers
    write x         copy a value that is computed to registers before to its ring: under products that read those
    fetch x         copy a tensor's elements, or its one, to registers, of which its role computes then
    compute x       compute a value, element by element
    issue x         start the product x; its left operand lies in registers or in a ring, the right one in a ring
    complete x      wait until x is computed (and what was issued before it)
    solve x         the inverse x of I + M, its blocks along the diagonal: M comes to memory in blocks, and so does x
    join x          compute x, an inverse with its columns scaled, of M and those blocks, which warps read of each other
    store x         copy a value from its ring to the tensor x, and wait until its slot has been read; or from the registers
                    that its role computes it to

An event that ends with " late" works on the chunk before: it runs under the next one's products. A fetch that ends with
" early" is of the chunk after: memory has a chunk's time to answer.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from typing import Any

DO = ("load", "read", "write", "fetch", "compute", "issue", "complete", "solve", "join", "store")
MAKE = ("load", "compute", "issue", "solve", "join")        # what a value comes from
REGISTERS = 65536                                          # of a multiprocessor


@dataclass(frozen=True)
class Event:
    """do: one of DO. late: for the chunk before; early: for the one after."""
    do: str
    value: str
    late: bool = False
    early: bool = False

    def __post_init__(self) -> None:
        if self.early and (self.late or self.do != "fetch"):
            raise ValueError(f"event: got {self.do} {self.value}, early{' and late' if self.late else ''}; accepts an early "
                             "fetch")
        if self.late and self.do in ("load", "store", "fetch"):
            raise ValueError(f"event: got {self.do} {self.value} late; accepts what touches no tensor, late")

    def __str__(self) -> str:
        return f"{self.do} {self.value}{' late' if self.late else ' early' if self.early else ''}"

    @staticmethod
    def of(text: str) -> Event:
        words = str(text).split()
        late, early = words[2:] == ["late"], words[2:] == ["early"]
        if len(words) != 2 + late + early or words[0] not in DO:
            raise ValueError(f"event: got {text!r}; accepts '{' | '.join(DO)}', a value's name, and 'late' or nothing "
                             "(of a fetch 'early')")
        return Event(words[0], words[1], late, early)


@dataclass(frozen=True)
class Role:
    """warps: how many; registers: of each thread (a multiple of 8, the same for all roles of a warpgroup). rows: the axis
    that lies on the rows of its products. copies: so many of it, of which each owns a part of the axis `rows`: its values
    that have this axis are parts too."""
    name: str
    events: tuple[Event, ...]
    warps: int = 1
    registers: int = 24
    rows: str = ""
    copies: int = 1


@dataclass(frozen=True)
class Ring:
    """Values that cross roles together, or the warps of one (one producer, one pair of barriers for each of `depth` slots).
    near: they lie next to each other in shared memory, where each else may take a whole kilobyte."""
    values: tuple[str, ...]
    depth: int = 2
    near: bool = False


@dataclass(frozen=True)
class Turn:
    """Roles that alternate: `before` of the role `second` waits for `after` of `first`, which waits for it, `depth` chunks
    later."""
    first: str
    after: Event
    second: str
    before: Event
    depth: int = 1


@dataclass(frozen=True)
class Roles:
    """names: (name, expression) of values that the program does not name, in terms of those it does, of tensors that are loaded
    and of names before it: "k . S16" is a product, "bf16(S)" a cast; casts to float32, twins and padding are not written.
    blocks: so many share a multiprocessor, its registers and its memory."""
    roles: tuple[Role, ...]
    rings: tuple[Ring, ...]
    names: tuple[tuple[str, str], ...] = ()
    turns: tuple[Turn, ...] = ()
    blocks: int = 1

    def __post_init__(self) -> None:
        seen = [r.name for r in self.roles]
        crossing = [v for r in self.rings for v in r.values]
        for what, listed in (("roles", seen), ("rings", crossing)):
            twice = sorted({x for x in listed if listed.count(x) > 1})
            if twice:
                raise ValueError(f"Roles.{what}: {', '.join(twice)} twice")
        if not self.roles:
            raise ValueError("Roles.roles: got none; accepts one or more")
        for r in self.roles:
            for name in ("warps", "registers", "copies"):
                if type(getattr(r, name)) is not int:
                    raise ValueError(f"Roles.roles[{r.name}].{name}: got {getattr(r, name)!r}; accepts a whole number")
            if r.warps not in (1, 2, 4) or r.registers % 8 or not 24 <= r.registers <= 240 or r.copies < 1:
                raise ValueError(f"Roles.roles[{r.name}]: got {r.warps} warps, {r.registers} registers, {r.copies} copies; "
                                 "accepts 1, 2 or 4 warps (a warpgroup), 24 to 240 registers in steps of 8, 1 copy or more")
            if r.copies > 1 and not r.rows:
                raise ValueError(f"Roles.roles[{r.name}]: copies own parts of the axis `rows`, which it lacks")
        for ring in self.rings:
            if ring.depth < 1 or not ring.values:
                raise ValueError(f"Roles.rings: got {ring}; accepts values, and a depth from 1 on")
        for t in self.turns:
            if t.depth < 1 or any(e.late or e.early for e in (t.after, t.before)):
                raise ValueError(f"Roles.turns: got {t}; accepts a depth from 1 on and events that are neither late nor early")
        for group in self.warpgroups():
            if sum(r.warps for r in group) != 4 or len({r.registers for r in group}) > 1:
                raise ValueError(f"Roles.roles: {', '.join(r.name for r in group)} share a warpgroup; accepts roles, in order, "
                                 "that fill 4 warps and have the same registers")
        if type(self.blocks) is not int or self.blocks < 1:
            raise ValueError(f"Roles.blocks: got {self.blocks!r}; accepts a whole number from 1 on")
        groups = self.warpgroups()
        used = sum(128 * group[0].registers for group in groups)
        each_has = REGISTERS // (128 * len(groups) * self.blocks) // 8 * 8
        pool = 128 * len(groups) * each_has                # what a block is started with, no more
        if used > pool:
            each = " + ".join(str(group[0].registers) for group in groups)
            raise ValueError(f"Roles.roles: got {each} registers a thread, by warpgroup; accepts {pool // 128} in all, as many "
                             f"as a block of {len(groups)} warpgroups starts with")

    def warpgroups(self) -> list[list[Role]]:
        """The roles (a role once for each of its copies) by the warpgroup that they are in."""
        groups: list[list[Role]] = []
        for r in self.roles:
            for _ in range(r.copies):
                if not groups or sum(x.warps for x in groups[-1]) >= 4:
                    groups.append([])
                groups[-1].append(r)
        return groups

    @property
    def warps(self) -> int:
        return sum(r.warps * r.copies for r in self.roles)

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = asdict(Role("", ()))
        roles = [{n: v for n, v in vars(r).items() if n in ("name", "warps", "registers") or v != plain[n]}
                 | {"events": [str(e) for e in r.events]} for r in self.roles]
        turns = [{**vars(t), "after": str(t.after), "before": str(t.before)} for t in self.turns]
        rings = [{"values": list(r.values), "depth": r.depth, **({"near": True} if r.near else {})} for r in self.rings]
        return {"names": dict(self.names), "roles": roles, "rings": rings, **({"turns": turns} if turns else {}),
                **({"blocks": self.blocks} if self.blocks > 1 else {})}

    @staticmethod
    def of(data: object) -> Roles:
        """What `data` wrote. Raises ValueError naming the field that is missing, unknown or out of range."""
        d = known(Roles, data, "roles", ("roles", "rings"))
        roles = [known(Role, r, "roles.roles", ("name", "events")) for r in d["roles"]]
        rings = [known(Ring, r, "roles.rings", ("values",)) for r in d["rings"]]
        turns = [known(Turn, t, "roles.turns", ("first", "after", "second", "before")) for t in d.get("turns", [])]
        return Roles(tuple(Role(**{**r, "events": tuple(Event.of(e) for e in r["events"])}) for r in roles),
                     tuple(Ring(**{**r, "values": tuple(r["values"])}) for r in rings),
                     tuple((n, text) for n, text in d.get("names", {}).items()),
                     tuple(Turn(**{**t, "after": Event.of(t["after"]), "before": Event.of(t["before"])}) for t in turns),
                     d.get("blocks", 1))


def known(kind: type, data: object, name: str, needed: tuple[str, ...]) -> Mapping[str, Any]:
    """An object with fields of the dataclass, those needed among them."""
    names = [f.name for f in fields(kind)]
    if not isinstance(data, dict) or set(data) - set(names) or set(needed) - set(data):
        raise ValueError(f"{name}: got {data!r}; accepts an object with {', '.join(names)} (at least {', '.join(needed)})")
    return data


# The scan of the plan "solve". With the state transposed V lies on the rows of its products, so each left operand is made of
# what the same warpgroup has in registers. ptxas takes all from an issue to the next wait for every product as one stage, in
# which nothing else may touch an accumulator: each copy of `state` has three a chunk. Roles with the longest text come first:
# each after them is printed two levels deeper.
SOLVED = Roles.of({
    "names": {"gamma": "exp(G)", "rest": "exp(total - G)", "whole": "exp(total)", "S16": "bf16(S)", "SK": "k . S16",
              "R": "bf16(v - (gamma * SK))", "QS": "q . S16", "decayed": "whole * S", "W": "bf16(rest * u)", "u16": "bf16(u)",
              "P": "bf16(D * qk)", "entering": "gamma * QS", "inside": "P . u16", "written": "k . W", "o16": "bf16(o)"},
    "roles": [
        {"name": "load", "registers": 32, "events": ["load k", "load q"]},
        {"name": "load_values", "registers": 32, "events": ["load v", "load A_beta"]},
        {"name": "sums", "registers": 32, "events": ["compute G", "compute gamma", "compute rest", "compute whole"]},
        {"name": "store", "registers": 32, "events": ["store o"]},
        {"name": "state", "copies": 2, "rows": "V", "warps": 4, "registers": 208, "events": [
            "compute S16", "issue SK", "compute o16 late", "read v", "complete SK",
            "issue QS", "compute R", "issue u", "compute decayed", "complete u",
            "compute W", "issue written", "compute u16", "compute entering", "issue inside", "complete inside"]},
        {"name": "aux", "rows": "C", "warps": 4, "registers": 64, "events": ["issue qk", "complete qk", "compute P"]}],
    "rings": [{"values": ["q"], "depth": 2}, {"values": ["k"], "depth": 3}, {"values": ["v"], "depth": 2},
              {"values": ["A_beta"], "depth": 2}, {"values": ["G", "gamma", "rest", "whole"], "depth": 3},
              {"values": ["P"], "depth": 2}, {"values": ["o16"], "depth": 1}],
})

# One warp of both of the backward's scans: what decays, of sums that were made before.
DECAYS = {"name": "sums", "registers": 80, "events": [
    "compute G", "compute gamma", "compute rest", "compute whole", "compute beta", "fetch total early", "fetch G early",
    "fetch beta early"]}

# The backward's two scans, of the plan "gathered". The one that runs again: each chunk's entering state and its u go to memory,
# by way of rings, under the products that read the same registers.
AGAIN = Roles.of({
    "names": {"gamma": "exp(G)", "rest": "exp(total - G)", "whole": "exp(total)", "S16": "bf16(S_again)", "SK": "k . S16",
              "R": "bf16(r_again)", "decayed": "whole * S_again", "W": "bf16(rest * u_again)", "u16": "bf16(u_again)",
              "written": "k . W"},
    "roles": [
        {"name": "load", "registers": 80, "events": ["load k", "load A", "load v"]},
        DECAYS,
        {"name": "store_state", "registers": 80, "events": ["store S_kept"]},
        {"name": "store", "registers": 80, "events": ["store u"]},
        {"name": "state", "copies": 2, "rows": "V", "warps": 4, "registers": 208, "events": [
            "compute S16", "compute decayed", "issue SK", "write S16", "read v", "complete SK", "compute R", "issue u_again",
            "complete u_again", "compute W", "issue written", "compute u16", "complete written"]}],
    "rings": [{"values": ["k"], "depth": 3}, {"values": ["A"], "depth": 3}, {"values": ["v"], "depth": 2},
              {"values": ["G", "gamma", "rest", "whole", "beta"], "depth": 4}, {"values": ["S16"], "depth": 1},
              {"values": ["u16"], "depth": 1}],
})

# The adjoint of the state, in reverse.
BACK = Roles.of({
    "names": {"gamma": "exp(G)", "rest": "exp(total - G)", "whole": "exp(total)", "d_S16": "bf16(d_S)", "SK": "d_S16 . k",
              "R": "bf16(d_u)", "d_r32": "A . R", "d_r16": "bf16(d_r)", "X": "bf16((d_o * scale) * gamma)", "QX": "X . q",
              "Y": "bf16(neg(d_v) * gamma)", "KY": "Y . k", "decayed": "d_S * whole"},
    "roles": [
        {"name": "load", "registers": 80, "events": ["load k", "load q", "load d_o", "load d_u_o", "load A"]},
        DECAYS,
        {"name": "store_state", "registers": 80, "events": ["store d_S"]},
        {"name": "store", "registers": 80, "events": ["store d_r"]},
        {"name": "state", "copies": 2, "rows": "V", "warps": 4, "registers": 208, "events": [
            "compute d_S16", "issue SK", "write d_S16", "read d_o", "compute X", "read d_u_o", "complete SK", "compute R",
            "issue d_r32", "compute decayed", "issue QX", "complete d_r32", "compute Y", "issue KY", "compute d_r16",
            "complete KY"]}],
    "rings": [{"values": ["k"], "depth": 2}, {"values": ["q"], "depth": 2}, {"values": ["d_o"], "depth": 2},
              {"values": ["d_u_o"], "depth": 2}, {"values": ["A"], "depth": 2},
              {"values": ["G", "gamma", "rest", "whole", "beta"], "depth": 4}, {"values": ["d_S16"], "depth": 1},
              {"values": ["d_r16"], "depth": 1}],
})

# The same where nothing of u's gradient was made before: aux has P ready, and the states multiply it beside what they carry.
BACK_ALONE = Roles.of({
    "names": {**dict(BACK.names), "P": "bf16(D * qk)", "OP": "d_o . P"},
    "roles": [
        {"name": "load", "registers": 32, "events": ["load k", "load q", "load d_o", "load A"]},
        *({**r, "registers": 32} for r in BACK.data()["roles"][1:-1]),
        {"name": "state", "copies": 2, "rows": "V", "warps": 4, "registers": 208, "events": [
            "read d_o", "compute d_S16", "issue OP", "issue SK", "write d_S16", "compute X", "complete SK", "compute R",
            "issue d_r32", "compute decayed", "issue QX", "complete d_r32", "compute Y", "issue KY", "compute d_r16",
            "complete KY"]},
        {"name": "aux", "rows": "C", "warps": 4, "registers": 64, "events": ["issue qk", "complete qk", "compute P"]}],
    "rings": [{"values": ["k"], "depth": 3}, {"values": ["q"], "depth": 2}, {"values": ["d_o"], "depth": 2},
              {"values": ["P"], "depth": 2}, {"values": ["A"], "depth": 2},
              {"values": ["G", "gamma", "rest", "whole", "beta"], "depth": 4}, {"values": ["d_S16"], "depth": 1},
              {"values": ["d_r16"], "depth": 1}],
})

# What follows both scans, of all chunks at once, of which a block walks through several: the plans "gathered-merged" and
# "gathered-turns" with what is of rows alone apart. dq and dk have a chunk's rows each, their left operands in shared memory,
# but for what they made of products; P and d_kk lie in rings, for they are read lying across. These and M are taken in two
# parts, for of the sums of their products most cancels. values has what needs no product. With all that memory is full: what
# is of rows lies in one slot, which dk gives back before its last products.
INNER = Roles.of({
    "names": {"gamma": "exp(G)", "rest": "exp(total - G)", "OU": "d_o . u", "P": "bf16(d_qk)", "P_low": "bf16(d_qk - P)",
              "OS": "d_o . S", "entering": "gamma * (scale * OS)", "Pk": "P . k", "Pk_low": "P_low . k",
              "q_sum": "reduce(q * d_q)", "d_q16": "bf16(d_q)",
              "RU": "d_r . u", "lower": "select(index() > index(), RU, 0.0)",
              "M": "select(index() > index(), neg(lower), 0.0) * D", "M16": "bf16(M)", "M_low": "bf16(M - M16)",
              "Y": "bf16(d_kk)", "Y_low": "bf16(d_kk - Y)", "RS": "d_r . S", "erased": "neg(gamma) * RS",
              "Mk": "M16 . k", "by_M16": "erased + Mk", "Mk_low": "M_low . k", "by_r": "by_M16 + Mk_low",
              "r_sum": "reduce(k * by_r)", "erasing": "by_r * beta",
              "US": "d_S . u", "u_sum": "reduce(US * k)", "written": "US * rest", "PTq": "P . q", "by_P": "written + PTq",
              "PTq_low": "P_low . q", "by_q": "by_P + PTq_low", "YTk": "Y . k", "by_Y": "by_q + YTk",
              "YTk_low": "Y_low . k", "by_k": "by_Y + YTk_low", "k_sum": "reduce(k * by_k)", "d_k16": "bf16(d_k)",
              "v_sum": "reduce(d_r * v)", "S_sum": "reduce(d_S * S)", "d_v16": "bf16(d_v)"},
    "roles": [
        {"name": "load", "registers": 56, "events": ["load d_o", "load u", "load k", "load q"]},
        {"name": "load_values", "registers": 56, "events": ["load d_r", "load v", "load S", "load d_S"]},
        {"name": "sums", "registers": 56, "events": [
            "fetch total", "fetch G", "fetch beta", "compute G", "compute gamma", "compute rest", "compute beta"]},
        {"name": "store", "registers": 56, "events": ["store d_q", "store d_k"]},
        {"name": "dq", "rows": "C", "warps": 4, "registers": 168, "events": [
            "issue OU", "issue OS", "complete OU", "compute d_qk", "compute P", "compute P_low", "complete OS",
            "compute entering", "issue Pk", "issue Pk_low", "complete Pk_low", "compute q_sum", "compute d_q16", "store row1"]},
        {"name": "dk", "rows": "C", "warps": 4, "registers": 208, "events": [
            "issue RU", "issue RS", "complete RU", "compute M", "compute M16", "compute M_low", "compute Y", "compute Y_low",
            "complete RS", "compute erased", "issue Mk", "issue Mk_low", "issue US", "complete Mk_low", "compute r_sum",
            "complete US", "compute erasing", "compute u_sum", "compute written", "issue PTq", "issue PTq_low", "issue YTk",
            "issue YTk_low", "complete YTk_low", "compute k_sum", "compute d_k16", "store row0", "store row3", "store row2"]},
        {"name": "values", "warps": 4, "registers": 80, "events": [
            "compute d_v16", "store d_v", "compute v_sum", "store row5", "compute S_sum", "store row4"]}],
    "rings": [*({"values": [n], "depth": 1} for n in ("u", "d_o", "k", "q", "d_r", "S", "d_S", "v")),
              {"values": ["G", "gamma", "rest", "beta"], "depth": 1, "near": True}, {"values": ["P", "P_low"], "depth": 1},
              {"values": ["Y", "Y_low"], "depth": 1}, {"values": ["d_q16"], "depth": 1}, {"values": ["d_k16"], "depth": 1}],
})


def on_diagonal(roles: Roles) -> Roles:
    """A scan of the backward whose solve's product is added onto what rounding took of its operand R (the step `diagonal`):
    that is made in place, in the registers that R was computed of."""
    names = dict(roles.names)
    whole = names["R"].removeprefix("bf16(").removesuffix(")")
    names |= {"R_low": f"{whole} - R", **({} if "A . R" in names.values() else {"AR": "A . R"})}
    return with_events(replace(roles, names=tuple(names.items())), {
        "compute R": ("compute R", "compute R_low"), "issue u_again": ("issue AR",), "complete u_again": ("complete AR",)})


def in_two_parts(again: Roles) -> Roles:
    """The scan that runs again, where what is written to its state has two parts (the step `in_parts`): the second is made
    under the product of the first."""
    names = (*again.names, ("W_low", "bf16((rest * u_again) - W)"), ("written_low", "k . W_low"))
    return with_events(replace(again, names=names), {
        "issue written": ("issue written", "compute W_low", "issue written_low"),
        "complete written": ("complete written_low",)})


def scaled_last(roles: Roles) -> Roles:
    """Roles of kernels whose scale comes last (the step `scale_last`): of what is stored."""
    said = {"(d_o * scale)": "d_o", "(scale * OS)": "OS", "bf16(d_q)": "bf16(scale * d_q)", "bf16(d_k)": "bf16(scale * d_k)",
            "bf16(d_v)": "bf16(scale * d_v)"}
    return replace(roles, names=tuple((n, reduce(lambda t, old: t.replace(old, said[old]), said, text))
                                      for n, text in roles.names))


def with_events(roles: Roles, instead: Mapping[str, tuple[str, ...]]) -> Roles:
    """With other events in place of some."""
    return replace(roles, roles=tuple(
        replace(r, events=tuple(Event.of(t) for e in r.events for t in instead.get(str(e), (str(e),)))) for r in roles.roles))


def in_halves(roles: Roles) -> Roles:
    """For blocks that each own as much as one copy of a role did: they have registers to spare, and memory for another slot of
    what is loaded and held until the end of its chunk, which comes sooner."""
    did = {do: {e.value for r in roles.roles for e in r.events if e.do == do} for do in ("load", "read")}
    rings = (replace(x, depth=x.depth + 1) if {*x.values} <= did["load"] - did["read"] else x for x in roles.rings)
    return replace(roles, rings=tuple(rings), roles=tuple(
        replace(r, copies=1, registers=240 if r.copies > 1 else 80) for r in roles.roles))


# The scan of the plan "fused": the inverse is made beside the states. aux multiplies K K^T and Q K^T and makes M; two warps
# invert M's blocks of 16 rows and join them, each what lies in its columns, and need nothing else of each other; who loads sums
# the decays, of which it has asked for the next already. Three chunks are at work at once: one is multiplied with the state,
# one waits in A16 and P, one is inverted. The states ask for both products by S at once, for so they do with fewer registers,
# which the two warps and aux want.
FUSED = Roles.of({
    "names": {**dict(SOLVED.names), "gamma": "exp2(G)", "rest": "exp2(total - G)", "whole": "exp2(total)",
              "M": "select(index() > index(), (beta * D) * kk, 0.0)", "A16": "bf16(A_beta)"},
    "roles": [
        {"name": "load", "registers": 56, "events": [
            "load k", "compute G", "compute total", "fetch g early", "compute gamma", "compute rest", "compute whole",
            "compute beta", "fetch beta early", "load v", "load q"]},
        {"name": "store", "registers": 56, "events": ["store o"]},
        {"name": "inverse", "warps": 2, "registers": 56, "events": ["solve A", "join A16"]},
        {"name": "state", "copies": 2, "rows": "V", "warps": 4, "registers": 192, "events": [
            "compute o16 late", "compute S16", "issue SK", "issue QS", "read v", "compute decayed", "complete QS", "compute R",
            "issue u", "compute entering", "complete u", "compute W", "issue written", "compute u16", "issue inside",
            "complete inside"]},
        {"name": "aux", "rows": "C", "warps": 4, "registers": 72, "events": [
            "issue kk", "complete kk", "compute M", "issue qk", "complete qk", "compute P"]}],
    "rings": [{"values": ["q"], "depth": 2}, {"values": ["k"], "depth": 3}, {"values": ["v"], "depth": 2},
              {"values": ["M"], "depth": 2}, {"values": ["A"], "depth": 2}, {"values": ["A16"], "depth": 2},
              {"values": ["G", "gamma", "rest", "whole", "beta"], "depth": 4},
              {"values": ["P"], "depth": 2}, {"values": ["o16"], "depth": 1}],
})
