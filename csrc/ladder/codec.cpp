#include "codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/parallel.h"
#include "minifloat.h"

namespace comoe {
namespace {

constexpr int64_t kGroupCols = kGroupBlocks * kBlockCols;
constexpr int kBins = 16;  // of the 4-bit rung; those of 3 and 2 bits are pairs and fours of them

// Scales of one matrix span at most 2^16: a group whose weights are all smaller than 2^-16 of the
// largest group's takes the least scale, and one of zeros decodes to less than 2^-10 of that
// group's step. Below 2^-120 (weights under 1e-34) scales stop, so that 1 / scale stays finite.
constexpr double kMaxLog2Span = 16.0;
constexpr double kMinLog2Scale = -120.0;
// Larger weights keep their exact record, and are coded as this: 255 * scale must stay finite.
constexpr float kMaxWeight = 3.0e38f;

// A group with outliers: its range is more than 7 times the root mean square of its weights. 0.2%
// of Gaussian groups of 128 are, half of Student-t ones with 4 degrees of freedom.
constexpr double kOutlierRange = 7.0;
// Zeros that such a group may take instead of the one that fits its range best: typical entries of
// table2 (they differ little between distributions), so that the many small weights decode to about
// 0 at 2 bits; and what this may cost in scale. Measured in docs/codec.md.
constexpr int kNumZeros = 4;
constexpr uint8_t kZeros[kNumZeros] = {41, 100, 155, 214};
constexpr double kMaxWiden = 1.5;
// Typical tables, to compare such choices before the tables of the matrix are known.
constexpr uint8_t kTypical2[4] = {41, 100, 155, 214};
constexpr uint8_t kTypical3[8] = {14, 50, 81, 112, 143, 174, 205, 241};
constexpr uint8_t kTypical4[kBins] = {8,   24,  40,  56,  72,  88,  104, 120,
                                      136, 152, 168, 184, 200, 216, 232, 248};
// What a squared error counts there: the inverse of its usual size at 2, 3, 4 and 8 bits, and 2
// bits three times that, for it is where outliers hurt.
constexpr int64_t kCost2 = 3, kCost3 = 4, kCost4 = 16, kCost8 = 4096;

// One row tile of one group, as fp32. Padding holds 0.
struct Tile {
  alignas(64) float w[kBlockRows][kGroupCols];
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// Loads convert `count` elements. Each is exact, NaN and infinity keep their exponent of all ones.
void load_fp32(const void* from, int64_t count, float* to) { std::memcpy(to, from, count * 4); }

void load_bf16(const void* from, int64_t count, float* to) {
  const auto* p = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < count; ++i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    to[i] = float_of(static_cast<uint32_t>(h) << 16);
  }
}

void load_fp16(const void* from, int64_t count, float* to) {
  const auto* p = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < count; ++i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    // The exponent is put right by a product, which also turns subnormals into normal numbers.
    const uint32_t magnitude =
        bits_of(float_of(static_cast<uint32_t>(h & 0x7fff) << 13) * 0x1p112f);
    const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    to[i] = float_of(magnitude | special | static_cast<uint32_t>(h & 0x8000) << 16);
  }
}

using Load = void (*)(const void*, int64_t, float*);

Load load_of(DType dtype) {
  return dtype == DType::fp32 ? load_fp32 : dtype == DType::bf16 ? load_bf16 : load_fp16;
}

// Values of all e4m3 codes, NaN included, and of all e2m1 codes.
struct CodeValues {
  float e4m3[256], e2m1[16];
  CodeValues() {
    for (uint32_t c = 0; c < 256; ++c) e4m3[c] = (c & 0x7f) == 0x7f ? NAN : e4m3_to_float(c);
    for (uint32_t c = 0; c < 16; ++c) e2m1[c] = e2m1_to_float(c);
  }
};
const CodeValues& code_values() {
  static const CodeValues values;
  return values;
}

// A matrix on its way: where it comes from, and what is known of it.
struct Matrix {
  ExactType type;
  const uint8_t* source;
  const uint8_t* code_scales;  // see ExpertSource
  MatrixGeometry shape;
  std::vector<float> low, high;   // [row_tiles * 16, groups] range of each group, including zero
  std::vector<uint8_t> outliers;  // [row_tiles * 16, groups] 1: see kOutlierRange
  std::vector<double>
      moments;  // [row_tiles, 2, kBins] sums of scale^2 and of scale^2 * code per bin
  MatrixHeader header{};
  float scales[256];
  double weights[256];  // (scale / largest scale)^2

