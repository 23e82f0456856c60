"""What the threads of a warp do together, as macros of TileLang that a kernel of roles brings along: sums by shuffles, an
inverse in blocks.

The inverse A of I + M, M strictly lower with 64 rows, is made transposed, for then no product waits for memory: a warp has a
column w of its blocks, A_ww = D_w the inverse of a diagonal block,

    A_jw^T = -(sum of A_tw^T M_jt^T over w <= t < j) D_j^T

and each left operand is what the same warp has in registers as an accumulator; right ones are M's blocks and the D_j. (All D
and A are kept negated, so that no product is: -A_jw^T is the sum of (-A_tw^T) M_jt^T, times -D_j^T. The D_j lie in memory as
they are: what loads them for a product transposes them.)
"""
from __future__ import annotations

from string import Template

SIZE, BLOCK, SOLVED = 64, 16, 8                            # rows of an inverse, of blocks that are joined, and that are solved
# rows of a block's tile are so long that eight of them lie in different banks
WIDTHS = {"matrix": SIZE + 8, "blocks": SOLVED + 4, "inverses": BLOCK + 8}

NEEDS = {"invert_blocks": ("load_pair", "multiply")}
TEXTS = {
    "running_sum": '''
@T.macro
def running_sum(x, at):
    """x[at], 64 numbers, becomes their running sum: two a lane, and those of the lanes before by shuffles."""
    lane = T.get_thread_binding() % 32
    mine = T.alloc_local((2,), "float32")
    before = T.alloc_local((1,), "float32")
    T.sync_warp()
    for i in T.unroll(2):
        mine[i] = x[at, 2 * lane + i]
    mine[1] += mine[0]
    for b in T.unroll(5):
        before[0] = T.shfl_up(mine[1], 1 << b)
        if lane >= 1 << b:
            mine[0] += before[0]
            mine[1] += before[0]
    for i in T.unroll(2):
        x[at, 2 * lane + i] = mine[i]
    T.sync_warp()
''',
    "invert_blocks": '''
@T.macro
def invert_blocks(small, m, at, inverses, to, warps):
    """The inverses of I + m, four strictly lower blocks of 16 rows, with the other sign: a row a lane, so two blocks a warp, and
    then two more if it is alone. small: m's blocks of 8 rows, which are solved first, x (I + m) = -1 from the last column on:
    what is known goes into all before it at once, so that no sum waits for itself. Then what lies under them, x m x, of both
    blocks by one product."""
    lane = T.get_thread_binding() % 32
    x = T.alloc_local((8,), "float32")
    left = T.alloc_local((8,), "float16")                  # two blocks of 8 x 8 on the diagonal of 16 x 16
    pair = T.alloc_local((4,), "float16")
    sums = T.alloc_local((4,), "float32")
    for turn in T.serial(2 // warps):
        first = (T.get_thread_binding() // 32 % warps + turn) * 32
        for i in T.unroll(8):
            x[i] = 0.0
        for i in T.unroll(8):
            x[7 - i] = T.Select(lane % 8 == 7 - i, -1.0, x[7 - i])
            for j in T.unroll(7 - i):
                x[j] -= small[at, first + lane // 8 * 8 + 7 - i, j] * x[7 - i]
        for i in T.unroll(8):
            inverses[to, first + lane, lane // 8 % 2 * 8 + i] = T.cast(x[i], "float16")
        for i in T.unroll(8):
            inverses[to, first + lane, 8 - lane // 8 % 2 * 8 + i] = T.cast(0.0, "float16")
            left[i] = T.cast(0.0, "float16")
        T.sync_warp()
        block, row = first + lane // 8 % 2 * 16, lane % 8
        load_pair(pair, inverses, to, block + 8 + row, 8, False)
        for i in T.unroll(4):
            left[i // 2 * 6 + i % 2] = pair[i]
            sums[i] = 0.0
        load_pair(pair, m, at, block + 8 + row, block, True)
        multiply(sums, 0, left, 0, pair, 0)
        for i in T.unroll(4):
            left[i // 2 * 6 + i % 2] = T.cast(sums[i], "float16")
            sums[i] = 0.0
        load_pair(pair, inverses, to, block + row, 0, True)
        multiply(sums, 0, left, 0, pair, 0)
        for i in T.unroll(4):
            inverses[to, first + i // 2 * 16 + 8 + lane // 4, lane % 4 * 2 + i % 2] = T.cast(sums[i], "float16")
''',  # noqa: E501 (a longer line than others, in the text that a GPU has run)
    "load_pair": '''
def load_pair(dst, tile, slot, row, col, transposed):
    """Two blocks of 8 x 8 for a product; row, col: a lane's, of the first or the second."""
    return T.ptx_ldmatrix(T.bool(transposed), 2, T.access_ptr(tile[slot, row, col], "r", extent=8),
                          T.access_ptr(dst[0], "w", extent=4))
''',
    "load_matrix": '''
def load_matrix(dst, at, tile, slot, row, col, transposed, turned):
    """A block of 16 x 16 for a product: its quarters in columns, or (turned) in rows, each transposed or not."""
    lane = T.get_thread_binding() % 32
    down, right = (lane // 16 * 8 + lane % 8, lane // 8 % 2 * 8) if turned else (lane % 16, lane // 16 * 8)
    return T.ptx_ldmatrix(T.bool(transposed), 4, T.access_ptr(tile[slot, row + down, col + right], "r", extent=8),
                          T.access_ptr(dst[at], "w", extent=8))
''',
    "multiply": '''
def multiply(sums, at, left, left_at, right, right_at):
    """sums (16 x 8) += left (16 x 16) right (16 x 8), each at its place among a thread's registers."""
    return T.ptx_mma("float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32", left.data, left_at, right.data, right_at,
                     sums.data, at, T.bool(False))
''',
}


