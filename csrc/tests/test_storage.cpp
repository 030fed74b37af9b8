// Checksums and readers.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../storage/crc32c.h"

using namespace comoe;

static int failures = 0;
#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (0)

// One bit at a time, straight from the polynomial.
static uint32_t crc32c_ref(const uint8_t* p, size_t bytes) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < bytes; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

static void test_crc32c() {
  CHECK(crc32c("123456789", 9) == 0xE3069283);  // the polynomial's published check value
  CHECK(crc32c("", 0) == 0);
  std::vector<uint8_t> data(20000);
  uint32_t state = 1;
  for (auto& byte : data) byte = (state = state * 1664525 + 1013904223) >> 24;
  // Every length around the loops' borders (8, 3072), from every alignment.
  for (size_t align = 0; align < 8; ++align)
    for (size_t bytes :
         {0, 1, 7, 8, 9, 63, 1023, 1024, 3071, 3072, 3073, 3080, 6143, 6144, 9217, 19991}) {
      const uint8_t* p = data.data() + align;
      const uint32_t expected = crc32c_ref(p, bytes);
      CHECK(crc32c(p, bytes) == expected);
      CHECK(crc32c_table(p, bytes) == expected);
      const size_t cut = bytes * 3 / 7;
      CHECK(crc32c(p + cut, bytes - cut, crc32c(p, cut)) == expected);
      CHECK(crc32c_table(p + cut, bytes - cut, crc32c_table(p, cut)) == expected);
    }
}

int main() {
  test_crc32c();
  std::printf("crc32c: %s\n", crc32c_isa());
  return failures != 0;
}