  int64_t tile_rows(int64_t tile) const {
    return std::min(kBlockRows, shape.rows - tile * kBlockRows);
  }
  int64_t group_cols(int64_t group) const {
    return std::min(kGroupCols, shape.cols - group * kGroupCols);
  }
  const uint8_t* at(int64_t row, int64_t col) const {  // mxfp4: col is even
    return source + (row * shape.cols + col) * exact_bits(type) / 8;
  }
  const uint8_t* scale_at(int64_t row, int64_t col) const {
    return type == ExactType::fp8
               ? code_scales + (row / kBlockRows * shape.groups() + col / kGroupCols) * 4
               : code_scales + row * shape.col_blocks() + col / kBlockCols;
  }

  // Weights [row, first column of the group...] as fp32; NaN or infinite where the source is.
  void load_row(int64_t row, int64_t group, float* out) const {
    const int64_t first = group * kGroupCols, cols = group_cols(group);
    const uint8_t* from = at(row, first);
    if (!is_coded(type)) return load_of(static_cast<DType>(type))(from, cols, out);
    const CodeValues& values = code_values();
    if (type == ExactType::fp8) {
      float scale;
      std::memcpy(&scale, scale_at(row, first), 4);
      for (int64_t c = 0; c < cols; ++c) out[c] = values.e4m3[from[c]] * scale;
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        const float scale = e8m0_to_float(*scale_at(row, first + c));
        out[c] = values.e2m1[from[c / 2] >> 4 * (c % 2) & 15] * scale;
      }
    }
  }

  void load_tile(int64_t tile, int64_t group, Tile& out) const {
    const int64_t rows = tile_rows(tile), cols = group_cols(group);
    if (rows < kBlockRows || cols < kGroupCols) std::memset(&out, 0, sizeof(out));
    for (int64_t r = 0; r < rows; ++r) load_row(tile * kBlockRows + r, group, out.w[r]);
  }
};

// Ranges of one row tile; returns false if a weight is NaN or infinite.
bool find_ranges(Matrix& m, int64_t tile) {
  constexpr int kLanes = 16;  // independent, so that the compiler may use vectors
  Tile t;
  uint32_t largest[kLanes] = {};
  for (int64_t g = 0; g < m.shape.groups(); ++g) {
    m.load_tile(tile, g, t);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      float low[kLanes] = {}, high[kLanes] = {}, squares[kLanes] = {};
      for (int64_t c = 0; c < kGroupCols; c += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          const float w = t.w[r][c + i];
          low[i] = w < low[i] ? w : low[i];
          high[i] = w > high[i] ? w : high[i];
          squares[i] += w * w;
          const uint32_t magnitude = bits_of(w) & 0x7fffffffu;
          largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        }
      }
      const int64_t at = (tile * kBlockRows + r) * m.shape.groups() + g;
      m.low[at] = std::max(*std::min_element(low, low + kLanes), -kMaxWeight);
      m.high[at] = std::min(*std::max_element(high, high + kLanes), kMaxWeight);
      double energy = 0;
      for (float s : squares) energy += s;
      const double range = static_cast<double>(m.high[at]) - m.low[at];
      m.outliers[at] = range * range * m.group_cols(g) > kOutlierRange * kOutlierRange * energy;
    }
  }
  return *std::max_element(largest, largest + kLanes) < 0x7f800000u;
}

// Of the scale at which 255 codes cover `range`.
double log2_scale(double range) { return range > 0 ? std::log2(range / 255) : -INFINITY; }

