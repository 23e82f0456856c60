"""What emitted Triton kernels call: text, copied into each source that uses it, so that a source stands alone."""

HELPERS = {
    "locate": '''
@triton.jit
def locate(slot, cu_ptr, T, N, CHUNK: tl.constexpr):
    """The sequence that owns a chunk slot, and its first token and length. Sequence n owns the slots from
    cu[n] // CHUNK + n on, so a binary search over cu is enough: no prefix sum, no index built on the host."""
    low, high = 0, N
    while high - low > 1:
        middle = (low + high) // 2
        inside = tl.load(cu_ptr + middle).to(tl.int32) // CHUNK + middle <= slot
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle)
    first, length = bounds(low, cu_ptr, T)
    return tl.cast(low, tl.int64), first, length
''',
    "locate_or_tail": '''
@triton.jit
def locate_or_tail(slot, cu_ptr, T, N, CHUNK: tl.constexpr):
    """As locate, with one more sequence, number N, of the rows that no sequence owns: those from cu[N] on."""
    tail = tl.minimum(tl.maximum(tl.load(cu_ptr + N).to(tl.int64), 0), T)
    if slot >= tail // CHUNK + N:
        n, first, length = tl.cast(N, tl.int64), tail, (T - tail).to(tl.int32)
    else:
        n, first, length = locate(slot, cu_ptr, T, N, CHUNK)
    return n, first, length
''',
    "bounds": '''
@triton.jit
def bounds(n, cu_ptr, T):
    """First token and length of sequence n, kept inside the tensor whatever cu holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + n).to(tl.int64), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + n + 1).to(tl.int64), first), T)
    return first, (end - first).to(tl.int32)
''',
    "load_sum": '''
@triton.jit
def load_sum(pointers, mask, step, count):
    """The sum of `count` tiles that lie `step` elements apart, in order."""
    total = tl.load(pointers, mask=mask, other=0.0)
    for i in range(1, count):
        total += tl.load(pointers + i * step, mask=mask, other=0.0)
    return total
''',
    "start_follower": '''
@triton.jit
def start_follower():
    """From here on blocks of the next kernel may start, once all of this one have come here: none of them waits in vain."""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
''',
    "wait_for_followed": '''
@triton.jit
def wait_for_followed():
    """Until the kernel before has ended."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
''',
    "count_stored": '''
@triton.jit
def count_stored(count_ptr, columns, now):
    """If now: all that this block has stored comes before the count. (tl.debug_barrier, or a branch, would keep the loop around
    it from being pipelined.)"""
    tl.inline_asm_elementwise("""{ .reg .pred now, first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.ne.s32 now, $2, 0;
        setp.eq.and.u32 first, thread, 0, now;
        @now bar.sync 0;
        @first red.release.gpu.global.add.u32 [$1], $3;
        mov.u32 $0, thread; }""", "=r,l,r,r", [count_ptr.to(tl.int64), now.to(tl.int32), columns], dtype=tl.int32,
        is_pure=False, pack=1)
''',
    "await_count": '''
@triton.jit
def await_count(count_ptr, enough):
    """Until so many columns are counted; what was stored before that can be read after it. (Triton would drop a loop around
    what it has for this, for one that does nothing.)"""
    tl.inline_asm_elementwise("""{ .reg .pred less;
        .reg .b32 count;
        again: ld.acquire.gpu.global.b32 count, [$1];
        setp.lt.s32 less, count, $2;
        @less bra again;
        mov.u32 $0, count; }""", "=r,l,r", [count_ptr.to(tl.int64), enough], dtype=tl.int32, is_pure=False, pack=1)
''',
    "softplus": '''
@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
''',
    "solve_rows": '''
@triton.jit
def solve_rows(m, r, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """u with (I + M) u = r by forward substitution, row after row; M counts below the diagonal of its blocks only."""
    row = tl.arange(0, SIZE)
    u = r
    for i in range(1, SIZE):
        m_i = tl.sum(tl.where(row[:, None] == i, m, 0.0), axis=0)
        m_i = tl.where((row < i) & (row // BLOCK == i // BLOCK), m_i, 0.0)
        u_i = tl.sum(m_i[:, None] * u, axis=0)
        u = tl.where(row[:, None] == i, u - u_i[None, :], u)
    return u
''',
    "inverse_of_4": '''
@triton.jit
def inverse_of_4(m, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M)^-1 of four blocks of rows: those on the diagonal by substitution, all at once, then joined two by two."""
    a, ca, b = quarters(m, 2 * BLOCK)
    a0, c0, a1 = quarters(a, BLOCK)
    b0, c1, b1 = quarters(b, BLOCK)
    four = tl.permute(tl.join(tl.join(a0, a1), tl.join(b0, b1)), [3, 2, 0, 1])
    x = substitute(tl.reshape(four, [4, BLOCK, BLOCK]), 4, BLOCK)
    first, second = tl.split(tl.permute(tl.reshape(x, [2, 2, BLOCK, BLOCK]), [2, 3, 1, 0]))
    a0, a1 = tl.split(first)
    b0, b1 = tl.split(second)
    a, b = join(a0, c0, a1, BLOCK, PRECISION), join(b0, c1, b1, BLOCK, PRECISION)
    return join(a, ca, b, 2 * BLOCK, PRECISION)
''',
    "inverse_of_2": '''
@triton.jit
def inverse_of_2(m, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M)^-1 of two blocks of rows: those on the diagonal by substitution, both at once, then joined."""
    a, c, b = quarters(m, BLOCK)
    x = substitute(tl.permute(tl.join(a, b), [2, 0, 1]), 2, BLOCK)
    a, b = tl.split(tl.permute(x, [1, 2, 0]))
    return join(a, c, b, BLOCK, PRECISION)
''',
    "join": '''
@triton.jit
def join(a, c, b, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """[[A, 0], [-B C A, B]], the inverse of [[A^-1, 0], [C, B^-1]]."""
    d = -tl.dot(b, tl.dot(c, a, input_precision=PRECISION), input_precision=PRECISION)
    x = tl.join(tl.join(a, d), tl.join(tl.zeros_like(a), b))
    return tl.reshape(tl.permute(x, [2, 0, 3, 1]), [2 * SIZE, 2 * SIZE])
''',
    "quarters": '''
@triton.jit
def quarters(m, SIZE: tl.constexpr):
    """The blocks of [[a, .], [c, b]]: a, c, b."""
    left, right = tl.split(tl.permute(tl.reshape(m, [2, SIZE, 2, SIZE]), [1, 3, 0, 2]))
    a, c = tl.split(left)
    _, b = tl.split(right)
    return a, c, b
''',
    "inverse_of_blocks": '''
@triton.jit
def inverse_of_blocks(m, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(I + M)^-1 of each diagonal block, by substitution in all blocks at once; zero outside the blocks."""
    COUNT: tl.constexpr = SIZE // BLOCK
    block = tl.arange(0, COUNT)
    diagonal = (block[:, None] == block[None, :])[:, :, None, None]
    tiles = tl.permute(tl.reshape(m, [COUNT, BLOCK, COUNT, BLOCK]), [0, 2, 1, 3])
    x = substitute(tl.sum(tl.where(diagonal, tiles, 0.0), axis=1), COUNT, BLOCK)
    spread = tl.where(diagonal, x[:, None, :, :], 0.0)
    return tl.reshape(tl.permute(spread, [0, 2, 1, 3]), [SIZE, SIZE])
''',
    "substitute": '''
@triton.jit
def substitute(m, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(I + M)^-1 of each of some blocks, row after row; M counts below the diagonal only."""
    row = tl.arange(0, BLOCK)
    below = tl.where((row[:, None] > row[None, :])[None, :, :], m, 0.0)
    x = tl.where((row[:, None] == row[None, :])[None, :, :], 1.0, tl.zeros([COUNT, BLOCK, BLOCK], tl.float32))
    for i in range(1, BLOCK):
        this = (row == i)[None, :, None]
        m_i = tl.sum(tl.where(this, below, 0.0), axis=1)
        x_i = tl.sum(m_i[:, :, None] * x, axis=1)
        x = tl.where(this, x - x_i[:, None, :], x)
    return x
''',
}
BESIDE = {"start_follower", "wait_for_followed", "count_stored", "await_count"}      # where one kernel runs beside another
NEEDS = {"locate": ("bounds",), "locate_or_tail": ("locate", "bounds"), "inverse_of_blocks": ("substitute",),
         "inverse_of_2": ("quarters", "substitute", "join"), "inverse_of_4": ("quarters", "substitute", "join")}
