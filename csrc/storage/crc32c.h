// CRC-32C (Castagnoli), the checksum of records: polynomial 0x1EDC6F41 reflected, initial and final
// inversion inside, so that crc32c(b, n, crc32c(a, m)) is the checksum of a followed by b.
#pragma once

#include <cstddef>
#include <cstdint>

namespace comoe {

// The fastest version that this CPU has, chosen at the first call.
uint32_t crc32c(const void* data, size_t bytes, uint32_t seed = 0);

// The version for any CPU (8 tables, 8 bytes a step); reference of the tests.
uint32_t crc32c_table(const void* data, size_t bytes, uint32_t seed = 0);

// "sse42", "armv8" or "table".
const char* crc32c_isa();

}  // namespace comoe
