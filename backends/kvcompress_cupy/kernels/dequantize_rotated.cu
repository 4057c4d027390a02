// Codes of rotated rows back to values: kvcompress.ops.dequantize_rotated.
#include "packing.cuh"
#include "rotation.cuh"
#include "tables.cuh"

constexpr int THREADS = 256;
constexpr float LIMIT = 8.507059173023462e37f;  // 2**126

template <class T>
constexpr bool IS_HALF = false;
template <>
constexpr bool IS_HALF<Float16> = true;

template <int BITS, int DIM, class T>
__global__ void __launch_bounds__(THREADS, 3)
    dequantize_rotated(const Byte *codes, const void *gain, T *out, long long rows,
                       long long code_head_stride, long long code_stride,
                       long long gain_head_stride, long long gain_stride, int tiles, int gain_type,
                       int aligned, unsigned long long signs_a, unsigned long long signs_b,
                       unsigned long long signs_c, unsigned long long signs_d) {
    constexpr int SIZE = 4;
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
    R::flip(y, R::signs(signs_a, signs_b, signs_c, signs_d, lane));
    if (row >= rows) return;
    out += (head * rows + row) * DIM;
#pragma unroll
    for (int k = 0; k < R::RUNS; ++k) {
        Run<T, SIZE> run;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            float value = __fmul_rn(y[k * SIZE + i], scale);
            // float16 ends before the limit, and `narrow` clips there.
            if constexpr (!IS_HALF<T>) value = fminf(fmaxf(value, -LIMIT), LIMIT);
            narrow(value, run.values[i]);
        }
        store((Run<T, SIZE> *)(out + R::channel(k, lane)), run);
    }
}
