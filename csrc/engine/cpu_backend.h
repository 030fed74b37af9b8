// Pages in the process's own memory, read straight from disk.
#pragma once

#include <memory>

#include "backend.h"

namespace comoe {

struct EngineConfig;
std::unique_ptr<Backend> make_cpu_backend(const EngineConfig& config);

}  // namespace comoe
