// expert_ffn, unpack_matrix and combine_pairs against loops in double precision that find each
// weight's bits by themselves, for every instruction set of this CPU. Plain main(); non-zero on
// failure.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/expert_ffn.h"
#include "../cpu/parallel.h"
#include "../ladder/codec.h"

using namespace comoe;

namespace {

std::mt19937 rng(7);
int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s (isa %s)\n", what.c_str(), isa_name());
}

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(rng);
}
double normal() { return std::normal_distribution<double>()(rng); }

float bf16_value(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
double fp16_value(uint16_t h) {
  const int e = h >> 10 & 31, m = h & 1023;
  const double v = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
  return h & 0x8000 ? -v : v;
}
double value_of(const void* p, DType dtype) {
  if (dtype == DType::fp32) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return dtype == DType::bf16 ? bf16_value(h) : fp16_value(h);
}
// A random number of about this size, as the type's bits.
void put_random(void* p, DType dtype, double size) {
  const float f = static_cast<float>(normal() * size);
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (dtype == DType::fp32) {
    std::memcpy(p, &u, 4);
  } else {
    uint16_t h = static_cast<uint16_t>(u >> 16);
    if (dtype == DType::fp16) {  // exponents that both types have, truncated mantissa
      const int e = static_cast<int>(u >> 23 & 255) - 112;
      h = e <= 0 ? 0
                 : static_cast<uint16_t>((u >> 16 & 0x8000) | (e > 30 ? 30 : e) << 10 |
                                         (u >> 13 & 1023));
    }
    std::memcpy(p, &h, 2);
  }
}

// An expert with random contents whose pages lie shuffled among bytes that no one may read.
struct Expert {
  ExpertGeometry g;
  int64_t page_bytes;
  std::vector<std::vector<uint8_t>> payload{kNumRecords};
  std::vector<uint8_t> arena;
  std::vector<std::vector<const uint8_t*>> pages{kNumRecords};
  PagedBytes records[kNumRecords];

  Expert(const ExpertGeometry& geometry, int64_t page_size) : g(geometry), page_bytes(page_size) {
    for (int r = 0; r < kNumRecords; ++r) {
      payload[r].resize(g.record_bytes(r));
      for (auto& b : payload[r]) b = static_cast<uint8_t>(rng());
    }
    for (int m = 0; m < g.num_matrices(); ++m) {
      MatrixHeader h{};
      h.log2_min = static_cast<float>(uniform(-11, -10));
      h.log2_step = 0.01f;
      for (auto& t : h.table2) t = static_cast<uint8_t>(rng());
      for (auto& t : h.table3) t = static_cast<uint8_t>(rng());
      for (auto& t : h.table4) t = static_cast<uint8_t>(rng());
      std::memcpy(payload[0].data() + g.header_offset(m), &h, sizeof h);
      const MatrixGeometry s = g.matrix(m);
      for (int64_t i = 0; i < s.row_tiles() * s.groups(); ++i)
        for (int64_t z = 16; z < 32; ++z)
          payload[0][g.params_offset(m) + i * kParamsBytes + z] =
              static_cast<uint8_t>(100 + rng() % 56);
      const int64_t size = dtype_bytes(g.exact_bias_dtype());
      std::memset(payload[4].data() + g.blocks_offset(4, m), 0, s.num_blocks() * g.block_bytes(4));
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t c = 0; c < s.cols; ++c)
          if (is_coded(g.exact_dtype))
            put_code(m, r, c);
          else
            put_random(payload[4].data() + exact_at(m, r, c), g.exact_bias_dtype(),
                       1 / std::sqrt(double(s.cols)));
      for (int64_t i = 0; i < s.row_tiles() * g.exact_scales_bytes(m); ++i) {
        uint8_t* scale = payload[4].data() + g.exact_scales_offset(m) + i;
        if (g.exact_dtype == ExactType::mxfp4)
          *scale = static_cast<uint8_t>(rng() % 64 == 0 ? rng() % 3 : 118 + rng() % 5);
        else if (i % 4 == 0)
          put_random(scale, DType::fp32, 0.01);
      }
      if (!g.biased) continue;
      for (int64_t r = 0; r < s.rows; ++r) {
        put_random(payload[0].data() + g.bias_offset(m) + 4 * r, DType::fp32, 1);
        put_random(payload[4].data() + g.exact_bias_offset(m) + size * r, g.exact_bias_dtype(), 1);
      }
    }
    int64_t total = 0;
    for (auto& p : payload) total += ceil_div(static_cast<int64_t>(p.size()), page_bytes);
    std::vector<int64_t> slots(total);
    for (int64_t i = 0; i < total; ++i) slots[i] = i;
    std::shuffle(slots.begin(), slots.end(), rng);
    arena.assign(total * page_bytes + 64, 0xff);
    uint8_t* base = arena.data() + (64 - reinterpret_cast<uintptr_t>(arena.data()) % 64) % 64;
    int64_t slot = 0;
    for (int r = 0; r < kNumRecords; ++r) {
      const auto size = static_cast<int64_t>(payload[r].size());
      for (int64_t at = 0; at < size; at += page_bytes) {
        uint8_t* page = base + slots[slot++] * page_bytes;
        std::memcpy(page, payload[r].data() + at, std::min(page_bytes, size - at));
        pages[r].push_back(page);
      }
      records[r] = {pages[r].data(), page_bytes};
    }
  }

  int64_t exact_at(int m, int64_t r, int64_t c) const {
    const int64_t block = r / 16 * g.matrix(m).col_blocks() + c / 32;
    const int64_t at = g.blocks_offset(4, m) + block * g.block_bytes(4);
    r %= 16, c %= 32;
    return g.exact_dtype == ExactType::fp32
               ? at + 64 * c + 4 * r
               : at + (32 * (c / 2) + 2 * r + c % 2) * exact_bits(g.exact_dtype) / 8;
  }

  // mxfp4: the byte and the bit where the code of a weight lies.
  std::pair<int64_t, int> nibble_at(int m, int64_t r, int64_t c) const {
    const int64_t block = r / 16 * g.matrix(m).col_blocks() + c / 32;
    r %= 16, c %= 32;
    const int64_t vector = c / 8, j = c % 8 / 2, i = c % 2;
    return {g.blocks_offset(4, m) + 256 * block + 64 * vector + 2 * (2 * r + i) + j / 2,
            static_cast<int>(4 * (j % 2))};
  }

  void put_code(int m, int64_t r, int64_t c) {
    if (g.exact_dtype == ExactType::fp8) {
      uint8_t code = static_cast<uint8_t>(rng());
      if ((code & 0x7f) == 0x7f) code ^= 1;  // NaN
      payload[4][exact_at(m, r, c)] = code;
    } else {
      const auto [at, shift] = nibble_at(m, r, c);
      payload[4][at] |= static_cast<uint8_t>(rng() % 16 << shift);
    }
  }

  double coded_weight(int m, int64_t row, int64_t col) const {
    const MatrixGeometry s = g.matrix(m);
    const int64_t scales = g.exact_scales_offset(m), tile = row / 16;
    if (g.exact_dtype == ExactType::fp8) {
      const int code = payload[4][exact_at(m, row, col)], e = code >> 3 & 15, f = code & 7;
      const double size = e ? std::ldexp(8 + f, e - 10) : std::ldexp(f, -9);
      return (code & 0x80 ? -size : size) *
             value_of(payload[4].data() + scales + 4 * (tile * s.groups() + col / 128),
                      DType::fp32);
    }
    const auto [at, shift] = nibble_at(m, row, col);
    const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const int code = payload[4][at] >> shift & 15;
    const int scale = payload[4][scales + 16 * (tile * s.col_blocks() + col / 32) + row % 16];
    return std::ldexp(code & 8 ? -values[code & 7] : values[code & 7], scale - 127);
  }

  double weight(Level level, int m, int64_t row, int64_t col) const {
    if (level == Level::exact && is_coded(g.exact_dtype)) return coded_weight(m, row, col);
    if (level == Level::exact)
      return value_of(payload[4].data() + exact_at(m, row, col), g.exact_bias_dtype());
    const MatrixGeometry s = g.matrix(m);
    const int64_t block = row / 16 * s.col_blocks() + col / 32, r = row % 16, c = col % 32;
    const int64_t q = c / 4, lane = 4 * r + c % 4;
    auto byte = [&](int record, int64_t at) {
      return payload[record][g.blocks_offset(record, m) + block * g.block_bytes(record) + at];
    };
    int code = byte(0, q / 4 * 64 + lane) >> 2 * (q % 4) & 3;
    if (level >= Level::bits3) code = code << 1 | (byte(1, lane) >> q & 1);
    if (level >= Level::bits4) code = code << 1 | (byte(2, lane) >> q & 1);
    if (level == Level::bits8) code = code << 4 | (byte(3, q / 2 * 64 + lane) >> 4 * (q % 2) & 15);
    MatrixHeader h;
    std::memcpy(&h, payload[0].data() + g.header_offset(m), sizeof h);
    const int value = level == Level::bits2   ? h.table2[code]
                      : level == Level::bits3 ? h.table3[code]
                      : level == Level::bits4 ? h.table4[code]
                                              : code;
    const int64_t params = g.params_offset(m) + (row / 16 * s.groups() + col / 128) * kParamsBytes;
    const double scale =
        std::exp2(double(h.log2_min) + double(h.log2_step) * payload[0][params + r]);
    return scale * (value - payload[0][params + 16 + r]);
  }

  double bias(Level level, int m, int64_t row) const {
    if (!g.biased) return 0;
    return level == Level::exact
               ? value_of(payload[4].data() + g.exact_bias_offset(m) +
                              dtype_bytes(g.exact_bias_dtype()) * row,
                          g.exact_bias_dtype())
               : value_of(payload[0].data() + g.bias_offset(m) + 4 * row, DType::fp32);
  }
};

