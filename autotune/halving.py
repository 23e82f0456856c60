"""Which candidate is fastest on each shape: successive halving, every round timed in turns beside one reference, the last few
once more all together."""
from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdn_ir.autotune.keys import Shape, of_schedule
from gdn_ir.autotune.pool import Worker
from gdn_ir.autotune.prune import Ready, idle
from gdn_ir.autotune.space import Frame, compose, widened
from gdn_ir.backends.base import Call
from gdn_ir.schedules.defaults import default

if TYPE_CHECKING:
    from gdn_ir.autotune.tune import Tuner

TOGETHER = 8                                               # timed in turns; their memory is held at once
KEPT = 4                                                   # one in so many goes on to the next round ...
FINALISTS = 5                                              # ... until so few are left, which are measured once more
NEAR = 1.15                                                # a frame within this of the best is searched whole
LAST = -1                                                  # the number of the last round
FIRST = 0.3                                                # part of the time that the first shape may take, for it tries all


@dataclass(frozen=True)
class Timing:
    """ms: the median; ratio: over the reference's, in the same turns."""
    ms: float
    ratio: float


def timed_rounds(tuner: Tuner, worker: Worker, good: list[Ready], shapes: list[Shape]) -> None:
    """Finish shapes one after another, while the budget lasts."""
    end = tuner.start + tuner.limits.budget
    for i, shape in enumerate(shapes):
        left = end - time.monotonic()
        if left <= 0 or not good:
            why = "the budget ended" if good or left <= 0 else "no candidate is both compiled and right"
            tuner.display.say(f"{len(shapes) - i} shapes not tuned: {why}")
            return
        share = max(1 / (len(shapes) - i), 0.0 if i else FIRST)
        good = one_shape(tuner, worker, promising_first(tuner, good), shape, time.monotonic() + left * share, i == 0)


def promising_first(tuner: Tuner, good: list[Ready]) -> list[Ready]:
    """Candidates in the order of how near they came to the best on any shape so far: where a shape's time ends early, those
    that never did well are the ones not timed on it."""
    shapes: dict[Shape, dict[str, float]] = {}
    for (code, shape, turn), t in tuner.timings.items():
        if turn == 0:
            shapes.setdefault(shape, {})[code] = t.ratio
    nearest: dict[str, float] = {}
    for ratios in shapes.values():
        least = min(ratios.values())
        for code, ratio in ratios.items():
            nearest[code] = min(nearest.get(code, float("inf")), ratio / least)
    return sorted(good, key=lambda r: nearest.get(r.code, float("inf")))


