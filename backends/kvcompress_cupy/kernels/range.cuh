// Least and greatest of values, two at a time where they are 16 bits wide. Which zero is less than
// the other is left open.
#pragma once
#include "device.cuh"

// A word holds one float32 or two values of 16 bits, the lower first.
template <class T>
struct Word;

template <>
struct Word<float> {
    static constexpr unsigned INFINITE = 0x7f800000u, SIGN = 0x80000000u;
    static __device__ __forceinline__ unsigned least(unsigned a, unsigned b) {
        return __float_as_uint(fminf(__uint_as_float(a), __uint_as_float(b)));
    }
    static __device__ __forceinline__ unsigned most(unsigned a, unsigned b) {
        return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
    }
    static __device__ __forceinline__ void widen(unsigned word, float *out) {
        out[0] = __uint_as_float(word);
    }
    static __device__ __forceinline__ float widen_one(unsigned word, int) {
        return __uint_as_float(word);
    }
};

template <>
struct Word<Float16> {
    static constexpr unsigned INFINITE = 0x7c007c00u, SIGN = 0x80008000u;
    static __device__ __forceinline__ unsigned least(unsigned a, unsigned b) { return half2_min(a, b); }
    static __device__ __forceinline__ unsigned most(unsigned a, unsigned b) { return half2_max(a, b); }
    static __device__ __forceinline__ void widen(unsigned word, float *out) {
        halves_to_floats(word, out[0], out[1]);
    }
    static __device__ __forceinline__ float widen_one(unsigned word, int i) {
        return half_to_float((unsigned short)(word >> 16 * i));
    }
};

template <>
struct Word<BFloat16> {
    static constexpr unsigned INFINITE = 0x7f807f80u, SIGN = 0x80008000u;
    static __device__ __forceinline__ unsigned least(unsigned a, unsigned b) { return bfloat2_min(a, b); }
    static __device__ __forceinline__ unsigned most(unsigned a, unsigned b) { return bfloat2_max(a, b); }
    static __device__ __forceinline__ void widen(unsigned word, float *out) {
        out[0] = __uint_as_float(word << 16);
        out[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ float widen_one(unsigned word, int i) {
        return __uint_as_float(i ? word & 0xffff0000u : word << 16);
    }
};

// Ends of all places of words, over `team` neighbouring threads of a warp.
template <class T>
__device__ __forceinline__ void team_ends(unsigned least, unsigned most, int team, float &lower,
                                          float &upper) {
    using W = Word<T>;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int mask = team / 2; mask > 0; mask /= 2) {
            least = W::least(least, __shfl_xor_sync(0xffffffffu, least, mask));
            most = W::most(most, __shfl_xor_sync(0xffffffffu, most, mask));
        }
        lower = __uint_as_float(least);
        upper = __uint_as_float(most);
    } else {
        // Both in one word, the greatest by its negative.
        most ^= W::SIGN;
        unsigned both = W::least(__byte_perm(least, most, 0x5410), __byte_perm(least, most, 0x7632));
#pragma unroll
        for (int mask = team / 2; mask > 0; mask /= 2)
            both = W::least(both, __shfl_xor_sync(0xffffffffu, both, mask));
        lower = to_float(T{(unsigned short)both});
        upper = -to_float(T{(unsigned short)(both >> 16)});
    }
}

// Of every place of a vector.
template <class T>
struct Range {
    Vector<T> low, high;

    __device__ __forceinline__ Range() {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low.words[i] = Word<T>::INFINITE;
            high.words[i] = Word<T>::INFINITE ^ Word<T>::SIGN;
        }
    }

    __device__ __forceinline__ void widen(const Vector<T> &x) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low.words[i] = Word<T>::least(low.words[i], x.words[i]);
            high.words[i] = Word<T>::most(high.words[i], x.words[i]);
        }
    }

    // Ends of all places, over `team` neighbouring threads of a warp.
    __device__ __forceinline__ void ends(int team, float &lower, float &upper) const {
        using W = Word<T>;
        const unsigned least = W::least(W::least(low.words[0], low.words[1]),
                                        W::least(low.words[2], low.words[3]));
        const unsigned most = W::most(W::most(high.words[0], high.words[1]),
                                      W::most(high.words[2], high.words[3]));
        team_ends<T>(least, most, team, lower, upper);
    }
};
