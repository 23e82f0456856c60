"""What the op accepts: every argument checked before anything is launched, each error naming it, what came and what fits."""
from __future__ import annotations

from typing import Any

import torch

from gdn_ir.compiler import LARGEST
from gdn_ir.environment import switched

Tensor = torch.Tensor
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# flags of flash-linear-attention that are not served yet, and the value that asks for nothing
LATER = {"transpose_state_layout": False, "safe_gate": False, "lower_bound": None, "cp_context": None, "chunk_indices": None,
         "head_first": False, "return_intermediate_states": False, "gk": None, "gv": None}

INSTEAD = {"transpose_state_layout": "; its new name is served: state_v_first",
           "gk": "; gk and gv come before beta here, so give beta by name"}


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    text = repr(x)
    return text if len(text) <= 60 else f"{type(x).__name__} {text[:50]}..."


def bad(name: str, got: object, accepts: str, error: type[Exception] = ValueError) -> Exception:
    return error(f"{name}: got {describe(got)}; accepts {accepts}")


def keywords(op: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse flags: those not served yet with NotImplementedError, unknown ones with TypeError."""
    for name, value in given.items():
        if name not in LATER:
            raise TypeError(f"{op}: unknown keyword {name!r}, got {describe(value)}; accepts {', '.join(known)}")
        if value is not LATER[name] and value != LATER[name]:
            raise NotImplementedError(f"{name}: got {describe(value)}; only {LATER[name]!r} is served so far"
                                      + INSTEAD.get(name, ""))


def flags(**given: object) -> None:
    for name, x in given.items():
        if not isinstance(x, bool):
            raise bad(name, x, "True or False", TypeError)


def number(name: str, x: object) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise bad(name, x, "a Python number (no gradient flows to it)", TypeError)
    return float(x)


def tensor(name: str, x: object, shape: tuple[str, ...], sizes: dict[str, int], dtypes: tuple[torch.dtype, ...],
           device: torch.device | None) -> None:
    """Check one tensor; `shape` names its dimensions, `sizes` fixes those seen before and learns new ones."""
    layout = f"[{', '.join(shape)}]"
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(x, Tensor):
        raise bad(name, x, f"a tensor {layout} of {names}", TypeError)
    if x.layout is not torch.strided or x.device.type not in ("cpu", "cuda"):
        raise bad(name, x, "a dense tensor on cpu or cuda" + ("" if x.layout is torch.strided else f", not {x.layout}"))
    if x.ndim != len(shape):
        raise bad(name, x, f"{len(shape)} dimensions, {layout}")
    if x.dtype not in dtypes:
        raise bad(name, x, f"dtype {names}", TypeError)
    if device is not None and x.device != device:
        raise bad(name, x, f"the device of q, {device}")
    for d, size in zip(shape, x.shape, strict=True):
        if sizes.setdefault(d, size) != size:
            want = ", ".join(f"{d} = {sizes[d]}" if d in sizes else d for d in shape)
            raise bad(name, x, f"{layout} with {want}")


def inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial_state: Tensor | None,
           cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, state_v_first: bool) -> dict[str, int]:
    """Check all tensors; returns B, T, H, HV, K, V and N. Raises TypeError (kind, dtype) or ValueError (all else)."""
    sizes: dict[str, int] = {}
    tensor("q", q, ("B", "T", "H", "K"), sizes, FLOATS, None)
    tensor("k", k, ("B", "T", "H", "K"), sizes, (q.dtype,), q.device)
    tensor("v", v, ("B", "T", "HV", "V"), sizes, (q.dtype,), q.device)
    if g is not None:
        tensor("g", g, ("B", "T", "HV"), sizes, FLOATS, q.device)
    tensor("beta", beta, ("B", "T", "HV"), sizes, FLOATS, q.device)
    for name, x, size in (("q", q, "K"), ("v", v, "V")):
        if not 0 < sizes[size] <= LARGEST or sizes[size] % 16:
            raise bad(name, x, f"{size} a multiple of 16 from 16 to {LARGEST}")
    if sizes["H"] == 0:
        raise bad("q", q, "at least one head")
    if sizes["HV"] % sizes["H"] or sizes["HV"] == 0:
        raise bad("v", v, f"HV a multiple of H = {sizes['H']} (q has {sizes['H']} heads, v {sizes['HV']})")
    if cu_seqlens is None and cu_seqlens_cpu is not None:
        raise bad("cu_seqlens_cpu", cu_seqlens_cpu, "None where cu_seqlens is None")
    if cu_seqlens is None:
        sizes["N"] = sizes["B"]
    else:
        if sizes["B"] != 1:
            raise bad("q", q, "B = 1 with cu_seqlens: sequences are packed along T")
        for name, ends, where in (("cu_seqlens", cu_seqlens, q.device),
                                  ("cu_seqlens_cpu", cu_seqlens_cpu, torch.device("cpu"))):
            if ends is not None:
                tensor(name, ends, ("N + 1",), {}, (torch.int32, torch.int64), where)
                if ends.shape[0] < 1:
                    raise bad(name, ends, "at least one entry, [N + 1]")
        if cu_seqlens_cpu is not None and cu_seqlens.shape != cu_seqlens_cpu.shape:
            raise bad("cu_seqlens_cpu", cu_seqlens_cpu, f"the values of cu_seqlens, {list(cu_seqlens.shape)}")
        sizes["N"] = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        tensor("initial_state", initial_state, ("N", "HV", *(("V", "K") if state_v_first else ("K", "V"))), sizes,
               (torch.float64 if q.dtype == torch.float64 else torch.float32,), q.device)
    return sizes


def gate(g: Tensor | None, use: bool, A_log: Tensor | None, dt_bias: Tensor | None, HV: int, device: torch.device) -> None:
    """Check what `use_gate_in_kernel` needs, and that nothing is given in vain without it."""
    if not use:
        for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
            if x is not None:
                raise bad(name, x, "None without use_gate_in_kernel")
        return
    for name, x in (("g", g), ("A_log", A_log)):
        if x is None:
            raise bad(name, x, "a tensor with use_gate_in_kernel", TypeError)
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None:
            tensor(name, x, ("HV",), {"HV": HV}, FLOATS, device)


def boundaries(cu: Tensor | None, cpu: Tensor | None, T: int) -> None:
    """Check the values of sequence boundaries that are on the host (under GDN_IR_CHECK=1 also on a GPU, which waits for it).
    Part of the op itself, so that a compiled graph checks them too."""
    read = {name: x.tolist() for name, x in (("cu_seqlens", cu), ("cu_seqlens_cpu", cpu)) if x is not None and _readable(x)}
    for name, ends in read.items():
        if ends[0] != 0:
            raise ValueError(f"{name}: got {_short(ends)}, which starts at {ends[0]}; accepts boundaries that start at 0")
        for i, (a, b) in enumerate(zip(ends, ends[1:])):
            if b < a:
                raise ValueError(f"{name}: got {_short(ends)}, which decreases at entry {i + 1}; "
                                 "accepts boundaries that never decrease")
        if ends[-1] > T:
            raise ValueError(f"{name}: got {_short(ends)}, which ends past T; accepts a last boundary of at most T = {T}")
    if len(read) == 2 and read["cu_seqlens"] != read["cu_seqlens_cpu"]:
        raise ValueError(f"cu_seqlens_cpu: got {_short(read['cu_seqlens_cpu'])}; accepts the values of cu_seqlens, "
                         f"{_short(read['cu_seqlens'])}")


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" or switched("GDN_IR_CHECK")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"
