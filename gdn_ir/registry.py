"""Which variant serves a call, and why: the fastest backend that can, its schedule chosen for the architecture and shape."""
from __future__ import annotations

import re
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from gdn_ir import policy, providers
from gdn_ir.artifacts import at_hand
from gdn_ir.autotune.lookup import find
from gdn_ir.autotune.records import Winner
from gdn_ir.compiler import NAMES, Instance, Unsupported, Variant, variant
from gdn_ir.environment import switched
from gdn_ir.explanation import Choice, Explanation
from gdn_ir.policy import forbid, use
from gdn_ir.schedules.defaults import roles_fit, roles_want
from gdn_ir.schedules.plans import CHUNK
from gdn_ir.providers import Offered
from gdn_ir.programs.gated_delta import Switches

# of what forwards leave to backwards, what a GPU has run: (backend, architecture, what is kept)
KEEP_SEEN = frozenset({("triton", "sm_90", "inverse"), ("triton", "sm_90", "states")})
PREFERENCE = {"cuda": ("triton", "tilelang", "torch"), "cpu": ("tilelang", "torch", "triton")}


def forced() -> str | None:
    """The backend that `use` or GDN_IR_BACKEND asks for here, if any."""
    return policy.forced(policy.asked())


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """"cpu", "sm_80" (all of Ampere and Ada, whose least shared memory holds its schedules), "sm_90" (Hopper); the device's own
    name elsewhere, for which no backend but torch has a schedule."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return named(f"sm_{major}{minor}")


def architecture_here() -> str:
    """Of this machine's GPU, where it has one."""
    return architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def named(arch: str) -> str:
    """An architecture as the registry knows it, from what a user calls it. Raises ValueError where it is none."""
    found = re.fullmatch(r"sm_(\d{2,3})a?", arch)
    if arch != "cpu" and not found:
        raise ValueError(f"arch: got {arch!r}; accepts cpu and GPUs' such as sm_80 (all sm_8x), sm_90 or sm_90a")
    return "cpu" if not found else "sm_80" if found[1].startswith("8") else f"sm_{found[1]}"


@dataclass(frozen=True)
class Option:
    """One backend's answer to a call: a variant and why it has this schedule, or why there is none. winner: where that was
    tuned, what was measured."""
    backend: str
    variant: Variant | Offered | None
    reason: str
    winner: Winner | None = None

    @property
    def by(self) -> frozenset[str]:
        """All backends that have a part in it."""
        made = [b.name for b in self.variant.compiled.makers] if isinstance(self.variant, Variant) else []
        return frozenset((self.backend, *made))


def unseen(instance: Instance, backend: str, arch: str, roles: bool = False) -> str | None:
    """Why a backend does not serve what it could, if so: no GPU has run all of it yet (bench/results has what one ran). roles:
    whether its schedule is one of roles."""
    if arch == "cpu" or backend not in ("triton", "tilelang"):
        return None
    part = None
    if instance.grads and (backend, arch) != ("triton", "sm_90") and not (backend == "tilelang" and roles):
        part = "backward"
    elif instance.left and (backend, arch, instance.keep) not in KEEP_SEEN:
        part = f"{'backward that is given' if instance.grads else 'forward that leaves'} {instance.keep}"
    elif backend == "tilelang" and instance.recurrent:
        part = "kernel of one token at a time"
    return part and f"{backend}'s {part} has not run on all it ships for on {arch}"


def can_be_had(option: Option) -> bool:
    """Whether an option's kernels are compiled already, or their compilers are here."""
    if not isinstance(option.variant, Variant):
        return False
    c, arch = option.variant.compiled, option.variant.arch
    return all(at_hand(b, k, s, arch) for b, k, s in zip(c.makers, c.kernels, c.sources, strict=True))


def has_roles(option: Option) -> bool:
    """Whether an option is a pipeline with roles: the fastest where a default has it."""
    return isinstance(option.variant, Variant) and any(k.options.roles for k in option.variant.compiled.kernels)