double act(Activation a, double x) {
  switch (a) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return std::fmax(x, 0);
    case Activation::relu2:
      return std::fmax(x, 0) * std::fmax(x, 0);
    case Activation::quick_gelu:
      return x / (1 + std::exp(-1.702 * x));
    default:
      return 0;
  }
}

// weight(m, row, col), bias(m, row).
template <class Weight, class Bias>
std::vector<double> reference(const FfnSpec& spec, const std::vector<double>& x, Weight&& weight,
                              Bias&& bias) {
  const ExpertGeometry& g = spec.geometry;
  auto multiply = [&](int m, const std::vector<double>& v) {
    const MatrixGeometry s = g.matrix(m);
    std::vector<double> out(s.rows);
    for (int64_t r = 0; r < s.rows; ++r) {
      out[r] = bias(m, r);
      for (int64_t c = 0; c < s.cols; ++c) out[r] += weight(m, r, c) * v[c];
    }
    return out;
  };
  std::vector<double> up = multiply(g.gated ? 1 : 0, x), gate;
  if (g.gated) gate = multiply(0, x);
  for (size_t i = 0; i < up.size(); ++i) {
    if (spec.activation == Activation::swigluoai) {
      const double a = std::fmin(gate[i], spec.limit);
      const double b = std::fmin(std::fmax(up[i], -double(spec.limit)), spec.limit);
      up[i] = a / (1 + std::exp(-spec.alpha * a)) * (b + 1);
    } else {
      up[i] = g.gated ? act(spec.activation, gate[i]) * up[i] : act(spec.activation, up[i]);
    }
  }
  return multiply(g.num_matrices() - 1, up);
}

