// Codes as wide as each component deserves: kvcompress.ops.quantize_allocated.
//
// A block takes a tile of rows of a head; codes go through shared memory, one a byte.
#include "allocated.cuh"
#include "all_steps.cuh"

constexpr float FARTHEST = 31.0f;  // all the steps are nearer, and beyond 5 no code changes

// WIDTH: components that a thread loads at once, which divides `n`.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS)
    quantize_allocated(const float *x, const Byte *depths, Byte *codes, long long tokens,
                       long long head_stride, int token_stride, int tiles, int tile_rows, int n,
                       unsigned loads_reciprocal, int pitch, int bits, int bytes,
                       unsigned bytes_reciprocal) {
    KV_SHARED(shared);
    Byte *const tile = shared, *const depth = tile + tile_rows * pitch;
    // Of every bit: component and place in its code, three bits.
    unsigned short *const owners = (unsigned short *)(depth + (n + 3) / 4 * 4);
    const long long head = blockIdx.x / tiles, start = (long long)(blockIdx.x % tiles) * tile_rows;
    const int count = (int)(tokens - start < tile_rows ? tokens - start : tile_rows);
    const Rows<float> rows(x + head * head_stride, nullptr, start, token_stride);
    for (int i = threadIdx.x; i < bits; i += THREADS) owners[i] = 0;
    each_component(depths + head * n, n, depth, [&](int component, int first, int width) {
        for (int i = 0; i < width; ++i)
            if (first + i < bits) owners[first + i] = (unsigned short)(component * DEEPEST + i);
    });
    const int loads = n / WIDTH;
#pragma unroll 2
    for (int i = threadIdx.x; i < count * loads; i += THREADS) {
        const int row = divide(i, loads_reciprocal), component = (i - row * loads) * WIDTH;
        const Run<float, WIDTH> values = load((const Run<float, WIDTH> *)(rows[row] + component));
        Run<Byte, WIDTH> out;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const float value = fminf(fmaxf(values.values[j], -FARTHEST), FARTHEST);
            out.values[j] = (Byte)code_of(value, depth[component + j]);
        }
        *(Run<Byte, WIDTH> *)(tile + row * pitch + component) = out;
    }
    __syncthreads();
    codes += (head * tokens + start) * bytes;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * bytes; i += THREADS) {
        const int row = divide(i, bytes_reciprocal), first = i - row * bytes;
        unsigned out = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int bit = first + j * bytes;
            if (bit >= bits) break;
            const int owner = owners[bit];
            out |= (tile[row * pitch + owner / DEEPEST] >> owner % DEEPEST & 1u) << j;
        }
        store(codes + i, (Byte)out);
    }
}
