// Dropout masks: element i of stream s under seed q is what `src/lora/dropout.rs` computes.
#pragma once

#include <cstdint>

namespace ferrotune {

// Elements that one Philox call serves: four 32-bit words are eight 16-bit uniforms.
constexpr int DROPOUT_LANES = 8;

// Philox4x32-7 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3": the fewest rounds that pass BigCrush).
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        uint32_t low_hi = __umulhi(counter.x, 0xD2511F53u), low_lo = counter.x * 0xD2511F53u;
        uint32_t high_hi = __umulhi(counter.z, 0xCD9E8D57u), high_lo = counter.z * 0xCD9E8D57u;
        counter = make_uint4(high_hi ^ counter.y ^ key.x, high_lo, low_hi ^ counter.w ^ key.y, low_lo);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// The eight 16-bit uniforms of elements 8 * group .. 8 * group + 7, two a word, the lower lane in the lower half.
__device__ __forceinline__ uint4 dropout_uniforms(uint64_t seed, uint64_t stream, uint64_t group) {
    return philox(make_uint4(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                             static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)),
                  make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)));
}

// Lane `lane` of the eight is kept iff its uniform is at least `threshold` = round(p * 65536).
__device__ __forceinline__ bool dropout_keeps(uint4 uniforms, int lane, uint32_t threshold) {
    uint32_t word = lane < 4 ? (lane < 2 ? uniforms.x : uniforms.y) : (lane < 6 ? uniforms.z : uniforms.w);
    return ((word >> (16 * (lane % 2))) & 0xFFFFu) >= threshold;
}

}  // namespace ferrotune
