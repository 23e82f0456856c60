"""What a kernel of roles calls where it runs beside others (`gdn_ir.follow`): C++, which the emitted text brings along.

Tiles are stored, and loaded, by the copy engine, which goes another way to memory than threads do. So a warp counts once it has
waited for its own copies to end (not only to have read what they store), and both sides fence between the two ways; the count
itself is released and acquired for the whole GPU.
"""
from __future__ import annotations

TEXT = '''
BESIDE = """
static __device__ __forceinline__ void count_stored(int* count, int columns) {
    // what this warp has stored comes before the count
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("red.release.gpu.global.add.s32 [%0], %1;" :: "l"(count), "r"(columns) : "memory");
}

static __device__ __forceinline__ void await_count(const int* count, int enough) {
    // what was stored before so many columns were counted can be loaded after it
    if (threadIdx.x % 32 == 0) {
        int found;
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
        while (found < enough) {
            __nanosleep(64);
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
        }
    }
    __syncwarp();
    asm volatile("fence.proxy.async;" ::: "memory");
}
"""
'''
LINES = ["", *TEXT.strip("\n").split("\n"), ""]
