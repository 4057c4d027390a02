// Centroids that codes stand for: kvcompress.ops.lookup. Copies words, whatever they hold.
#include "device.cuh"

__device__ __forceinline__ long long load_code(const void *codes, long long i, int bytes) {
    if (bytes == 1) return load((const Byte *)codes + i);
    if (bytes == 2) return load((const unsigned short *)codes + i);
    if (bytes == 4) return load((const int *)codes + i);
    return load((const long long *)codes + i);
}

// A centroid has `words` words. A code that is out of range reads the last one.
template <class Word>
__global__ void __launch_bounds__(256)
    lookup(const void *codes, const Word *codebook, Word *out, long long vectors, int tile,
           int words, unsigned words_reciprocal, int size, int code_bytes) {
    const long long first = (long long)blockIdx.x * tile;
    const int count = (int)(vectors - first < tile ? vectors - first : tile);
#pragma unroll 4
    for (int i = threadIdx.x; i < count * words; i += blockDim.x) {
        const int vector = divide(i, words_reciprocal);
        const long long code = load_code(codes, first + vector, code_bytes);
        const long long row = (unsigned long long)code < (unsigned)size ? code : size - 1;
        store(out + first * words + i, load(codebook + row * words + i - vector * words));
    }
}
