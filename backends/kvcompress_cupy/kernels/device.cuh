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

// Rows one after another, or where `slots` says (kvcompress/ops/slots.py); stride in elements.
template <class T>
struct Rows {
    const T *first;
    const int *slots;
    long long stride;

    __device__ __forceinline__ const T *operator[](long long row) const {
        return first + (slots ? load(slots + row) : row) * stride;
    }
};

constexpr float HALF_MAX = 65504.0f;

// What exceeds float16 becomes its largest, as kvcompress._namespace.narrow has it.
__device__ __forceinline__ void narrow(float x, Float16 &out) {
    from_float(fminf(fmaxf(x, -HALF_MAX), HALF_MAX), out);
}
__device__ __forceinline__ void narrow(float x, BFloat16 &out) { from_float(x, out); }
__device__ __forceinline__ void narrow(float x, float &out) { out = x; }

// Neighbouring values that are stored at once.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Run {
    T values[COUNT];
};
