// The mask of a projection's dropout, a bit an element, for the passes of its backward.
#include "common/launch.cuh"
#include "common/lora.cuh"

namespace ferrotune {

struct LoraMask {
    uint32_t* bits;  // [m, words]: bit i % 32 of word i / 32 of a row is that of its element i
    const uint64_t* seed;
    uint64_t m;
    uint64_t columns;  // a multiple of 8
    uint32_t words;    // ceil(columns / 32)
    uint32_t reserved;
    Segment segment;
};
static_assert(sizeof(LoraMask) == 64, "src/cuda/lora/kernels.rs lays it out alike");

// A thread a word at a time. It uses no shared memory and few registers, and runs beside the pass over the gradients.
//
// Floor, 8192 x 4096: 4.2 million Philox calls of about 150 instructions, 528 a clock: 25 us at 1.5 GHz.
__device__ __forceinline__ void lora_mask(const LoraMask& p) {
    const uint64_t seed = *p.seed;
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < p.m * p.words;
         index += step) {
        const uint64_t row = index / p.words, word = index % p.words;
        const uint64_t call = row * (p.columns / 8) + word * 4;
        uint32_t bits = 0;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) bits |= kept_of_call<false>(seed, p.segment, call + byte) << 8 * byte;
        p.bits[index] = bits;  // past a row's end: of the next one, and not used
    }
}

}  // namespace ferrotune

extern "C" __global__ void __launch_bounds__(384, 4) lora_mask(const __grid_constant__ ferrotune::LoraMask p) {
    ferrotune::begin();
    ferrotune::lora_mask(p);
}
