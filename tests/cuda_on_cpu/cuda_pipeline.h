// Copies to shared memory that arrive when the thread that started them waits. See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if (bytes != 4 && bytes != 8 && bytes != 16) emulator::fail("a copy must have 4, 8 or 16 bytes");
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes) emulator::fail("a copy is not aligned");
    emulator::threads[emulator::current].copies.push_back({to, from, bytes});
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(int stages) {
    if (stages != 0) emulator::fail("only waiting for all copies is known here");
    for (const emulator::Copy& copy : emulator::threads[emulator::current].copies)
        memcpy(copy.to, copy.from, copy.bytes);
    emulator::threads[emulator::current].copies.clear();
}
