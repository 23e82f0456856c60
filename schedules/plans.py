"""The plans that schedules are made of: the gated delta rule cut into kernels in several ways, each as a list of steps.

    naive     one kernel; the solve row by row
    fused     one kernel; the solve as an inverse, blocks merged by products
    solve     the inverse, its columns scaled by beta, for all chunks at once; then one scan
    states    the inverse; a scan that only carries the state; the output for all chunks at once
    wy        as states, with both halves of u (it is affine in the state) computed for all chunks at once
    segments  as states, with each sequence's scan cut into segments of chunks, which run at once: first for what they do to a
              state (transition and offset), then, composed, from the state that each starts with
    cut       the same of solve: the last scan makes the output too
    cut-fused  the same of fused: the last scan makes the inverses too; those of the chunks that transition and offset look at
              are made before

(What has faded at a segment's end is left out of the two where the log decay's sums are there to tell: `sums`. What the op
normalises may be so in a kernel of its own, before all others: `norm`.)

The kernels are called solve, scan and output; and transition, offset and compose.

The derived backward has plans of its own (`backward_plan`), of the same steps:

    naive     its scans, one kernel each; the solves row by row
    fused     likewise, with fewer products: u is kept, and what reverse mode derives is rearranged
    states    solve, as above; again, a scan that saves each chunk's entering state and u; local, for all chunks at once, what
              needs no adjoint of the state; back, a scan in reverse that only carries that adjoint; inner and grads, for all
              chunks at once, the other gradients; heads, the sums over value heads that share a key head
    grouped   as states, but grads owns a key head, steps through the value heads that share it, and writes their sum; what
              heads still sums, and what inner hands to grads, is stored in the inputs' dtype
    inside    as grouped, with local's sums so too: there is no heads
    merged    as states, with inner and grads as one kernel, and what heads sums in the inputs' dtype
    segments  as grouped, with both scans cut into segments, as above: before each of them a transition, an offset and a compose
              of its own (again_transition, back_transition and so on)
    gathered  as grouped, but inner makes d_q too, for it reads the states anyway; so local makes only what back reads, of the
              inputs alone, and comes first: back needs nothing of again, and the two may run beside each other
    gathered-merged  as gathered, with inner and grads as one kernel, which steps through K in parts; what the decay's gradient
              needs is taken of sums of the other gradients' parts (`trade`, `collect`)
    gathered-turns  as gathered-merged, but blocks of value heads that share a key head add their parts one after another in
              memory: there is no heads
    gathered-segments  the same of segments: what leads to back between what leads to again, each beside one that it reads
              nothing of
    gathered-turns-segments  the same, with one kernel for inner and grads as in gathered-turns

A forward may leave values that its kernels store anyway (LEFT), which its backward then reads instead of computing them again:

    nothing   all is computed again
    inverse   the inverse A and the sums of the log decay: there is no solve
    states    these, the state entering each chunk and u: there is no again either

A serial scan waits for what it does not read ahead, and hardware copies ahead no less than four bytes at a place: where beta
has two, one for each row, a scan reads it as float32 from an earlier kernel (WIDENS; a forward when told to): from solve,
where there is one; else from local; else from one of its own, widen.
"""
from __future__ import annotations

from functools import lru_cache

from gdn_ir.nodes import Node, Op
from gdn_ir.program import Program, ScanView, toposort

Steps = tuple[tuple[str | int, ...], ...]
PLANS = {"forward": ("naive", "fused", "solve", "states", "wy", "segments", "cut", "cut-fused"),
         "backward": ("naive", "fused", "states", "grouped", "inside", "merged", "segments", "gathered", "gathered-segments",
                      "gathered-merged", "gathered-turns", "gathered-turns-segments")}
KEEP = ("nothing", "inverse", "states")                    # each with what those before it leave
WIDENS = PLANS["backward"][3:]                              # scans read a float32 beta
CHUNK = 64                                                 # tokens of a chunk of which something is left
SMALL_K = 64                                               # K up to which one product more of a state costs little
LESS: Steps = (("factor",), ("regroup",), ("exchange",), ("symmetric",))       # fewer products than reverse mode derives