def fastest_first(found: list[Option]) -> list[Option]:
    """Options in order, but those that were tuned for the same shape (as lookups see it, which is without H) on the same device
    change places, the fastest first."""
    def subject(o: Option) -> object:
        return o.winner and (o.winner.shape.key, o.winner.subject.device)
    timed = [o for o in found if o.winner is not None and o.winner.ms is not None and can_be_had(o)]
    for one in dict.fromkeys(map(subject, timed)):
        same = [o for o in timed if subject(o) == one]
        ranked = iter(sorted(same, key=lambda o: o.winner.ms))                 # type: ignore[union-attr, arg-type, return-value]
        found = [next(ranked) if o in same else o for o in found]
    return found


@lru_cache(maxsize=4096)
def options(instance: Instance, arch: str, sequences: int, heads: int, tokens: int) -> tuple[Option, ...]:
    """Every backend's answer, the preferred one first. heads: HV; tokens: of all sequences together."""
    kind = "cpu" if arch == "cpu" else "cuda"
    found = []
    roles = roles_fit(arch, instance, sequences, heads, tokens)
    unverified = switched("GDN_IR_UNVERIFIED")
    for name in PREFERENCE[kind]:
        target = "torch" if name == "torch" else arch       # it has one schedule, wherever it runs
        try:
            tuned = find(target, instance, sequences, heads, tokens, name)
            why = unseen(instance, name, arch, any(o.roles for _, o in tuned.schedule.kernels))
            if why and not unverified:
                if instance.grads and name == "tilelang":
                    why = f"{roles_want(arch, instance, sequences, heads, tokens)}; without them {why}"
                found.append(Option(name, None, f"{why} (GDN_IR_UNVERIFIED=1 lets it)"))
                continue
            found.append(Option(name, variant(instance, tuned.schedule, name, target), tuned.why, tuned.winner))
        except ValueError as e:                            # Unsupported, an illegal step, an architecture without a default
            found.append(Option(name, None, str(e)))
    found.sort(key=lambda o: not (roles and has_roles(o) and can_be_had(o)))   # stable: the rest stays in order
    found = fastest_first(found)
    first: list[Option] = []
    # another package's variants leave nothing to a backward
    for provider in () if instance.left else providers.providers().values():
        try:
            run, why = provider.offer(instance, arch, sequences, heads, tokens)
            option = Option(provider.name, Offered(provider.name, instance, run), why)
        except ValueError as e:
            option = Option(provider.name, None, str(e))
        (first if provider.first else found).append(option)
    return (*first, *found)


def first(every: tuple[Option, ...], asked: str) -> Option | None:
    """The option that serves under a policy (see `gdn_ir.policy`), if one can."""
    wanted, out = policy.forced(asked), policy.forbidden(asked)
    return next((o for o in every if o.variant is not None and wanted in (None, o.backend) and o.by.isdisjoint(out)), None)


@lru_cache(maxsize=4096)
def choose(instance: Instance, arch: str, sequences: int, heads: int, tokens: int, asked: str | None = None) \
        -> Variant | Offered:
    """The variant that serves. asked: a policy (see `gdn_ir.policy`); a backend's name forces it, and raises Unsupported with
    its reason where it cannot serve."""
    every, wanted = options(instance, arch, sequences, heads, tokens), asked or ""
    if policy.forced(wanted):
        option = next((o for o in every if o.backend == wanted), None)
        if option is None or option.variant is None:
            raise Unsupported(f"{wanted} cannot serve {instance}: {option.reason if option else 'it is not registered'}")
        return option.variant
    allowed = [o for o in every if o.by.isdisjoint(policy.forbidden(wanted))]
    option = first(every, wanted)
    if option is not None and option.variant is not None:
        if option is not allowed[0] and arch != "cpu":     # on a GPU something faster was to be expected
            _warn(allowed[0].backend, option.backend, allowed[0].reason)
        return option.variant
    raise Unsupported("no backend serves " + str(instance) + "".join(
        f"\n  {o.backend}: {o.reason if o in allowed else 'forbidden here'}" for o in every))