def one_shape(tuner: Tuner, worker: Worker, good: list[Ready], shape: Shape, end: float, first: bool) -> list[Ready]:
    """Find a shape's winner; returns the candidates for the next shape: those that did not fail, and new ones that this shape
    led to."""
    first_reference = reference = heuristic(tuner, good, shape)
    before = tuner.served.get(shape)
    code = before and tuner.codes.get(before)
    served = next((r for r in good if r.code == code), None)
    alive = list(dict.fromkeys([reference, *([served] if served else []), *(r for r in good if not pruned(tuner, r, shape))]))
    scores, reference = measure(tuner, worker, alive, reference, shape, 0, end)
    if first and time.monotonic() < end:
        frame = promising(tuner, alive, scores)
        if frame is not None:
            tuner.display.say(f"{frame} is near the best: searched whole")
            t = tuner.task
            more = tuner.prepare(widened(frame, tuner.searched, t.backend, t.arch, t.instance, shape.HV))
            good, alive = good + more, alive + more
            scores, reference = measure(tuner, worker, alive, reference, shape, 0, end, scores)
    if time.monotonic() < end:
        parts = compose([(r.candidate, scores[r.code].ratio) for r in alive if r.code in scores])
        more = tuner.prepare(parts)
        good, alive = good + more, alive + more
        scores, reference = measure(tuner, worker, alive, reference, shape, 0, end, scores)
    turn = 1
    ranked = sorted((r for r in alive if r.code in scores), key=lambda r: scores[r.code].ratio)
    while len(ranked) > FINALISTS and time.monotonic() < end:
        ranked = ranked[:max(FINALISTS, len(ranked) // KEPT)]
        if len(ranked) > FINALISTS:
            found, reference = measure(tuner, worker, ranked, reference, shape, turn, end)
            scores |= found
            ranked.sort(key=lambda r: scores[r.code].ratio)
        turn += 1
    ranked = list(dict.fromkeys([*ranked[:FINALISTS], *([served] if served else [])]))
    final, reference = measure(tuner, worker, ranked, reference, shape, LAST, float("inf"))
    best = min((r for r in [reference, *ranked] if r.code in final), key=lambda r: final[r.code].ms, default=None)
    if best is None:
        tuner.display.say(f"{shape}: nothing could be timed")
    else:
        mine = final.get(reference.code) if reference is first_reference and reference.candidate.frame is None else None
        its = final.get(served.code) if served else None
        tuner.finish(shape, best, final[best.code].ms, mine.ms if mine else None, its.ms if its else None)
    return [r for r in good if r.code not in tuner.failed]


def heuristic(tuner: Tuner, good: list[Ready], shape: Shape) -> Ready:
    """The candidate that nobody tuned, which all others are timed beside; where it cannot run, the first that can."""
    t = tuner.task
    try:
        wanted = default(t.arch, t.instance, *shape.key, t.backend)[0]
    except ValueError:
        return good[0]
    return next((r for r in good if r.candidate.schedule == wanted), good[0])


def pruned(tuner: Tuner, r: Ready, shape: Shape) -> bool:
    """Whether a candidate leaves too much of the device idle on this shape."""
    sequences, heads, tokens = shape.key
    call = Call(sequences, tokens, tokens if tuner.task.instance.varlen else tokens // sequences, {"H": shape.H, "HV": heads})
    narrowest = min((v for v in tuner.searched.v_tile if v is not None), default=1)
    reason = idle(r.variant, call, tuner.subject.device.units, narrowest) if tuner.task.device == "cuda" else None
    if reason is not None:
        tuner.pruned.add(reason)
    return reason is not None


def promising(tuner: Tuner, alive: Iterable[Ready], scores: dict[str, Timing]) -> Frame | None:
    """The best frame that was not searched whole, if it is near the best of all, each as it was before options were varied."""
    first = tuner.searched.frames[0]
    plain = [(scores[r.code].ratio, r.candidate.frame) for r in alive
             if r.code in scores and r.candidate.frame is not None and r.candidate.varies is None]
    best = min((s for s, f in plain if f == first), default=None)
    other = min(((s, str(f), f) for s, f in plain if f != first), default=None)
    return other[2] if other is not None and (best is None or other[0] < NEAR * best) else None


def measure(tuner: Tuner, worker: Worker, candidates: list[Ready], reference: Ready, shape: Shape, turn: int, end: float,
            before: dict[str, Timing] | None = None) -> tuple[dict[str, Timing], Ready]:
    """Time candidates on a shape, by code; not again what a resumed run, or an earlier call, measured in this turn, nor what
    comes after `end`. Where the reference is lost the whole turn is timed again beside another, which is returned: ratios
    compare only where they are to the same. before: returned where there was no time to time anything again."""
    while True:
        found = beside(tuner, worker, candidates, reference, shape, turn, end)
        left = [r for r in candidates if r.code not in tuner.failed]
        if reference.code not in tuner.failed or not left:
            return found or before or {}, reference
        reference = left[0]
        tuner.display.say(f"{shape}: timed again beside {reference.candidate.frame or reference.candidate.schedule.name}")
        for r in candidates:
            tuner.timings.pop((r.code, shape, turn), None)


def beside(tuner: Tuner, worker: Worker, candidates: list[Ready], reference: Ready, shape: Shape, turn: int, end: float) \
        -> dict[str, Timing]:
    """`measure`, until a reference is lost."""
    seconds = tuner.limits.seconds * (8 if turn == LAST else 2 ** turn)
    found = {r.code: tuner.timings[r.code, shape, turn] for r in candidates
             if turn != LAST and (r.code, shape, turn) in tuner.timings and r.code not in tuner.failed}
    todo = [r for r in candidates if r.code not in found and r is not reference and r.code not in tuner.failed]
    what = "the last few once more" if turn == LAST else f"round {turn + 1}"
    tuner.display.phase(f"timing {shape}, {what}", len(todo))
    groups = [todo[i:i + TOGETHER - 1] for i in range(0, len(todo), TOGETHER - 1)] or ([[]] if turn == LAST else [])
    for group in groups:
        if time.monotonic() > end or reference.code in tuner.failed:
            break
        found |= in_turns(tuner, worker, [reference, *group], shape, turn, seconds)
        tuner.display.step(len(group), best(found))
    return found


def in_turns(tuner: Tuner, worker: Worker, group: list[Ready], shape: Shape, turn: int, seconds: float) -> dict[str, Timing]:
    """Time a group, the reference first. Where another is lost the rest is timed without it; where that one is, nothing."""
    where = {"lengths": list(shape.lengths), "H": shape.H, "HV": shape.HV}
    while group:
        job = tuner.job("time", schedules=[of_schedule(r.candidate.schedule) for r in group], shape=where, seconds=seconds)
        answer = worker.run(job, tuner.limits.timing)
        if "done" in answer:
            ms = answer["done"]["ms"]
            base = statistics.median(ms[0])
            found = {}
            for r, samples in zip(group, ms, strict=True):
                t = Timing(statistics.median(samples), statistics.median(samples) / base)
                tuner.records.append("time", tuner.subject.json(), code=r.code, shape=where, round=turn, ms=samples,
                                     ratio=round(t.ratio, 6), schedule=of_schedule(r.candidate.schedule))
                found[r.code] = tuner.timings[r.code, shape, turn] = t
            return found
        why = answer.get("lost") or answer["failed"]
        if "at" not in answer:
            tuner.display.say(f"{shape}: not timed: {why}")
            return {}
        bad = group[answer["at"]]
        tuner.failed[bad.code] = why
        tuner.records.append("time", tuner.subject.json(), code=bad.code, shape=where, round=turn, failed=why,
                             reference=bad is group[0])
        tuner.display.say(f"{shape}: {bad.candidate.schedule.name} is lost: {why}")
        if bad is group[0]:
            return {}
        group = [r for r in group if r is not bad]
    return {}


def best(found: dict[str, Timing]) -> str:
    if not found:
        return ""
    t = min(found.values(), key=lambda t: t.ms)
    return f"best {t.ms:.4g} ms, {t.ratio:.3f} of the heuristic's"


__all__ = ["Timing", "timed_rounds"]