void check_ffn(const Expert& e, Activation activation, Level level, DType x_dtype, int num_rows) {
  const ExpertGeometry& g = e.g;
  FfnSpec spec{g, activation, 1.702f, 7.0f};
  const int64_t stride = g.hidden + 5, size = dtype_bytes(x_dtype);
  std::vector<uint8_t> x(num_rows * stride * size, 0xff);  // NaN between the rows
  std::vector<std::vector<double>> rows(num_rows, std::vector<double>(g.hidden));
  for (int t = 0; t < num_rows; ++t)
    for (int64_t h = 0; h < g.hidden; ++h) {
      uint8_t* at = x.data() + (t * stride + h) * size;
      put_random(at, x_dtype, 1);
      rows[t][h] = value_of(at, x_dtype);
    }
  std::vector<int32_t> token(num_rows), pair(num_rows);
  for (int i = 0; i < num_rows; ++i) token[i] = num_rows - 1 - i, pair[i] = i + 1;
  const ExpertView view(level, e.records);
  const FfnTask tasks[] = {{&view, nullptr, nullptr, 0},
                           {&view, token.data(), pair.data(), num_rows}};
  std::vector<float> out((num_rows + 2) * g.hidden, 123.0f);
  expert_ffn(spec, tasks, 2, x.data(), x_dtype, stride, out.data());
  double error = 0, norm = 0;
  for (int i = 0; i < num_rows; ++i) {
    const auto want = reference(
        spec, rows[token[i]], [&](int m, int64_t r, int64_t c) { return e.weight(level, m, r, c); },
        [&](int m, int64_t r) { return e.bias(level, m, r); });
    for (int64_t h = 0; h < g.hidden; ++h) {
      const double d = out[pair[i] * g.hidden + h] - want[h];
      error += d * d, norm += want[h] * want[h];
    }
  }
  bool kept = true;
  for (int64_t h = 0; h < g.hidden; ++h)
    kept &= out[h] == 123.0f && out[(num_rows + 1) * g.hidden + h] == 123.0f;
  // int8 activations are good to 1% of a group, twice, and random tables leave sums in which most
  // of it cancels; 15-bit ones to 1e-4. Exact experts of 16-bit models round their results to that
  // type.
  double allowed = 6e-2;
  if (level == Level::bits8) allowed = 4e-4;
  if (level == Level::exact)
    allowed = x_dtype == DType::fp32 ? 2e-6 : x_dtype == DType::bf16 ? 1e-2 : 2e-3;
  const std::string what =
      "expert_ffn H=" + std::to_string(g.hidden) + " I=" + std::to_string(g.intermediate) +
      " activation " + std::to_string(int(activation)) + " level " + std::to_string(int(level)) +
      " exact " + std::to_string(int(g.exact_dtype)) + " x " + std::to_string(int(x_dtype)) +
      " rows " + std::to_string(num_rows) + " error " + std::to_string(std::sqrt(error / norm));
  expect(std::sqrt(error / norm) <= allowed, what);
  expect(kept, what + ": wrote outside its rows");
}

