// Codes of rotated rows back to values: kvcompress.ops.dequantize_rotated.
#include "packing.cuh"
#include "range.cuh"
#include "rotation.cuh"
#include "tables.cuh"

constexpr int THREADS = 256;
constexpr float LIMIT = 8.507059173023462e37f;  // 2**126

template <class T>
constexpr bool IS_HALF = false;
template <>
constexpr bool IS_HALF<Float16> = true;

// Four values, stored at once, and their words.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
    union {
        T values[4];
        unsigned words[sizeof(T)];
    };
};

template <int BITS, int DIM, class T>
__global__ void __launch_bounds__(THREADS, 3)
    dequantize_rotated(const Byte *codes, const void *gain, T *out, long long rows,
                       long long code_head_stride, long long code_stride,
                       long long gain_head_stride, long long gain_stride, int tiles, int gain_type,
                       int aligned, const __grid_constant__ Signs signs) {
    constexpr int SIZE = 4, WORDS = sizeof(T);
    using R = Rotation<DIM, SIZE>;
    constexpr int ROWS = THREADS / R::LANES;
    KV_SHARED(shared);
    float *const levels = (float *)shared;
    for (int i = threadIdx.x; i < 1 << BITS; i += THREADS) levels[i] = Quantizer<BITS>::level(i);

    const long long head = blockIdx.x / tiles;
    const long long row = (long long)(blockIdx.x % tiles) * ROWS + threadIdx.x / R::LANES;
    const int lane = threadIdx.x % R::LANES;
    codes += head * code_head_stride + row * code_stride;
    unsigned words[R::RUNS];
    float scale = 0.0f;
#pragma unroll
    for (int k = 0; k < R::RUNS; ++k) words[k] = 0;
    if (row < rows) {
        scale = load_as(gain, head * gain_head_stride + row * gain_stride, gain_type);
#pragma unroll
        for (int k = 0; k < R::RUNS; ++k) {
            const int channel = R::channel(k, lane);
            if (aligned) {
                words[k] = unpack<BITS, 4>(codes, channel, DIM);
            } else {
#pragma unroll
                for (int i = 0; i < SIZE; ++i)
                    words[k] |= unpack<BITS, 1>(codes, channel + i, DIM) << (8 * i);
            }
        }
    }
    __syncthreads();  // for the levels
    float y[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) y[i] = levels[words[i / SIZE] >> (i % SIZE * 8) & 0xffu];
    R::transform(y, lane);
    const unsigned minus = signs.lanes[lane];
    if (row >= rows) return;
    out += (head * rows + row) * DIM;
#pragma unroll
    for (int k = 0; k < R::RUNS; ++k) {
        float values[SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            values[i] = __fmul_rn(y[k * SIZE + i], scale);
            // float16 ends before the limit, and `narrow` clips there.
            if constexpr (!IS_HALF<T>) values[i] = fminf(fmaxf(values[i], -LIMIT), LIMIT);
        }
        Quad<T> quad;
        narrow(values, quad.values);
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            quad.words[i] ^= minus << (k * WORDS + i) & Word<T>::SIGN;
        store((Quad<T> *)(out + R::channel(k, lane)), quad);
    }
}