@lru_cache(maxsize=16)
def left(keep: str, decay: bool = True, erase: bool = True) -> tuple[str, ...]:
    """The tensors that a forward leaves to its backward. Without erase there is no inverse, and u is beta * v."""
    if keep not in KEEP:
        raise ValueError(f"keep: got {keep!r}; accepts {', '.join(KEEP)}")
    inverse = ("A", *(("G", "total") if decay else ())) if erase else ()
    return {"nothing": (), "inverse": inverse, "states": (*inverse, "S", *(("u",) if erase else ()))}[keep]


def plan(name: str, erase: bool = True, io: str = "bf16", chunk: int = 64, block: int = 16, sums: bool = False,
         segment: int = 32, leave: tuple[str, ...] = (), widen: bool = False, scaled: bool = False,
         norm: bool = False) -> Steps:
    """The steps of a plan. Without erase there is nothing to solve: what is left of the plan is where the output is computed.
    Float32 inputs merge the inverse's blocks in split tf32, others in tf32. sums: the running sums of the log decay are
    computed beside the inverse, not in the serial scan. segment: chunks of a segment. leave: what is left to the backward.
    widen: the scan reads beta, if it does, as float32 from beside the inverse. scaled: the plan fused scales the inverse's
    columns by beta, merges its blocks in fp16 and has the log decay's sums in base 2: as roles want it. norm: q and k, which
    the program normalises, are so before all else, once for each key head (a kernel norm).
    Raises ValueError for a name it lacks."""
    merges = {"f64": "f64", "f32": "tf32x3"}.get(io, "f16" if scaled else "tf32")
    invert: Steps = (("invert", "u", "A"), ("merge", "A", chunk, block, merges)) if erase else ()
    shared: Steps = (("hoist", "G", "f32", "solve"), ("hoist", "total", "f32", "solve")) if erase and sums else ()
    # the scan need not read beta: the stored inverse's columns are scaled by it
    absorbed: Steps = (("absorb", "u", "A_beta"), ("hoist", "A_beta", "io", "solve"))
    alone: Steps = (("hoist", "A", "io", "solve"),         # the backward needs it without beta
                    *((("hoist", "beta", "f32", "solve"),) if widen else ()))
    hoist: Steps = (*(alone if leave else absorbed), *shared) if erase else ()
    halves: Steps = (("distribute", "u", "u0", "w"), ("hoist", "u0", "io", "solve"), ("hoist", "w", "io", "solve"), *shared)
    output: Steps = (("sink", "o", "u" if erase else "", "output"),)
    scan: Steps = (("name_kernel", "S", "scan"),)
    table: dict[str, Steps] = {
        "naive": (),
        "fused": (*scan, *invert, *((absorbed[0], ("base_two", "G")) if scaled else ()), ("move_scales",)),
        "solve": (*scan, *invert, *hoist, ("move_scales",)),
        "states": (*scan, *invert, *hoist, *output, ("move_scales",)),
        "wy": (*scan, *invert, *(halves if erase else ()), *output, ("move_scales",)),
    }
    fades: Steps = (("forget", "S"),) if erase and sums else ()
    in_parts: Steps = (("segment", "S", segment, "f64" if io == "f64" else "tf32x3"), *fades)
    for cut, whole in (("segments", "states"), ("cut", "solve")):
        table[cut] = (*table[whole], *in_parts)
    # the inverses are hoisted out of transition and offset alone; then the scan is made what fused is, scaled
    near: Steps = (("hoist_within", "A_beta,G,total", "io,f32,f32", "solve"), ("base_two", "G"),
                   *((("merge", "A", chunk, block, "f16"),) if merges == "tf32" else ())) if fades else ()
    table["cut-fused"] = (*scan, *invert, *(absorbed[:1] if erase else ()), ("move_scales",), *in_parts, *near)
    if name not in table:
        raise ValueError(f"plan: got {name!r}; accepts {', '.join(table)}")
    first: Steps = (("hoist_shared", "q,k", "io", "norm"),) if norm else ()
    return (*first, *table[name], ("leave", *leave)) if leave else (*first, *table[name])


