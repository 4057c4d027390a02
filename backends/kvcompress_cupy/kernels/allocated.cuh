// Codes of a width for every component, bit after bit: kvcompress/ops/allocated.py.
//
// The bits of a row are the components' codes end to end, lowest bits first. Packed, byte j of m has
// the bits j, j + m, ..., j + 7 m.
#pragma once
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int DEEPEST = 8;  // bits of a component at most

// Call `place(component, first bit, depth)` for all components of a head. `copied` is room in shared
// memory for as many bytes, rounded up to words. Of no barrier at the end.
template <class Place>
__device__ __forceinline__ void each_component(const Byte *depths, int n, Byte *copied, Place place) {
    for (int c = threadIdx.x; c < (n + 3) / 4 * 4; c += THREADS)
        copied[c] = c < n ? (Byte)min((int)load(depths + c), DEEPEST) : (Byte)0;
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += THREADS) {
        const unsigned *const words = (const unsigned *)copied;
        unsigned pairs = 0;  // sums of 16 bits: below 2**13 for the 1024 components there may be
        for (int i = 0; i < c / 4; ++i)
            pairs += (words[i] & 0x00ff00ffu) + (words[i] >> 8 & 0x00ff00ffu);
        int start = (int)(pairs & 0xffffu) + (int)(pairs >> 16);
        for (int i = c / 4 * 4; i < c; ++i) start += copied[i];
        place(c, start, (int)copied[c]);
    }
}
