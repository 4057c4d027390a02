// Gain-shape quantization of rotated rows: kvcompress.ops.quantize_rotated.
//
// A block takes a tile of whole rows, `Rotation` says how; codes go through shared memory.
#include "packing.cuh"
#include "range.cuh"
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

// The highest bytes of four words.
__device__ __forceinline__ unsigned gather_high_bytes(unsigned a, unsigned b, unsigned c,
                                                      unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410);
}

template <int BITS, int DIM, class T>
__global__ void __launch_bounds__(THREADS, 3)
    quantize_rotated(const T *x, const int *slots, Byte *codes, float *gain, long long rows,
                     long long head_stride, int row_stride, int blocks, int turns, int aligned,
                     const __grid_constant__ Signs signs) {
    using Q = Quantizer<BITS>;
    using D = Dot<DIM>;
    using W = Word<T>;
    constexpr int SIZE = Vector<T>::SIZE;
    constexpr int PER_WORD = 4 / sizeof(T);
    using R = Rotation<DIM, SIZE>;
    constexpr int ROWS = THREADS / R::LANES;
    // Padded, so that the rows of a warp store to different banks.
    constexpr int PITCH = DIM + (DIM < 64 ? 16 : DIM / 4);
    constexpr int FIRST = DIM * Planes<BITS>::FIRST / 8, SECOND = DIM * Planes<BITS>::SECOND / 8;
    constexpr int CHUNK = FIRST % 16 == 0 && SECOND % 16 == 0 ? 16 : 4;
    constexpr int CHUNKS = (FIRST + SECOND) / CHUNK;
    KV_SHARED(shared);
    Byte *const tile = shared, *const steps = tile + ROWS * PITCH;
    Byte *const levels = steps + 4 * Q::STEPS;
#pragma unroll 1
    for (int i = threadIdx.x; i < Q::STEPS; i += THREADS) ((unsigned *)steps)[i] = Q::step(i);
#pragma unroll 1
    for (int i = threadIdx.x; i < 1 << BITS; i += THREADS) {
        const float level = Q::level(i);
        ((Level *)levels)[i] = Level{level, D::shifted(level, level, D::SHIFT) - D::SHIFT_BITS};
    }

    const long long head = blockIdx.x / blocks;
    const long long first = (long long)(blockIdx.x % blocks) * turns * ROWS;
    const int left = (int)(rows - first < turns * ROWS ? rows - first : turns * ROWS);
    const int row = threadIdx.x / R::LANES, lane = threadIdx.x % R::LANES;
    const unsigned minus = signs.lanes[lane];
    const Rows<T> source(x + head * head_stride, slots, first, row_stride);
    codes += (head * rows + first) * (FIRST + SECOND);
    gain += head * rows + first;
#pragma unroll 1
    for (int start = 0; start < left; start += ROWS) {
        const int count = left - start < ROWS ? left - start : ROWS;
        const T *const values = source[start + (row < count ? row : 0)];
        float y[HELD];
        float peak = 0.0f;
        {
            Vector<T> vector[R::RUNS];
#pragma unroll
            for (int k = 0; k < R::RUNS; ++k)
                vector[k] = load_vector(values + R::channel(k, lane), row < count ? SIZE : 0, aligned);
            unsigned most = 0;
#pragma unroll
            for (int i = 0; i < HELD / PER_WORD; ++i) {
                const unsigned word = vector[i / 4].words[i % 4];
                most = W::most(most, word & ~W::SIGN);
                W::widen(word ^ (minus << i & W::SIGN), y + i * PER_WORD);
            }
            float peaks[PER_WORD];
            W::widen(most, peaks);
            peak = fmaxf(peaks[0], peaks[PER_WORD - 1]);
        }
#pragma unroll
        for (int bit = 1; bit < R::LANES; bit *= 2)
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, bit));
        const bool zero = peak < TINY;
        const float inverse_peak = zero ? 0.0f : __frcp_rn(peak);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            y[i] = __fmul_rn(y[i], inverse_peak);
            y[i] = fabsf(y[i]) < FAINT ? 0.0f : y[i];
        }
        R::transform(y, lane);

        unsigned energy = 0u - HELD * D::SHIFT_BITS;
#pragma unroll
        for (int i = 0; i < HELD; ++i) energy += D::shifted(y[i], y[i], D::SHIFT);
        const float rms = heron_root(__fmul_rn(D::total(energy), 1.0f / DIM));
        const float inverse_rms = zero ? 0.0f : __frcp_rn(rms);

        __syncthreads();  // for the tables, and for the last tile to be packed
        constexpr float CELLS_PER_UNIT = 1024.0f;
        constexpr unsigned STEP_MASK = (Q::STEPS - 1) * 4, LEVEL_MASK = ((1 << BITS) - 1) * 8;
        unsigned along = 0u - HELD * D::SIGNED_SHIFT_BITS, power = 0;
#pragma unroll
        for (int k = 0; k < R::RUNS; ++k) {
            unsigned code[SIZE];  // in the highest byte
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
                const float value = __fmul_rn(y[k * SIZE + i], inverse_rms);
                const unsigned cell =
                    __float_as_uint(__fmaf_rd(value, CELLS_PER_UNIT, D::SIGNED_SHIFT));
                const unsigned step = cell >> (Q::SHIFT - 2) & STEP_MASK;
                code[i] = cell + *(const unsigned *)(steps + step);
                const Level level = *(const Level *)(levels + (code[i] >> 21 & LEVEL_MASK));
                along += D::shifted(value, level.level, D::SIGNED_SHIFT);
                power += level.square;
            }
#pragma unroll
            for (int i = 0; i < SIZE; i += 4)
                *(unsigned *)(tile + row * PITCH + R::channel(k, lane) + i) =
                    gather_high_bytes(code[i], code[i + 1], code[i + 2], code[i + 3]);
        }
        const float quotient = __fdiv_rn(D::total(along), D::total(power));
        if (lane == 0 && row < count)
            store(gain + start + row, zero ? 0.0f : __fmul_rn(__fmul_rn(peak, rms), quotient));
        __syncthreads();
        pack_rows<BITS>(tile, PITCH, count, DIM, codes + start * (FIRST + SECOND), CHUNK,
                        (unsigned)(((1ll << 31) + CHUNKS - 1) / CHUNKS));
    }
}
