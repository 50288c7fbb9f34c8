// Loads with a cache policy.
#pragma once

#include <cstdint>

namespace ferrotune {

// For what is read once: evicted first.
__device__ __forceinline__ uint4 load_stream(const uint4* from) { return __ldcs(from); }
__device__ __forceinline__ uint32_t load_stream(const uint32_t* from) { return __ldcs(from); }
__device__ __forceinline__ uint16_t load_stream(const uint16_t* from) { return __ldcs(from); }

}  // namespace ferrotune
