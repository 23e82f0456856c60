"""What to do where a kernel would have to be compiled and may not: the command that compiles it ahead."""
from __future__ import annotations

from typing import TYPE_CHECKING

from gdn_ir.artifacts import NotCompiled

if TYPE_CHECKING:
    from gdn_ir.backends.base import Call
    from gdn_ir.compiler import Variant


def not_compiled(chosen: Variant, call: Call, why: NotCompiled) -> NotCompiled:
    """The same error, with the shape that was called and the command that makes a pack for it."""
    i, count = chosen.instance, max(1, call.sequences)
    shape = f"{count}x{max(1, call.tokens // count)}:{call.heads['H']}/{call.heads['HV']}"
    words = [f"gdn-ir compile --target {chosen.arch} --shapes {shape} --backends {chosen.backend} --dtype {i.io}",
             f"--K {i.K} --V {i.V}"]
    flags = [n if v else f"no-{n}" for n, v in vars(i.switches).items() if isinstance(v, bool) and v != (n == "erase")]
    flags += ["no-decay"] if i.switches.decay == "none" else []
    flags += ["no-final_state"] if not i.grads and not i.switches.final_state else []
    words += [f"--op backward --grads {','.join(i.grads)}"] if i.grads else ["--op recurrent"] if i.recurrent else []
    words += [f"--flags {','.join(flags)}"] if flags else []
    words += [f"--beta {i.beta}"] if i.beta != i.io else []
    words += [] if i.varlen else ["--dense"]
    return NotCompiled(f"{i}, {call.sequences} sequences of {call.tokens} tokens together, H/HV {call.heads['H']}/"
                       f"{call.heads['HV']}: {why}. Compile it ahead: {' '.join(words)} -o PACK, and call "
                       "gdn_ir.load_pack('PACK')")
