// CRC-32C (Castagnoli, reflected, as in iSCSI, ext4 and RFC 3720): the checksum of every record of
// the store.
#pragma once

#include <cstddef>
#include <cstdint>

namespace comoe {

// `seed` is the result for the bytes before these: crc32c(b, n2, crc32c(a, n1)) is that of a
// followed by b.
uint32_t crc32c(const void* data, size_t bytes, uint32_t seed = 0);

}  // namespace comoe