def serving(device: torch.device, io: torch.dtype, beta: torch.dtype, K: int, V: int, H: int, HV: int, sequences: int,
            tokens: int, varlen: bool, decay: bool, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, initial_state: bool,
            final_state: bool, state_v_first: bool, recurrent: bool, grads: tuple[str, ...], asked: str, keep: str) \
        -> Variant | Offered:
    """`choose`, by what an op sees of its arguments."""
    switches = Switches("scalar" if decay else "none", True, l2norm, beta_sigmoid, neg_eigval, initial_state, final_state,
                        state_v_first)
    instance = Instance(switches, K, V, NAMES[io], NAMES[beta], varlen, grads, grouped=not grads or H < HV, recurrent=recurrent,
                        keep=keep)
    return choose(instance, architecture(device), sequences, HV, tokens, asked)


@lru_cache(maxsize=4096)
def keeps(device: torch.device, io: torch.dtype, beta: torch.dtype, K: int, V: int, H: int, HV: int, varlen: bool, decay: bool,
          l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, initial_state: bool, final_state: bool, state_v_first: bool,
          asked: str, keep: str) -> str:
    """What a forward keeps for its backward where `keep` is asked for: that, if a backend that has a part in the backward that
    would serve without serves forward and backward with it; else nothing, with one warning. (Whether it can is no matter of how
    many tokens there are.)"""
    arch = architecture(device)
    switches = Switches("scalar" if decay else "none", True, l2norm, beta_sigmoid, neg_eigval, initial_state, final_state,
                        state_v_first)
    there = {"g": decay, "initial_state": initial_state}
    grads = tuple(n for n in ("q", "k", "v", "g", "beta", "initial_state") if there.get(n, True))
    forward = Instance(switches, K, V, NAMES[io], NAMES[beta], varlen, keep=keep)
    backward = replace(forward, grads=grads, grouped=H < HV)
    without = first(options(replace(backward, keep="nothing"), arch, 1, HV, CHUNK), asked)
    if without is None:
        _warn_kept(keep, "no backend serves the backward")
        return "nothing"
    reasons = []
    for name in sorted(without.by, key=lambda b: b != without.backend):        # of roles, Triton has a part
        both = [next((o for o in options(i, arch, 1, HV, CHUNK) if o.backend == name), None) for i in (backward, forward)]
        if all(o is not None and o.variant is not None for o in both):
            return keep
        missing = next(o for o in both if o is None or o.variant is None)
        reasons.append(missing.reason if missing else f"{name} leaves nothing to a backward")
    _warn_kept(keep, "; ".join(reasons))
    return "nothing"


prepared: dict[Hashable, Any] = {}                         # what the ops made of decisions: a warm call looks here alone


def forget() -> None:
    """Decide anew, and load kernels anew: after anything that decides changed (packs, providers). What is memoised of
    decisions is memoised here and in `variant`, nowhere else."""
    prepared.clear()
    for memo in (options, choose, keeps, variant):
        memo.cache_clear()


@lru_cache(maxsize=256)
def _warn(missed: str, served: str, reason: str) -> None:
    """Once for each reason, whatever the shapes that meet it."""
    warnings.warn(f"gdn_ir: {missed} cannot serve this call, {served} does: {reason}", RuntimeWarning, stacklevel=5)


@lru_cache(maxsize=256)
def _warn_kept(keep: str, reason: str) -> None:
    """Likewise."""
    warnings.warn(f"gdn_ir: nothing is kept for the backward, though {keep} is asked for: {reason}", RuntimeWarning,
                  stacklevel=5)


