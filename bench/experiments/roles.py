"""The forward pass of the gated delta rule as one kernel of cooperating roles, written by hand in TileLang for sm_90a.

An experiment: the text that a printer of roles would have to produce. One block of 512 threads serves one sequence and one
value head, in chunks of 64 tokens, K = V = 128, bfloat16. Its warps have four jobs:

  threads    role        per chunk
  0..127     state 0     rows   0..63 of the transposed state S^T [V, K], which never leave their registers
  128..255   state 1     rows 64..127 of it; the two exchange nothing, and each hides the other's waits
  256..383   aux         what needs no state, up to two chunks ahead: T = (I + M)^-1 diag(beta), P = scale Gamma * Q K^T
  384..511   load        one warp each: TMA of q and k; TMA of v; running sums of the decay; TMA store of o

With the state transposed, V is the M of every product, so each left operand is made of an accumulator of the same warpgroup
and goes to the next product from registers. (. multiplies by one factor for each token, a column here.)

    SK = S^T K^T          R = V^T - gamma . SK               U = R T^T
    O  = S^T Q^T          O = scale gamma . O + U P^T        S^T = gamma_L S^T + ((gamma_L / gamma) . U) K

ptxas takes all from a warpgroup.arrive to the next wait for *every* product as one stage: it does not reuse registers in it,
and if something else touches an accumulator of the stage in it, or registers run short, it serialises every product of the
kernel (its notes C7512, C7514, C7517). So a chunk has three stages, each ended by wait_wgmma(0), and what runs under them
touches none of their accumulators:

    SK              under it: the last chunk's O goes to shared memory, V^T comes from it (stmatrix, ldmatrix, transposing)
    U, then O       under it: S is scaled
    S, then O       under it: nothing; the other warpgroup has the tensor cores

Barriers. A ring of n slots has two for each slot: chunk c waits for `full` with parity c // n % 2 and, to refill the slot, for
`free` with parity (c // n + 1) % 2, which a fresh barrier passes. Every role walks chunks 0, 1, .. and arrives once a chunk:

  ring   slots  full: arrivals, by             free: arrivals (lane 0 of each warp), by
  q      2      32, load warp 0 (+ TMA bytes)  12, states and aux
  k      3      32, load warp 0 (+ TMA bytes)  12, states and aux
  v0 v1  2      32, load warp 1 (+ TMA bytes)  4, its state
  gates  3      32, load warp 2                12, states and aux
  T P    2      128, aux                       8, states
  o0 o1  1      128, its state                 32, load warp 3

No cycle: load waits for free slots only; aux for q, k, gates and free T and P slots; a state for all of these and a free o
slot; load warp 3 for o. Slots are freed in order of chunks. `protocol.py` runs the roles as coroutines: none starves.

Writes to shared memory that the asynchronous proxy reads (T, P, o, and tails of q and k, which ordinary stores fill) are
followed by fence.proxy.async in each writing thread before it arrives. TileLang's ThreadSync pass is off: it would put
barriers into roles. A tail's rows past the end of its sequence are zeros in q, k, v and beta, and their decay is 1, so that
nothing of the next sequence is read, and o is stored up to the end only.
"""
import functools
from typing import Any, NamedTuple

import tilelang
import tilelang.language as T
import torch

C, D, HALF = 64, 128, 64                                   # tokens in a chunk; K and V; rows of S^T in one warpgroup
BF16, F16, F32 = "bfloat16", "float16", "float32"
SUM, GAMMA, REST, BETA = range(4)                          # rows of gates: log2 of gamma, gamma, gamma_L / gamma, beta
LOG2E = 1.4426950408889634
REGISTERS = (208, 72, 24)                                  # of a thread: state, aux, load; 2 * 208 + 72 + 24 = 65536 / 128


