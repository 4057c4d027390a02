// Affine quantization with groups along the tokens: kvcompress.ops.quantize, axis "channel".
//
// A block takes a group of tokens, whole rows. A thread keeps to a column of channels, a vector
// wide, and takes every `lanes`-th token. The ends of its tokens meet in shared memory; the codes
// replace them there and are packed as in quantize_token.
#include "affine.cuh"
#include "packing.cuh"

constexpr int LANES = 16;  // by at most 256 / SIZE columns

// GROUP = 0: groups of `size` tokens, any number, and rows of any number of columns. Codes of
// `tile_rows` tokens are in shared memory at a time; of a whole group where GROUP is not 0.
template <int BITS, int GROUP, class T>
__global__ void __launch_bounds__(LANES * 256 / Vector<T>::SIZE, 1)
    quantize_channel(const T *x, const int *slots, Byte *codes, void *lower, void *upper,
                     long long tokens, long long head_stride, int token_stride, int size,
                     int groups, int n, int columns, int tile_rows, int pitch,
                     int ends_type, int aligned, int chunk, unsigned chunks_reciprocal) {
    constexpr int SIZE = Vector<T>::SIZE;
    // Vectors that a thread keeps; where they would be too many registers, they are read again.
    constexpr int HELD = GROUP <= 64 ? GROUP / LANES : 0;
    KV_SHARED(shared);
    const int lanes = GROUP ? LANES : blockDim.x / columns;
    // Of every channel: lower end and inverse step; then what each lane found, or the codes.
    const int width = columns * SIZE;
    float *const start = (float *)shared, *const inverse = start + width;
    float *const low = inverse + width, *const high = low + lanes * width;
    Byte *const tile = (Byte *)low;

    const long long head = blockIdx.x / groups, group = blockIdx.x % groups;
    const long long first = group * size;
    const int count = (int)(tokens - first < size ? tokens - first : size);
    const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
    const int channel = column * SIZE, left = n - channel;
    const Rows<T> rows(x + head * head_stride + channel, slots, first, token_stride);

    Vector<T> held[HELD ? HELD : 1];
    Range<T> range;
    if constexpr (HELD > 0) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            const int token = k * LANES + lane;
            const T *values = rows[token < count ? token : 0];
            held[k] = load_vector(values, token < count ? left : 0, aligned);
        }
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k * LANES + lane < count) range.widen(held[k]);
    } else {
#pragma unroll 4
        for (int token = lane; token < count; token += lanes)
            range.widen(load_vector(rows[token], left, aligned));
    }
#pragma unroll
    for (int i = 0; i < SIZE; i += 4) {
        const int at = lane * width + channel + i;
        const T *least = range.low.values + i, *most = range.high.values + i;
        *(float4 *)(low + at) = make_float4(to_float(least[0]), to_float(least[1]),
                                            to_float(least[2]), to_float(least[3]));
        *(float4 *)(high + at) = make_float4(to_float(most[0]), to_float(most[1]),
                                             to_float(most[2]), to_float(most[3]));
    }
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
        float minimum = __uint_as_float(0x7f800000u), maximum = -minimum;
#pragma unroll
        for (int k = 0; k < lanes; ++k) {
            minimum = fminf(minimum, low[k * width + c]);
            maximum = fmaxf(maximum, high[k * width + c]);
        }
        minimum = round_end(minimum, ends_type);
        maximum = round_end(maximum, ends_type);
        start[c] = minimum;
        inverse[c] = inverse_step<BITS>(minimum, maximum);
        const long long end = (head * groups + group) * n + c;
        store_end(minimum, lower, end, ends_type);
        store_end(maximum, upper, end, ends_type);
    }
    __syncthreads();

    codes += (head * tokens + first) * row_size<BITS>(n);
    for (int base = 0; base < count; base += tile_rows) {
        const int held_rows = count - base < tile_rows ? count - base : tile_rows;
        if constexpr (HELD > 0) {
#pragma unroll
            for (int k = 0; k < HELD; ++k) {
                const int token = k * LANES + lane;
                if (token < held_rows)
                    encode_vector<BITS>(held[k], start + channel, inverse + channel, 1,
                                        tile + token * pitch + channel);
            }
        } else {
#pragma unroll 4
            for (int token = lane; token < held_rows; token += lanes)
                encode_vector<BITS>(load_vector(rows[base + token], left, aligned),
                                    start + channel, inverse + channel, 1,
                                    tile + token * pitch + channel);
        }
        __syncthreads();
        pack_rows<BITS>(tile, pitch, held_rows, n, codes + (long long)base * row_size<BITS>(n), chunk,
                        chunks_reciprocal);
        if constexpr (GROUP == 0) __syncthreads();
    }
}
