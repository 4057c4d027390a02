// A GPU's execution model on one CPU thread, strict enough to find what a GPU would only sometimes
// punish: the threads of a block are fibers that run from one barrier or shuffle to the next, in a
// seeded random order. In every other block the order is one of warps: the first that can run does,
// so that it comes far before the others wherever no barrier holds it back.
//
// An error ends the launch, which then returns its text: loads and stores outside the arguments'
// arrays or misaligned, threads that wait at different barriers or shuffles, or leave others
// waiting, shared memory overrun, any other address that faults. Shared memory starts as junk.
// Denormal numbers are flushed to zero where `flush` asks for it, as CuPy has kernels compiled.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define KV_EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

enum State { READY, AT_BARRIER, IN_WARP, DONE };

constexpr size_t STACK = 64 * 1024;
constexpr unsigned WARP = 32;
constexpr size_t GUARD = 4096;

struct Fiber {
    jmp_buf environment;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    bool started = false;
    State state = DONE;
    int line = 0;
    Index thread;
};

// A shuffle or warp barrier that is gathering its lanes. Values alternate between two rows: no lane
// can be two operations ahead of another.
struct Warp {
    std::vector<unsigned> ready;
    unsigned arrived = 0, mask = 0;
    int line = 0, generation = 0;
    uint64_t values[2][WARP];
};

struct Range {
    uintptr_t start, stop;
    bool writable;
};

struct Machine {
    std::vector<Fiber *> fibers;
    std::vector<unsigned> order;  // of the warps in this block
    std::vector<Warp> warps;
    std::vector<Range> ranges;
    std::vector<unsigned char> shared;
    size_t shared_size = 0;
    Fiber *running = nullptr;
    Index block, block_size, grid_size;
    jmp_buf scheduler;
    ucontext_t bootstrap;
    void (*body)(void **) = nullptr;
    void **arguments = nullptr;
    std::string error;
    uint64_t random = 1;
    unsigned threads = 0, at_barrier = 0, done = 0;
};

inline Machine machine;

inline uint64_t draw() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random;
}

inline void make_ready(unsigned thread) {
    machine.fibers[thread]->state = READY;
    machine.warps[thread / WARP].ready.push_back(thread);
}

// The thread to resume, or -1 if there is none.
inline int next_thread() {
    const size_t count = machine.warps.size();
    const size_t first = machine.block.x % 2 ? 0 : draw() % count;
    for (size_t i = 0; i < count; ++i) {
        std::vector<unsigned> &ready = machine.warps[machine.order[(first + i) % count]].ready;
        if (ready.empty()) continue;
        std::swap(ready[draw() % ready.size()], ready.back());
        const unsigned thread = ready.back();
        ready.pop_back();
        return (int)thread;
    }
    return -1;
}

__attribute__((noinline)) inline void suspend() {
    if (_setjmp(machine.running->environment) == 0) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string &what) {
    const Index t = machine.running->thread, b = machine.block;
    machine.error = what + " (block " + std::to_string(b.x) + ", thread " + std::to_string(t.x) + ")";
    _longjmp(machine.scheduler, 1);
}

inline void on_fault(int) { fail("access to an address that is none"); }

inline void fiber_main() {
    // The fiber outlives a block: it runs the next one when it is resumed.
    for (;;) {
        machine.body(machine.arguments);
        machine.running->state = DONE;
        ++machine.done;
        suspend();
    }
}