# an inverse of its blocks: as products by it take it, transposed; or upright, as it is stored: then a warp writes two bytes to
# each of many rows, swizzled, so that no two words lie in a bank
JOIN = Template('''
@T.macro
def $name(m, m_at, inverses, at, ${factors}to, to_at, warps):
    """The inverse of I + M, $what: a column of blocks a warp. Fewer warps go on with the next, there
    and back, for those to the left are longer. inverses: of the diagonal blocks."""
    lane, warp = T.get_thread_binding() % 32, T.get_thread_binding() // 32 % warps
    left = T.alloc_local((24,), "float16")                 # blocks of the column, as left operands
    right = T.alloc_local((8,), "float16")
    half = T.alloc_local((8,), "float16")
    sums = T.alloc_local((8,), "float32")
    factor = T.alloc_local((2,), "float32")
    for turn in T.serial(4 // warps):
        w = warps * turn + warp + turn % 2 * (warps - 1 - 2 * warp)
        for i in T.unroll(2):
            factor[i] = $factor
        load_matrix(left, 0, inverses, at, w * 16, 0, True, True)
        for i in T.unroll(4):
            for e in T.$each(2):
                to[to_at, $own] = T.cast(
                    factor[i % 2] * T.cast(left[2 * i + e], "float32"), "bfloat16")
        for s in T.unroll(1, 4):
            if w + s < 4:
                for i in T.unroll(8):
                    sums[i] = 0.0
                for t in T.unroll(s):
                    load_matrix(right, 0, m, m_at, (w + s) * 16, (w + t) * 16, False, True)
                    multiply(sums, 0, left, 8 * t, right, 0)
                    multiply(sums, 4, left, 8 * t, right, 4)
                for i in T.unroll(8):
                    half[i] = T.cast(sums[i], "float16")
                    sums[i] = 0.0
                load_matrix(right, 0, inverses, at, (w + s) * 16, 0, False, True)
                multiply(sums, 0, half, 0, right, 0)
                multiply(sums, 4, half, 0, right, 4)
                if s < 3:
                    for i in T.unroll(8):
                        left[8 * s + i] = T.cast(sums[i], "float16")
                for i in T.unroll(4):
                    for e in T.$each(2):
                        to[to_at, $below] = T.cast(
                            factor[i % 2] * sums[2 * i + e], "bfloat16")
''')


def joined(name: str, upright: bool, scaled: bool) -> str:
    row = "w * 16 + i % 2 * 8 + lane // 4"
    own, below = ([row, f"{w} * 16 + i // 2 * 8 + lane % 4 * 2 + e"] for w in ("w", "(w + s)"))
    at = [", ".join(x[::-1] if upright else x) for x in (own, below)]
    return JOIN.substitute(
        name=name, factors="factors, f_at, " if scaled else "", own=at[0], below=at[1],
        each="unroll" if upright else "vectorized",
        what=", ".join(["its columns scaled"] * scaled + ["as it is stored" if upright else "transposed"]),
        factor='-T.cast(factors[f_at, w * 16 + i * 8 + lane // 4], "float32")' if scaled else "-1.0")


JOINS = {"join_blocks": (False, True), "join_upright": (True, False), "join_scaled_upright": (True, True)}
TEXTS |= {name: joined(name, *how) for name, how in JOINS.items()}
NEEDS |= dict.fromkeys(JOINS, ("load_matrix", "multiply"))


def texts(wanted: list[str]) -> list[str]:
    """The lines of macros, after those that they call."""
    names = dict.fromkeys(n for w in wanted for n in (*NEEDS.get(w, ()), w))
    return [line for n in names for line in ["", *TEXTS[n].strip("\n").split("\n"), ""]]
