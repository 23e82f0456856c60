"""The table: how each operation of the language is written in torch, over tiles with batch dimensions before them."""
from __future__ import annotations

import math

from gdn_ir.backends.linearize import Linear, Table, infix, listed, paren
from gdn_ir.nodes import FUNCTIONS, At, Member, Members, Node, Op, Rows, Slot, Tile, Turn, base, stored_axes

DTYPES = {"f64": "torch.float64", "f32": "torch.float32", "tf32": "torch.float32", "tf32x3": "torch.float32",
          "real": "torch.float32", "bf16": "torch.bfloat16", "f16": "torch.float16", "int": "torch.int64"}
CALLS = {"exp": "torch.exp", "exp2": "torch.exp2", "log": "torch.log", "rsqrt": "torch.rsqrt",
         "sigmoid": "torch.sigmoid", "softplus": "torch.nn.functional.softplus", "min": "torch.minimum", "max": "torch.maximum"}


def number(n: Node) -> bool:
    """Whether the value is a plain Python number when the kernel runs."""
    return n.op in (Op.CONST, Op.PARAM) or \
        (n.op in (Op.ELEM, Op.CAST) and (n.op is Op.CAST or FUNCTIONS[n["fn"]].symbol is not None)
         and all(number(a) for a in n.args))


def aligned(text: str, axes: tuple[str, ...], to: tuple[str, ...]) -> str:
    """The text of a value over `axes`, indexed to stand among values over `to`: x[..., :, None]."""
    return text if axes == to else f"{paren(text)}[..., {', '.join(':' if a in axes else 'None' for a in to)}]"


def operand(l: Linear, x: Node, to: tuple[str, ...]) -> str:
    if number(x):
        return l.text(x)
    return aligned(l.text(x), x.axes, to).replace("..., ", "" if x.op is Op.INDEX else "..., ")     # coordinates have no batch


def const(l: Linear, n: Node) -> str:
    value = n["value"]
    return repr(value) if math.isfinite(value) else f"float('{value}')"


def elem(l: Linear, n: Node) -> str:
    fn = FUNCTIONS[n["fn"]]
    whole = any(a.type.dtype == "int" for a in n.args)
    args = [str(int(a["value"])) if whole and a.const is not None else operand(l, a, n.axes) for a in n.args]
    if fn.arity == 2 and fn.symbol:
        return infix(fn.symbol, *args)
    if n["fn"] == "neg":
        return f"-{paren(args[0])}"
    args = [f"torch.tensor({t}, dtype={l.rest})" if number(a) else t for a, t in zip(n.args, args, strict=True)]
    return f"{CALLS[n['fn']]}({', '.join(args)})"


def cast(l: Linear, n: Node) -> str:
    (x,) = n.args
    # a value of reals (a choice between numbers) has whatever dtype torch gives it
    if number(x) or (x.type.dtype != "real" and DTYPES[x.type.dtype] == DTYPES[n["dtype"]]):
        return l.text(x)
    return f"{paren(l.text(x))}.to({DTYPES[n['dtype']]})"


def broadcast(l: Linear, n: Node) -> str:
    (x,) = n.args
    sizes = listed([str(l.kernel.tile(a)) for a in n.axes])
    if number(x):
        return f"torch.full({sizes}, {l.text(x)}, dtype={l.rest}, device=n.device)"
    return f"run.spread({operand(l, x, n.axes)}, {sizes})"


def select(l: Linear, n: Node) -> str:
    args = [operand(l, a, n.axes) for a in n.args]
    if number(n.args[1]) and number(n.args[2]):            # two numbers: say what they are numbers of
        args[1] = f"torch.tensor({args[1]}, dtype=torch.float64)"
    return f"torch.where({', '.join(args)})"


def dot(l: Linear, n: Node) -> str:
    over = n["over"]
    a, b = n.args if n.axes[0] in n.args[0].axes else n.args[::-1]
    left, right = (paren(l.text(x)) + ("" if x.axes[at] == over else ".mT") for x, at in ((a, 1), (b, 0)))
    if DTYPES[a.type.dtype] not in ("torch.float32", "torch.float64"):         # sums are wider than what is multiplied
        left, right = f"{left}.float()", f"{right}.float()"
    return f"{left} @ {right}"


def reduce(l: Linear, n: Node) -> str:
    (x,) = n.args
    return f"{paren(l.text(x))}.{'sum' if n['fn'] == 'sum' else 'amax'}({x.axes.index(n['over']) - len(x.axes)})"


