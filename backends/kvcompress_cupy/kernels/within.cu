// Whether all magnitudes are within a limit: kvcompress.ops.within.
//
// Magnitudes of numbers are in the order of their bits, NaN beyond infinity, so a word's one or two
// values are compared by one subtraction: from the limit with a bit more, which is left where the
// value is no larger.
#include "range.cuh"

// `limit`: of every value of a word. `out` is true before; whoever finds more makes it false.
template <class T>
__global__ void __launch_bounds__(256)
    within(const T *x, const int *slots, Byte *out, long long tokens, long long head_stride,
           int token_stride, int tiles, int tile_rows, int n, int vectors,
           unsigned vectors_reciprocal, int aligned, unsigned limit) {
    constexpr unsigned SIGN = Word<T>::SIGN;
    const long long head = blockIdx.x / tiles;
    const long long start = (long long)(blockIdx.x % tiles) * tile_rows;
    const int count = (int)(tokens - start < tile_rows ? tokens - start : tile_rows);
    const Rows<T> rows(x + head * head_stride, slots, start, token_stride);
    unsigned left = SIGN;
#pragma unroll 4
    for (int i = threadIdx.x; i < count * vectors; i += blockDim.x) {
        const int row = divide(i, vectors_reciprocal);
        const int channel = (i - row * vectors) * Vector<T>::SIZE;
        const Vector<T> vector = load_vector(rows[row] + channel, n - channel, aligned);
#pragma unroll
        for (int j = 0; j < 4; ++j) left &= (limit | SIGN) - (vector.words[j] & ~SIGN);
    }
    if (left != SIGN) store(out, (Byte)0);
}
