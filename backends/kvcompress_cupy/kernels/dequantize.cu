// Codes back to values: kvcompress.ops.dequantize, either axis.
//
// A block takes a tile of rows. A thread keeps to COUNT channels, whose codes are neighbours in
// every plane, and takes every `lanes`-th row; stores are contiguous over the threads.
#include "affine.cuh"
#include "packing.cuh"

constexpr int CHANNEL = 0, TOKEN = 1;  // values of AXIS: what a group runs along

template <int BITS, int GROUP, int AXIS, class T, int COUNT>
__device__ __forceinline__ void dequantize_rows(const Byte *codes, const void *lower,
                                                const void *upper, T *out, int rows,
                                                long long code_stride, long long end_stride, int n,
                                                int columns, int ends_type) {
    constexpr float SCALE = (float)(1.0 / ((1 << BITS) - 1));
    const int lanes = blockDim.x / columns;
    const int lane = threadIdx.x / columns;
    for (int channel = threadIdx.x % columns * COUNT; channel < n; channel += columns * COUNT) {
        float start[COUNT], step[COUNT];
        auto load_ends = [&](long long end, int i) {
            start[i] = load_as(lower, end, ends_type);
            step[i] = __fmul_rn(__fsub_rn(load_as(upper, end, ends_type), start[i]), SCALE);
        };
        if constexpr (AXIS == CHANNEL) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) load_ends(channel + i, i);
        }
#pragma unroll 4
        for (int row = lane; row < rows; row += lanes) {
            const unsigned code = unpack<BITS, COUNT>(codes + row * code_stride, channel, n);
            if constexpr (AXIS == TOKEN)
                load_ends(row * end_stride + (GROUP ? channel / (GROUP ? GROUP : 1) : 0), 0);
            float values[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                // 2**23 + code, without a conversion.
                const unsigned bits = __byte_perm(code, 0x4b000000u, 0x7650 + i);
                const float whole = __fsub_rn(__uint_as_float(bits), 8388608.0f);
                const int end = AXIS == TOKEN ? 0 : i;
                values[i] = __fadd_rn(__fmul_rn(whole, step[end]), start[end]);
            }
            Run<T, COUNT> run;
            narrow(values, run.values);
            store((Run<T, COUNT> *)(out + (long long)row * n + channel), run);
        }
    }
}

// GROUP = 0: one group along the axis. Strides in elements; `quads`: channels go by four.
template <int BITS, int GROUP, int AXIS, class T>
__global__ void __launch_bounds__(256, 4)
    dequantize(const Byte *codes, const void *lower, const void *upper, T *out, long long tokens,
               long long code_head_stride, long long code_stride, long long end_head_stride,
               long long end_stride, int tiles, int tile_rows, int n, int columns, int ends_type,
               int quads) {
    const long long head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const long long first = tile * tile_rows;
    const int rows = (int)(tokens - first < tile_rows ? tokens - first : tile_rows);
    codes += head * code_head_stride + first * code_stride;
    out += (head * tokens + first) * n;
    // Along the tokens a tile is a group, or part of the only one.
    const long long row = AXIS == TOKEN ? first : GROUP ? tile : 0;
    const long long end = head * end_head_stride + row * end_stride;
    const int size = ends_type == FLOAT32 ? 4 : 2;
    lower = (const Byte *)lower + end * size;
    upper = (const Byte *)upper + end * size;
    if (quads) {
        dequantize_rows<BITS, GROUP, AXIS, T, 4>(codes, lower, upper, out, rows, code_stride,
                                                 end_stride, n, columns, ends_type);
    } else {
        dequantize_rows<BITS, GROUP, AXIS, T, 1>(codes, lower, upper, out, rows, code_stride,
                                                 end_stride, n, columns, ends_type);
    }
}