class Ring(NamedTuple):
    tile: Any
    full: Any
    free: Any
    slots: int

    def wait_full(self, c: Any) -> Any:
        return T.barrier_wait(self.full[c % self.slots], c // self.slots % 2)

    def wait_free(self, c: Any) -> Any:
        return T.barrier_wait(self.free[c % self.slots], (c // self.slots + 1) % 2)

    def fill(self, c: Any) -> Any:
        return T.barrier_arrive(self.full[c % self.slots])

    def release(self, c: Any) -> Any:
        return T.barrier_arrive(self.free[c % self.slots])


@T.macro
def state(half, q, k, v, t, p, o, gates, chunks, lane, scale, final, n, hv):
    S = T.alloc_fragment((HALF, D), F32)
    S16 = T.alloc_fragment((HALF, D), BF16)
    SK = T.alloc_fragment((HALF, C), F32)
    R16 = T.alloc_fragment((HALF, C), BF16)
    U = T.alloc_fragment((HALF, C), F32)
    U16 = T.alloc_fragment((HALF, C), BF16)
    W16 = T.alloc_fragment((HALF, C), BF16)
    O = T.alloc_fragment((HALF, C), F32)
    V16 = T.alloc_fragment((C, HALF), BF16)                # tokens by rows of V: what ldmatrix and stmatrix transpose
    O16 = T.alloc_fragment((C, HALF), BF16)
    transposed = T.Fragment((C, HALF), forward_thread_fn=lambda j, i: i // 16 * 32 + i % 8 * 4 + j % 8 // 2,
                            forward_index_fn=lambda j, i: j // 8 * 4 + i % 16 // 8 * 2 + j % 2)
    T.annotate_layout({V16: transposed, O16: transposed})

    T.clear(S)
    T.clear(O)
    for c in T.serial(chunks):
        for i, j in T.Parallel(HALF, D):
            S16[i, j] = S[i, j]
        k.wait_full(c)
        T.wgmma_gemm(S16, k.tile[c % k.slots, :, :], SK, transpose_B=True, clear_accum=True)
        if c > 0:
            o.wait_free(c - 1)
            for i, j in T.Parallel(HALF, C):
                O16[j, i] = O[i, j]
            T.copy(O16, o.tile)
            T.fence_proxy_async()
            o.fill(c - 1)
        v.wait_full(c)
        gates.wait_full(c)
        if c % 2 == 0:                                     # slots of v are buffers: ldmatrix drops a slice's offset
            T.copy(v.tile[0], V16)
        else:
            T.copy(v.tile[1], V16)
        T.wait_wgmma(0)
        for i, j in T.Parallel(HALF, C):
            SK[i, j] = V16[j, i] - gates.tile[c % gates.slots, GAMMA, j] * SK[i, j]
        for i, j in T.Parallel(HALF, C):
            R16[i, j] = SK[i, j]
        t.wait_full(c)
        T.wgmma_gemm(R16, t.tile[c % t.slots, :, :], U, transpose_B=True, clear_accum=True)
        q.wait_full(c)
        T.wgmma_gemm(S16, q.tile[c % q.slots, :, :], O, transpose_B=True, clear_accum=True)
        for i, j in T.Parallel(HALF, D):
            S[i, j] *= gates.tile[c % gates.slots, GAMMA, C - 1]
        T.wait_wgmma(0)
        T.sync_warp()
        if lane == 0:
            v.release(c)
            t.release(c)
            q.release(c)
        for i, j in T.Parallel(HALF, C):
            U16[i, j] = U[i, j]
        for i, j in T.Parallel(HALF, C):
            U[i, j] *= gates.tile[c % gates.slots, REST, j]
        for i, j in T.Parallel(HALF, C):
            W16[i, j] = U[i, j]
        for i, j in T.Parallel(HALF, C):
            O[i, j] *= scale * gates.tile[c % gates.slots, GAMMA, j]
        T.wgmma_gemm(W16, k.tile[c % k.slots, :, :], S)
        p.wait_full(c)
        T.wgmma_gemm(U16, p.tile[c % p.slots, :, :], O, transpose_B=True)
        T.wait_wgmma(0)
        T.sync_warp()
        if lane == 0:
            k.release(c)
            p.release(c)
            gates.release(c)
    if chunks > 0:
        o.wait_free(chunks - 1)
        for i, j in T.Parallel(HALF, C):
            O16[j, i] = O[i, j]
        T.copy(O16, o.tile)
        T.fence_proxy_async()
        o.fill(chunks - 1)
    for i, j in T.Parallel(HALF, D):
        final[n, hv, j, half * HALF + i] = S[i, j]


def load_matrix(dst: Any, at: Any, tile: Any, row: Any, col: Any, lane: Any, transpose: bool) -> Any:
    """A 16 x 16 block as the left operand of m16n8k16, or (transposed) as two right operands side by side."""
    return T.ptx_ldmatrix(T.bool(transpose), 4, T.access_ptr(tile[row + lane % 16, col + lane // 16 * 8], "r", extent=8),
                          T.access_ptr(dst[at], "w", extent=8))


def multiply(acc: Any, at: int, a: Any, a_at: Any, b: Any, b_at: int) -> Any:
    """acc (16 x 8) += a (16 x 16) b (16 x 8), each at its place in a thread's registers."""
    return T.ptx_mma(F32, "m16n8k16", "row", "col", "fp16", "fp16", "fp32", a.data, a_at, b.data, b_at, acc.data, at,
                     T.bool(False))


@T.macro
def aux(q, k, t, p, gates, diag, m, a, chunks, warp, lane, scale):
    """T: 16 x 16 diagonal blocks by substitution in float32, a warp each; merged to 32 and to 64 by fp16 products (m16n8k16).
    The blocks above the diagonal of t and a are zeroed once and never written again."""
    KK = T.alloc_fragment((C, C), F32)
    QK = T.alloc_fragment((C, C), F32)
    x = T.alloc_local((16,), F32)                          # a column of the inverse of a diagonal block
    left = T.alloc_local((16,), F16)
    right = T.alloc_local((8,), F16)
    w = T.alloc_local((8,), F32)
    w16 = T.alloc_local((16,), F16)
    row, col = lane // 4, lane % 4 * 2                     # of a thread's first element of an accumulator

    T.clear(t.tile)
    T.clear(a)
    T.sync_threads(1, 128)
    for c in T.serial(chunks):
        k.wait_full(c)
        T.wgmma_gemm(k.tile[c % k.slots, :, :], k.tile[c % k.slots, :, :], KK, transpose_B=True, clear_accum=True)
        gates.wait_full(c)
        T.wait_wgmma(0)
        for i, j in T.Parallel(C, C):                      # M, masked before the exponential
            KK[i, j] *= gates.tile[c % gates.slots, BETA, i] * T.exp2(T.Select(
                i > j, gates.tile[c % gates.slots, SUM, i] - gates.tile[c % gates.slots, SUM, j], -1e30))
        T.sync_threads(1, 128)                             # the last chunk's products have read m and a
        for i, j in T.Parallel(C, C):
            m[i, j] = -KK[i, j]
            if i // 16 == j // 16:
                diag[i // 16, i % 16, j % 16] = KK[i, j]
        T.sync_warp()
        q.wait_full(c)
        T.wgmma_gemm(q.tile[c % q.slots, :, :], k.tile[c % k.slots, :, :], QK, transpose_B=True, clear_accum=True)

        t.wait_free(c)                                     # lanes 0..15 and 16..31 both solve; each stores half the rows
        for i in T.unroll(16):
            x[i] = T.Select(lane % 16 == i, 1.0, 0.0)
        for i in T.unroll(1, 16):
            for j in T.unroll(i):
                x[i] -= diag[warp, i, j] * x[j]
        for i in T.unroll(8):
            w[i] = T.Select(lane < 16, x[i], x[i + 8])
        for i in T.unroll(8):
            a[16 * warp + lane // 16 * 8 + i, 16 * warp + lane % 16] = w[i]
            t.tile[c % t.slots, 16 * warp + lane // 16 * 8 + i, 16 * warp + lane % 16] = \
                w[i] * gates.tile[c % gates.slots, BETA, 16 * warp + lane % 16]
        T.sync_threads(1, 128)

        T.wait_wgmma(0)
        if lane == 0:
            q.release(c)
            k.release(c)
        for i, j in T.Parallel(C, C):
            QK[i, j] *= scale * T.exp2(T.Select(
                i >= j, gates.tile[c % gates.slots, SUM, i] - gates.tile[c % gates.slots, SUM, j], -1e30))
        p.wait_free(c)
        for i, j in T.Parallel(C, C):
            p.tile[c % p.slots, i, j] = QK[i, j]
        T.fence_proxy_async()
        p.fill(c)

        lo = warp // 2 * 32                                # A10 = A11 (-M10) A00 in both halves; a warp has 8 of 16 columns
        load_matrix(left, 0, a, lo + 16, lo + 16, lane, False)
        load_matrix(right, 0, m, lo + 16, lo, lane, True)
        for i in T.unroll(8):
            w[i] = 0.0
        multiply(w, 0, left, 0, right, 0)
        multiply(w, 4, left, 0, right, 4)
        for i in T.unroll(8):
            w16[i] = w[i]
        load_matrix(right, 0, a, lo, lo + warp % 2 * 8, lane, True)
        for i in T.unroll(4):
            w[i] = 0.0
        multiply(w, 0, w16, 0, right, 0)
        for i in T.unroll(2):
            for e in T.vectorized(2):
                a[lo + 16 + row + 8 * i, lo + warp % 2 * 8 + col + e] = w[2 * i + e]
            for e in T.vectorized(2):
                t.tile[c % t.slots, lo + 16 + row + 8 * i, lo + warp % 2 * 8 + col + e] = \
                    w[2 * i + e] * gates.tile[c % gates.slots, BETA, lo + warp % 2 * 8 + col + e]
        T.sync_threads(1, 128)

        for i in T.unroll(2):                              # the lower left 32 x 32, a 16 x 16 block for each warp
            load_matrix(left, 8 * i, a, 32 + warp // 2 * 16, 32 + 16 * i, lane, False)
        for i in T.unroll(2):
            for j in T.unroll(8):
                w[j] = 0.0
            for j in T.unroll(2):
                load_matrix(right, 0, m, 32 + 16 * j, 16 * i, lane, True)
                multiply(w, 0, left, 8 * j, right, 0)
                multiply(w, 4, left, 8 * j, right, 4)
            for j in T.unroll(8):
                w16[8 * i + j] = w[j]
        for j in T.unroll(8):
            w[j] = 0.0
        for i in T.unroll(2):
            load_matrix(right, 0, a, 16 * i, warp % 2 * 16, lane, True)
            multiply(w, 0, w16, 8 * i, right, 0)
            multiply(w, 4, w16, 8 * i, right, 4)
        for i in T.unroll(4):
            for e in T.vectorized(2):
                t.tile[c % t.slots, 32 + warp // 2 * 16 + row + i % 2 * 8, warp % 2 * 16 + i // 2 * 8 + col + e] = \
                    w[2 * i + e] * gates.tile[c % gates.slots, BETA, warp % 2 * 16 + i // 2 * 8 + col + e]
        T.fence_proxy_async()
        t.fill(c)
        T.sync_warp()
        if lane == 0:
            gates.release(c)


@T.macro
def load_rows(src, head, ring, c, left, end):
    """One chunk of q or k: TMA where it is whole, ordinary loads and zeros where the sequence ends in it."""
    ring.wait_free(c)
    if left + C <= end:
        T.tma_copy(src[left:left + C, head, 0:D], ring.tile[c % ring.slots, :, :], barrier=ring.full[c % ring.slots])
    else:
        for i, j in T.Parallel(C, D):
            if left + i < end:
                ring.tile[c % ring.slots, i, j] = src[left + i, head, j]
            else:
                ring.tile[c % ring.slots, i, j] = 0
        T.fence_proxy_async()
    ring.fill(c)


@T.macro
def load_half(src, head, first, ring, tile, c, left, end):
    """One chunk of 64 columns of v, to the slot that is `tile`."""
    ring.wait_free(c)
    if left + C <= end:
        T.tma_copy(src[left:left + C, head, first:first + HALF], tile, barrier=ring.full[c % ring.slots])
    else:
        for i, j in T.Parallel(C, HALF):
            if left + i < end:
                tile[i, j] = src[left + i, head, first + j]
            else:
                tile[i, j] = 0
    ring.fill(c)


@T.macro
def load_gates(g, beta, head, ring, chunks, start, end, lane):
    """Two tokens a lane: the running sum of g, in units of log 2, by shuffles."""
    total = T.alloc_local((2,), F32)
    other = T.alloc_local((1,), F32)
    for c in T.serial(chunks):
        token = start + c * C + 2 * lane
        for i in T.unroll(2):
            total[i] = T.if_then_else(token + i < end, g[token + i, head] * LOG2E, 0.0)
        ring.wait_free(c)
        for i in T.unroll(2):
            ring.tile[c % ring.slots, BETA, 2 * lane + i] = T.if_then_else(token + i < end, beta[token + i, head], 0.0)
        total[1] += total[0]
        for b in T.unroll(5):
            other[0] = T.shfl_up(total[1], 1 << b)
            if lane >= 1 << b:
                total[0] += other[0]
                total[1] += other[0]
        other[0] = T.shfl_sync(total[1], 31)
        for i in T.unroll(2):
            ring.tile[c % ring.slots, SUM, 2 * lane + i] = total[i]
            ring.tile[c % ring.slots, GAMMA, 2 * lane + i] = T.exp2(total[i])
            ring.tile[c % ring.slots, REST, 2 * lane + i] = T.exp2(other[0] - total[i])
        ring.fill(c)


@T.macro
def store_half(o, head, first, ring, c, left, end):
    ring.wait_full(c)
    if left + C <= end:
        T.copy(ring.tile, o[left:left + C, head, first:first + HALF])
    else:
        for i, j in T.Parallel(C, HALF):
            if left + i < end:
                o[left + i, head, first + j] = ring.tile[i, j]
    ring.release(c)


def build(H: int, HV: int, q_slots: int = 2, k_slots: int = 3, slots: int = 2,
          registers: tuple[int, int, int] = REGISTERS) -> Any:
    """The kernel for H key heads and HV value heads. The slots are those of the rings; `slots` is for T and P."""
    tokens, ends = T.dynamic("tokens"), T.dynamic("ends")

    @T.prim_func
    def roles(q: T.Tensor((tokens, H, D), BF16), k: T.Tensor((tokens, H, D), BF16), v: T.Tensor((tokens, HV, D), BF16),
              g: T.Tensor((tokens, HV), F32), beta: T.Tensor((tokens, HV), BF16), cu_seqlens: T.Tensor((ends,), "int32"),
              o: T.Tensor((tokens, HV, D), BF16), final_state: T.Tensor((ends - 1, HV, D, D), F32), scale: T.float32):
        with T.Kernel((ends - 1) * HV, threads=512) as block:
            n, hv = block // HV, block % HV
            h = hv // (HV // H)
            start = T.alloc_var("int32")
            end = T.alloc_var("int32")
            chunks = T.alloc_var("int32")
            start = cu_seqlens[n]
            end = cu_seqlens[n + 1]
            chunks = T.ceildiv(end - start, C)

            q_s = T.alloc_shared((q_slots, C, D), BF16)
            k_s = T.alloc_shared((k_slots, C, D), BF16)
            v00_s, v01_s = T.alloc_shared((C, HALF), BF16), T.alloc_shared((C, HALF), BF16)
            v10_s, v11_s = T.alloc_shared((C, HALF), BF16), T.alloc_shared((C, HALF), BF16)
            t_s = T.alloc_shared((slots, C, C), BF16)
            p_s = T.alloc_shared((slots, C, C), BF16)
            o0_s = T.alloc_shared((C, HALF), BF16)
            o1_s = T.alloc_shared((C, HALF), BF16)
            gates_s = T.alloc_shared((k_slots, 4, C), F32)
            diag_s = T.alloc_shared((4, 16, 20), F32)      # rows of 80 bytes: aligned to 16
            m_s = T.alloc_shared((C, C + 8), F16)          # rows of 144 bytes: ldmatrix without bank conflicts
            a_s = T.alloc_shared((C, C + 8), F16)
            swizzled = tilelang.layout.make_swizzled_layout
            T.annotate_layout({x: swizzled(x) for x in (v00_s, v01_s, v10_s, v11_s, o0_s, o1_s)})

            q_full, q_free = T.alloc_barrier([32] * q_slots), T.alloc_barrier([12] * q_slots)
            k_full, k_free = T.alloc_barrier([32] * k_slots), T.alloc_barrier([12] * k_slots)
            v0_full, v0_free = T.alloc_barrier([32] * 2), T.alloc_barrier([4] * 2)
            v1_full, v1_free = T.alloc_barrier([32] * 2), T.alloc_barrier([4] * 2)
            g_full, g_free = T.alloc_barrier([32] * k_slots), T.alloc_barrier([12] * k_slots)
            t_full, t_free = T.alloc_barrier([128] * slots), T.alloc_barrier([8] * slots)
            p_full, p_free = T.alloc_barrier([128] * slots), T.alloc_barrier([8] * slots)
            o0_full, o0_free = T.alloc_barrier([128]), T.alloc_barrier([32])
            o1_full, o1_free = T.alloc_barrier([128]), T.alloc_barrier([32])

            tx = T.get_thread_binding()
            lane = tx % 32
            if tx < 128:
                T.set_max_nreg(registers[0], 1)
                state(0, Ring(q_s, q_full, q_free, q_slots), Ring(k_s, k_full, k_free, k_slots),
                      Ring((v00_s, v01_s), v0_full, v0_free, 2), Ring(t_s, t_full, t_free, slots),
                      Ring(p_s, p_full, p_free, slots), Ring(o0_s, o0_full, o0_free, 1),
                      Ring(gates_s, g_full, g_free, k_slots), chunks, lane, scale, final_state, n, hv)
            elif tx < 256:
                T.set_max_nreg(registers[0], 1)
                state(1, Ring(q_s, q_full, q_free, q_slots), Ring(k_s, k_full, k_free, k_slots),
                      Ring((v10_s, v11_s), v1_full, v1_free, 2), Ring(t_s, t_full, t_free, slots),
                      Ring(p_s, p_full, p_free, slots), Ring(o1_s, o1_full, o1_free, 1),
                      Ring(gates_s, g_full, g_free, k_slots), chunks, lane, scale, final_state, n, hv)
            elif tx < 384:
                T.set_max_nreg(registers[1], 0)
                aux(Ring(q_s, q_full, q_free, q_slots), Ring(k_s, k_full, k_free, k_slots), Ring(t_s, t_full, t_free, slots),
                    Ring(p_s, p_full, p_free, slots), Ring(gates_s, g_full, g_free, k_slots), diag_s, m_s, a_s,
                    chunks, tx // 32 - 8, lane, scale)
            else:
                T.set_max_nreg(registers[2], 0)
                if tx < 416:
                    for c in T.serial(chunks):
                        load_rows(k, h, Ring(k_s, k_full, k_free, k_slots), c, start + c * C, end)
                        load_rows(q, h, Ring(q_s, q_full, q_free, q_slots), c, start + c * C, end)
                elif tx < 448:
                    for c in T.serial(chunks):
                        if c % 2 == 0:
                            load_half(v, hv, 0, Ring(None, v0_full, v0_free, 2), v00_s, c, start + c * C, end)
                            load_half(v, hv, HALF, Ring(None, v1_full, v1_free, 2), v10_s, c, start + c * C, end)
                        else:
                            load_half(v, hv, 0, Ring(None, v0_full, v0_free, 2), v01_s, c, start + c * C, end)
                            load_half(v, hv, HALF, Ring(None, v1_full, v1_free, 2), v11_s, c, start + c * C, end)
                elif tx < 480:
                    load_gates(g, beta, hv, Ring(gates_s, g_full, g_free, k_slots), chunks, start, end, lane)
                else:
                    for c in T.serial(chunks):
                        store_half(o, hv, 0, Ring(o0_s, o0_full, o0_free, 1), c, start + c * C, end)
                        store_half(o, hv, HALF, Ring(o1_s, o1_full, o1_free, 1), c, start + c * C, end)

    return roles


@functools.cache
def kernel(H: int, HV: int, **options: Any) -> Any:
    key = tilelang.PassConfigKey
    off = (key.TL_DISABLE_THREAD_STORAGE_SYNC, key.TL_DISABLE_SHARED_MEMORY_REUSE, key.TL_DISABLE_BUFFER_INIT_CHECK)
    return tilelang.compile(build(H, HV, **options), target={"kind": "cuda", "arch": "sm_90a"}, execution_backend="tvm_ffi",
                            pass_configs={key.TL_ENABLE_FAST_MATH: True} | dict.fromkeys(off, True))


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor,
            scale: float | None = None, o: torch.Tensor | None = None, final_state: torch.Tensor | None = None,
            **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [T, H, 128], v [T, HV, 128], beta [T, HV] bfloat16; g [T, HV] float32, log decay; cu_seqlens [N + 1] int32. Returns
    o and the final state [N, HV, K, V], float32. Rows of o past the last sequence are not written."""
    H, HV, N = q.shape[1], v.shape[1], len(cu_seqlens) - 1
    o = torch.empty_like(v) if o is None else o
    final_state = torch.empty(N, HV, D, D, device=v.device) if final_state is None else final_state
    kernel(H, HV, **options)(q, k, v, g, beta, cu_seqlens, o, final_state, D ** -0.5 if scale is None else scale)
    return o, final_state
