"""Launches what Triton compiled through the CUDA driver: from a cubin (or PTX) and a few numbers, without Triton."""
from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch

from gdn_ir.backends.base import Call, Kernel, blocks, heads
from gdn_ir.backends.temporaries import BLOCK, Life, outputs, overwritten, placed, uncleared

MAX_DYNAMIC_SHARED = 8                                     # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
WITHOUT_ASKING = 48 * 1024                                 # bytes of shared memory that every kernel may use
ALIGNMENT = 16                                             # bytes: what cross_compile tells Triton of every pointer
BESIDE = 6                                                 # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

LAUNCH = [ctypes.c_void_p] * 4                             # cuLaunchKernelEx(configuration, function, arguments, nothing)


def about(built: Any) -> dict[str, Any]:
    """What a launch needs to know of a kernel that Triton compiled. Raises NotImplementedError where it needs more than
    arguments: scratch memory, or blocks in clusters."""
    m = built.metadata
    names = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    more = {n: value for n in names if (value := getattr(m, n, 0))} | ({"num_ctas": m.num_ctas} if m.num_ctas != 1 else {})
    if more:
        raise NotImplementedError(f"{m.name}: the driver's loader knows no launch with {more}")
    return {"name": m.name, "shared": m.shared, "num_warps": m.num_warps}


def arguments(kernel: Kernel) -> tuple[str, ...]:
    """Names of a kernel's arguments, in the order of its signature: tensors, boundaries, parameters, sizes."""
    ends = ("cu_seqlens",) if kernel.varlen else ()
    return (*(t.name for t in kernel.tensors()), *ends, *kernel.program.params(), "T", "N", *heads(kernel))


def sizes(call: Call) -> dict[str, int]:
    """The sizes among arguments. T: tokens of a sequence where they are dense, of all where they are packed."""
    return {"T": call.length, "N": call.sequences, **call.heads}


@lru_cache(maxsize=1)
def driver() -> Any:
    """The CUDA driver, its launch declared so that addresses can be given as numbers."""
    found = ctypes.CDLL("libcuda.so.1")
    found.cuLaunchKernelEx.argtypes = LAUNCH
    found.cuMemsetD32Async.argtypes = [ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p]
    return found