void check_unpack(const Expert& e, Level level) {
  const ExpertView view(level, e.records);
  for (int m = 0; m < e.g.num_matrices(); ++m) {
    const MatrixGeometry s = e.g.matrix(m);
    const int64_t ld = s.cols + 3;
    std::vector<float> out(s.rows * ld, 123.0f), bias(s.rows);
    unpack_matrix(e.g, view, m, out.data(), DType::fp32, ld);
    bool same = true, kept = true;
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t c = 0; c < s.cols; ++c) {
        const double want = e.weight(level, m, r, c);
        same &= std::fabs(out[r * ld + c] - want) <= 1e-6 * std::fabs(want);
      }
      for (int64_t c = s.cols; c < ld; ++c) kept &= out[r * ld + c] == 123.0f;
    }
    const std::string what =
        "unpack level " + std::to_string(int(level)) + " matrix " + std::to_string(m);
    expect(same, what);
    expect(kept, what + ": wrote outside the matrix");
    if (!e.g.biased) continue;
    unpack_bias(e.g, view, m, bias.data());
    for (int64_t r = 0; r < s.rows; ++r)
      expect(bias[r] == float(e.bias(level, m, r)), what + " bias");
  }
}

// Bytes in shuffled pages among bytes that no one may read.
struct Paged {
  std::vector<uint8_t> arena;
  std::vector<const uint8_t*> pages;
  PagedBytes bytes;
  Paged(const std::vector<uint8_t>& payload, int64_t page_bytes) {
    const auto size = static_cast<int64_t>(payload.size());
    const int64_t count = ceil_div(size, page_bytes);
    arena.assign(count * page_bytes + 64, 0xff);
    uint8_t* base = arena.data() + (64 - reinterpret_cast<uintptr_t>(arena.data()) % 64) % 64;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* page = base + (count - 1 - i) * page_bytes;
      std::memcpy(page, payload.data() + i * page_bytes,
                  std::min(page_bytes, size - i * page_bytes));
      pages.push_back(page);
    }
    bytes = {pages.data(), page_bytes};
  }
};

