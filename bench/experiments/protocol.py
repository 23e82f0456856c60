"""The barriers of roles.py as coroutines: does any role starve, and is a slot ever rewritten while it is still to be read?

    python -m gdn_ir.bench.experiments.protocol
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

# slots, arrivals that fill one, arrivals that free it
RINGS = {"q": (2, 32, 12), "k": (3, 32, 12), "v0": (2, 32, 4), "v1": (2, 32, 4), "gates": (3, 32, 12), "t": (2, 128, 8),
         "p": (2, 128, 8), "o0": (1, 128, 32), "o1": (1, 128, 32)}
Step = tuple[str, str, int, int]                           # wait or arrive, the barrier, chunk, arrivals


def wait_full(ring: str, c: int) -> Step:
    return "wait", f"{ring}.full", c, 0


def wait_free(ring: str, c: int) -> Step:
    return "wait", f"{ring}.free", c, 0


def fill(ring: str, c: int, arrivals: int) -> Step:
    return "arrive", f"{ring}.full", c, arrivals


def release(ring: str, c: int, arrivals: int) -> Step:
    return "arrive", f"{ring}.free", c, arrivals


def state(half: int, chunks: int) -> Iterator[Step]:
    o, v = f"o{half}", f"v{half}"
    for c in range(chunks):
        yield wait_full("k", c)
        if c > 0:
            yield wait_free(o, c - 1)
            yield fill(o, c - 1, 128)
        for ring in (v, "gates", "t", "q"):
            yield wait_full(ring, c)
        for ring in (v, "t", "q"):
            yield release(ring, c, 4)
        yield wait_full("p", c)
        for ring in ("k", "p", "gates"):
            yield release(ring, c, 4)
    if chunks > 0:
        yield wait_free(o, chunks - 1)
        yield fill(o, chunks - 1, 128)


def aux(chunks: int) -> Iterator[Step]:
    for c in range(chunks):
        for ring in ("k", "gates", "q"):
            yield wait_full(ring, c)
        yield wait_free("t", c)
        yield release("q", c, 4)
        yield release("k", c, 4)
        yield wait_free("p", c)
        yield fill("p", c, 128)
        yield fill("t", c, 128)
        yield release("gates", c, 4)


def load(rings: tuple[str, ...], chunks: int) -> Iterator[Step]:
    for c, ring in itertools.product(range(chunks), rings):
        yield wait_free(ring, c)
        yield fill(ring, c, 32)


def store(chunks: int) -> Iterator[Step]:
    for c, ring in itertools.product(range(chunks), ("o0", "o1")):
        yield wait_full(ring, c)
        yield release(ring, c, 32)


def run(chunks: int, seed: int) -> None:
    """One random interleaving. A wait passes as mbarrier.try_wait.parity does: if the phase in progress has another parity."""
    choose = random.Random(seed)
    phase: dict[tuple[str, int], int] = dict.fromkeys(((f"{r}.{e}", i) for r, (n, *_) in RINGS.items()
                                                       for e in ("full", "free") for i in range(n)), 0)
    pending = dict.fromkeys(phase, 0)
    roles: dict[str, Any] = {
        "state 0": state(0, chunks), "state 1": state(1, chunks), "aux": aux(chunks), "load qk": load(("k", "q"), chunks),
        "load v": load(("v0", "v1"), chunks), "load gates": load(("gates",), chunks), "store": store(chunks)}
    at = {name: next(role, None) for name, role in roles.items()}
    while any(at.values()):
        ready = []
        for name, step in at.items():
            if step is None:
                continue
            what, barrier, c, _ = step
            slots, fills, frees = RINGS[barrier.split(".")[0]]
            slot, use = (barrier, c % slots), c // slots
            if what == "wait":
                full = barrier.endswith("full")
                passes = phase[slot] % 2 != (use if full else use + 1) % 2
                meant = phase[slot] == use + 1 if full else phase[slot] == use      # the phase that the role means to see
                assert not passes or meant, (name, step, phase[slot])
                if not passes:
                    continue
            ready.append(name)
        assert ready, f"deadlock with {chunks} chunks: {({n: s for n, s in at.items() if s})}"
        name = choose.choice(ready)
        what, barrier, c, arrivals = at[name]              # type: ignore[misc]
        slots, fills, frees = RINGS[barrier.split(".")[0]]
        if what == "arrive":
            slot, needed = (barrier, c % slots), fills if barrier.endswith("full") else frees
            pending[slot] += arrivals
            assert pending[slot] <= needed, (name, at[name])
            if pending[slot] == needed:
                pending[slot], phase[slot] = 0, phase[slot] + 1
        at[name] = next(roles[name], None)
    assert not any(pending.values()), pending


def main() -> None:
    for chunks, seed in itertools.product(range(12), range(200)):
        run(chunks, seed)
    print("0 to 11 chunks, 200 interleavings each: no deadlock, no phase missed or seen twice")


if __name__ == "__main__":
    main()
