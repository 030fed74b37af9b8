#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/expert_ffn.h"
#include "bindings.h"

namespace comoe {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// One expert in pages: of numpy arrays, in any order (tests and benchmarks), or of the engine.
struct PagedExpert {
  ExpertGeometry geometry;
  ExpertView view;
  std::vector<std::vector<const uint8_t*>> pages;
  std::vector<py::object> owners;

  // Level of an expert of one part, -1 of several or of none.
  int level() const {
    const bool plain = view.parts.size() == 1 && view.low_rank.empty() && view.means.empty();
    return plain ? static_cast<int>(view.parts[0].level) : -1;
  }
  bool has_matrices() const { return !view.parts.empty() || !view.low_rank.empty(); }

  // Of the engine's pages, which a session keeps in place.
  PagedExpert(const ExpertGeometry& geometry, const ExpertView& view)
      : geometry(geometry), view(view) {}

  PagedExpert(int64_t hidden, int64_t intermediate, bool gated, bool biased, int exact_dtype,
              int level, const std::map<int, std::pair<Array<uint8_t>, Array<int64_t>>>& records,
              int64_t page_bytes) {
    auto fail = [](const std::string& text) {
      throw std::invalid_argument("PagedExpert: " + text);
    };
    if (hidden < 1 || intermediate < 1) fail("hidden and intermediate must be at least 1");
    if (exact_dtype < 0 || exact_dtype >= kNumExactTypes)
      fail("exact_dtype must be 0 (fp32), 1 (bf16), 2 (fp16), 3 (fp8) or 4 (mxfp4)");
    if (level < 0 || level > 4) fail("level must be 0..4, got " + std::to_string(level));
    if (page_bytes < 4096 || page_bytes % 4096)
      fail("page_bytes must be a multiple of 4096, got " + std::to_string(page_bytes));
    geometry.hidden = hidden;
    geometry.intermediate = intermediate;
    geometry.gated = gated;
    geometry.biased = biased;
    geometry.exact_dtype = static_cast<ExactType>(exact_dtype);
    PagedBytes records_of_level[kNumRecords];
    pages.resize(kNumRecords);
    for (int r = 0; r < kNumRecords; ++r) {
      const bool needed = level == 4 ? r == 4 : r <= level;
      if (!needed) continue;
      const auto found = records.find(r);
      if (found == records.end())
        fail("level " + std::to_string(level) + " needs record " + std::to_string(r));
      const auto& [arena, offsets] = found->second;
      const int64_t expected = ceil_div(geometry.record_bytes(r), page_bytes);
      if (offsets.ndim() != 1 || offsets.size() != expected)
        fail("record " + std::to_string(r) + " needs " + std::to_string(expected) + " pages, got " +
             std::to_string(offsets.size()));
      for (int64_t i = 0; i < expected; ++i) {
        const int64_t offset = offsets.data()[i];
        // The last page may end with the record.
        const int64_t last = geometry.record_bytes(r) - (expected - 1) * page_bytes;
        if (offset < 0 || offset + (i + 1 < expected ? page_bytes : last) > arena.size())
          fail("record " + std::to_string(r) + ": page " + std::to_string(i) +
               " lies outside its array");
        const uint8_t* page = arena.data() + offset;
        if (reinterpret_cast<uintptr_t>(page) % 64)
          fail("record " + std::to_string(r) + ": page " + std::to_string(i) +
               " is not aligned to 64 bytes");
        pages[r].push_back(page);
      }
      records_of_level[r] = {pages[r].data(), page_bytes};
      owners.push_back(arena);
    }
    view = ExpertView(static_cast<Level>(level), records_of_level);
  }
};

}  // namespace comoe
