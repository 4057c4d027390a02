// Code of every vector: kvcompress.ops.nearest.
#include "centroids.cuh"

// DIM = 0: of more than 32 channels.
template <int DIM>
__global__ void __launch_bounds__(THREADS, 2)
    nearest(const float *x, const float *codebook, int *codes, long long vectors, long long stride,
            int tile, int dim, int size) {
    KV_SHARED(shared);
    const long long first = (long long)blockIdx.x * tile;
    const int count = (int)(vectors - first < tile ? vectors - first : tile);
    auto put = [&](int vector, int code) { store(codes + first + vector, code); };
    if constexpr (DIM == 0) {
        search_wide(x + first * stride, stride, count, dim, codebook, size, shared, put);
    } else {
        search<DIM>(x + first * stride, stride, count, dim, codebook, size, shared, put);
    }
}