void choose_scales(Matrix& m) {
  double least = INFINITY, most = -INFINITY;
  for (int64_t row = 0; row < m.shape.rows; ++row) {
    for (int64_t g = 0; g < m.shape.groups(); ++g) {
      const int64_t at = row * m.shape.groups() + g;
      const double s = log2_scale(m.high[at] - static_cast<double>(m.low[at]));
      least = std::min(least, s);
      most = std::max(most, m.outliers[at] ? s + std::log2(kMaxWiden) : s);
    }
  }
  most = std::max(most, kMinLog2Scale);
  least = std::min(least, most);  // of a matrix without weights
  least = std::max({least, most - kMaxLog2Span, kMinLog2Scale});
  m.header.log2_min = static_cast<float>(least);
  m.header.log2_step = static_cast<float>((most - least) / 255);
  // Rounding to float may leave the top of the grid under the largest scale.
  while (m.header.log2_step > 0 && std::fma(255.0, m.header.log2_step, m.header.log2_min) < most)
    m.header.log2_step = std::nextafter(m.header.log2_step, 1.0f);
  for (int q = 0; q < 256; ++q) {
    m.scales[q] = std::exp2(m.header.log2_min + m.header.log2_step * static_cast<float>(q));
    m.weights[q] = std::exp2(2 * static_cast<double>(m.header.log2_step) * (q - 255));
  }
}

// The least scale on the grid that covers the range: rounding it to the nearest instead would clip
// the ends of half of the groups, which measured worse at 8 bits when the grid is coarse.
uint8_t scale_code(const Matrix& m, double range) {
  const double s = log2_scale(range);
  if (!(s > m.header.log2_min) || m.header.log2_step == 0) return 0;
  // 1e-4 of a step of slack: a range on the grid must not move up by rounding of the logarithm.
  const double q = std::ceil((s - m.header.log2_min) / m.header.log2_step - 1e-4);
  return static_cast<uint8_t>(std::min(q, 255.0));
}

// Codes of one row of one group: round(w / scale + zero).
void quantise(const float* w, float inverse_scale, float zero, uint8_t* codes) {
  const float offset = zero + 0.5f;
  for (int64_t c = 0; c < kGroupCols; ++c) {
    float v = w[c] * inverse_scale + offset;
    v = v < 0.0f ? 0.0f : v;
    v = v > 255.0f ? 255.0f : v;
    codes[c] = static_cast<uint8_t>(static_cast<int32_t>(v));
  }
}

// Count and sum of the codes of one group in each bin of 4 bits.
struct Bins {
  int32_t count[kBins], sum[kBins];
};

Bins bin_codes(const uint8_t* codes, int64_t count) {
  // Two fields in one counter (count << 16 | sum, at most 128 * 255), four copies against the
  // latency of hitting one bin again and again.
  static_assert(kGroupCols * 255 < 65536);
  uint32_t bins[4][kBins] = {};
  int64_t c = 0;
  for (; c + 4 <= count; c += 4)
    for (int i = 0; i < 4; ++i) bins[i][codes[c + i] >> 4] += 65536u + codes[c + i];
  for (; c < count; ++c) bins[0][codes[c] >> 4] += 65536u + codes[c];
  Bins out;
  for (int b = 0; b < kBins; ++b) {
    const uint32_t both = bins[0][b] + bins[1][b] + bins[2][b] + bins[3][b];
    out.count[b] = both >> 16;
    out.sum[b] = both & 65535;
  }
  return out;
}

struct GroupParams {
  uint8_t scale_q, zero;
};

// Weighted squared error of a group's codes over all levels, in code units.
int64_t typical_cost(const uint8_t* codes, int64_t count) {
  const Bins bins = bin_codes(codes, count);
  int64_t squares = 0, cost = 0;
  for (int64_t c = 0; c < count; ++c) squares += int32_t{codes[c]} * codes[c];
  for (int b = 0; b < kBins; ++b) {
    const auto error = [&](int64_t value) {
      return value * (value * bins.count[b] - 2 * bins.sum[b]);
    };
    cost += kCost2 * error(kTypical2[b >> 2]) + kCost3 * error(kTypical3[b >> 1]) +
            kCost4 * error(kTypical4[b]);
  }
  return cost + (kCost2 + kCost3 + kCost4) * squares + kCost8 * count / 12;
}

