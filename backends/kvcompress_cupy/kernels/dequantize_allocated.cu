// Levels of codes of different widths: kvcompress.ops.dequantize_allocated.
//
// A block takes a tile of rows of a head, whose packed bits it copies to shared memory.
#include "allocated.cuh"
#include "all_levels.cuh"

struct Place {
    unsigned short first, depth;
};

// WIDTH: components that a thread stores at once, which divides `n`.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS)
    dequantize_allocated(const Byte *codes, const Byte *depths, float *out, long long tokens,
                         long long head_stride, int token_stride, int tiles, int tile_rows, int n,
                         unsigned stores_reciprocal, int bits, int bytes,
                         unsigned bytes_reciprocal) {
    KV_SHARED(shared);
    Place *const places = (Place *)shared;
    Byte *const depth = (Byte *)(places + n), *const packed = depth + (n + 3) / 4 * 4;
    const long long head = blockIdx.x / tiles, start = (long long)(blockIdx.x % tiles) * tile_rows;
    const int count = (int)(tokens - start < tile_rows ? tokens - start : tile_rows);
    const Rows<Byte> rows(codes + head * head_stride, nullptr, start, token_stride);
    for (int i = threadIdx.x; i < count * bytes; i += THREADS) {
        const int row = divide(i, bytes_reciprocal);
        packed[i] = load(rows[row] + i - row * bytes);
    }
    each_component(depths + head * n, n, depth, [&](int component, int first, int width) {
        places[component] = Place{(unsigned short)first, (unsigned short)width};
    });
    __syncthreads();
    const int stores = n / WIDTH;
    out += (head * tokens + start) * n;
    for (int i = threadIdx.x; i < count * stores; i += THREADS) {
        const int row = divide(i, stores_reciprocal), component = (i - row * stores) * WIDTH;
        Run<float, WIDTH> levels;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const Place place = places[component + j];
            unsigned code = 0;
            for (int k = 0; k < place.depth && place.first + k < bits; ++k) {
                const int bit = place.first + k, part = divide(bit, bytes_reciprocal);
                code |= (packed[row * bytes + bit - part * bytes] >> part & 1u) << k;
            }
            levels.values[j] = level_of(code, place.depth);
        }
        store((Run<float, WIDTH> *)(out + (long long)row * n + component), levels);
    }
}
