"""What a GPU serves when nobody asks for a backend: gradients too, on Hopper without a warning."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gdn_ir import registry
from gdn_ir.autotune.measure import capture
from gdn_ir.bench import inputs
from gdn_ir.compiler import Instance, variant
from gdn_ir.ops import chunk_gated_delta_rule
from gdn_ir.programs.gated_delta import Switches
from gdn_ir.reference import recurrence
from gdn_ir.schedules.adjoints import in_segments
from gdn_ir.schedules.defaults import default, whole_scans
from gdn_ir.schedules.schedule import Schedule
from tests.inputs import error, make

pytestmark = pytest.mark.gpu
GRADS = ("q", "k", "v", "g", "beta")


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDN_IR_UNVERIFIED", raising=False)
    x = {n: t.requires_grad_() for n, t in make(K=96, V=32, device="cuda").items()}
    o = chunk_gated_delta_rule(**x)[0]                     # type: ignore[arg-type]
    slow = torch.cuda.get_device_capability()[0] == 8      # where Triton's have not run on all they ship for
    with pytest.warns(RuntimeWarning, match="torch does") if slow else warnings.catch_warnings():
        if not slow:
            warnings.simplefilter("error")
        grads = torch.autograd.grad(o.sum(), list(x.values()))
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in x.items()}
    wanted = torch.autograd.grad(recurrence(**exact)[0].sum(), list(exact.values()))        # type: ignore[arg-type]
    for name, a, b in zip(x, grads, wanted, strict=True):
        assert error(a.cpu(), b) <= 1e-4, name


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="of Hopper's schedules")
def test_what_a_training_step_holds() -> None:
    """At 1x32768, 2/4 beyond its inputs no more than FlashQLA 0.1.3, which holds 246.25 MiB."""
    x = make(T=32768, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16, device="cuda")
    leaves, d_o = [t.requires_grad_() for t in x.values()], torch.randn_like(x["v"])

    def step() -> None:
        o = chunk_gated_delta_rule(**x)[0]
        torch.autograd.grad(o, leaves, d_o)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before <= 246.25 * 2 ** 20


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="of Hopper's roles")
@pytest.mark.parametrize(("lengths", "H", "HV"), [
    ((8192,), 16, 32), ((1000, 24, 0, 1024, 2048, 63), 16, 32), ((4096, 4100), 8, 16), ((32768,), 4, 8), ((768,), 2, 4)])
def test_a_training_step_by_roles_agrees_to_the_bit(lengths: tuple[int, ...], H: int, HV: int) -> None:
    """Each way of a backward by roles, and forwards in segments and whole: a thousand times the same."""
    backward = Instance(Switches(), 128, 128, "bf16", "bf16", True, GRADS)
    (option, *_) = registry.options(backward, "sm_90", len(lengths), HV, sum(lengths))
    assert option.variant is not None and any(k.options.roles for k in option.variant.compiled.kernels)
    x = inputs.make(list(lengths), H, HV, kind="real")
    leaves = {n: x[n][None].requires_grad_() for n in GRADS}
    d_o = torch.randn_like(x["v"])[None]

    def step() -> list[torch.Tensor]:
        o, _ = chunk_gated_delta_rule(**leaves, cu_seqlens=x["cu_seqlens"])
        return [o, *torch.autograd.grad(o, list(leaves.values()), d_o)]
    first, differ = step(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):                                  # asked once, at the end: steps follow each other as in training
        differ += sum((a != b).any() for a, b in zip(first, step(), strict=True))
    assert all(bool(t.isfinite().all()) for t in first) and int(differ) == 0


@pytest.mark.parametrize(("grads", "plan"), [((), ""), (GRADS, ""), (GRADS, "gathered"), (GRADS, "gathered-segments"),
                                               (GRADS, "gathered-merged"), (GRADS, "gathered-turns"),
                                               (GRADS, "gathered-turns-segments")])
def test_followers_wait_for_their_chunks(grads: tuple[str, ...], plan: str) -> None:
    """Over more chunks than are counted as one, ragged: to the bit what the same kernels do in a row, from a graph too."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("one kernel starts beside another on Hopper alone")
    lengths = [1100, 0, 512, 513, 7]
    x = inputs.make(lengths, 4, 8)
    x["d_o"] = torch.randn(x["v"].shape, device="cuda").to(x["v"].dtype)
    instance = Instance(Switches(final_state=not grads), 128, 128, "bf16", "bf16", True, grads)
    follows = default("sm_90", instance, len(lengths), 8, sum(lengths))[0]
    if plan:
        whole = plan.removesuffix("-segments")
        merges = whole if whole in ("gathered-merged", "gathered-turns") else ""
        follows = whole_scans("sm_90", instance, len(lengths), 8, "triton", gathers=True, merges=merges)[0]
    if plan.endswith("segments"):
        follows = in_segments(follows, instance, 16, plan)
    plain = follows.with_options(**{n: replace(o, follows=False) for n, o in follows.kernels if n != "*"})
    assert follows != plain

    def outputs(schedule: Schedule) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        given = {n: x[n] for n in ("q", "k", "v", "g", "beta", *(["d_o"] if grads else []))}
        out = {f"d_{n}": torch.full_like(x[n], float("nan")) for n in grads} or \
            {"o": torch.full_like(x["v"], float("nan")), "final_state": torch.full_like(x["initial_state"], float("nan"))}
        chosen = variant(instance, schedule, "triton", "sm_90")
        return out, lambda: chosen(given | out, 128 ** -0.5, len(lengths), x["cu_seqlens"])
    want, call = outputs(plain)
    call()
    found, call = outputs(follows)
    for _ in range(20):
        for t in found.values():
            t.fill_(float("nan"))
        call()
        assert all(torch.equal(found[n], want[n]) for n in want)
    graph = capture([call])
    for t in found.values():
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[n], want[n]) for n in want)
