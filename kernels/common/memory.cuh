// Loads with a cache policy, and stores that stay whole.
#pragma once

#include <cstdint>

namespace ferrotune {

// For what is read once: evicted first, so that what is written stays in L2 for its reader.
template <typename T>
__device__ __forceinline__ T load_once(const void* from) {
    return __ldcs(static_cast<const T*>(from));
}

// One 16-byte store, which the compiler may take apart otherwise. For memory that the kernel itself does not read: no
// other access waits for it.
__device__ __forceinline__ void store16(void* to, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w));
}

}  // namespace ferrotune
