// Centroids that codes stand for, side by side: kvcompress.ops.decode_product.
#include "product.cuh"

// WORD: channels that a thread copies at once, which divides all sub-vectors.
template <int WORD>
__global__ void __launch_bounds__(256)
    decode_product(const Byte *codes, float *out, long long tokens, long long head_stride,
                   long long token_stride, int tiles, int tile, int books, int words,
                   unsigned words_reciprocal, int channels,
                   const __grid_constant__ Codebooks codebooks) {
    using Word = Run<float, WORD>;
    KV_SHARED(shared);
    // Of every word of a row, the number of its codebook among `books`.
    Byte *const owner = shared;
    for (int book = 0; book < books; ++book) {
        const int count = codebooks.books[book].dim / WORD;
        for (int i = threadIdx.x; i < count; i += blockDim.x)
            owner[codebooks.books[book].start / WORD + i] = (Byte)book;
    }
    Codebook *const table = (Codebook *)(shared + (words + 15) / 16 * 16);
    for (int i = threadIdx.x; i < books; i += blockDim.x) table[i] = codebooks.books[i];
    __syncthreads();

    const long long head = blockIdx.x / tiles, first = (long long)(blockIdx.x % tiles) * tile;
    const int count = (int)(tokens - first < tile ? tokens - first : tile);
    codes += head * head_stride + first * token_stride;
    out += (head * tokens + first) * channels;
#pragma unroll 4
    for (int i = threadIdx.x; i < count * words; i += blockDim.x) {
        const int token = divide(i, words_reciprocal);
        const int channel = (i - token * words) * WORD;
        const Codebook book = table[owner[channel / WORD]];
        const int code = load(codes + token * token_stride + book.column);
        const float *centroid = book.centroids + (head * CENTROIDS + code) * book.dim;
        store((Word *)(out + (long long)token * channels + channel),
              load((const Word *)(centroid + channel - book.start)));
    }
}
