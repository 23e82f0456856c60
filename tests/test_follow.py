"""A kernel that starts beside the scan before it: where that is legal, and what it is printed as. That it computes the same is
seen on a GPU (test_gpu_op.py): an interpreter runs one block after another."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from gdn_ir.backends.temporaries import moments, temporaries
from gdn_ir.backends.triton import cross_compile
from gdn_ir.backends.triton.driver import Batch, Image
from gdn_ir.compiler import Instance, Unsupported, planned, variant
from gdn_ir.follow import followers
from gdn_ir.nodes import IRError
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.schedules.defaults import default, segmented, whole_scans
from gdn_ir.schedules.schedule import KernelOptions, Schedule

FORWARD = Instance(Switches(final_state=True), 128, 128, "bf16", "bf16", True)
BACKWARD = Instance(Switches(), 128, 128, "bf16", "bf16", True, ("q", "k", "v", "g", "beta"))


def following(instance: Instance, *names: str) -> Schedule:
    plain = whole_scans("sm_90", instance, 1, 32, "triton", gathers=False)[0] if instance.grads else \
        default("sm_90", instance, 1, 32, 32768)[0]
    plain = plain.with_options(**{n: replace(o, follows=False) for n, o in plain.kernels if n != "*"})
    return plain.with_options(**{n: replace(plain.options(n), follows=True) for n in names})


@pytest.mark.parametrize(("instance", "pairs"), [(FORWARD, {"output": "scan"}),
                                                 (BACKWARD, {"local": "again", "inner": "back"})])
def test_a_follower_counts_what_the_scan_before_it_has_stored(instance: Instance, pairs: dict[str, str]) -> None:
    chosen = variant(instance, following(instance, *pairs), "triton", "sm_90")
    kernels = {k.name: (k, s) for k, s in zip(chosen.compiled.kernels, chosen.sources, strict=True)}
    for name, (kernel, source) in kernels.items():
        scan, follower = name in pairs.values(), name in pairs
        assert ("count_stored(" in source.text, "await_count(" in source.text) == (scan, follower)
        if follower:
            ((counts, enough, backwards),) = kernel.awaits
            assert counts == kernels[pairs[name]][0].counts and backwards == (name == "inner")
            assert enough == 128
    if instance is FORWARD:
        ptx = {n: cross_compile(k, s, "sm_90").asm["ptx"] for n, (k, s) in kernels.items() if n in ("scan", "output")}
        assert "griddepcontrol.launch_dependents" in ptx["scan"] and "griddepcontrol.wait" in ptx["output"]
        stored, counted = ptx["scan"].index("st.global"), ptx["scan"].index("red.release.gpu")
        waited, read = ptx["output"].index("ld.acquire.gpu"), ptx["output"].index("wgmma")
        assert stored < counted and waited < read


def test_counts_start_at_zero() -> None:
    """The kernel before the scan clears them, where it has a block for each chunk; else the driver is asked to."""
    for instance, cleared in ((FORWARD, ["solve"]), (replace(FORWARD, switches=Switches(erase=False, final_state=True)), []),
                              (BACKWARD, ["solve", "local"])):
        names = ("local", "inner") if instance.grads else ("output",)
        kernels = variant(instance, following(instance, *names), "triton", "sm_90").compiled.kernels
        assert [k.name for k in kernels if k.clears] == cleared
        images = [Image(k, b"", {}) for k in kernels]
        assert Batch(images, temporaries(kernels)).unset == (set() if cleared else {"scan_ready"})


def test_what_cannot_follow_says_why() -> None:
    for instance, name, why in ((FORWARD, "scan", "solve takes all its chunks at once"),
                                (BACKWARD, "heads", "local takes all its chunks at once")):
        with pytest.raises(IRError, match=why):
            variant(instance, following(instance, name), "triton", "sm_90")
    for backend, arch in (("triton", "sm_80"), ("tilelang", "sm_90"), ("torch", "torch")):
        with pytest.raises(Unsupported, match=r"beside"):
            variant(FORWARD, following(FORWARD, "output"), backend, arch)


def test_what_reads_nothing_of_the_kernel_before_it_waits_for_nothing() -> None:
    """The offset beside the transition; and two that run beside one another and the third, where those two meet."""
    made = variant(FORWARD, segmented("sm_90", FORWARD, 32), "triton", "sm_90")
    kernels = {k.name: k for k in made.compiled.kernels}
    assert [n for n, k in kernels.items() if k.beside] == ["offset"]
    assert [n for n, k in kernels.items() if k.leads] == ["transition"]
    assert not any(k.counts or k.awaits or k.clears for k in kernels.values())
    texts = {s.kernel: s.text for s in made.sources}
    assert "start_follower()" in texts["transition"] and "wait_for_followed()" in texts["offset"]
    lives = moments(made.compiled.kernels)
    assert lives[2] == lives[3] < lives[4]
    pipeline = planned(FORWARD.program, segmented("sm_90", FORWARD, 32).steps)
    offset = next(i for i, p in enumerate(pipeline) if p.name == "offset")
    both = (*pipeline[:offset + 1], pipeline[offset - 1], *pipeline[offset + 1:])
    assert followers(both[offset - 1:offset + 1], {"offset"}) == {1: {}}
    with pytest.raises(IRError, match="transition could run before transition has ended"):
        followers(both[offset - 1:offset + 2], {"offset", "transition"})


def test_one_kernel_follows_two_scans() -> None:
    """again forwards and back backwards, beside each other, and inner beside both. A block of back takes as long as all of it:
    one waits for again at its end."""
    schedule = whole_scans("sm_90", BACKWARD, 1, 32, "triton", gathers=True)[0]
    made = variant(BACKWARD, schedule, "triton", "sm_90")
    kernels = {k.name: k for k in made.compiled.kernels}
    assert [n for n, k in kernels.items() if k.beside] == ["back", "inner", "grads"]
    assert kernels["inner"].awaits == ((kernels["back"].counts, 128, True), (kernels["again"].counts, 128, False))
    assert {n: k.clears.name for n, k in kernels.items() if k.clears} == {"solve": "again_ready", "local": "back_ready"}
    lives = dict(zip(kernels, moments(made.compiled.kernels), strict=True))
    assert lives["local"] < lives["again"] == lives["back"] == lives["inner"] < lives["heads"] == lives["grads"]
    texts = {s.kernel: s.text for s in made.sources}
    assert texts["back"].rstrip().endswith("wait_for_followed()") and texts["back"].count("wait_for_followed()") == 2
    assert texts["inner"].count("    await_count(") == 2


def test_who_follows_two_scans_begins_where_they_meet() -> None:
    """Each block has a chunk, those in the middle first."""
    schedule = whole_scans("sm_90", BACKWARD, 1, 32, "triton", gathers=True)[0]
    text = next(s.text for s in variant(BACKWARD, schedule, "triton", "sm_90").sources if s.kernel == "inner")
    lines = [x.strip() for x in text.splitlines() if x.strip().startswith(("middle, away =", "pid = tl.where("))]
    for blocks in (1, 2, 7, 8):
        tl = SimpleNamespace(num_programs=lambda _, blocks=blocks: blocks, where=lambda c, a, b: a if c else b)
        order = []
        for pid in range(blocks):
            names = {"tl": tl, "pid": pid}
            exec("\n".join(lines), names)
            order.append(names["pid"])
        assert sorted(order) == list(range(blocks)) and order[0] == blocks // 2 and {*order[-2:]} == {0, blocks - 1}


def test_the_options_say_so() -> None:
    options = KernelOptions(64, 4, 2, follows=True)
    assert str(options) == "4 warps, 2 stages, V in tiles of 64, follows the scan before it"
    schedule = Schedule("mine").with_options(output=options)
    assert Schedule.from_json(schedule.to_json()) == schedule