// Codes of one group, and the parameters that they go with.
GroupParams encode_group(const Matrix& m, const float* w, int64_t count, int64_t at,
                         uint8_t* codes) {
  const float low = m.low[at], high = m.high[at];
  GroupParams best;
  best.scale_q = scale_code(m, static_cast<double>(high) - low);
  float inverse = 1.0f / m.scales[best.scale_q];
  best.zero = static_cast<uint8_t>(std::min(std::floor(-low * inverse + 0.5f), 255.0f));
  quantise(w, inverse, best.zero, codes);
  if (!m.outliers[at]) return best;

  double least = typical_cost(codes, count) * m.weights[best.scale_q];
  const double widest = kMaxWiden * (static_cast<double>(high) - low);
  uint8_t tried[kGroupCols];
  for (uint8_t zero : kZeros) {
    const double range =
        255 * std::max(-static_cast<double>(low) / zero, static_cast<double>(high) / (255 - zero));
    if (range > widest) continue;
    const uint8_t q = scale_code(m, range);
    quantise(w, 1.0f / m.scales[q], zero, tried);
    const double cost = typical_cost(tried, count) * m.weights[q];
    if (cost >= least) continue;
    least = cost;
    best = {q, zero};
    std::memcpy(codes, tried, kGroupCols);
  }
  return best;
}

// The four planes of one block. codes: [16 rows, stride], 32 columns of them.
void write_planes(const uint8_t* codes, int64_t stride, uint8_t* p2, uint8_t* p1a, uint8_t* p1b,
                  uint8_t* p4) {
  // quads[q][row]: four neighbouring codes in one word, so that every plane is shifts and masks.
  uint32_t quads[8][kBlockRows];
  for (int64_t r = 0; r < kBlockRows; ++r) {
    uint32_t row[8];
    std::memcpy(row, codes + r * stride, 32);
    for (int q = 0; q < 8; ++q) quads[q][r] = row[q];
  }
  uint32_t out[kBlockRows];
  for (int v = 0; v < 2; ++v) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      uint32_t word = 0;
      for (int j = 0; j < 4; ++j) word |= (quads[4 * v + j][r] >> 6 & 0x03030303u) << (2 * j);
      out[r] = word;
    }
    std::memcpy(p2 + 64 * v, out, 64);
  }
  for (int plane = 0; plane < 2; ++plane) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      uint32_t word = 0;
      for (int q = 0; q < 8; ++q) word |= (quads[q][r] >> (5 - plane) & 0x01010101u) << q;
      out[r] = word;
    }
    std::memcpy(plane == 0 ? p1a : p1b, out, 64);
  }
  for (int v = 0; v < 4; ++v) {
    for (int64_t r = 0; r < kBlockRows; ++r)
      out[r] = (quads[2 * v][r] & 0x0f0f0f0fu) | (quads[2 * v + 1][r] & 0x0f0f0f0fu) << 4;
    std::memcpy(p4 + 64 * v, out, 64);
  }
}

// One exact block: words of rows side by side. A word is one fp32 element, two of 16 bits or two
// fp8 codes.
template <class Word>
void write_words(const Matrix& m, int64_t tile, int64_t block, uint8_t* out) {
  const int64_t bits = exact_bits(m.type), words = kBlockCols * bits / 8 / sizeof(Word);
  const int64_t rows = m.tile_rows(tile);
  const int64_t bytes = std::min(kBlockCols, m.shape.cols - block * kBlockCols) * bits / 8;
  Word row[kBlockCols] = {};
  Word columns[kBlockCols][kBlockRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(row, m.at(tile * kBlockRows + r, block * kBlockCols), bytes);
    for (int64_t c = 0; c < words; ++c) columns[c][r] = row[c];
  }
  std::memcpy(out, columns, words * kBlockRows * sizeof(Word));
}

void write_mxfp4(const Matrix& m, int64_t tile, int64_t block, uint8_t* out) {
  const int64_t rows = m.tile_rows(tile);
  const int64_t pairs = std::min(kBlockCols, m.shape.cols - block * kBlockCols) / 2;
  uint16_t words[4][kBlockRows][2] = {};  // as layout.h says: pair 4v + j of columns in bits 4j
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = m.at(tile * kBlockRows + r, block * kBlockCols);
    for (int64_t p = 0; p < pairs; ++p)
      for (int i = 0; i < 2; ++i)
        words[p / 4][r][i] |= static_cast<uint16_t>((row[p] >> 4 * i & 15) << 4 * (p % 4));
  }
  std::memcpy(out, words, sizeof(words));
}

