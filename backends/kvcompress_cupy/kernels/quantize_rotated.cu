// Gain-shape quantization of rotated rows: kvcompress.ops.quantize_rotated.
//
// A block takes a tile of whole rows, `Rotation` says how; codes go through shared memory.
#include "packing.cuh"
#include "rotation.cuh"
#include "tables.cuh"

constexpr int THREADS = 256;

struct Level {
    float level;
    unsigned square;  // rounded as in Dot
};

// Sums over a row of products rounded to multiples of 1 / unit: whole numbers below 2**24, whose sum
// is the same in any order. Adding 2**23 or, for either sign, half as much again rounds them, half to
// even; the bits of the results are added as integers.
template <int DIM>
struct Dot {
    static constexpr float UNIT = (float)((1 << 22) / DIM);
    static constexpr float SHIFT = 8388608.0f, SIGNED_SHIFT = 12582912.0f;
    static constexpr unsigned SHIFT_BITS = 0x4b000000u, SIGNED_SHIFT_BITS = 0x4b400000u;

    static __device__ __forceinline__ unsigned shifted(float x, float y, float shift) {
        return __float_as_uint(__fmaf_rn(__fmul_rn(x, y), UNIT, shift));
    }

    static __device__ __forceinline__ float total(unsigned sum) {
        int all = (int)sum;
#pragma unroll
        for (int bit = 1; bit < DIM / HELD; bit *= 2) all += __shfl_xor_sync(0xffffffffu, all, bit);
        return __fmul_rn((float)all, 1.0f / UNIT);
    }
};

// The fourteenth of Heron's approximations to the root of a multiple of 2**-22 up to 1: for all of
// them it is the one that follows on the rounded root.
__device__ __forceinline__ float heron_root(float x) {
    const float root = __fsqrt_rn(x);
    return root == 0.0f ? root : __fmul_rn(__fadd_rn(root, __fdiv_rn(x, root)), 0.5f);
}

template <int BITS, int DIM, class T>
__global__ void __launch_bounds__(THREADS, 3)
    quantize_rotated(const T *x, const int *slots, Byte *codes, float *gain, long long rows,
                     long long head_stride, long long row_stride, int tiles, int aligned,
                     unsigned long long signs_a, unsigned long long signs_b,
                     unsigned long long signs_c, unsigned long long signs_d) {
    using Q = Quantizer<BITS>;
    using D = Dot<DIM>;
    constexpr int SIZE = Vector<T>::SIZE;
    using R = Rotation<DIM, SIZE>;
    constexpr int ROWS = THREADS / R::LANES;
    // Padded, so that the rows of a warp store to different banks.
    constexpr int PITCH = DIM + (DIM < 64 ? 16 : DIM / 4);
    constexpr int FIRST = DIM * Planes<BITS>::FIRST / 8, SECOND = DIM * Planes<BITS>::SECOND / 8;
    constexpr int CHUNK = FIRST % 16 == 0 && SECOND % 16 == 0 ? 16 : 4;
    constexpr int CHUNKS = (FIRST + SECOND) / CHUNK;
    KV_SHARED(shared);
    Byte *const tile = shared;
    Step *const steps = (Step *)(shared + ROWS * PITCH);
    Level *const levels = (Level *)(steps + Q::STEPS);
    for (int i = threadIdx.x; i < Q::STEPS; i += THREADS) steps[i] = Q::step(i);
    for (int i = threadIdx.x; i < 1 << BITS; i += THREADS) {
        const float level = Q::level(i);
        levels[i] = Level{level, D::shifted(level, level, D::SHIFT) - D::SHIFT_BITS};
    }

    const long long head = blockIdx.x / tiles;
    const long long start = (long long)(blockIdx.x % tiles) * ROWS;
    const int count = (int)(rows - start < ROWS ? rows - start : ROWS);
    const int row = threadIdx.x / R::LANES, lane = threadIdx.x % R::LANES;
    const Rows<T> source{x + head * head_stride, slots, row_stride};
    x = source[start + (row < count ? row : 0)];

    float y[HELD];
    float peak = 0.0f;
    {
        Vector<T> vector[R::RUNS];
#pragma unroll
        for (int k = 0; k < R::RUNS; ++k)
            vector[k] = load_vector(x + R::channel(k, lane), row < count ? SIZE : 0, aligned);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            y[i] = to_float(vector[i / SIZE].values[i % SIZE]);
            peak = fmaxf(peak, fabsf(y[i]));
        }
    }
#pragma unroll
    for (int bit = 1; bit < R::LANES; bit *= 2)
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, bit));
    const bool zero = peak < TINY;
    const float inverse_peak = zero ? 0.0f : __fdiv_rn(1.0f, peak);
#pragma unroll
    for (int i = 0; i < HELD; ++i) y[i] = __fmul_rn(y[i], inverse_peak);
    R::flip(y, R::signs(signs_a, signs_b, signs_c, signs_d, lane));
    R::transform(y, lane);

    unsigned energy = 0u - HELD * D::SHIFT_BITS;
#pragma unroll
    for (int i = 0; i < HELD; ++i) energy += D::shifted(y[i], y[i], D::SHIFT);
    const float rms = heron_root(__fmul_rn(D::total(energy), 1.0f / DIM));
    const float inverse_rms = zero ? 0.0f : __fdiv_rn(1.0f, rms);

    __syncthreads();  // for the tables
    unsigned along = 0u - HELD * D::SIGNED_SHIFT_BITS, power = 0;
#pragma unroll
    for (int k = 0; k < R::RUNS; ++k) {
        unsigned word[SIZE / 4];
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            const float value = __fmul_rn(y[k * SIZE + i], inverse_rms);
            // Rounded by adding 1.5 * 2**23, whose bits are then taken off.
            const float whole = __fmaf_rn(value, (float)Q::PER_UNIT, D::SIGNED_SHIFT);
            const int step = __float_as_int(whole) - (int)(D::SIGNED_SHIFT_BITS - Q::ZERO);
            const Step rise = steps[min(max(step, 0), Q::STEPS - 1)];
            const unsigned code = rise.code + (value >= rise.threshold ? 1u : 0u);
            const Level level = levels[code];
            along += D::shifted(value, level.level, D::SIGNED_SHIFT);
            power += level.square;
            word[i / 4] = i % 4 ? word[i / 4] | code << (i % 4 * 8) : code;
        }
#pragma unroll
        for (int i = 0; i < SIZE / 4; ++i)
            *(unsigned *)(tile + row * PITCH + R::channel(k, lane) + 4 * i) = word[i];
    }
    const float quotient = __fdiv_rn(D::total(along), D::total(power));
    const long long first_row = head * rows + start;
    if (lane == 0 && row < count)
        store(gain + first_row + row, zero ? 0.0f : __fmul_rn(__fmul_rn(peak, rms), quotient));
    __syncthreads();
    pack_rows<BITS>(tile, PITCH, count, DIM, codes + first_row * (FIRST + SECOND), CHUNK,
                    (unsigned)(((1ll << 31) + CHUNKS - 1) / CHUNKS));
}