def must(code: int, what: str, name: str) -> None:
    """name: of the kernel or device that it was called for."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))            # leaves it null where it does not know the code
        said = f" ({text.value.decode()})" if text.value else ""
        raise RuntimeError(f"{what} of {name} failed with CUDA driver error {code}{said}")


def load(kernel: str, image: bytes, launch: Mapping[str, Any], device: int) -> ctypes.c_void_p:
    """The function in an image (a cubin, or PTX as text), on a device."""
    enter(device)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    must(driver().cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData", kernel)
    must(driver().cuModuleGetFunction(ctypes.byref(function), module, launch["name"].encode()), "cuModuleGetFunction", kernel)
    if launch["shared"] > WITHOUT_ASKING:
        must(driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, launch["shared"]), "cuFuncSetAttribute", kernel)
    return function


def enter(device: int) -> None:
    """Make torch's context of a device current in this thread: a new thread has none before its first call to the runtime."""
    context, handle, name = ctypes.c_void_p(), ctypes.c_int(), f"cuda:{device}"
    must(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet", name)
    must(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain", name)
    must(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent", name)


def stream(device: int) -> int:
    """torch's current stream there, as the driver takes it (torch.cuda.current_stream makes an object for it each time)."""
    return torch._C._cuda_getCurrentRawStream(device)


def workspace(size: int, device: int) -> torch.Tensor:
    """Bytes there. Freed as soon as nobody holds it: torch gives it only to what comes later on the same stream."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def current() -> int:
    """torch's current device."""
    return torch._C._cuda_getDevice()


class Image:
    """A kernel as Triton compiled it (a cubin, or PTX), loaded to a device at the first launch there. Called alone it is a
    launch whose temporaries are given."""

    def __init__(self, kernel: Kernel, image: bytes, launch: Mapping[str, Any]) -> None:
        self.kernel, self.image, self.launch = kernel, image, launch
        self.functions: dict[int, int] = {}
        self.alone = Batch([self], {})

    def function(self, device: int) -> int:
        found = self.functions.get(device)
        if found is None:
            found = self.functions[device] = load(self.kernel.name, self.image, self.launch, device).value or 0
        return found

    def __call__(self, memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
        self.alone(memory, values, call)


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, of those whose value is a number: 8 bytes of what it is, 64 of its value."""
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class Config(ctypes.Structure):
    """CUlaunchConfig: what a launch is told beside the kernel and its arguments."""
    _fields_ = [*((n, ctypes.c_uint) for n in ("gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ", "shared")),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


class Frame:
    """What the driver reads at the launches of one call: every argument once, at a place of its own in `block`, to which all
    kernels that take it point; and each launch's configuration. Addresses and parameters are written for each call."""

    def __init__(self, plan: Plan, device: int) -> None:
        self.block = ctypes.create_string_buffer(plan.layout.size + 4 * len(plan.sizes))
        struct.pack_into(f"{len(plan.sizes)}i", self.block, plan.layout.size, *plan.sizes.values())
        first, self.stream = ctypes.addressof(self.block), 0
        self.configs: list[Config] = []
        self.held: list[Any] = []
        self.launches: list[tuple[int, int, int, str]] = []
        for image, grid in plan.grids:
            config = Config(grid, 1, 1, 32 * image.launch["num_warps"], 1, 1, image.launch["shared"])
            if image.kernel.beside:                        # it may start beside the kernel before it
                beside = Attribute(BESIDE, 0, 1)
                config.attributes, config.count = ctypes.addressof(beside), 1
                self.held.append(beside)
            # after a kernel's own arguments come two of Triton's, pointers to scratch memory: null
            at = [first + plan.places[n] for n in arguments(image.kernel)] + [first + plan.places[""]] * 2
            pointers = (ctypes.c_void_p * len(at))(*at)
            self.configs.append(config)
            self.held.append(pointers)
            self.launches.append((ctypes.addressof(config), image.function(device), ctypes.addressof(pointers),
                                  image.kernel.name))

    def on(self, stream: int) -> None:
        """Launch there from now on."""
        for config in self.configs:
            config.stream = stream
        self.stream = stream


class Plan:
    """What a batch works out from a call's sizes: grids, where temporaries lie, where arguments lie in a frame. frames: those
    not in use, by device; a call takes one and gives it back, so that threads never share one."""

    def __init__(self, batch: Batch, call: Call) -> None:
        self.grids = [(image, grid) for image in batch.images if (grid := blocks(image.kernel, call))]
        spans, hosts = ({n: life.span(call) for n, life in some.items()} for some in (batch.temps, batch.hosts))
        where, self.bytes = placed(spans, hosts, batch.over)         # of the workspace
        bases = {n: i for i, n in enumerate((BLOCK, *batch.tensors))}
        # of each temporary, which of these it lies in and how far from its start
        self.offsets = [(bases[where[n].where], where[n].at) for n in batch.temps]
        # of counts, which start at zero: the same, and how many there are
        numbers = [math.prod(call.shape(k, t)) if n in batch.unset else 0 for n, (k, t, *_) in batch.temps.items()]
        self.counts = [(*place, number) for place, number in zip(self.offsets, numbers, strict=True) if number]
        self.sizes = sizes(call)
        addresses = ["", *batch.given, *batch.temps]       # "": a null pointer
        self.layout = struct.Struct(f"{len(addresses)}P{len(batch.params)}f")
        self.places = {n: 8 * i for i, n in enumerate(addresses)}
        self.places |= {n: 8 * len(addresses) + 4 * i for i, n in enumerate((*batch.params, *self.sizes))}
        self.frames: dict[int, list[Frame]] = {}


class Batch:
    """Kernels launched one after another as one call of Python: addresses are read once and written once, temporaries are parts
    of one allocation or of outputs, and the rest is kept from the last call of the same sizes. `temps`: the temporaries that it
    makes."""

    def __init__(self, images: Sequence[Image], temps: Mapping[str, Life]) -> None:
        self.images, self.temps = images, temps
        kernels = [image.kernel for image in images]
        self.varlen = any(k.varlen for k in kernels)
        names = dict.fromkeys(t.name for k in kernels for t in k.tensors() if t.name not in temps)
        self.tensors = tuple(names)
        self.given = (*self.tensors, *(["cu_seqlens"] if self.varlen else []))
        self.params = tuple(dict.fromkeys(p for k in kernels for p in k.program.params()))
        self.unset = uncleared(kernels)
        self.hosts, self.over = outputs(kernels), overwritten(kernels)
        self.written = {n for k in kernels for n in k.changes}

    def __call__(self, memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
        """Tensors that are not aligned to 16 bytes are copied first: the code was compiled for those that are."""
        plan = call.memo.get(self)
        if plan is None:
            plan = call.memo[self] = Plan(self, call)
        addresses = [memory[n].data_ptr() for n in self.tensors]
        if self.varlen:
            assert call.cu_seqlens is not None
            addresses.append(call.cu_seqlens.data_ptr())
        if reduce(or_, addresses) % ALIGNMENT:
            self.copied(memory, values, call)
            return
        device = memory[self.tensors[0]].get_device()
        if device == current():
            self.run(plan, addresses, [values[p] for p in self.params], device)
        else:
            with torch.cuda.device(device):                # launches go to the tensors' device
                self.run(plan, addresses, [values[p] for p in self.params], device)

    def run(self, plan: Plan, addresses: list[int], params: list[float], device: int) -> None:
        if device not in _thread.entered:
            enter(device)
            _thread.entered.add(device)
        free = plan.frames.setdefault(device, [])
        try:
            frame = free.pop()
        except IndexError:
            frame = Frame(plan, device)
        held = workspace(plan.bytes, device) if plan.bytes else None           # until all is launched
        start = held.data_ptr() if held is not None else 0
        bases = [start, *addresses]
        addresses += [bases[i] + at for i, at in plan.offsets]
        plan.layout.pack_into(frame.block, 0, 0, *addresses, *params)
        if frame.stream != (here := stream(device)):
            frame.on(here)
        for i, at, number in plan.counts:
            must(driver().cuMemsetD32Async(bases[i] + at, 0, number, here), "cuMemsetD32Async", "counts")
        launch = driver().cuLaunchKernelEx
        for config, function, pointers, name in frame.launches:
            if code := launch(config, function, pointers, None):
                must(code, "cuLaunchKernelEx", name)
        free.append(frame)

    def copied(self, memory: Mapping[str, torch.Tensor], values: Mapping[str, float], call: Call) -> None:
        moved = {n: memory[n].clone() for n in self.tensors if memory[n].data_ptr() % ALIGNMENT}
        if call.cu_seqlens is not None and call.cu_seqlens.data_ptr() % ALIGNMENT:
            call = call.bounded(call.cu_seqlens.clone())
        self({**memory, **moved}, values, call)
        for name in self.written & moved.keys():
            memory[name].copy_(moved[name])


class _Thread(threading.local):
    """What a thread of its own needs before it can launch."""

    def __init__(self) -> None:
        self.entered: set[int] = set()                     # devices


_thread = _Thread()