void write_exact(const Matrix& m, int64_t tile, int64_t block, uint8_t* out) {
  if (m.type == ExactType::mxfp4) return write_mxfp4(m, tile, block, out);
  if (m.type == ExactType::fp8) return write_words<uint16_t>(m, tile, block, out);
  write_words<uint32_t>(m, tile, block, out);
}

// The scales of one row tile, `bytes` of them.
void write_scales(const Matrix& m, int64_t tile, int64_t bytes, uint8_t* out) {
  if (m.type == ExactType::fp8) std::memcpy(out, m.scale_at(tile * kBlockRows, 0), bytes);
  if (m.type != ExactType::mxfp4) return;
  for (int64_t b = 0; b < m.shape.col_blocks(); ++b)
    for (int64_t r = 0; r < kBlockRows; ++r)
      *out++ = r < m.tile_rows(tile) ? *m.scale_at(tile * kBlockRows + r, b * kBlockCols) : 127;
}

// Where the parts of one matrix go; planes and exact elements that are not wanted are null.
struct Destination {
  uint8_t* params;
  uint8_t* planes[kNumPlanes];
  uint8_t* exact;
  uint8_t* scales;       // of exact codes
  int64_t scales_bytes;  // of one row tile
};

// Codes, parameters, planes and exact blocks of one row tile.
void encode_tile(Matrix& m, int64_t tile, const Destination& to) {
  Tile t;
  alignas(64) uint8_t codes[kBlockRows][kGroupCols];
  alignas(64) uint8_t unwanted[kPlane4BlockBytes];
  double* moments = m.moments.data() + tile * 2 * kBins;
  const int64_t col_blocks = m.shape.col_blocks(), groups = m.shape.groups();
  const int64_t rows = m.tile_rows(tile);
  uint8_t* params = to.params + tile * groups * kParamsBytes;
  write_scales(m, tile, to.scales_bytes, to.scales + tile * to.scales_bytes);
  for (int64_t group = 0; group < groups; ++group, params += kParamsBytes) {
    const int64_t cols = m.group_cols(group);
    m.load_tile(tile, group, t);
    std::memset(params, 0, kParamsBytes);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      if (r >= rows) {
        std::memset(codes[r], 0, kGroupCols);
        continue;
      }
      const int64_t at = (tile * kBlockRows + r) * groups + group;
      const GroupParams p = encode_group(m, t.w[r], cols, at, codes[r]);
      params[r] = p.scale_q;
      params[kBlockRows + r] = p.zero;
      if (cols < kGroupCols) std::memset(codes[r] + cols, 0, kGroupCols - cols);
      const Bins bins = bin_codes(codes[r], cols);
      for (int b = 0; b < kBins; ++b) {
        moments[b] += m.weights[p.scale_q] * bins.count[b];
        moments[kBins + b] += m.weights[p.scale_q] * bins.sum[b];
      }
    }
    const int64_t first = group * kGroupBlocks, last = std::min(first + kGroupBlocks, col_blocks);
    for (int64_t b = first; b < last; ++b) {
      const int64_t block = tile * col_blocks + b;
      uint8_t* planes[kNumPlanes];
      for (int p = 0; p < kNumPlanes; ++p)
        planes[p] = to.planes[p] ? to.planes[p] + block * kPlaneBlockBytes[p] : unwanted;
      write_planes(&codes[0][(b - first) * kBlockCols], kGroupCols, planes[0], planes[1], planes[2],
                   planes[3]);
      if (to.exact)
        write_exact(m, tile, b,
                    to.exact + block * (kBlockRows * kBlockCols * exact_bits(m.type) / 8));
    }
  }
}

// Each entry is the mean code of its bin, weighted by scale^2: the value of least squared error.
void choose_tables(Matrix& m) {
  double total[2 * kBins] = {};
  for (int64_t tile = 0; tile < m.shape.row_tiles(); ++tile)
    for (int i = 0; i < 2 * kBins; ++i) total[i] += m.moments[tile * 2 * kBins + i];
  for (int bits = 2; bits <= 4; ++bits) {
    uint8_t* table = bits == 2 ? m.header.table2 : bits == 3 ? m.header.table3 : m.header.table4;
    const int merged = kBins >> bits;
    for (int entry = 0; entry < 1 << bits; ++entry) {
      double count = 0, sum = 0;
      for (int i = entry * merged; i < (entry + 1) * merged; ++i) {
        count += total[i];
        sum += total[kBins + i];
      }
      const int width = 256 >> bits;
      // A bin that holds no code is never looked up: its middle is as good as anything.
      table[entry] = static_cast<uint8_t>(count > 0 ? sum / count + 0.5 : (entry + 0.5) * width);
    }
  }
}

