// f32 operations that flush subnormals to zero, where bitsandbytes' CUDA code (built with -use_fast_math) does.
#pragma once

namespace ferrotune {

__device__ __forceinline__ float mul_ftz(float a, float b) {
    float product;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}

// The larger, not a NaN if either is none.
__device__ __forceinline__ float max_ftz(float a, float b) {
    float larger;
    asm("max.ftz.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

// 1 / x to within one unit in the last place; infinity for 0.
__device__ __forceinline__ float reciprocal_ftz(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

}  // namespace ferrotune