def explain(*, H: int, HV: int, K: int = 128, V: int = 128, T: int, B: int = 1, sequences: int | None = None,
            dtype: str | torch.dtype = "bf16", arch: str | None = None, recurrent: bool = False, grads: tuple[str, ...] = (),
            keep: str | None = None, **switches: bool | str) -> Explanation:
    """Every variant that could serve such a call, and why it is or is not chosen: printed it is a page to read, and `data()` of
    it is plain data. dtype: "bf16", "f16", "f32", "f64" or torch's; sequences: of packed input (None: dense, B of them); arch:
    "cpu", "sm_80", "sm_90" (None: this machine's); recurrent: one token at a time; grads: a backward, of these inputs; keep:
    what is left to a backward, or it is given (None: for a backward what `gdn_ir.keep` asks for here); further keywords:
    `Switches`' fields, such as l2norm=True. H and HV: heads of q and of v; T: tokens of a batch row."""
    arch = named(arch or architecture_here())
    io = NAMES.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else dtype
    for name, size, least in (("H", H, 1), ("T", T, 0), ("B", B, 1), ("sequences", sequences or 0, 0)):
        if size < least:
            raise ValueError(f"{name}: got {size}; accepts a number from {least} on")
    if sequences is not None and B != 1:
        raise ValueError(f"B: got {B} with sequences = {sequences}; accepts 1, for packed sequences lie along T")
    unknown = set(switches) - set(Switches.__dataclass_fields__)
    if unknown:
        raise TypeError(f"explain: unknown keyword {', '.join(sorted(unknown))}; accepts, besides its own, "
                        f"{', '.join(Switches.__dataclass_fields__)}")
    if HV < H or HV % H:
        raise ValueError(f"HV: got {HV}; accepts a multiple of H = {H}")
    if isinstance(grads, str):
        raise ValueError(f"grads: got {grads!r}; accepts names in a tuple, as ('q', 'k')")
    instance = Instance(Switches(**switches), K, V, io, io, sequences is not None, tuple(grads),  # type: ignore[arg-type]
                        grouped=not grads or HV > H, recurrent=recurrent, keep=keep or policy.kept_by(bool(grads)))
    return explained(instance, arch, sequences or B, H, HV, B * T)


def explained(instance: Instance, arch: str, sequences: int, H: int, HV: int, tokens: int) -> Explanation:
    """The same for an instance, and a call's numbers. tokens: of all sequences together."""
    io, grads, keep = instance.io, instance.grads, instance.keep
    every = options(instance, arch, sequences, HV, tokens)
    asked = policy.asked()
    wanted, out = policy.forced(asked), policy.forbidden(asked)
    chosen = first(every, asked)
    count = f"{sequences} sequence{'s' * (sequences != 1)}"
    kind = f"packed {io}, {count}, {tokens} tokens together" if instance.varlen else \
        f"dense {io}, {sequences} x {tokens // max(sequences, 1)} tokens"
    kind += ", one token at a time" if instance.recurrent else ""
    kind += f", gradients of {' '.join(grads)}" if grads else ""
    kind += f", {'given' if grads else 'leaves'} {keep}" if keep != "nothing" else ""
    choices = []
    for rank, o in enumerate(every):
        if not o.by.isdisjoint(out):
            part = ", ".join(sorted(o.by & set(out)))
            choices.append(Choice(o.backend, "forbidden", "gdn_ir.forbid or GDN_IR_FORBID names "
                                  + (f"{part}, which makes a part of its schedule" if o.backend not in out else "it")))
        elif o.variant is None:
            choices.append(Choice(o.backend, "cannot", o.reason))
        else:
            timed = {x.backend for x in every if x.winner and o.winner and x.winner.shape.key == o.winner.shape.key}
            why = "gdn_ir.use or GDN_IR_BACKEND asks for it" if o is chosen and wanted else \
                f"the fastest of those tuned for {o.winner.shape}" if o is chosen and o.winner and len(timed) > 1 else \
                f"first that can serve on {arch}" if o is chosen else \
                f"{wanted} is asked for" if wanted else f"ranks {rank + 1} of {len(every)} on {arch}"
            choices.append(Choice(o.backend, "chosen" if o is chosen else "not chosen", why,
                                  o.variant.schedule.name, o.reason, tuple((s.kernel, s.hash) for s in o.variant.sources)))
    s = instance.switches
    on = "".join(f", {name}" for name, value in vars(s).items() if value is True and name != "erase")
    on += ", no decay" * (s.decay == "none") + ", no erase" * (not s.erase)
    return Explanation(f"{kind}, H/HV {H}/{HV}, K x V {instance.K} x {instance.V}{on}", arch, tuple(choices))


__all__ = ["Option", "architecture", "choose", "explain", "first", "forbid", "forced", "forget", "options", "prepared",
           "serving", "unseen", "use"]