std::string name_of(const ExpertGeometry& g, int matrix) {
  return matrix == g.num_matrices() - 1 ? "down" : matrix == 0 && g.gated ? "gate" : "up";
}

[[noreturn]] void throw_not_finite(const std::string& what, float value, const std::string& where) {
  throw std::invalid_argument("encode_expert: " + what + " must be finite, got " +
                              (std::isnan(value) ? "NaN" : "infinity") + " at " + where +
                              "; mend or leave out the checkpoint: such an expert cannot run");
}

[[noreturn]] void throw_not_finite_weight(const ExpertGeometry& g, int matrix, const Matrix& m) {
  const std::string what = "weights of matrix " + name_of(g, matrix) + " [" +
                           std::to_string(m.shape.rows) + ", " + std::to_string(m.shape.cols) + "]";
  float row[kGroupCols];
  for (int64_t r = 0; r < m.shape.rows; ++r)
    for (int64_t group = 0; group < m.shape.groups(); ++group) {
      m.load_row(r, group, row);
      for (int64_t c = 0; c < m.group_cols(group); ++c)
        if (!std::isfinite(row[c]))
          throw_not_finite(
              what, row[c],
              "row " + std::to_string(r) + ", column " + std::to_string(group * kGroupCols + c));
    }
  throw std::logic_error("encode_expert: " + what + ": non-finite value lost");
}

void encode_bias(const ExpertGeometry& g, int matrix, const ExpertSource& source,
                 uint8_t* const payloads[kNumRecords]) {
  const DType dtype = g.exact_bias_dtype();
  std::vector<float> values(g.matrix(matrix).rows);
  const auto rows = static_cast<int64_t>(values.size());
  load_of(dtype)(source.biases[matrix], rows, values.data());
  for (int64_t r = 0; r < rows; ++r)
    if (!std::isfinite(values[r]))
      throw_not_finite("bias of matrix " + name_of(g, matrix), values[r],
                       "row " + std::to_string(r));
  const auto put = [&](uint8_t* to, const void* from, int64_t bytes) {
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, round_up(bytes, 64) - bytes);
  };
  put(payloads[0] + g.bias_offset(matrix), values.data(), rows * 4);
  put(payloads[4] + g.exact_bias_offset(matrix), source.biases[matrix], rows * dtype_bytes(dtype));
}

// f(matrix, row tile) for all row tiles of all matrices.
template <class F>
void for_each_tile(const std::vector<Matrix>& matrices, F&& f) {
  std::vector<int64_t> first{0};
  for (const Matrix& m : matrices) first.push_back(first.back() + m.shape.row_tiles());
  parallel_for(first.back(), 8, [&](int64_t begin, int64_t end, int) {
    for (size_t m = 0; m < matrices.size(); ++m)
      for (int64_t t = std::max(begin, first[m]); t < std::min(end, first[m + 1]); ++t)
        f(m, t - first[m]);
  });
}

Matrix matrix_of(const void* source, const MatrixGeometry& shape, ExactType type) {
  Matrix m{};
  m.type = type;
  m.source = static_cast<const uint8_t*>(source);
  m.shape = shape;
  const int64_t ranges = shape.row_tiles() * kBlockRows * shape.groups();
  m.low.resize(ranges);
  m.high.resize(ranges);
  m.outliers.resize(ranges);
  m.moments.resize(shape.row_tiles() * 2 * kBins);
  return m;
}

// Codes, parameters and tables of all matrices. not_finite(m) is called, and throws, if matrix m
// has a weight that is NaN or infinite.
template <class F>
void encode(std::vector<Matrix>& matrices, const std::vector<Destination>& to, F&& not_finite) {
  std::vector<std::atomic<bool>> finite(matrices.size());
  for (auto& f : finite) f = true;
  for_each_tile(matrices, [&](size_t m, int64_t tile) {
    if (!find_ranges(matrices[m], tile)) finite[m] = false;
  });
  for (size_t m = 0; m < matrices.size(); ++m) {
    if (!finite[m]) not_finite(static_cast<int>(m));
    choose_scales(matrices[m]);
  }
  for_each_tile(matrices, [&](size_t m, int64_t tile) { encode_tile(matrices[m], tile, to[m]); });
  for (Matrix& m : matrices) choose_tables(m);
}

}  // namespace

