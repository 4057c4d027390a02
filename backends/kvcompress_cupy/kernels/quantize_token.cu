// Affine quantization with groups along the channels: kvcompress.ops.quantize, axis "token".
//
// A block takes a tile of whole rows. A team of threads takes a group, a vector each, and finds its
// ends by shuffles; codes go through shared memory, since a packed byte holds channels that lie far
// apart, and leave in 16-byte chunks.
#include "affine.cuh"
#include "packing.cuh"

constexpr int THREADS = 256;

// GROUP = 0: a row is one group, of any length; a warp reads it twice.
template <int BITS, int GROUP, class T>
__global__ void __launch_bounds__(THREADS, 3)
    quantize_token(const T *x, const int *slots, Byte *codes, void *lower, void *upper,
                   long long rows, long long head_stride, int row_stride, int tiles,
                   int tile_rows, int n, int groups, unsigned groups_reciprocal, int pitch, int ends_type, int aligned,
                   int chunk, unsigned chunks_reciprocal) {
    constexpr int SIZE = Vector<T>::SIZE;
    // Vectors that a thread loads before it needs the first.
    constexpr int UNROLL = GROUP == 0 ? 1 : 4;
    constexpr int TEAM = GROUP == 0 ? 32 : GROUP / SIZE;
    constexpr int TEAMS = THREADS / TEAM;
    KV_SHARED(tile);
    const long long head = blockIdx.x / tiles;
    const long long start = (long long)(blockIdx.x % tiles) * tile_rows;
    const int count = (int)(rows - start < tile_rows ? rows - start : tile_rows);
    const int team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM;
    const Rows<T> source(x + head * head_stride, slots, start, row_stride);
    const long long first_row = head * rows + start;

    for (int base = 0; base < count * groups; base += TEAMS * UNROLL) {
        Vector<T> vector[UNROLL];
        const T *values[UNROLL];
        int row[UNROLL], channel[UNROLL], left[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int group = base + u * TEAMS + team;
            row[u] = divide(group, groups_reciprocal);
            channel[u] = (group - row[u] * groups) * GROUP + lane * SIZE;
            left[u] = row[u] < count ? n - channel[u] : 0;
            values[u] = source[row[u] < count ? row[u] : 0] + channel[u];
            if constexpr (GROUP > 0) vector[u] = load_vector(values[u], left[u], aligned);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            Range<T> range;
            if constexpr (GROUP > 0) {
                if (left[u] > 0) range.widen(vector[u]);
            } else {
#pragma unroll 2
                for (int i = 0; i < left[u]; i += TEAM * SIZE)
                    range.widen(load_vector(values[u] + i, left[u] - i, aligned));
            }
            float low, high;
            range.ends(TEAM, low, high);
            if (left[u] <= 0) continue;
            low = round_end(low, ends_type);
            high = round_end(high, ends_type);
            const float inverse = inverse_step<BITS>(low, high);
            Byte *out = tile + row[u] * pitch + channel[u];
            if constexpr (GROUP > 0) {
                encode_vector<BITS>(vector[u], &low, &inverse, 0, out);
            } else {
#pragma unroll 2
                for (int i = 0; i < left[u]; i += TEAM * SIZE) {
                    encode_vector<BITS>(load_vector(values[u] + i, left[u] - i, aligned), &low,
                                        &inverse, 0, out + i);
                }
            }
            if (lane == 0) {
                const long long group = first_row * groups + base + u * TEAMS + team;
                store_end(low, lower, group, ends_type);
                store_end(high, upper, group, ends_type);
            }
        }
    }
    __syncthreads();
    pack_rows<BITS>(tile, pitch, count, n, codes + first_row * row_size<BITS>(n), chunk,
                    chunks_reciprocal);
}