// Two code sets of different depth, two low-rank deltas and a mean: the sum of all, and mean alone.
void check_composite(const Expert& a, const Expert& b, DType x_dtype) {
  const ExpertGeometry& g = a.g;
  ExpertView view(Level::bits3, a.records);
  view.parts.push_back(ExpertView(Level::bits8, b.records).parts[0]);
  std::vector<std::vector<float>> dense;
  for (int m = 0; m < g.num_matrices(); ++m) {
    const MatrixGeometry s = g.matrix(m);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t c = 0; c < s.cols; ++c) {
        if (r == 0 && c == 0) dense.emplace_back();
        dense[m].push_back(
            static_cast<float>(a.weight(Level::bits3, m, r, c) + b.weight(Level::bits8, m, r, c)));
      }
  }
  std::vector<Paged> kept;
  kept.reserve(3);
  const uint16_t ranks[2][kMaxMatrices] = {{16, 0, 32}, {7, 20, 0}};
  for (const auto& rank : ranks) {
    const CodedLayout layout = low_rank_layout(g, rank);
    std::vector<std::vector<float>> factors;
    std::vector<const float*> sources;
    for (int i = 0; i < layout.count; ++i) {
      const MatrixGeometry s = layout.matrices[i];
      factors.emplace_back(s.rows * s.cols);
      for (float& f : factors.back()) f = static_cast<float>(normal() / std::sqrt(double(s.cols)));
      sources.push_back(factors.back().data());
    }
    std::vector<uint8_t> payload(layout.record_bytes(0, kNumPlanes));
    encode_coded(layout, sources.data(), nullptr, kNumPlanes, payload.data());
    kept.emplace_back(payload, a.page_bytes);
    LowRankView low_rank;
    low_rank.record = kept.back().bytes;
    std::copy(rank, rank + kMaxMatrices, low_rank.ranks);
    view.low_rank.push_back(low_rank);
    for (int m = 0; m < g.num_matrices(); ++m) {
      const MatrixGeometry s = g.matrix(m);
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t c = 0; c < s.cols; ++c)
          for (int64_t k = 0; k < rank[m]; ++k)
            dense[m][r * s.cols + c] +=
                factors[2 * m + 1][r * rank[m] + k] * factors[2 * m][k * s.cols + c];
    }
  }
  std::vector<uint8_t> mean(mean_bytes(g));
  for (int64_t h = 0; h < g.hidden; ++h) put_random(mean.data() + 4 * h, DType::fp32, 1);
  kept.emplace_back(mean, a.page_bytes);
  view.means.push_back(kept.back().bytes);

  for (int m = 0; m < g.num_matrices(); ++m) {
    const MatrixGeometry s = g.matrix(m);
    std::vector<float> out(s.rows * s.cols), bias(s.rows);
    unpack_matrix(g, view, m, out.data(), DType::fp32, s.cols);
    double error = 0, norm = 0;
    for (int64_t i = 0; i < s.rows * s.cols; ++i)
      error += std::pow(out[i] - dense[m][i], 2), norm += std::pow(dense[m][i], 2);
    // Factors in 8-bit codes leave 3.5e-5 of their energy each.
    expect(error <= 7e-5 * norm, "unpack of a sum, matrix " + std::to_string(m));
    if (!g.biased) continue;
    unpack_bias(g, view, m, bias.data());
    for (int64_t r = 0; r < s.rows; ++r)
      expect(std::fabs(bias[r] - a.bias(Level::bits3, m, r) - b.bias(Level::bits8, m, r)) < 1e-5,
             "bias of a sum");
  }

  FfnSpec spec{g, Activation::relu, 0, 0};
  const int num_rows = 11;
  const int64_t size = dtype_bytes(x_dtype);
  std::vector<uint8_t> x(num_rows * g.hidden * size);
  std::vector<std::vector<double>> rows(num_rows, std::vector<double>(g.hidden));
  std::vector<int32_t> token(num_rows), pair(num_rows), other(1, 3), last(1, num_rows);
  for (int t = 0; t < num_rows; ++t) {
    token[t] = num_rows - 1 - t, pair[t] = t;
    for (int64_t h = 0; h < g.hidden; ++h) {
      put_random(x.data() + (t * g.hidden + h) * size, x_dtype, 1);
      rows[t][h] = value_of(x.data() + (t * g.hidden + h) * size, x_dtype);
    }
  }
  ExpertView only_mean;
  only_mean.means = view.means;
  const FfnTask tasks[] = {{&view, token.data(), pair.data(), num_rows},
                           {&only_mean, other.data(), last.data(), 1}};
  std::vector<float> out((num_rows + 1) * g.hidden, NAN);
  expert_ffn(spec, tasks, 2, x.data(), x_dtype, g.hidden, out.data());
  double error = 0, norm = 0;
  for (int i = 0; i < num_rows; ++i) {
    const auto want = reference(
        spec, rows[token[i]],
        [&](int m, int64_t r, int64_t c) { return dense[m][r * g.matrix(m).cols + c]; },
        [&](int m, int64_t r) { return a.bias(Level::bits3, m, r) + b.bias(Level::bits8, m, r); });
    for (int64_t h = 0; h < g.hidden; ++h) {
      const double with_mean = want[h] + value_of(mean.data() + 4 * h, DType::fp32);
      error += std::pow(out[i * g.hidden + h] - with_mean, 2), norm += with_mean * with_mean;
    }
  }
  expect(std::sqrt(error / norm) <= 6e-2, "expert_ffn of a sum, x " + std::to_string(int(x_dtype)) +
                                              " error " + std::to_string(std::sqrt(error / norm)));
  bool same = true;
  for (int64_t h = 0; h < g.hidden; ++h)
    same &= out[num_rows * g.hidden + h] == float(value_of(mean.data() + 4 * h, DType::fp32));
  expect(same, "a mean alone is the output");
}