void encode_expert(const ExpertGeometry& g, const ExpertSource& source,
                   uint8_t* const payloads[kNumRecords]) {
  std::vector<Matrix> matrices;
  std::vector<Destination> to;
  for (int m = 0; m < g.num_matrices(); ++m) {
    matrices.push_back(matrix_of(source.matrices[m], g.matrix(m), g.exact_dtype));
    matrices.back().code_scales = static_cast<const uint8_t*>(source.scales[m]);
    Destination d{};
    d.params = payloads[0] + g.params_offset(m);
    for (int p = 0; p < kNumPlanes; ++p) d.planes[p] = payloads[p] + g.blocks_offset(p, m);
    d.exact = payloads[4] + g.blocks_offset(4, m);
    d.scales = payloads[4] + g.exact_scales_offset(m);
    d.scales_bytes = g.exact_scales_bytes(m);
    to.push_back(d);
  }
  encode(matrices, to, [&](int m) { throw_not_finite_weight(g, m, matrices[m]); });
  for (int m = 0; m < g.num_matrices(); ++m) {
    if (g.biased) encode_bias(g, m, source, payloads);
    std::memcpy(payloads[0] + g.header_offset(m), &matrices[m].header, sizeof(MatrixHeader));
  }
  // Gaps that alignment leaves inside a payload.
  const auto clear = [](uint8_t* payload, int64_t begin, int64_t end) {
    std::memset(payload + begin, 0, end - begin);
  };
  clear(payloads[0], g.params_offset(g.num_matrices()), g.blocks_offset(0, 0));
  clear(payloads[4], g.exact_scales_offset(g.num_matrices()), g.blocks_offset(4, 0));
}

namespace {

void encode_record(const CodedLayout& layout, const void* const* sources, DType dtype,
                   const float* const* biases, int num_planes, uint8_t* payload) {
  std::memset(payload, 0, layout.plane_offset(0, 0, 0));
  std::vector<Matrix> matrices;
  std::vector<Destination> to;
  for (int m = 0; m < layout.count; ++m) {
    matrices.push_back(matrix_of(sources[m], layout.matrices[m], static_cast<ExactType>(dtype)));
    Destination d{};
    d.params = payload + layout.params_offset(m);
    for (int p = 0; p < num_planes; ++p) d.planes[p] = payload + layout.plane_offset(0, p, m);
    to.push_back(d);
  }
  encode(matrices, to, [](int m) {
    throw std::invalid_argument("encode_coded: matrix " + std::to_string(m) +
                                " has a weight that is NaN or infinite; it cannot be coded");
  });
  for (int m = 0; m < layout.count; ++m) {
    std::memcpy(payload + layout.header_offset(m), &matrices[m].header, sizeof(MatrixHeader));
    if (layout.biased)
      std::memcpy(payload + layout.bias_offset(m), biases[m], layout.matrices[m].rows * 4);
  }
  for (int p = 1; p < num_planes; ++p) {  // gaps between planes
    const int64_t end = layout.plane_offset(0, p - 1, layout.count);
    std::memset(payload + end, 0, layout.plane_offset(0, p, 0) - end);
  }
}

}  // namespace

void encode_coded(const CodedLayout& layout, const float* const* sources,
                  const float* const* biases, int num_planes, uint8_t* payload) {
  const void* untyped[kMaxCodedMatrices] = {};
  std::copy_n(sources, layout.count, untyped);
  encode_record(layout, untyped, DType::fp32, biases, num_planes, payload);
}

void encode_coded_matrix(const MatrixGeometry& shape, const void* source, DType dtype,
                         int num_planes, uint8_t* payload) {
  CodedLayout layout;
  layout.count = 1;
  layout.matrices[0] = shape;
  encode_record(layout, &source, dtype, nullptr, num_planes, payload);
}

}  // namespace comoe
