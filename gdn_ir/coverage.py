"""The coverage table: what every backend must serve. The suite prints it as executed, declined (with the reason) or failed;
declining a cell that is listed here fails."""
from __future__ import annotations

from dataclasses import dataclass, replace

from gdn_ir.compiler import Instance
from gdn_ir.programs.gated_delta import Switches

FAMILY = {"gated delta rule": Switches(), "delta rule": Switches(decay="none"),
          "gated linear attention": Switches(erase=False), "linear attention": Switches(decay="none", erase=False)}
DTYPES = ("bf16", "f16", "f32")


@dataclass(frozen=True)
class Layout:
    """lengths: of the sequences; varlen: packed, with cu_seqlens (else all of one length)."""
    lengths: tuple[int, ...]
    varlen: bool = False
    H: int = 2
    HV: int = 2
    K: int = 64
    V: int = 64


LAYOUTS = {"dense": Layout((128, 128)), "varlen": Layout((64, 0, 150, 1), varlen=True), "GVA": Layout((128,), H=1, HV=3),
           "ragged": Layout((200, 200)), "K != V": Layout((130,), K=48, V=80)}
FLAGS = {"initial state": Switches(initial_state=True, final_state=True),
         "states [V, K]": Switches(initial_state=True, final_state=True, state_v_first=True),
         "l2norm in kernel": Switches(l2norm=True, final_state=True),
         "beta sigmoid in kernel": Switches(beta_sigmoid=True, final_state=True),
         "negative eigenvalues": Switches(beta_sigmoid=True, neg_eigval=True, final_state=True),
         "no final state": Switches()}


@dataclass(frozen=True)
class Cell:
    """One entry of the table."""
    name: str
    switches: Switches
    io: str
    layout: Layout

    @property
    def instance(self) -> Instance:
        return Instance(self.switches, self.layout.K, self.layout.V, self.io, self.io, self.layout.varlen)


def table(dtypes: tuple[str, ...] = DTYPES) -> tuple[Cell, ...]:
    """Every member of the family x dtype x layout, then every flag on packed bf16 and float32. dtypes: only cells of these
    (native code for CPUs has no 16-bit arithmetic, and must serve float32)."""
    cells = [Cell(f"{member}, {io}, {layout}", replace(s, final_state=True), io, LAYOUTS[layout])
             for member, s in FAMILY.items() for io in DTYPES for layout in LAYOUTS]
    cells += [Cell(f"{flag}, {io}", s, io, LAYOUTS["varlen"]) for flag, s in FLAGS.items() for io in ("bf16", "f32")]
    return tuple(c for c in cells if c.io in dtypes)
