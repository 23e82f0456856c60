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
    "inverse_of_blocks": '''
@triton.jit
def inverse_of_blocks(m, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(I + M)^-1 of each diagonal block, by substitution in all blocks at once; zero outside the blocks."""
    COUNT: tl.constexpr = SIZE // BLOCK
    block, row = tl.arange(0, COUNT), tl.arange(0, BLOCK)
    diagonal = (block[:, None] == block[None, :])[:, :, None, None]
    tiles = tl.permute(tl.reshape(m, [COUNT, BLOCK, COUNT, BLOCK]), [0, 2, 1, 3])
    below = tl.sum(tl.where(diagonal & (row[:, None] > row[None, :])[None, None, :, :], tiles, 0.0), axis=1)
    x = tl.where((row[:, None] == row[None, :])[None, :, :], 1.0, tl.zeros([COUNT, BLOCK, BLOCK], tl.float32))
    for i in range(1, BLOCK):
        this = (row == i)[None, :, None]
        m_i = tl.sum(tl.where(this, below, 0.0), axis=1)
        x_i = tl.sum(m_i[:, :, None] * x, axis=1)
        x = tl.where(this, x - x_i[:, None, :], x)
    spread = tl.where(diagonal, x[:, None, :, :], 0.0)
    return tl.reshape(tl.permute(spread, [0, 2, 1, 3]), [SIZE, SIZE])
''',
}
NEEDS = {"locate": ("bounds",), "locate_or_tail": ("locate", "bounds")}
