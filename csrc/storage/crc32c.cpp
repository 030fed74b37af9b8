#include "crc32c.h"

#include <array>
#include <cstring>

namespace comoe {
namespace {

// tables[k][b]: the CRC of byte b followed by k zero bytes, so that 8 bytes need 8 independent
// lookups.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

Tables make_tables() {
  Tables t{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int i = 0; i < 8; ++i) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0u);
    t[0][b] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (int b = 0; b < 256; ++b) t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 255];
  return t;
}

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t seed) {
  static const Tables t = make_tables();
  const auto* p = static_cast<const uint8_t*>(data);
  uint32_t crc = ~seed;
  for (; bytes >= 8; p += 8, bytes -= 8) {
    uint8_t b[8];
    std::memcpy(b, p, 8);
    crc = t[7][b[0] ^ (crc & 255)] ^ t[6][b[1] ^ (crc >> 8 & 255)] ^
          t[5][b[2] ^ (crc >> 16 & 255)] ^ t[4][b[3] ^ (crc >> 24)] ^ t[3][b[4]] ^ t[2][b[5]] ^
          t[1][b[6]] ^ t[0][b[7]];
  }
  for (; bytes; ++p, --bytes) crc = (crc >> 8) ^ t[0][(crc ^ *p) & 255];
  return ~crc;
}

}  // namespace comoe
