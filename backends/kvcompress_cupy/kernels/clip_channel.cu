// Clipped groups along the tokens: kvcompress.ops.clip_groups, axis "channel".
//
// A warp takes a group of tokens and a slice of the channels: 32 bytes of a row, 16 where groups
// are of 128. A thread keeps to a column of it and takes every TEAM-th token.
#include "clipping.cuh"

// GROUP = 0: groups of `size` tokens, any number, which are read again and again.
template <int GROUP, class T>
__global__ void __launch_bounds__(THREADS, GROUP <= 32 ? 3 : 2)
    clip_channel(const T *x, float *out, long long tokens, long long head_stride, int token_stride,
                 int size, unsigned units, unsigned tiles, unsigned tile_units, unsigned slices,
                 int n, int bits, int ends_type, int aligned) {
    constexpr int TEAM = GROUP ? GROUP / EACH : 4, COLUMNS = 32 / TEAM;
    constexpr int WORDS = TEAM == 4 ? 1 : 2, PER_WORD = 4 / sizeof(T), CHANNELS = WORDS * PER_WORD;
    constexpr int STORED = CHANNELS < 4 ? CHANNELS : 4;
    using W = Word<T>;
    using Column = Run<unsigned, WORDS>;
    KV_SHARED(table);
    fill_errors(bits, table);
    __syncthreads();
    const long long head = blockIdx.x / tiles;
    const unsigned start = blockIdx.x % tiles * tile_units, stop = min(start + tile_units, units);
    const int lane = threadIdx.x % 32, column = lane % COLUMNS, part = lane / COLUMNS;
    x += head * head_stride;
    out += head * tokens * n;

#pragma unroll 1
    for (unsigned unit = start + threadIdx.x / 32; unit < stop; unit += THREADS / 32) {
        const unsigned group = unit / slices;
        const int slice = (int)(unit - group * slices);
        const int channel = (slice * COLUMNS + column) * CHANNELS, left = n - channel;
        const long long first = (long long)group * size;
        const int members = (int)(tokens - first < size ? tokens - first : size);
        const Rows<T> source(x + channel, nullptr, first, token_stride);
        Column held[EACH];
        auto fetch = [&](int token) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                // The last token, repeated, moves no end.
                const T *const values = source[min(token + i * TEAM, members - 1)];
                held[i] = left > 0 ? load_run<T, WORDS>(values, left, aligned) : Column{};
            }
        };
        if constexpr (GROUP > 0) fetch(part);
        // All tokens of the thread, eight at a time.
        auto each = [&](auto use) {
            if constexpr (GROUP > 0) {
                use(part);
            } else {
#pragma unroll 1
                for (int base = 0; base < members; base += EACH * TEAM) {
                    fetch(part + base);
                    use(part + base);
                }
            }
        };
        Column least, most;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            least.values[i] = W::INFINITE;
            most.values[i] = W::INFINITE ^ W::SIGN;
        }
        each([&](int) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
#pragma unroll
                for (int j = 0; j < WORDS; ++j) {
                    least.values[j] = W::least(least.values[j], held[i].values[j]);
                    most.values[j] = W::most(most.values[j], held[i].values[j]);
                }
            }
        });
#pragma unroll
        for (int j = 0; j < WORDS; ++j) {
#pragma unroll
            for (int mask = COLUMNS; mask < 32; mask *= 2) {
                unsigned &low = least.values[j], &high = most.values[j];
                low = W::least(low, __shfl_xor_sync(0xffffffffu, low, mask));
                high = W::most(high, __shfl_xor_sync(0xffffffffu, high, mask));
            }
        }
        float lower[CHANNELS], upper[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            const int word = c / PER_WORD, place = c % PER_WORD;
            lower[c] = round_end(W::widen_one(least.values[word], place), ends_type);
            upper[c] = round_end(W::widen_one(most.values[word], place), ends_type);
            const float inverse = inverse_step<8>(lower[c], upper[c]);
            Errors<TEAM, COLUMNS> errors(table);
            each([&](int token) {
                float x[EACH];
#pragma unroll
                for (int i = 0; i < EACH; ++i) x[i] = W::widen_one(held[i].values[word], place);
                errors.add(x, lower[c], inverse,
                           [=](int i) { return token + i * TEAM < members; });
            });
            errors.cut(lower[c], upper[c]);
        }
        each([&](int token) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int row = token + i * TEAM;
                if (row >= members) break;
                float x[CHANNELS];
#pragma unroll
                for (int j = 0; j < WORDS; ++j) W::widen(held[i].values[j], x + j * PER_WORD);
                float *const target = out + (first + row) * n + channel;
#pragma unroll
                for (int c = 0; c < CHANNELS; c += STORED) {
                    float clipped[STORED];
#pragma unroll
                    for (int k = 0; k < STORED; ++k)
                        clipped[k] = clip(x[c + k], lower[c + k], upper[c + k]);
                    store_run(target + c, clipped, left - c, n % STORED == 0);
                }
            }
        });
    }
}
