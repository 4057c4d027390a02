// The best of 16 ranges for a group: kvcompress.ops.clip_groups, operation by operation.
//
// A team of threads of a warp takes a group, eight values each at a time. A thread looks up what
// each of its values adds to the errors of all the ranges, 32 bytes; the team adds up and chooses.
#pragma once
#include "affine.cuh"
#include "all_errors.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 8;         // values of a thread; the sums of two threads fit 16 bits
constexpr int ABSENT = 256;     // the code of a value that is none: a row of zeros
constexpr int ROW_BYTES = 128;  // of the table: four times the same two halves of the ranges
constexpr unsigned CODE_0 = 0x4b000000u;  // as `encode` returns it

// Fill the table; a barrier has to follow.
__device__ __forceinline__ void fill_errors(int bits, Byte *table) {
    const uint4 *const errors = ERRORS + 2 * ABSENT * (bits - FEWEST_BITS);
    for (int i = threadIdx.x; i < (ABSENT + 1) * 8; i += THREADS) {
        const int code = i / 8, half = i % 2;
        *(uint4 *)(table + 16 * i) =
            code < ABSENT ? errors[2 * code + half] : make_uint4(0, 0, 0, 0);
    }
}

// Errors of one group's ranges, summed over a team: TEAM lanes, each STRIDE from the next.
template <int TEAM, int STRIDE>
class Errors {
    const Byte *table;
    // Where the lane reads in a row: eight neighbours read eight places, which share no bank. The
    // half of the ranges that a lane reads first is its own, the other that of its partner.
    int slot;
    unsigned sums[8] = {};  // of both lanes, for the lane's own half

  public:
    __device__ __forceinline__ explicit Errors(const Byte *table) : table(table) {
        const int lane = threadIdx.x % 32;
        slot = STRIDE == 1 ? lane % 8 : lane % 8 ^ (lane / STRIDE & 1);
    }

    // Add values of which some are present. All lanes of the warp have to come.
    template <class Present>
    __device__ __forceinline__ void add(const float (&x)[EACH], float lower, float inverse,
                                        Present present) {
        const unsigned first = 16 * slot - CODE_0 * ROW_BYTES;
        const unsigned absent = 16 * slot + ABSENT * ROW_BYTES;
        uint4 own = make_uint4(0, 0, 0, 0), other = own;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            unsigned place = encode<8>(x[i], lower, inverse) * ROW_BYTES + first;
            if (!present(i)) place = absent;
            accumulate(own, *(const uint4 *)(table + place));
            accumulate(other, *(const uint4 *)(table + (place ^ 16)));
        }
        const unsigned mine[] = {own.x, own.y, own.z, own.w};
        const unsigned given[] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned both = mine[i] + __shfl_xor_sync(0xffffffffu, given[i], STRIDE);
            sums[2 * i] += both & 0xffffu;
            sums[2 * i + 1] += both >> 16;
        }
    }

    // Shrink the ends to the range with the least error. All lanes of the warp have to come.
    __device__ __forceinline__ void cut(float &lower, float &upper) {
        const int lane = threadIdx.x % 32;
        int pair = 8 * (slot & 1), held = 8;
        // Two lanes share out what both hold, until each holds one sum.
#pragma unroll
        for (int mask = 2 * STRIDE; mask < TEAM * STRIDE; mask *= 2) {
            if (held == 1) {
                sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], mask);
                continue;
            }
            held /= 2;
            const bool second = lane & mask;
            pair += second ? held : 0;
#pragma unroll
            for (int i = 0; i < held; ++i) {
                const unsigned kept = second ? sums[held + i] : sums[i];
                const unsigned given = second ? sums[i] : sums[held + i];
                sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, mask);
            }
        }
        unsigned best = sums[0] * 16 + pair;  // the first of equals is less
#pragma unroll
        for (int i = 1; i < held; ++i) best = min(best, sums[i] * 16 + pair + i);
#pragma unroll
        for (int mask = STRIDE; mask < TEAM * STRIDE; mask *= 2)
            best = min(best, __shfl_xor_sync(0xffffffffu, best, mask));
        const unsigned low = best / 4 % 4, high = best % 4;
        const float sixteenth = __fmul_rn(__fsub_rn(upper, lower), 0.0625f);
#pragma unroll
        for (unsigned i = 1; i < 4; ++i) {
            if (low >= i) lower = __fadd_rn(lower, sixteenth);
            if (high >= i) upper = __fsub_rn(upper, sixteenth);
        }
    }

  private:
    static __device__ __forceinline__ void accumulate(uint4 &sum, uint4 x) {
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
    }
};

// Neighbouring values in N words, of which `count` are there; what is missing repeats the first.
// `aligned`: there are whole runs only, at multiples of their size.
template <class T, int N>
__device__ __forceinline__ Run<unsigned, N> load_run(const T *pointer, int count, bool aligned) {
    constexpr int SIZE = 4 * N / sizeof(T);
    union {
        Run<unsigned, N> run;
        T values[SIZE];
    };
    if (SIZE == 1 || aligned) return load((const Run<unsigned, N> *)pointer);
    const T first = load(pointer);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) values[i] = i < count ? load(pointer + i) : first;
    return run;
}

// `count` of the values, clipped; all of them at once where `whole` says so.
template <int COUNT>
__device__ __forceinline__ void store_run(float *out, const float (&x)[COUNT], int count,
                                          bool whole) {
    if (whole) {
        Run<float, COUNT> run;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) run.values[i] = x[i];
        if (count > 0) store((Run<float, COUNT> *)out, run);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (i < count) store(out + i, x[i]);
}

__device__ __forceinline__ float clip(float x, float lower, float upper) {
    return fminf(fmaxf(x, lower), upper);
}