def narrow(beta: str) -> bool:
    """Whether what is stored in a dtype is too small for a copy ahead of a loop, one at a place."""
    return beta in ("bf16", "f16")


def finer(steps: Steps, io: str, K: int, arch: str) -> Steps:
    """The steps of a plan of Triton's, and in bf16 on sm_90, where a GPU has run them, then those by which less is lost than
    its products' operands round: of its inverses' (`diagonal`), and, where products over K are small, of what is written to
    the state that the forward carries (`in_parts`: one product more). f16 rounds an eighth as much: it errs little enough."""
    kernels = next((s[2:] for s in steps if s[0] == "separate"), ("scan",))
    more: list[tuple[str | int, ...]] = []
    for name in (s[1] for s in steps if s[0] == "invert" and (io, arch) == ("bf16", "sm_90")):
        more += [("diagonal", kernels[-1 if name == "d_r" else 0], name, io)]
        carried = {"u": "S", "u_again": "S_again"}.get(str(name), "")
        more += [("in_parts", kernels[0], io, carried)] if carried and K <= SMALL_K else []
    return (*steps, *more)


def backward_plan(name: str, program: Program, io: str = "bf16", chunk: int = 64, block: int = 16, keep: str = "nothing",
                  beta: str = "", segment: int = 32, norm: bool = False) -> Steps:
    """The steps of a plan of a derived backward: those whose values `program` has (it computes only the gradients that were
    asked for). keep: what it is given. beta: its dtype, where it is not io. segment: chunks of a segment. norm: q and k, which
    the program normalises, are so in a kernel norm before all others, and their gradients made of those of the normalised ones
    in a kernel unnorm after them. Raises ValueError for a name it lacks."""
    named = {note.name for note in program.notes.values() if note.name}
    stores = [n for n in program.nodes() if n.op is Op.STORE and not n["tensor"].temp]
    scans = [r for r in program.roots if r.op is Op.SCAN]
    kernels = ("again", "back") if len(scans) == 2 else ("back",)
    some = next(n for n in program.nodes() if program.name_of(n) and n in set(program_values(scans[-1])))
    parted: Steps = (("separate", str(program.name_of(some)), *kernels),)
    heads: Steps = (("sum_after", "heads"),) if any(n["sum"] for n in stores) else ()
    if name not in PLANS["backward"]:
        raise ValueError(f"plan: got {name!r}; accepts {', '.join(PLANS['backward'])}")
    back = scans[-1]["carries"] == ("d_S",)
    turns = name.startswith("gathered-turns")
    merges = {"f64": "f64", "f32": "tf32x3"}.get(io, "tf32")
    solves = [n for n in ("u_again", "d_r") if n in named]
    known = set(left(keep, "G" in named, bool(solves)))
    steps: list[tuple[str | int, ...]] = [*parted]
    if "S" in known and len(scans) == 2:
        steps += [("given", "S", "io"), *([("given", "u", "io")] if "u" in named & known else [])]
        solves = [n for n in solves if n != "u_again"]
    elif len(scans) == 2 and name != "naive":
        steps += [("keep", "u", "u_again", "io")] if {"u", "u_again"} <= named else []
        steps += [("store_as", "S_kept", "io")]
    if "A" in known:
        steps += [("invert", n, "A") for n in solves]
        steps += [("given", "A", "io", "u")] if solves else []
        steps += [("given", n, "f32") for n in ("G", "total") if n in named]
    steps += [("wrap", "q,k", "io", "norm", "unnorm")] if norm else []
    if name == "naive":
        return (*steps, *heads)
    if name == "fused":
        return (*steps, *LESS, ("move_scales",), *heads)
    steps += [("turn", "d_u")] if "d_u" in named and "d_r" not in named else []
    steps += [s for s in LESS if s != ("symmetric",) or not (turns or name == "gathered-merged")]
    if "A" not in known:
        steps += [("invert", n, "A") for n in solves]
        steps += [("merge", "A", chunk, block, merges), ("hoist", "A", "io", "solve")] if solves else []
        steps += [("hoist", n, "f32", "solve") for n in ("G", "total") if n in named] if solves else []
    widens = name in WIDENS and narrow(beta or io) and back and "d_r" in named
    if widens and "S" not in known:
        steps += [("hoist", "beta", "f32", "widen" if "A" in known else "solve")]
    out = {n["tensor"].name for n in stores}
    gathers = name.startswith("gathered") and "d_k" in out and "d_r" in named
    if not back:                                           # nothing is carried: all chunks at once already
        return (*steps, ("move_scales",), *heads)
    if "d_r" in named:
        steps += [("peel", "d_u", "d_u_o"), ("turn", "d_u_o"), ("hoist", "d_u_o", "io", "local")]
    steps += [("hoist", "beta", "f32", "local")] if widens and "S" in known else []
    if not gathers:
        steps += [("hoist", "d_qk", "io", "local")] if "d_qk" in named else []
        steps += [("lift", "d_q", "local")] if "d_q" in out else []
        steps += [("peel", "d_G", "d_G_o"), ("hoist", "d_G_o", "f32", "local")] if "d_G" in named else []
    late = [n for n in ("d_k", "d_g", "d_beta", "d_v", *(("d_q",) if gathers else ())) if n in out]
    steps += [("sink", ",".join(late), "d_r" if "d_r" in named else "", "grads")] if late else []
    merges_all = turns or name in ("merged", "gathered-merged")
    if late and "d_r" in named and "d_k" in out and not merges_all:            # all at once strains a block's registers
        steps += [("peel", "d_k", "d_k_r", "d_S"), ("hoist", "d_k_r", "f32" if name == "states" else "io", "inner")]
        steps += [("peel", "d_G", "d_G_r", "d_S"), ("hoist", "d_G_r", "f32", "inner")] if "d_g" in out else []
        steps += [("lift", n, "inner") for n in late if n in ("d_beta", "d_v", "d_q")]
        steps += [("share", "inner")] if name in WIDENS else []
    if merges_all and gathers:
        steps += [("trade", "grads"), ("collect", "grads"), ("share", "grads"), ("chain", "grads")]
    steps += [("move_scales",)]
    if heads and name != "states":
        owned = () if merges_all else {"inside": ("d_q", "d_k")}.get(name, ("d_k",))
        k = "k_kept" if norm else "k"                      # held for all value heads, it would strain grads' registers
        anew = (k,) if gathers and "d_g" in out else ()
        steps += [("sum_inside", "local")] if "d_q" in {*owned} & out else []
        steps += [("sum_inside", "grads", *anew)] if "d_k" in {*owned} & out else []
        heads = (("sum_after", "heads", "io"),) if {"d_q", "d_k"} & out - set(owned) and not turns else ()
    again = len(scans) == 2 and "S" not in known
    if not name.endswith("segments"):
        early: Steps = (("move", "local", "again"),) if gathers and again else ()
        return (*steps, *early, *heads)
    cut: list[tuple[str | int, ...]] = []
    fades = "G" in named and bool(solves) and "A" not in known        # the kernel solve is there to tell
    both = (("again", "S_again"), ("back", "d_S"))
    for kernel, carried in both if again else both[1:]:
        cut.append(("segment", carried, segment, "f64" if io == "f64" else "tf32x3", f"{kernel}_"))
        cut += [("forget", carried)] if fades else []
    if gathers and again:
        places = [*([("back_reach", "again_transition")] if fades else []), ("local", "again_compose"),
                  ("back_transition", "local"), ("back_offset", "again"), ("back_compose", "again")]
        cut += [("move", *place) for place in places]
    return (*steps, *heads, *cut)


def program_values(scan: Node) -> list[Node]:
    view = ScanView.of(scan)
    return toposort(view.nexts + view.effects)