__attribute__((noinline)) inline void resume(Fiber *fiber) {
    machine.running = fiber;
    if (_setjmp(machine.scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->environment, 1);
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    setcontext(&fiber->context);
}

inline void barrier(int line) {
    machine.running->state = AT_BARRIER;
    machine.running->line = line;
    ++machine.at_barrier;
    suspend();
}

// Post a value, wait for all lanes of the mask, and return the values of all lanes.
inline const uint64_t *exchange(unsigned mask, uint64_t value, int line) {
    const unsigned thread = machine.running->thread.x, lane = thread % WARP;
    Warp &warp = machine.warps[thread / WARP];
    if (!(mask >> lane & 1)) fail("a lane takes part in a warp operation that does not name it");
    if (warp.arrived == 0) {
        warp.mask = mask;
        warp.line = line;
    } else if (warp.line != line || warp.mask != mask) {
        fail("lanes of a warp meet at different operations, lines " + std::to_string(warp.line) +
             " and " + std::to_string(line));
    }
    const int row = warp.generation & 1;
    warp.values[row][lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        ++warp.generation;
        for (unsigned i = 0; i < WARP; ++i) {
            const unsigned other = thread - lane + i;
            if (i != lane && mask >> i & 1) make_ready(other);
        }
    } else {
        machine.running->state = IN_WARP;
        machine.running->line = line;
        suspend();
    }
    return warp.values[row];
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const uint64_t *all = exchange(mask, bits, line);
    if (!(mask >> source & 1)) fail("a shuffle reads a lane outside its mask");
    memcpy(&value, &all[source], sizeof(T));
    return value;
}

inline void check(const void *pointer, size_t bytes, bool write) {
    const uintptr_t start = (uintptr_t)pointer;
    if (start % bytes != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes");
    for (size_t i = 0; i < machine.ranges.size(); ++i) {
        const Range range = machine.ranges[i];
        if (range.start <= start && start + bytes <= range.stop) {
            if (write && !range.writable) fail("store to an input");
            if (i) std::swap(machine.ranges[i], machine.ranges[0]);
            return;
        }
    }
    fail(write ? "store out of bounds" : "load out of bounds");
}

inline void run_block() {
    Machine &m = machine;
    for (unsigned char &byte : m.shared) byte = (unsigned char)draw();
    std::vector<unsigned char> guard(m.shared.end() - GUARD, m.shared.end());
    m.at_barrier = m.done = 0;
    m.order.clear();
    for (unsigned i = 0; i < m.warps.size(); ++i) {
        m.warps[i].arrived = 0;
        m.warps[i].ready.clear();
        m.order.push_back(i);
        std::swap(m.order[draw() % (i + 1)], m.order.back());
    }
    for (unsigned i = 0; i < m.threads; ++i) make_ready(i);
    while (m.done < m.threads) {
        const int thread = next_thread();
        if (thread < 0) {
            if (m.at_barrier != m.threads) {
                m.error = "threads wait for others that never come";
                for (unsigned i = 0; i < m.threads; ++i) {
                    if (m.fibers[i]->state == DONE || m.fibers[i]->state == READY) continue;
                    m.error += " (line " + std::to_string(m.fibers[i]->line) + ")";
                    break;
                }
                return;
            }
            for (unsigned i = 0; i < m.threads; ++i) {
                if (m.fibers[i]->line != m.fibers[0]->line) {
                    m.error = "threads wait at different barriers";
                    return;
                }
                make_ready(i);
            }
            m.at_barrier = 0;
            continue;
        }
        resume(m.fibers[thread]);
        if (!m.error.empty()) return;
    }
    if (memcmp(guard.data(), m.shared.data() + m.shared_size, GUARD)) m.error = "shared memory overrun";
}

template <class Signature>
struct Call;

template <class... Arguments>
struct Call<void (*)(Arguments...)> {
    template <auto KERNEL, size_t... I>
    static void apply(void **arguments, std::index_sequence<I...>) {
        KERNEL(*(Arguments *)arguments[I]...);
    }
    template <auto KERNEL>
    static void run(void **arguments) {
        apply<KERNEL>(arguments, std::index_sequence_for<Arguments...>());
    }
    static constexpr size_t sizes[sizeof...(Arguments)] = {sizeof(Arguments)...};
};

struct Kernel {
    const char *name;
    void (*run)(void **);
    const size_t *sizes;
    size_t count;
};

template <auto KERNEL>
constexpr Kernel kernel(const char *name) {
    using C = Call<decltype(KERNEL)>;
    return {name, &C::template run<KERNEL>, C::sizes, sizeof(C::sizes) / sizeof(size_t)};
}

}  // namespace emulation

#define threadIdx (::emulation::machine.running->thread)
#define blockIdx (::emulation::machine.block)
#define blockDim (::emulation::machine.block_size)
#define gridDim (::emulation::machine.grid_size)
#define __syncthreads() ::emulation::barrier(__LINE__)
#define __syncwarp() ((void)::emulation::exchange(0xffffffffu, 0, __LINE__))
#define __shfl_xor_sync(mask, value, offset) \
    ::emulation::shuffle(mask, value, (threadIdx.x % ::emulation::WARP) ^ (offset), __LINE__)

#define KV_SHARED(name) unsigned char *const name = ::emulation::machine.shared.data()
#define KV_CHECK_LOAD(pointer, bytes) ::emulation::check(pointer, bytes, false)
#define KV_CHECK_STORE(pointer, bytes) ::emulation::check(pointer, bytes, true)

// Compiled with -ffp-contract=off: each is one rounding.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rd(float a, float b, float c) {
    const int mode = std::fegetround();
    std::fesetround(FE_DOWNWARD);
    volatile float x = a, out = std::fma(x, b, c);
    std::fesetround(mode);
    return out;
}

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline int __float_as_int(float x) { return (int)__float_as_uint(x); }

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i)
        out |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}

