// Pages in the process's own memory, read straight from disk.
#pragma once

#include <functional>
#include <memory>

#include "backend.h"

namespace comoe {

struct EngineConfig;

// For memory that a device copies from: called after a slab was mapped, and before it goes. A slab
// that `mapped` refuses is not used.
struct SlabHooks {
  std::function<bool(void*, int64_t)> mapped;
  std::function<void(void*, int64_t)> unmapping;
};

std::unique_ptr<Backend> make_cpu_backend(const EngineConfig& config, const SlabHooks& hooks = {});

}  // namespace comoe
