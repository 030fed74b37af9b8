// The plainest fast way to read a file: what the engine's readers are measured against.
#pragma once

#include <cstdint>
#include <string>

namespace comoe {

// Seconds to read bytes [begin, end) of a file by O_DIRECT in requests of `chunk_bytes`, `depth`
// threads with one buffer each. begin, end and chunk_bytes: multiples of 4096. Throws with the
// reason.
double raw_read_seconds(const std::string& path, int64_t begin, int64_t end, int64_t chunk_bytes,
                        int depth);

}  // namespace comoe
