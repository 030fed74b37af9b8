// The encoder against a decoder that walks weight by weight, as layout.h describes the bytes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/parallel.h"
#include "../ladder/codec.h"

using namespace comoe;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}
void check(bool good, const std::string& what) {
  if (!good) fail(what);
}

struct Expert {
  ExpertGeometry g;
  std::vector<std::vector<uint8_t>> matrices, biases, scales;  // elements or codes
  ExpertSource source() const {
    ExpertSource s;
    for (int m = 0; m < g.num_matrices(); ++m) {
      s.matrices[m] = matrices[m].data();
      if (g.biased) s.biases[m] = biases[m].data();
      if (is_coded(g.exact_dtype)) s.scales[m] = scales[m].data();
    }
    return s;
  }
};

double value_of(const uint8_t* element, DType dtype) {
  if (dtype == DType::fp32) {
    float x;
    std::memcpy(&x, element, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, element, 2);
  if (dtype == DType::bf16) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double magnitude =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return h >> 15 ? -magnitude : magnitude;
}

// Random elements near 0.02, as bits of the dtype.
std::vector<uint8_t> draw(int64_t count, DType dtype, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<uint8_t> out(count * dtype_bytes(dtype));
  for (int64_t i = 0; i < count; ++i) {
    float x = normal(random);
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (dtype == DType::fp32) {
      std::memcpy(&out[4 * i], &u, 4);
      continue;
    }
    // Any fp16 of this range will do: sign, exponent 8..9, random mantissa.
    const uint16_t h = dtype == DType::bf16
                           ? static_cast<uint16_t>(u >> 16)
                           : static_cast<uint16_t>((random() & 0x83ff) | (8 + random() % 2) << 10);
    std::memcpy(&out[2 * i], &h, 2);
  }
  return out;
}

Expert make(const ExpertGeometry& g, unsigned seed) {
  Expert e{g, {}, {}};
  std::mt19937 random(seed);
  for (int m = 0; m < g.num_matrices(); ++m) {
    const MatrixGeometry shape = g.matrix(m);
    e.matrices.push_back(draw(shape.rows * shape.cols, g.exact_bias_dtype(), random));
    e.biases.push_back(draw(shape.rows, g.exact_bias_dtype(), random));
  }
  return e;
}

using Payloads = std::vector<std::vector<uint8_t>>;

Payloads encode(const Expert& e, uint8_t junk) {
  Payloads payloads;
  uint8_t* out[kNumRecords];
  for (int r = 0; r < kNumRecords; ++r) payloads.emplace_back(e.g.record_bytes(r), junk);
  for (int r = 0; r < kNumRecords; ++r) out[r] = payloads[r].data();
  encode_expert(e.g, e.source(), out);
  return payloads;
}

const uint8_t* block(const Expert& e, const Payloads& p, int record, int m, int64_t row,
                     int64_t col) {
  const int64_t n = row / kBlockRows * e.g.matrix(m).col_blocks() + col / kBlockCols;
  return p[record].data() + e.g.blocks_offset(record, m) + n * e.g.block_bytes(record);
}

double decode(const Expert& e, const Payloads& p, int m, int64_t row, int64_t col, int bits) {
  const int64_t r = row % kBlockRows, c = col % kBlockCols, q = c / 4, lane = 4 * r + c % 4;
  int code = (block(e, p, 0, m, row, col)[64 * (q / 4) + lane] >> (2 * (q % 4)) & 3) << 6;
  if (bits >= 3) code |= (block(e, p, 1, m, row, col)[lane] >> q & 1) << 5;
  if (bits >= 4) code |= (block(e, p, 2, m, row, col)[lane] >> q & 1) << 4;
  if (bits == 8) code |= block(e, p, 3, m, row, col)[64 * (q / 2) + lane] >> (4 * (q % 2)) & 15;
  MatrixHeader header;
  std::memcpy(&header, p[0].data() + e.g.header_offset(m), sizeof(header));
  const int64_t group =
      row / kBlockRows * e.g.matrix(m).groups() + col / (kGroupBlocks * kBlockCols);
  const uint8_t* params = p[0].data() + e.g.params_offset(m) + group * kParamsBytes;
  const double scale =
      std::exp2(header.log2_min + static_cast<double>(header.log2_step) * params[r]);
  const int value = bits == 8   ? code
                    : bits == 4 ? header.table4[code >> 4]
                    : bits == 3 ? header.table3[code >> 5]
                                : header.table2[code >> 6];
  return scale * (value - params[kBlockRows + r]);
}

const uint8_t* exact(const Expert& e, const Payloads& p, int m, int64_t row, int64_t col) {
  const int64_t r = row % kBlockRows, c = col % kBlockCols;
  const int64_t element =
      e.g.exact_dtype == ExactType::fp32 ? 16 * c + r : 32 * (c / 2) + 2 * r + c % 2;
  return block(e, p, 4, m, row, col) + element * exact_bits(e.g.exact_dtype) / 8;
}

void test_round_trip(const ExpertGeometry& g) {
  const std::string name = "H=" + std::to_string(g.hidden) +
                           " I=" + std::to_string(g.intermediate) +
                           " dtype=" + std::to_string(static_cast<int>(g.exact_dtype));
  const Expert e = make(g, 7);
  const Payloads p = encode(e, 0xa5);
  check(p == encode(e, 0x00), name + ": every byte is written");
  for (int threads : {1, 3}) {
    Parallel::instance().set_num_threads(threads);
    check(p == encode(e, 0xa5), name + ": bytes depend on the number of threads");
  }
  const int64_t item = dtype_bytes(g.exact_bias_dtype());
  for (int m = 0; m < g.num_matrices(); ++m) {
    const MatrixGeometry shape = g.matrix(m);
    const int bits[4] = {2, 3, 4, 8};
    double energy = 0, error[4] = {};
    for (int64_t row = 0; row < shape.rows; ++row) {
      for (int64_t col = 0; col < shape.cols; ++col) {
        const uint8_t* element = &e.matrices[m][(row * shape.cols + col) * item];
        check(std::memcmp(exact(e, p, m, row, col), element, item) == 0, name + ": exact differs");
        const double w = value_of(element, g.exact_bias_dtype());
        energy += w * w;
        for (int b = 0; b < 4; ++b) {
          const double d = decode(e, p, m, row, col, bits[b]) - w;
          error[b] += d * d;
        }
      }
    }
    const double bound[4] = {0.2, 0.06, 0.015, 6e-5};
    for (int b = 0; b < 4; ++b)
      check(error[b] < bound[b] * energy, name + ": error " + std::to_string(error[b] / energy) +
                                              " at " + std::to_string(bits[b]) + " bits");
    if (!g.biased) continue;
    for (int64_t row = 0; row < shape.rows; ++row) {
      float bias;
      std::memcpy(&bias, p[0].data() + g.bias_offset(m) + 4 * row, 4);
      check(bias == value_of(&e.biases[m][row * item], g.exact_bias_dtype()),
            name + ": fp32 bias differs");
    }
    check(std::memcmp(p[4].data() + g.exact_bias_offset(m), e.biases[m].data(),
                      shape.rows * item) == 0,
          name + ": exact bias differs");
  }
}

void test_nan_is_refused() {
  Expert e = make({40, 24, true, false, ExactType::bf16}, 1);
  e.matrices[1][2 * (5 * 40 + 39) + 1] = 0x7f;  // exponent of all ones
  e.matrices[1][2 * (5 * 40 + 39)] = 0xc0;
  try {
    encode(e, 0);
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    check(text.find("matrix up [24, 40]") != std::string::npos &&
              text.find("row 5, column 39") != std::string::npos,
          "message: " + text);
    return;
  }
  fail("NaN was encoded");
}

}  // namespace

int main() {
  for (ExactType dtype : {ExactType::fp32, ExactType::bf16, ExactType::fp16}) {
    test_round_trip({8, 5, true, false, dtype});
    test_round_trip({1, 1, false, true, dtype});
    test_round_trip({131, 37, false, true, dtype});
    test_round_trip({160, 128, true, true, dtype});
  }
  test_nan_is_refused();
  std::printf("codec: round trips, threads, bad values: ok\n");
  return 0;
}