inline float half_to_float(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

inline void halves_to_floats(unsigned word, float &low, float &high) {
    low = half_to_float((unsigned short)word);
    high = half_to_float((unsigned short)(word >> 16));
}

inline unsigned short float_to_half(float x) {
    const _Float16 half = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

inline unsigned short float_to_bfloat(float x) {
    const unsigned bits = __float_as_uint(x);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline unsigned floats_to_halves(float low, float high) {
    return float_to_half(low) | (unsigned)float_to_half(high) << 16;
}

inline unsigned floats_to_bfloats(float low, float high) {
    return float_to_bfloat(low) | (unsigned)float_to_bfloat(high) << 16;
}

template <class Choose>
unsigned pairwise(unsigned a, unsigned b, float (*widen)(unsigned short), Choose first) {
    unsigned out = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const unsigned short x = (unsigned short)(a >> shift), y = (unsigned short)(b >> shift);
        out |= (unsigned)(first(widen(x), widen(y)) ? x : y) << shift;
    }
    return out;
}

inline float bfloat_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
inline bool is_less(float x, float y) { return x < y; }
inline bool is_more(float x, float y) { return x > y; }
inline unsigned half2_min(unsigned a, unsigned b) { return pairwise(a, b, half_to_float, is_less); }
inline unsigned half2_max(unsigned a, unsigned b) { return pairwise(a, b, half_to_float, is_more); }
inline unsigned bfloat2_min(unsigned a, unsigned b) { return pairwise(a, b, bfloat_to_float, is_less); }
inline unsigned bfloat2_max(unsigned a, unsigned b) { return pairwise(a, b, bfloat_to_float, is_more); }

// The kernels' file follows, then `emulation::Kernel kernels[]`, then this.
#define KV_EXPORT                                                                                 \
    extern "C" const char *kv_launch(unsigned index, unsigned first, unsigned grid,               \
                                     unsigned block, size_t shared, void **arguments,             \
                                     const uintptr_t *ranges, size_t count, uint64_t seed,        \
                                     bool flush) {                                                \
        return ::emulation::launch(kernels[index], first, grid, block, shared, arguments, ranges, \
                                   count, seed, flush);                                           \
    }                                                                                             \
    extern "C" size_t kv_argument_size(unsigned index, size_t i) {                                \
        return i < kernels[index].count ? kernels[index].sizes[i] : 0;                            \
    }

namespace emulation {

// Run the blocks from `first` on. `ranges` holds start, stop and whether to write of every array.
// Returns an error, or nullptr.
inline const char *launch(const Kernel &kernel, unsigned first, unsigned grid, unsigned block,
                          size_t shared, void **arguments, const uintptr_t *ranges, size_t count,
                          uint64_t seed, bool flush) {
    Machine &m = machine;
    m.error.clear();
    m.random = seed * 2 + 1;
    m.block_size = {block, 1, 1};
    m.grid_size = {grid, 1, 1};
    m.threads = block;
    m.shared_size = shared;
    m.shared.assign(shared + GUARD, 0);
    m.warps.resize((block + WARP - 1) / WARP);
    m.ranges.clear();
    for (size_t i = 0; i < count; ++i)
        m.ranges.push_back({ranges[3 * i], ranges[3 * i + 1], ranges[3 * i + 2] != 0});
    while (m.fibers.size() < block) {
        m.fibers.push_back(new Fiber);
        m.fibers.back()->thread.x = (unsigned)m.fibers.size() - 1;
    }
    m.body = kernel.run;
    m.arguments = arguments;
    struct sigaction fault = {}, before;
    fault.sa_handler = on_fault;
    fault.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &fault, &before);
#ifdef __SSE__
    const unsigned control = _mm_getcsr();
    if (flush) _mm_setcsr(control | 0x8040);
#else
    (void)flush;  // other processors keep them
#endif
    for (m.block.x = first; m.block.x < grid && m.error.empty(); ++m.block.x) run_block();
#ifdef __SSE__
    _mm_setcsr(control);
#endif
    sigaction(SIGSEGV, &before, nullptr);
    if (m.error.empty()) return nullptr;
    // What the fibers were doing is abandoned.
    for (Fiber *fiber : m.fibers) fiber->started = false;
    return m.error.c_str();
}

}  // namespace emulation
