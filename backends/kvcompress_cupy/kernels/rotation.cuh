// The fast Hadamard transform of kvcompress/ops/hadamard.py, 32 channels a thread.
//
// A row of DIM channels belongs to DIM / 32 neighbouring threads. A thread holds runs of SIZE
// channels; run k begins at channel (k * LANES + lane) * SIZE. So the lowest bits of a channel's
// number count inside a run, the next ones the thread, the highest the run, and the transform's
// rounds, which go from the lowest bit to the highest, are at first private, then take shuffles,
// then are private again.
#pragma once
#include "device.cuh"

constexpr int HELD = 32;

// Of the signs of a thread's channels, see tables.py.
struct Signs {
    unsigned lanes[8];
};

template <int DIM, int SIZE>
struct Rotation {
    static constexpr int LANES = DIM / HELD;
    static constexpr int RUNS = HELD / SIZE;

    static __device__ __forceinline__ int channel(int run, int lane) {
        return (run * LANES + lane) * SIZE;
    }

    // One private round: pairs whose positions differ in `bit`.
    static __device__ __forceinline__ void combine(float (&x)[HELD], int bit) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            if (i & bit) continue;
            const float sum = __fadd_rn(x[i], x[i + bit]);
            x[i + bit] = __fsub_rn(x[i], x[i + bit]);
            x[i] = sum;
        }
    }

    static __device__ __forceinline__ void transform(float (&x)[HELD], int lane) {
        constexpr float SCALE =
            (float)(DIM == 32 ? 0.17677669529663687 : DIM == 64 ? 0.125
                    : DIM == 128                  ? 0.08838834764831845
                                                  : 0.0625);  // 1 / sqrt(DIM)
#pragma unroll
        for (int bit = 1; bit < SIZE; bit *= 2) combine(x, bit);
#pragma unroll
        for (int bit = 1; bit < LANES; bit *= 2) {
            const float sign = lane & bit ? -1.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < HELD; ++i)  // the product is exact: a sum or a difference
                x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(0xffffffffu, x[i], bit));
        }
#pragma unroll
        for (int bit = SIZE; bit < HELD; bit *= 2) combine(x, bit);
#pragma unroll
        for (int i = 0; i < HELD; ++i) x[i] = __fmul_rn(x[i], SCALE);
    }
};
