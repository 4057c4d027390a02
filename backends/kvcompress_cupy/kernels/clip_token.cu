// Clipped groups along the channels: kvcompress.ops.clip_groups, axis "token".
//
// A block takes a tile of whole rows. A thread has two runs of four channels of its group, so that
// the team's stores, twice as wide as loads of 16 bits, follow each other.
#include "clipping.cuh"

// GROUP = 0: a row is one group, of any length; a warp reads it three times.
template <int GROUP, class T>
__global__ void __launch_bounds__(THREADS, GROUP ? 3 : 2)
    clip_token(const T *x, float *out, long long rows, long long head_stride, int row_stride,
               int tiles, int tile_rows, int n, int groups, unsigned groups_reciprocal, int bits,
               int ends_type, int aligned) {
    constexpr int WORDS = sizeof(T), PER_WORD = 4 / sizeof(T);
    constexpr int TEAM = GROUP ? GROUP / EACH : 32, TEAMS = THREADS / TEAM, APART = 4 * TEAM;
    using W = Word<T>;
    struct Held {
        Run<unsigned, WORDS> runs[2];
    };
    KV_SHARED(table);
    fill_errors(bits, table);
    __syncthreads();
    const long long head = blockIdx.x / tiles;
    const long long start = (long long)(blockIdx.x % tiles) * tile_rows;
    const int count = (int)(rows - start < tile_rows ? rows - start : tile_rows);
    const int team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM;
    const Rows<T> source(x + head * head_stride, nullptr, start, row_stride);
    out += (head * rows + start) * n;

    auto fetch = [&](const T *values, int left) {
        Held held = {};
#pragma unroll
        for (int q = 0; q < 2; ++q)
            if (left > q * APART)
                held.runs[q] = load_run<T, WORDS>(values + q * APART, left - q * APART, aligned);
        return held;
    };
    auto widen = [](const Held &held, float (&values)[EACH]) {
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int i = 0; i < WORDS; ++i)
                W::widen(held.runs[q].values[i], values + 4 * q + i * PER_WORD);
    };
#pragma unroll 1
    for (int base = 0; base < count * groups; base += TEAMS) {
        const int row = divide(base + team, groups_reciprocal);
        const int channel = (base + team - row * groups) * GROUP + lane * 4;
        const int left = row < count ? n - channel : 0;
        const T *const values = source[row] + channel;
        Held held;
        if constexpr (GROUP > 0) held = fetch(values, left);
        // All that the thread has of the group, eight values at a time.
        auto each = [&](auto use) {
            if constexpr (GROUP > 0) {
                use(held, 0, left);
            } else {
#pragma unroll 1
                for (int i = 0; i < n; i += EACH * TEAM)
                    use(fetch(values + i, left - i), i, left - i);
            }
        };
        unsigned least = W::INFINITE, most = W::INFINITE ^ W::SIGN;
        each([&](const Held &some, int, int left) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                if (left <= q * APART) continue;
#pragma unroll
                for (int i = 0; i < WORDS; ++i) {
                    least = W::least(least, some.runs[q].values[i]);
                    most = W::most(most, some.runs[q].values[i]);
                }
            }
        });
        float lower, upper;
        team_ends<T>(least, most, TEAM, lower, upper);
        lower = round_end(lower, ends_type);
        upper = round_end(upper, ends_type);
        const float inverse = inverse_step<8>(lower, upper);
        Errors<TEAM, 1> errors(table);
        each([&](const Held &some, int, int left) {
            float x[EACH];
            widen(some, x);
            errors.add(x, lower, inverse,
                       [=](int i) { return (i < 4 ? i : APART + i - 4) < left; });
        });
        errors.cut(lower, upper);
        each([&](const Held &some, int at, int left) {
            float x[EACH];
            widen(some, x);
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                float clipped[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) clipped[i] = clip(x[4 * q + i], lower, upper);
                store_run(out + (row * n + channel + at + q * APART), clipped, left - q * APART,
                          n % 4 == 0);
            }
        });
    }
}
