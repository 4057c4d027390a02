// What all kernels share: number formats, checked loads and stores, arithmetic that no compiler may
// contract. Needs no CUDA header, so that NVRTC compiles it anywhere.
#pragma once

typedef unsigned char Byte;

// The emulator that runs these files on a CPU defines KV_EMULATED and what is declared here for it.
#ifndef KV_EMULATED
#define KV_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define KV_CHECK_LOAD(pointer, bytes)
#define KV_CHECK_STORE(pointer, bytes)

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ void halves_to_floats(unsigned word, float &low, float &high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(low), "=f"(high)
        : "r"(word));
}

__device__ __forceinline__ unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ unsigned short float_to_bfloat(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

#define KV_FROM_FLOATS(name, instruction)                                                 \
    __device__ __forceinline__ unsigned name(float low, float high) {                     \
        unsigned word;                                                                    \
        asm(instruction " %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));               \
        return word;                                                                      \
    }
KV_FROM_FLOATS(floats_to_halves, "cvt.rn.f16x2.f32")
KV_FROM_FLOATS(floats_to_bfloats, "cvt.rn.bf16x2.f32")

#define KV_PAIRWISE(name, instruction)                                                    \
    __device__ __forceinline__ unsigned name(unsigned a, unsigned b) {                    \
        unsigned out;                                                                     \
        asm(instruction " %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));                     \
        return out;                                                                       \
    }
KV_PAIRWISE(half2_min, "min.f16x2")
KV_PAIRWISE(half2_max, "max.f16x2")
KV_PAIRWISE(bfloat2_min, "min.bf16x2")
KV_PAIRWISE(bfloat2_max, "max.bf16x2")
#endif

#define TINY 7.888609052210118e-31f  // 2**-100: less counts as zero
#define FAINT 8.077935669463161e-28f  // 2**-90: less of a token's largest counts as zero

struct Float16 {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float to_float(BFloat16 x) {
    return __uint_as_float((unsigned)x.bits << 16);
}
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ void from_float(float x, Float16 &out) { out.bits = float_to_half(x); }
__device__ __forceinline__ void from_float(float x, BFloat16 &out) { out.bits = float_to_bfloat(x); }
__device__ __forceinline__ void from_float(float x, float &out) { out = x; }

template <class T>
__device__ __forceinline__ T load(const T *pointer) {
    KV_CHECK_LOAD(pointer, sizeof(T));
    return *pointer;
}

template <class T>
__device__ __forceinline__ void store(T *pointer, T value) {
    KV_CHECK_STORE(pointer, sizeof(T));
    *pointer = value;
}

// Type of an array that is no template parameter: there are few values of it.
enum Type { FLOAT16, BFLOAT16, FLOAT32 };

__device__ __forceinline__ float load_as(const void *values, long long i, int type) {
    if (type == FLOAT16) return to_float(load((const Float16 *)values + i));
    if (type == BFLOAT16) return to_float(load((const BFloat16 *)values + i));
    return load((const float *)values + i);
}

// Floor of n / d for n * d < 2**31, where reciprocal = ceil(2**31 / d).
__device__ __forceinline__ int divide(int n, unsigned reciprocal) {
    return (int)(((unsigned long long)(unsigned)n * reciprocal) >> 31);
}

// Sixteen bytes of values.
template <class T>
struct Vector {
    static constexpr int SIZE = 16 / sizeof(T);
    union {
        uint4 all;
        unsigned words[4];
        T values[SIZE];
    };
};

// The `count` values at `pointer`; what is missing of a vector repeats the first. `aligned`: there
// are whole vectors only, at addresses that are multiples of 16.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T *pointer, int count, bool aligned) {
    Vector<T> vector;
    vector.all = make_uint4(0, 0, 0, 0);
    if (count <= 0) return vector;
    if (aligned) {
        vector.all = load((const uint4 *)pointer);
        return vector;
    }
    const T first = load(pointer);
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) vector.values[i] = i < count ? load(pointer + i) : first;
    return vector;
}

// Rows from the `start`-th on: one after another, or where `slots` says (kvcompress/ops/slots.py).
template <class T>
struct Rows {
    const T *first;
    const int *slots;
    long long start;
    int stride;  // in elements

    __device__ __forceinline__ Rows(const T *x, const int *slots, long long start, int stride)
        : first(slots ? x : x + start * stride), slots(slots), start(start), stride(stride) {}

    __device__ __forceinline__ const T *operator[](int row) const {
        return first + (long long)(slots ? load(slots + start + row) : row) * stride;
    }
};

constexpr float HALF_MAX = 65504.0f;

// What exceeds float16 becomes its largest, as kvcompress.ops.cast has it.
__device__ __forceinline__ void narrow(float x, Float16 &out) {
    from_float(fminf(fmaxf(x, -HALF_MAX), HALF_MAX), out);
}
__device__ __forceinline__ void narrow(float x, BFloat16 &out) { from_float(x, out); }
__device__ __forceinline__ void narrow(float x, float &out) { out = x; }

__device__ __forceinline__ void narrow(float low, float high, Float16 *out) {
    // Clipped when they are rounded: what is infinite then was no less.
    const unsigned word =
        half2_min(half2_max(floats_to_halves(low, high), 0xfbfffbffu), 0x7bff7bffu);
    out[0].bits = (unsigned short)word;
    out[1].bits = (unsigned short)(word >> 16);
}
__device__ __forceinline__ void narrow(float low, float high, BFloat16 *out) {
    const unsigned word = floats_to_bfloats(low, high);
    out[0].bits = (unsigned short)word;
    out[1].bits = (unsigned short)(word >> 16);
}
__device__ __forceinline__ void narrow(float low, float high, float *out) {
    out[0] = low;
    out[1] = high;
}

template <class T, int COUNT>
__device__ __forceinline__ void narrow(const float (&x)[COUNT], T (&out)[COUNT]) {
#pragma unroll
    for (int i = 0; i + 1 < COUNT; i += 2) narrow(x[i], x[i + 1], out + i);
    if constexpr (COUNT % 2) narrow(x[COUNT - 1], out[COUNT - 1]);
}

// Neighbouring values that are stored at once.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Run {
    T values[COUNT];
};
