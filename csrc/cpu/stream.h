// How fast this machine's memory can be read: the ceiling that decoding is measured against.
#pragma once

#include <cstdint>

namespace comoe {

// Reads `bytes` (a multiple of 64) once with all threads, in order, and returns a sum so that
// nothing is optimised away. The caller takes the time.
uint64_t stream_read(const void* data, int64_t bytes);

}  // namespace comoe
