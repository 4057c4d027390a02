// The nearest of a codebook's centroids: least |c|^2 / 2 - <x, c>, the first of equals.
#pragma once
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int CODES = 256;   // centroids in shared memory at a time
constexpr int ABREAST = 8;   // centroids at a time that wider vectors are compared with

// Vectors of a thread; the more, the less shared memory is read for each.
template <int DIM>
constexpr int VECTORS = DIM <= 8 ? 4 : DIM == 16 ? 2 : 1;

template <int DIM>
struct alignas(DIM % 4 == 0 ? 16 : 4 * DIM) Centroid {
    float channels[DIM];
};

// Of `count` vectors, `stride` apart, write the code of each: `put(vector, code)`. The threads of a
// block share the work and all have to come. DIM: the vectors' length, filled up with zeros.
template <int DIM, class Put>
__device__ __forceinline__ void search(const float *x, long long stride, int count, int dim,
                                       const float *codebook, int size, unsigned char *shared,
                                       Put put) {
    constexpr int N = VECTORS<DIM>;
    auto *const table = (Centroid<DIM> *)shared;
    float *const half_norms = (float *)(table + CODES);
    Centroid<DIM> vectors[N];
    float least[N];
    int best[N];
#pragma unroll
    for (int v = 0; v < N; ++v) {
        const int vector = v * THREADS + threadIdx.x;
        least[v] = __uint_as_float(0x7f800000u);  // infinity
        best[v] = 0;
#pragma unroll
        for (int d = 0; d < DIM; ++d)
            vectors[v].channels[d] =
                vector < count && d < dim ? load(x + vector * stride + d) : 0.0f;
    }
    for (int base = 0; base < size; base += CODES) {
        const int codes = size - base < CODES ? size - base : CODES;
        __syncthreads();  // the last ones have been read
        for (int i = threadIdx.x; i < codes * DIM; i += THREADS) {
            const int code = i / DIM, d = i % DIM;
            table[code].channels[d] =
                d < dim ? load(codebook + (long long)(base + code) * dim + d) : 0.0f;
        }
        __syncthreads();
        if ((int)threadIdx.x < codes) {
            float norm = 0.0f;
#pragma unroll
            for (int d = 0; d < DIM; ++d) {
                const float channel = table[threadIdx.x].channels[d];
                norm = __fmaf_rn(channel, channel, norm);
            }
            half_norms[threadIdx.x] = __fmul_rn(norm, 0.5f);
        }
        __syncthreads();
#pragma unroll 2
        for (int code = 0; code < codes; ++code) {
            const Centroid<DIM> centroid = table[code];
            const float half_norm = half_norms[code];
#pragma unroll
            for (int v = 0; v < N; ++v) {
                float score = half_norm;
#pragma unroll
                for (int d = 0; d < DIM; ++d)
                    score = __fmaf_rn(-vectors[v].channels[d], centroid.channels[d], score);
                if (score < least[v]) {
                    least[v] = score;
                    best[v] = base + code;
                }
            }
        }
    }
#pragma unroll
    for (int v = 0; v < N; ++v) {
        const int vector = v * THREADS + threadIdx.x;
        if (vector < count) put(vector, best[v]);
    }
}

// Vectors of any length, read again for every few centroids.
template <class Put>
__device__ __forceinline__ void search_wide(const float *x, long long stride, int count, int dim,
                                            const float *codebook, int size,
                                            unsigned char *shared, Put put) {
    float *const half_norms = (float *)shared;
    const bool valid = (int)threadIdx.x < count;
    x += (valid ? threadIdx.x : 0) * stride;
    float least = __uint_as_float(0x7f800000u);
    int best = 0;
    for (int base = 0; base < size; base += CODES) {
        const int codes = size - base < CODES ? size - base : CODES;
        __syncthreads();
        if ((int)threadIdx.x < codes) {
            const float *centroid = codebook + (long long)(base + threadIdx.x) * dim;
            float norm = 0.0f;
            for (int d = 0; d < dim; ++d) {
                const float channel = load(centroid + d);
                norm = __fmaf_rn(channel, channel, norm);
            }
            half_norms[threadIdx.x] = __fmul_rn(norm, 0.5f);
        }
        __syncthreads();
        for (int first = 0; valid && first < codes; first += ABREAST) {
            float score[ABREAST];
#pragma unroll
            for (int i = 0; i < ABREAST; ++i)
                score[i] = half_norms[first + i < codes ? first + i : codes - 1];
            for (int d = 0; d < dim; ++d) {
                const float channel = -load(x + d);
#pragma unroll
                for (int i = 0; i < ABREAST; ++i) {
                    const long long code = base + (first + i < codes ? first + i : codes - 1);
                    score[i] = __fmaf_rn(channel, load(codebook + code * dim + d), score[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < ABREAST; ++i) {
                // The last code, repeated to fill up, is not less than itself.
                if (score[i] < least) {
                    least = score[i];
                    best = base + first + i;
                }
            }
        }
    }
    if (valid) put((int)threadIdx.x, best);
}