void check_combine() {
  const int T = 5, K = 3, H = 700, E = 4;
  std::vector<float> pairs(T * K * H), weights(T * K), out(T * H);
  std::vector<int64_t> idx(T * K);
  for (auto& i : idx) i = static_cast<int64_t>(rng() % (E + 2)) - 1;
  for (auto& w : weights) w = static_cast<float>(uniform(0, 1));
  for (int p = 0; p < T * K; ++p)
    for (int h = 0; h < H; ++h)
      pairs[p * H + h] = idx[p] < 0 || idx[p] >= E ? NAN : static_cast<float>(normal());
  combine_pairs(pairs.data(), weights.data(), idx.data(), E, T, K, H, out.data(), DType::fp32);
  bool same = true;
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h) {
      double sum = 0;
      for (int k = 0; k < K; ++k) {
        const int p = t * K + k;
        if (idx[p] >= 0 && idx[p] < E) sum += double(weights[p]) * pairs[p * H + h];
      }
      same &= std::fabs(out[t * H + h] - sum) <= 1e-5;
    }
  expect(same, "combine_pairs");
}

// Each thread number once, nested and concurrent calls finish, and the settings are checked.
void check_parallel() {
  Parallel& pool = Parallel::instance();
  for (int n : {1, 2, 5}) {
    pool.set_num_threads(n);
    for (int repeat = 0; repeat < 200; ++repeat) {
      std::atomic<int64_t> sum{0};
      parallel_for(1000, 7, [&](int64_t begin, int64_t end, int thread) {
        if (thread < 0 || thread >= n) std::abort();
        for (int64_t i = begin; i < end; ++i) sum += i;
        if (begin == 0)
          parallel_for(10, 1, [&](int64_t b, int64_t e, int) {
            for (int64_t i = b; i < e; ++i) sum += i;
          });
      });
      expect(sum == 999 * 500 + 45, "parallel_for");
    }
  }
  pool.set_num_threads(2);
  bool threw = false;
  try {
    pool.set_num_threads(0);
  } catch (const std::invalid_argument&) {
    threw = true;
  }
  expect(threw, "set_num_threads(0)");
}

}  // namespace

int main() {
  check_parallel();
  for (const char* isa : isa_names()) {
    force_isa(isa);
    const DType dtypes[] = {DType::fp32, DType::bf16, DType::fp16};
    for (int exact = 0; exact < kNumExactTypes; ++exact) {
      ExpertGeometry g;
      g.hidden = 37, g.intermediate = 163, g.gated = true, g.biased = true,
      g.exact_dtype = static_cast<ExactType>(exact);
      const Expert odd(g, 4096);
      g.hidden = 160, g.intermediate = 64, g.gated = false, g.biased = false;
      const Expert even(g, 8192);
      if (exact == 0)
        for (DType x : dtypes) {
          check_composite(even, Expert(g, 4096), x);
          check_composite(odd, Expert(odd.g, 4096), x);
        }
      for (int level = 0; level < 5; ++level) {
        const Level l = static_cast<Level>(level);
        check_unpack(odd, l);
        check_unpack(even, l);
        for (DType x : dtypes) {
          check_ffn(odd, Activation::silu, l, x, 1);
          check_ffn(odd, Activation::silu, l, x, 11);
          check_ffn(even, Activation::gelu, l, x, 3);
        }
        for (int a = 0; a <= int(Activation::swigluoai); ++a)
          check_ffn(odd, static_cast<Activation>(a), l, DType::fp32, 2);
      }
    }
    check_combine();
    std::printf("%s: %s\n", isa, failures ? "failed" : "ok");
  }
  return failures ? 1 : 0;
}
