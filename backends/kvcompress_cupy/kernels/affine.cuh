// The recipe of affine quantization, operation by operation as in kvcompress/ops/affine.py.
#pragma once
#include "range.cuh"

__device__ __forceinline__ void store_end(float x, void *ends, long long i, int type) {
    if (type == FLOAT16) {
        store((Float16 *)ends + i, Float16{float_to_half(x)});
    } else if (type == BFLOAT16) {
        store((BFloat16 *)ends + i, BFloat16{float_to_bfloat(x)});
    } else {
        store((float *)ends + i, x);
    }
}

// An end as it will be read: what is tiny is zero, of either sign, then rounded to its type.
__device__ __forceinline__ float round_end(float x, int type) {
    x = fabsf(x) < TINY ? 0.0f : x;
    if (type == FLOAT16) return half_to_float(float_to_half(x));
    if (type == BFLOAT16) return __uint_as_float((unsigned)float_to_bfloat(x) << 16);
    return x;
}

template <int BITS>
__device__ __forceinline__ float inverse_step(float lower, float upper) {
    const float extent = __fsub_rn(upper, lower);
    return extent < TINY ? 0.0f : __fdiv_rn((float)((1 << BITS) - 1), extent);
}

// Code in the lowest byte; the others are junk. Adding 2**23 rounds to whole numbers, half to even.
template <int BITS>
__device__ __forceinline__ unsigned encode(float x, float lower, float inverse) {
    const float scaled = __fmul_rn(__fsub_rn(x, lower), inverse);
    const float clipped = fminf(fmaxf(scaled, 0.0f), (float)((1 << BITS) - 1));
    return __float_as_uint(__fadd_rn(clipped, 8388608.0f));
}

// The lowest bytes of four words.
__device__ __forceinline__ unsigned gather_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Codes of a vector of values, one a byte, to shared memory.
template <int BITS, class T>
__device__ __forceinline__ void encode_vector(const Vector<T> &x, const float *lower,
                                              const float *inverse, int stride, Byte *codes) {
    float values[Vector<T>::SIZE];
#pragma unroll
    for (int i = 0; i < 4; ++i) Word<T>::widen(x.words[i], values + i * Vector<T>::SIZE / 4);
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; i += 4) {
        unsigned code[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int end = (i + j) * stride;
            code[j] = encode<BITS>(values[i + j], lower[end], inverse[end]);
        }
        *(unsigned *)(codes + i) = gather_bytes(code[0], code[1], code[2], code[3]);
    }
}
