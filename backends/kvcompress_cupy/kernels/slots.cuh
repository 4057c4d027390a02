// Tokens in the slots of a pool and side by side: kvcompress/ops/slots.py.
#pragma once
#include "device.cuh"

// Words of `heads` rows of every token, in the pool or not; strides in words.
struct Layout {
    long long head_stride, token_stride;

    __device__ __forceinline__ long long at(int head, long long token, int word) const {
        return head * head_stride + token * token_stride + word;
    }
};

// Call `copy(head, token, slot, word)` for all words of a block's tile of tokens.
template <class Copy>
__device__ __forceinline__ void each_word(const int *slots, long long tokens, int tile, int heads,
                                          int words, unsigned token_reciprocal,
                                          unsigned head_reciprocal, Copy copy) {
    const long long first = (long long)blockIdx.x * tile;
    const int count = (int)(tokens - first < tile ? tokens - first : tile);
    const int size = heads * words;
#pragma unroll 4
    for (int i = threadIdx.x; i < count * size; i += blockDim.x) {
        const int token = divide(i, token_reciprocal), rest = i - token * size;
        const int head = divide(rest, head_reciprocal);
        copy(head, first + token, load(slots + first + token), rest - head * words);
    }
}
