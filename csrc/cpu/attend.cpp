#include "attend.h"

#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace comoe {

void attend(const AttendArgs& args) {
  const Kernels& kernels = kernels_in_use();
  const int64_t group = args.heads / args.kv_heads;
  // A KV head is read once for all the query heads that share it.
  parallel_for(args.batch * args.kv_heads, 1, [&](int64_t begin, int64_t end, int) {
    // Not in the kernels' files: what the standard library compiles there could be kept by the
    // linker for CPUs without their instructions.
    std::vector<int32_t> seen;
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / args.kv_heads;
      const uint8_t* mask = args.mask ? args.mask + b * args.strides[8] : nullptr;
      seen.clear();
      for (int64_t l = 0; l < args.positions; ++l)
        if (!mask || mask[l]) seen.push_back(static_cast<int32_t>(l));
      const auto n = static_cast<int64_t>(seen.size());
      scratch.resize(2 * group * args.head_dim + args.head_dim + n * group);
      kernels.attend(args, b, i % args.kv_heads, seen.data(), n, scratch.data());
    }
  });
}

}  // namespace comoe
