// Nearest centroid of every sub-vector: kvcompress.ops.encode_product.
//
// A block takes one sub-vector of a tile of tokens. Blocks of the same tokens follow each other,
// since the channels of a token are neighbours in memory.
#include "centroids.cuh"
#include "product.cuh"

// DIM is that of all `books`, filled up; 0: more than 32. Codes of `columns` bytes a token.
template <int DIM>
__global__ void __launch_bounds__(THREADS, 2)
    encode_product(const float *x, Byte *codes, long long tokens, long long head_stride,
                   long long token_stride, int tiles, int tile, int books, int columns,
                   const __grid_constant__ Codebooks codebooks) {
    KV_SHARED(shared);
    const Codebook &book = codebooks.books[blockIdx.x % books];
    const unsigned rest = blockIdx.x / books;
    const long long head = rest / tiles, first = (long long)(rest % tiles) * tile;
    const int count = (int)(tokens - first < tile ? tokens - first : tile);
    const float *codebook = book.centroids + head * CENTROIDS * book.dim;
    x += head * head_stride + first * token_stride + book.start;
    codes += (head * tokens + first) * columns + book.column;
    auto put = [&](int token, int code) { store(codes + (long long)token * columns, (Byte)code); };
    if constexpr (DIM == 0) {
        search_wide(x, token_stride, count, book.dim, codebook, CENTROIDS, shared, put);
    } else {
        search<DIM>(x, token_stride, count, book.dim, codebook, CENTROIDS, shared, put);
    }
}