def cumsum(l: Linear, n: Node) -> str:
    dim, x = n.axes.index(n["axis"]) - len(n.axes), paren(l.text(n.args[0]))
    return f"{x}.flip({dim}).cumsum({dim}).flip({dim})" if n["reverse"] else f"{x}.cumsum({dim})"


def reordered(text: str, axes: tuple[str, ...], to: tuple[str, ...]) -> str:
    """A tile whose dimensions are `axes`, with its dimensions in the order of `to`."""
    if axes == to:
        return text
    if len(axes) == 2:
        return f"{paren(text)}.mT"
    return f"torch.movedim({text}, {tuple(axes.index(a) - len(axes) for a in to)}, {tuple(range(-len(to), 0))})"


def twin(l: Linear, n: Node) -> str:
    swap = {n["axis"]: n["axis"] + "'", n["axis"] + "'": n["axis"]}
    return reordered(l.text(n.args[0]), tuple(swap.get(a, a) for a in n.args[0].axes), n.axes)


def tri_solve(l: Linear, n: Node) -> str:
    m, r = (l.text(a) for a in n.args)
    options = (f", block={n['block']}" if n["block"] else "") + (", transpose=True" if dict(n.attr).get("transpose") else "")
    if len(n.axes) == 1:
        return f"run.solve({m}, {paren(r)}[..., None]{options})[..., 0]"
    turn = "" if n.axes[0] == n["axis"] else ".mT"
    return f"run.solve({m}, {paren(r) if turn else r}{turn}{options}){turn}"


# ---- memory -----------------------------------------------------------------------------------------------------------------


def place(n: Node) -> tuple[tuple[int, ...], str, str]:
    """Which dimensions a load or store indexes, with what, and the mask of the places that exist ("": all of them)."""
    rows = [t for t in n["index"] if isinstance(t, Rows) and not t.single]
    more = "[..., None]" if rows else ""                   # beside a tile of rows, every other index is one column
    dims, index, mask = [], [], ""
    for d, term in enumerate(n["index"]):
        match term:
            case Tile():
                continue
            case At(grid, share):
                text = ("n" if grid == "N" else f"i_{share or grid}") + more
            case Rows(_, tile, single):
                text, mask = "t", "rows > 0" if single else f"in_{base(tile)}"
            case Slot(chain, _, inner):
                at, there = (f"slot_{chain[-1]}", f"in_{chain[-1]}") if inner else ("slot", "rows > 0")
                text, mask = at + more, mask or there + more
            case Turn(scan):
                text = f"i_{scan}"
            case Members(grid):
                text = f"i_{grid}" + more
            case Member(grid, scan, own):
                text = f"i_{grid if own else scan}" + more
        dims.append(d)
        index.append(text)
    return tuple(dims), listed(index), mask


def stored(n: Node) -> tuple[str, ...]:
    """The order of a tile's axes in memory, after indexing: rows first."""
    rows = tuple(t.tile for t in n["index"] if isinstance(t, Rows) and not t.single)
    return rows + tuple(a for a in stored_axes(n["index"]) if a not in rows)


def load(l: Linear, n: Node) -> str:
    dims, index, mask = place(n)
    slots = any(isinstance(t, Slot) for t in n["index"])
    masked = f", {mask}" if mask and not slots else ""
    groups = [(i, t.grid) for i, t in enumerate(n["index"]) if isinstance(t, Members)]
    masked += "".join(f", members=({i}, {grid})" for i, grid in groups)
    return reordered(f"{n['tensor'].name}_.load({dims}, {index}{masked})", stored(n), n.axes)


def store(l: Linear, n: Node) -> str:
    _, index, mask = place(n)
    value = n.args[0]
    text = reordered(l.text(value), value.axes, stored(n))
    if number(value):
        text = f"torch.tensor({text}, dtype={DTYPES[n['tensor'].dtype]}, device=n.device)"
    return f"{n['tensor'].name}_.store({index}, {text}, batch{f', {mask}' if mask else ''}{', add=True' if n['sum'] else ''})"


def valid(l: Linear, n: Node) -> str:
    a = base(n["axis"])
    return "rows" if a in l.tokens else f"torch.tensor({l.kernel.extents[a]})"


RULES: Table = {
    Op.CONST: const, Op.PARAM: lambda l, n: n["name"], Op.INDEX: lambda l, n: base(n["axis"]), Op.VALID: valid,
    Op.ELEM: elem, Op.CAST: cast, Op.SELECT: select, Op.BROADCAST: broadcast, Op.DOT: dot, Op.REDUCE: reduce,
    Op.CUMSUM: cumsum, Op.TWIN: twin, Op.TRI_SOLVE: tri_solve, Op.LOAD: load, Op.STORE: store,
}
