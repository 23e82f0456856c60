"""draft"""

import functools

import tilelang
import tilelang.language as T

C, D = 64, 128
LOG2E = 1.4426950408889634
FULL_ROW = T.GemmWarpPolicy.FullRow


def build(H: int, HV: int, q_stages: int = 2, k_stages: int = 3, v_stages: int = 2, ring: int = 2, registers=(184, 112, 32)):
    STATE_REGS, AUX_REGS, LOAD_REGS = registers
    QS, KS, VS, R = q_stages, k_stages, v_stages, ring
    tokens, ends = T.dynamic("tokens"), T.dynamic("ends")
    bf16, f16, f32 = "bfloat16", "float16", "float32"

    @T.prim_func
    def roles(q: T.Tensor((tokens, H, D), bf16), k: T.Tensor((tokens, H, D), bf16), v: T.Tensor((tokens, HV, D), bf16),
              g: T.Tensor((tokens, HV), f32), beta: T.Tensor((tokens, HV), bf16), cu_seqlens: T.Tensor((ends,), "int32"),
              o: T.Tensor((tokens, HV, D), bf16), final_state: T.Tensor((ends - 1, HV, D, D), f32), scale: T.float32):
        with T.Kernel((ends - 1) * HV, threads=512) as block:
            n, hv = block // HV, block % HV
            h = hv // (HV // H)
            start = T.alloc_var("int32")
            end = T.alloc_var("int32")
            chunks = T.alloc_var("int32")
            start = cu_seqlens[n]
            end = cu_seqlens[n + 1]
            chunks = T.ceildiv(end - start, C)

            q_s = T.alloc_shared((QS, C, D), bf16)
            k_s = T.alloc_shared((KS, C, D), bf16)
            v_s = T.alloc_shared((VS, C, D), bf16)
            t_s = T.alloc_shared((R, C, C), bf16)
            p_s = T.alloc_shared((R, C, C), bf16)
            o_s = T.alloc_shared((R, C, D), bf16)
            sum_s = T.alloc_shared((KS, C), f32)
            gamma_s = T.alloc_shared((KS, C), f32)
            rest_s = T.alloc_shared((KS, C), f32)
            beta_s = T.alloc_shared((KS, C), f32)
            diag_s = T.alloc_shared((4, 16, 20), f32)
            m1_s = T.alloc_shared((C, C), f16)
            m2_s = T.alloc_shared((C, C), f16)
            a0_s = T.alloc_shared((C, C), f16)
            a1_s = T.alloc_shared((C, C), f16)
            T.annotate_layout({v_s: tilelang.layout.make_swizzled_layout(v_s), o_s: tilelang.layout.make_swizzled_layout(o_s)})

            q_full = T.alloc_barrier([32] * QS)
            q_free = T.alloc_barrier([12] * QS)
            k_full = T.alloc_barrier([32] * KS)
            k_free = T.alloc_barrier([12] * KS)
            v_full = T.alloc_barrier([32] * VS)
            v_free = T.alloc_barrier([8] * VS)
            g_full = T.alloc_barrier([32] * KS)
            g_free = T.alloc_barrier([12] * KS)
            t_full = T.alloc_barrier([128] * R)
            t_free = T.alloc_barrier([8] * R)
            p_full = T.alloc_barrier([128] * R)
            p_free = T.alloc_barrier([8] * R)
            o_full = T.alloc_barrier([256] * R)
            o_free = T.alloc_barrier([32] * R)

            S = T.alloc_fragment((D, D), f32)
            S16 = T.alloc_fragment((D, D), bf16)
            SK = T.alloc_fragment((D, C), f32)
            R16 = T.alloc_fragment((D, C), bf16)
            U = T.alloc_fragment((D, C), f32)
            U16 = T.alloc_fragment((D, C), bf16)
            W16 = T.alloc_fragment((D, C), bf16)
            O = T.alloc_fragment((D, C), f32)

            KK = T.alloc_fragment((C, C), f32)
            QK = T.alloc_fragment((C, C), f32)
            A0 = T.alloc_fragment((C, C), f16)
            A1 = T.alloc_fragment((C, C), f16)
            A = T.alloc_fragment((C, C), f32)
            X = T.alloc_fragment((C, C), f32)
            X16 = T.alloc_fragment((C, C), f16)
            x = T.alloc_local((16,), f32)

            tx = T.get_thread_binding()
            lane = tx % 32

            if tx < 256:
                T.set_max_nreg(STATE_REGS, 1)
                T.clear(S)
                for c in T.serial(chunks):
                    qs, ks, vs, rs = c % QS, c % KS, c % VS, c % R
                    for i, j in T.Parallel(D, D):
                        S16[i, j] = S[i, j]
                    T.barrier_wait(k_full[ks], (c // KS) % 2)
                    T.wgmma_gemm(S16, k_s[ks, :, :], SK, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    T.barrier_wait(q_full[qs], (c // QS) % 2)
                    T.wgmma_gemm(S16, q_s[qs, :, :], O, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    T.barrier_wait(g_full[ks], (c // KS) % 2)
                    T.barrier_wait(v_full[vs], (c // VS) % 2)
                    T.wait_wgmma(1)
                    for i, j in T.Parallel(D, C):
                        R16[i, j] = v_s[vs, j, i] - gamma_s[ks, j] * SK[i, j]
                    T.sync_warp()
                    if lane == 0:
                        T.barrier_arrive(v_free[vs])
                    T.barrier_wait(t_full[rs], (c // R) % 2)
                    T.wgmma_gemm(R16, t_s[rs, :, :], U, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    for i, j in T.Parallel(D, D):
                        S[i, j] *= gamma_s[ks, C - 1]
                    T.wait_wgmma(1)
                    for i, j in T.Parallel(D, C):
                        O[i, j] *= scale * gamma_s[ks, j]
                    T.wait_wgmma(0)
                    if lane == 0:
                        T.barrier_arrive(q_free[qs])
                        T.barrier_arrive(t_free[rs])
                    for i, j in T.Parallel(D, C):
                        U16[i, j] = U[i, j]
                    for i, j in T.Parallel(D, C):
                        W16[i, j] = U[i, j] * rest_s[ks, j]
                    T.wgmma_gemm(W16, k_s[ks, :, :], S, policy=FULL_ROW)
                    T.barrier_wait(p_full[rs], (c // R) % 2)
                    T.wgmma_gemm(U16, p_s[rs, :, :], O, transpose_B=True, policy=FULL_ROW)
                    T.wait_wgmma(0)
                    if lane == 0:
                        T.barrier_arrive(k_free[ks])
                        T.barrier_arrive(g_free[ks])
                        T.barrier_arrive(p_free[rs])
                    T.barrier_wait(o_free[rs], (c // R + 1) % 2)
                    for i, j in T.Parallel(D, C):
                        o_s[rs, j, i] = O[i, j]
                    T.fence_proxy_async()
                    T.barrier_arrive(o_full[rs])
                for i, j in T.Parallel(D, D):
                    final_state[n, hv, j, i] = S[i, j]

            elif tx < 384:
                T.set_max_nreg(AUX_REGS, 0)
                warp = (tx - 256) // 32
                for c in T.serial(chunks):
                    qs, ks, rs = c % QS, c % KS, c % R
                    T.barrier_wait(k_full[ks], (c // KS) % 2)
                    T.wgmma_gemm(k_s[ks, :, :], k_s[ks, :, :], KK, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    T.barrier_wait(q_full[qs], (c // QS) % 2)
                    T.wgmma_gemm(q_s[qs, :, :], k_s[ks, :, :], QK, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    T.barrier_wait(g_full[ks], (c // KS) % 2)
                    T.wait_wgmma(0)
                    if lane == 0:
                        T.barrier_arrive(q_free[qs])
                        T.barrier_arrive(k_free[ks])
                    for i, j in T.Parallel(C, C):
                        X[i, j] = T.if_then_else(i >= j, T.exp2(sum_s[ks, i] - sum_s[ks, j]), 0.0)
                    for i, j in T.Parallel(C, C):
                        KK[i, j] = T.if_then_else(i > j, KK[i, j] * X[i, j] * beta_s[ks, i], 0.0)
                    T.barrier_wait(p_free[rs], (c // R + 1) % 2)
                    for i, j in T.Parallel(C, C):
                        p_s[rs, i, j] = scale * X[i, j] * QK[i, j]
                    T.fence_proxy_async()
                    T.barrier_arrive(p_full[rs])

                    T.sync_threads(1, 128)
                    for i, j in T.Parallel(C, C):
                        if i // 16 == j // 16:
                            diag_s[i // 16, i % 16, j % 16] = KK[i, j]
                        m1_s[i, j] = T.if_then_else((i // 32 == j // 32) & (i // 16 > j // 16), -KK[i, j], 0.0)
                        m2_s[i, j] = T.if_then_else(i // 32 > j // 32, -KK[i, j], 0.0)
                    T.sync_warp()
                    for i in T.unroll(16):
                        x[i] = T.if_then_else(lane % 16 == i, 1.0, 0.0)
                    for i in T.unroll(15):
                        for e in T.unroll(15 - i):
                            x[i + 1 + e] -= diag_s[warp, i + 1 + e, i] * x[i]
                    for b in T.unroll(4):
                        for i in T.unroll(8):
                            a0_s[16 * warp + i + 8 * (lane // 16), 16 * b + lane % 16] = T.if_then_else(
                                b == warp, T.if_then_else(lane < 16, x[i], x[i + 8]), 0.0)
                    T.fence_proxy_async()
                    T.sync_threads(1, 128)
                    T.copy(a0_s, A0)
                    T.wgmma_gemm(A0, m1_s, X, policy=FULL_ROW, clear_accum=True)
                    for i, j in T.Parallel(C, C):
                        A[i, j] = A0[i, j]
                    T.wait_wgmma(0)
                    for i, j in T.Parallel(C, C):
                        X16[i, j] = X[i, j]
                    T.wgmma_gemm(X16, a0_s, A, policy=FULL_ROW)
                    T.wait_wgmma(0)
                    for i, j in T.Parallel(C, C):
                        A1[i, j] = A[i, j]
                    for i, j in T.Parallel(C, C):
                        a1_s[i, j] = A1[i, j]
                    T.fence_proxy_async()
                    T.sync_threads(1, 128)
                    T.wgmma_gemm(A1, m2_s, X, policy=FULL_ROW, clear_accum=True)
                    T.wait_wgmma(0)
                    for i, j in T.Parallel(C, C):
                        X16[i, j] = X[i, j]
                    T.wgmma_gemm(X16, a1_s, A, policy=FULL_ROW)
                    T.barrier_wait(t_free[rs], (c // R + 1) % 2)
                    T.wait_wgmma(0)
                    for i, j in T.Parallel(C, C):
                        t_s[rs, i, j] = A[i, j] * beta_s[ks, j]
                    T.fence_proxy_async()
                    T.barrier_arrive(t_full[rs])
                    T.sync_warp()
                    if lane == 0:
                        T.barrier_arrive(g_free[ks])

            else:
                T.set_max_nreg(LOAD_REGS, 0)
                if tx < 416:
                    for c in T.serial(chunks):
                        qs, ks = c % QS, c % KS
                        left = start + c * C
                        T.barrier_wait(k_free[ks], (c // KS + 1) % 2)
                        if left + C <= end:
                            T.tma_copy(k[left:left + C, h, 0:D], k_s[ks, :, :], barrier=k_full[ks])
                        else:
                            for i, j in T.Parallel(C, D):
                                if left + i < end:
                                    k_s[ks, i, j] = k[left + i, h, j]
                                else:
                                    k_s[ks, i, j] = 0
                            T.fence_proxy_async()
                        T.barrier_arrive(k_full[ks])
                        T.barrier_wait(q_free[qs], (c // QS + 1) % 2)
                        if left + C <= end:
                            T.tma_copy(q[left:left + C, h, 0:D], q_s[qs, :, :], barrier=q_full[qs])
                        else:
                            for i, j in T.Parallel(C, D):
                                if left + i < end:
                                    q_s[qs, i, j] = q[left + i, h, j]
                                else:
                                    q_s[qs, i, j] = 0
                            T.fence_proxy_async()
                        T.barrier_arrive(q_full[qs])
                elif tx < 448:
                    for c in T.serial(chunks):
                        vs = c % VS
                        left = start + c * C
                        T.barrier_wait(v_free[vs], (c // VS + 1) % 2)
                        if left + C <= end:
                            T.tma_copy(v[left:left + C, hv, 0:D], v_s[vs, :, :], barrier=v_full[vs])
                        else:
                            for i, j in T.Parallel(C, D):
                                if left + i < end:
                                    v_s[vs, i, j] = v[left + i, hv, j]
                                else:
                                    v_s[vs, i, j] = 0
                        T.barrier_arrive(v_full[vs])
                elif tx < 480:
                    run = T.alloc_local((2,), f32)
                    up = T.alloc_local((1,), f32)
                    for c in T.serial(chunks):
                        ks = c % KS
                        row = start + c * C + 2 * lane
                        T.barrier_wait(g_free[ks], (c // KS + 1) % 2)
                        for i in T.unroll(2):
                            run[i] = T.if_then_else(row + i < end, g[row + i, hv] * LOG2E, 0.0)
                            beta_s[ks, 2 * lane + i] = T.if_then_else(row + i < end, beta[row + i, hv], 0.0)
                        run[1] += run[0]
                        up[0] = run[1]
                        for b in T.unroll(5):
                            T.evaluate(0)
                        for b in T.unroll(5):
                            up[0] = T.shfl_up(run[1], 1 << b)
                            if lane >= (1 << b):
                                run[0] += up[0]
                                run[1] += up[0]
                        up[0] = T.shfl_sync(run[1], 31)
                        for i in T.unroll(2):
                            sum_s[ks, 2 * lane + i] = run[i]
                            gamma_s[ks, 2 * lane + i] = T.exp2(run[i])
                            rest_s[ks, 2 * lane + i] = T.exp2(up[0] - run[i])
                        T.barrier_arrive(g_full[ks])
                else:
                    for c in T.serial(chunks):
                        rs = c % R
                        left = start + c * C
                        T.barrier_wait(o_full[rs], (c // R) % 2)
                        if left + C <= end:
                            T.copy(o_s[rs, :, :], o[left:left + C, hv, 0:D])
                        else:
                            for i, j in T.Parallel(C, D):
                                if left + i < end:
                                    o[left + i, hv, j] = o_s[rs, i, j]
                        T.barrier_arrive(o_free[rs])

    return roles


@functools.cache
def kernel(H: int, HV: int, **options):
    return tilelang.compile(build(H, HV, **options), target={"kind": "cuda", "arch": "sm_90a"}, execution_backend="tvm_ffi",
                            pass_configs={tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
                                          tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
                                          tilelang.PassConfigKey.TL_DISABLE_SHARED_MEMORY_REUSE: True})
