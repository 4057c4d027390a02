// Codes back to values: kvcompress.ops.dequantize, either axis.
//
// A block takes a tile of rows. A thread keeps to COUNT channels, whose codes are neighbours in
// every plane, and takes every `lanes`-th row; stores are contiguous over the threads.
#include "affine.cuh"
#include "packing.cuh"

constexpr int CHANNEL = 0, TOKEN = 1;  // values of AXIS: what a group runs along

template <int BITS, int GROUP, int AXIS, int COUNT, class T, class End>
__device__ __forceinline__ void dequantize_rows(const Byte *codes, const End *lower,
                                                const End *upper, T *out, int rows,
                                                int code_stride, int end_stride, int n,
                                                int columns) {
    constexpr float SCALE = (float)(1.0 / ((1 << BITS) - 1));
    constexpr int UNROLL = 4;  // rows that are loaded before the first is needed
    const int lanes = blockDim.x / columns;
    const int lane = threadIdx.x / columns;
    for (int channel = threadIdx.x % columns * COUNT; channel < n; channel += columns * COUNT) {
        float start[AXIS == TOKEN ? UNROLL : COUNT], step[AXIS == TOKEN ? UNROLL : COUNT];
        auto load_ends = [&](long long end, int i) {
            start[i] = to_float(load(lower + end));
            step[i] = __fmul_rn(__fsub_rn(to_float(load(upper + end)), start[i]), SCALE);
        };
        if constexpr (AXIS == CHANNEL) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) load_ends(channel + i, i);
        }
        const int group = GROUP ? channel / (GROUP ? GROUP : 1) : 0;
        for (int base = lane; base < rows; base += UNROLL * lanes) {
            unsigned code[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int row = min(base + u * lanes, rows - 1);
                code[u] = unpack<BITS, COUNT>(codes + (long long)row * code_stride, channel, n);
                if constexpr (AXIS == TOKEN) load_ends((long long)row * end_stride + group, u);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int row = base + u * lanes;
                if (row >= rows) break;
                float values[COUNT];
#pragma unroll
                for (int i = 0; i < COUNT; ++i) {
                    // 2**23 + code, without a conversion.
                    const unsigned bits = __byte_perm(code[u], 0x4b000000u, 0x7650 + i);
                    const float whole = __fsub_rn(__uint_as_float(bits), 8388608.0f);
                    const int end = AXIS == TOKEN ? u : i;
                    values[i] = __fadd_rn(__fmul_rn(whole, step[end]), start[end]);
                }
                Run<T, COUNT> run;
                narrow(values, run.values);
                store((Run<T, COUNT> *)(out + (long long)row * n + channel), run);
            }
        }
    }
}

// GROUP = 0: one group along the axis. Strides in elements; `quads`: channels go by four.
template <int BITS, int GROUP, int AXIS, class T>
__global__ void __launch_bounds__(256, 4)
    dequantize(const Byte *codes, const void *lower, const void *upper, T *out, long long tokens,
               long long code_head_stride, long long end_head_stride, int code_stride,
               int end_stride, int tiles, int tile_rows, int n, int columns, int ends_type,
               int quads) {
    const long long head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const long long first = tile * tile_rows;
    const int rows = (int)(tokens - first < tile_rows ? tokens - first : tile_rows);
    codes += head * code_head_stride + first * code_stride;
    out += (head * tokens + first) * n;
    // Along the tokens a tile is a group, or part of the only one.
    const long long row = AXIS == TOKEN ? first : GROUP ? tile : 0;
    const long long end = head * end_head_stride + row * end_stride;
    auto run = [&](auto *low, auto *high) {
        if (quads) {
            dequantize_rows<BITS, GROUP, AXIS, 4>(codes, low + end, high + end, out, rows,
                                                  code_stride, end_stride, n, columns);
        } else {
            dequantize_rows<BITS, GROUP, AXIS, 1>(codes, low + end, high + end, out, rows,
                                                  code_stride, end_stride, n, columns);
        }
    };
    if (ends_type == FLOAT16) {
        run((const Float16 *)lower, (const Float16 *)upper);
    } else if (ends_type == BFLOAT16) {
        run((const BFloat16 *)lower, (const BFloat16 *)upper);
    } else {
        run((const float *)lower, (const float *)upper);
    }
}
