// CUDA on the CPU, for tests: runs the kernels of csrc/cuda, compiled as plain C++, one thread of the grid at a time.
//
// Every thread of a block is a fiber that runs until it waits at a barrier or a shuffle. Which thread runs next is
// drawn anew each time from a seeded generator, so a result that depends on a missing barrier changes from seed to
// seed. A barrier that some threads of a block never reach, and a shuffle that some lanes of its warp do not make, end
// the process with a message. Copies to shared memory that were started arrive when the thread waits for them, not
// before. Shared memory, and the rest of it beyond what the launch asked for, is filled with NaN.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
typedef int cudaError_t;
typedef struct Stream* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace vaecirc {
namespace cuda {
alignas(16) inline unsigned char memory[256 << 10];  // the dynamic shared memory of the one block that runs
}
}  // namespace vaecirc

namespace emulator {

constexpr size_t STACK = 128 << 10, SHARED_LIMIT = 48 << 10;
constexpr unsigned WARP = 32;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

// Arrivals of all threads that meet somewhere: of a block at barriers, or of a warp at shuffles. As nobody leaves the
// k-th meeting before all have come, all have come k times when there are k times their number of arrivals.
struct Meetings {
    long members, arrivals;
};

struct Thread {
    jmp_buf state;
    ucontext_t start;
    std::vector<char> stack = std::vector<char>(STACK);
    std::vector<Copy> copies;
    bool started, done;
    Meetings* waits_for;
    long arrivals;      // that it waits for
    uint64_t shuffled;  // what it offers to its warp

    bool can_run() const { return !done && (waits_for == nullptr || waits_for->arrivals >= arrivals); }
};

inline std::vector<Thread> threads;
inline Meetings block;
inline std::vector<Meetings> warps;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline unsigned current;
inline std::mt19937 generator;
inline uint3 block_index;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what, block_index.x, current);
    abort();
}

inline void meet(Meetings& meetings) {
    const long meeting = meetings.arrivals / meetings.members + 1;
    ++meetings.arrivals;
    threads[current].waits_for = &meetings;
    threads[current].arrivals = meeting * meetings.members;
    if (_setjmp(threads[current].state) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
    body();
    threads[current].done = true;
    _longjmp(scheduler, 1);
}

template <class T>
T shuffle(T x, unsigned lane) {
    static_assert(sizeof(T) <= 8, "at most 8 bytes");
    const unsigned warp = current / WARP;
    memcpy(&threads[current].shuffled, &x, sizeof(T));
    meet(warps[warp]);
    memcpy(&x, &threads[warp * WARP + lane].shuffled, sizeof(T));
    meet(warps[warp]);  // all have read before anyone writes again
    return x;
}

// Runs the current thread until it waits or ends.
__attribute__((noinline)) inline void resume() {
    if (_setjmp(scheduler) != 0) return;
    if (threads[current].started) _longjmp(threads[current].state, 1);
    threads[current].started = true;
    setcontext(&threads[current].start);
}

// All threads, by rank: warps in any order, and the lanes of each.
inline std::vector<unsigned> ranked() {
    std::vector<unsigned> order, lanes;
    for (unsigned warp = 0; warp < warps.size(); ++warp) order.push_back(warp);
    std::shuffle(order.begin(), order.end(), generator);
    std::vector<unsigned> all;
    for (unsigned warp : order) {
        lanes.clear();
        for (unsigned lane = 0; lane < WARP; ++lane) lanes.push_back(warp * WARP + lane);
        std::shuffle(lanes.begin(), lanes.end(), generator);
        all.insert(all.end(), lanes.begin(), lanes.end());
    }
    return all;
}

// One block; the stacks are made once and used again.
inline void run_block(unsigned size) {
    if (threads.size() != size) threads = std::vector<Thread>(size);
    block = {(long)size, 0};
    warps.assign(size / WARP, {(long)WARP, 0});
    for (Thread& thread : threads) {
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.data();
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, entry, 0);
        thread.started = thread.done = false;
        thread.waits_for = nullptr;
    }
    unsigned ended = 0;
    std::vector<unsigned> order = ranked();
    while (ended < size) {
        const auto next =
            std::find_if(order.begin(), order.end(), [](unsigned thread) { return threads[thread].can_run(); });
        if (next == order.end()) fail("a barrier or shuffle is not reached by all threads");
        current = *next;
        resume();
        ended += threads[current].done;
        if (generator() % 512 == 0) order = ranked();
    }
}

}  // namespace emulator

#define threadIdx (uint3{emulator::current, 0, 0})
#define blockIdx (emulator::block_index)

inline void __syncthreads() { emulator::meet(emulator::block); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
    if (mask != 0xffffffffu) emulator::fail("only shuffles of a whole warp are known here");
    return emulator::shuffle(x, (emulator::current % emulator::WARP) ^ (unsigned)distance);
}

template <class T>
T __ldcs(const T* from) {
    return *from;
}
inline float __fdividef(float a, float b) { return a / b; }

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
    if (grid.y * grid.z * block.y * block.z != 1) emulator::fail("only grids of one dimension are known here");
    if (grid.x < 1 || block.x < 1 || block.x > 1024 || block.x % emulator::WARP || shared > emulator::SHARED_LIMIT)
        return 9;
    const Parameters parameters = *static_cast<Parameters*>(arguments[0]);
    emulator::body = [=] { kernel(parameters); };
    for (unsigned b = 0; b < grid.x; ++b) {
        emulator::block_index = {b, 0, 0};
        memset(vaecirc::cuda::memory, 0xff, sizeof vaecirc::cuda::memory);
        emulator::run_block(block.x);
        for (size_t k = shared; k < sizeof vaecirc::cuda::memory; ++k)
            if (vaecirc::cuda::memory[k] != 0xff) emulator::fail("shared memory was written beyond what was asked for");
    }
    return cudaSuccess;
}
