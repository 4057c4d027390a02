// Codes of a tile, one a byte in shared memory, packed into planes as kvcompress/ops/packing.py
// lays them out.
#pragma once
#include "device.cuh"

// The planes of a code, lowest bits first.
template <int BITS>
struct Planes {
    static constexpr int FIRST = BITS == 3 ? 2 : BITS;
    static constexpr int SECOND = BITS - FIRST;
};

// Bytes of the plane of `width` bits in a row of `n` codes.
__device__ __forceinline__ int plane_size(int n, int width) { return (n * width + 7) / 8; }

template <int BITS>
__device__ __forceinline__ int row_size(int n) {
    return plane_size(n, Planes<BITS>::FIRST) + plane_size(n, Planes<BITS>::SECOND);
}

// Four bytes of a plane at once: shifted by less than its width, a code stays in its byte.
template <int SHIFT, int WIDTH>
__device__ __forceinline__ unsigned place(unsigned codes, int i) {
    constexpr unsigned MASK = 0x01010101u * ((1u << WIDTH) - 1u);
    return ((codes >> SHIFT) & MASK) << (i * WIDTH);
}

template <int SHIFT, int WIDTH>
__device__ __forceinline__ uint4 pack_16(const Byte *codes, int size) {
    uint4 out = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 8 / WIDTH; ++i) {
        const uint4 words = *(const uint4 *)(codes + i * size);
        out.x |= place<SHIFT, WIDTH>(words.x, i);
        out.y |= place<SHIFT, WIDTH>(words.y, i);
        out.z |= place<SHIFT, WIDTH>(words.z, i);
        out.w |= place<SHIFT, WIDTH>(words.w, i);
    }
    return out;
}

template <int SHIFT, int WIDTH>
__device__ __forceinline__ unsigned pack_4(const Byte *codes, int size) {
    unsigned out = 0;
#pragma unroll
    for (int i = 0; i < 8 / WIDTH; ++i)
        out |= place<SHIFT, WIDTH>(*(const unsigned *)(codes + i * size), i);
    return out;
}

// One byte, from the `left` codes that are left of the row.
template <int SHIFT, int WIDTH>
__device__ __forceinline__ Byte pack_1(const Byte *codes, int size, int left) {
    unsigned out = 0;
#pragma unroll
    for (int i = 0; i < 8 / WIDTH; ++i)
        if (i * size < left) out |= place<SHIFT, WIDTH>(codes[i * size], i);
    return (Byte)out;
}

template <int SHIFT, int WIDTH>
__device__ __forceinline__ void pack_chunk(const Byte *row, int j, int n, Byte *out, int chunk) {
    const int size = plane_size(n, WIDTH);
    if (chunk == 16) {
        store((uint4 *)out, pack_16<SHIFT, WIDTH>(row + j, size));
    } else if (chunk == 4) {
        store((unsigned *)out, pack_4<SHIFT, WIDTH>(row + j, size));
    } else {
        store(out, pack_1<SHIFT, WIDTH>(row + j, size, n - j));
    }
}

// Pack `rows` rows of `n` codes that lie `pitch` bytes apart in shared memory. Output rows follow
// each other; every thread takes chunks of 16, 4 or 1 bytes, which must divide all planes.
template <int BITS>
__device__ __forceinline__ void pack_rows(const Byte *codes, int pitch, int rows, int n, Byte *out,
                                          int chunk, unsigned chunks_reciprocal) {
    constexpr int FIRST = Planes<BITS>::FIRST, SECOND = Planes<BITS>::SECOND;
    const int first = plane_size(n, FIRST);
    const int bytes = row_size<BITS>(n), chunks = bytes / chunk;
    for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
        const int row = divide(i, chunks_reciprocal);
        const int j = (i - row * chunks) * chunk;
        const Byte *source = codes + row * pitch;
        Byte *target = out + (long long)row * bytes + j;
        if constexpr (SECOND > 0) {
            if (j >= first) {
                pack_chunk<FIRST, SECOND>(source, j - first, n, target, chunk);
                continue;
            }
        }
        pack_chunk<0, FIRST>(source, j, n, target, chunk);
    }
}

// The codes of four neighbours in a row, one a byte; all four are in the same part of every plane.
template <int SHIFT, int WIDTH>
__device__ __forceinline__ unsigned unpack_4(const Byte *plane, int channel, int size) {
    constexpr unsigned MASK = 0x01010101u * ((1u << WIDTH) - 1u);
    const int part = channel / size;
    const unsigned bytes = load((const unsigned *)(plane + channel - part * size));
    return ((bytes >> (part * WIDTH)) & MASK) << SHIFT;
}

template <int SHIFT, int WIDTH>
__device__ __forceinline__ unsigned unpack_1(const Byte *plane, int channel, int size) {
    const int part = channel / size;
    const unsigned byte = load(plane + channel - part * size);
    return ((byte >> (part * WIDTH)) & ((1u << WIDTH) - 1u)) << SHIFT;
}

// Codes of the `COUNT` (4 or 1) channels of a packed row from `channel` on, one a byte.
template <int BITS, int COUNT>
__device__ __forceinline__ unsigned unpack(const Byte *row, int channel, int n) {
    constexpr int FIRST = Planes<BITS>::FIRST, SECOND = Planes<BITS>::SECOND;
    const int first = plane_size(n, FIRST);
    unsigned codes;
    if constexpr (COUNT == 4) {
        codes = unpack_4<0, FIRST>(row, channel, first);
    } else {
        codes = unpack_1<0, FIRST>(row, channel, first);
    }
    if constexpr (SECOND > 0) {
        const int second = plane_size(n, SECOND);
        if constexpr (COUNT == 4) {
            codes |= unpack_4<FIRST, SECOND>(row + first, channel, second);
        } else {
            codes |= unpack_1<FIRST, SECOND>(row + first, channel, second);
        }
    }
    return codes;
}
