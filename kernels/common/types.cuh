// Element types: loads, stores and conversions that every kernel shares. All arithmetic is f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ferrotune {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two elements of a 16-bit type in one register, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<f16>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<__half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Sixteen bytes of T.
template <typename T>
__device__ __forceinline__ uint4 pack16(const float (&values)[16 / sizeof(T)]) {
    if constexpr (sizeof(T) == 4) {
        return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                          __float_as_uint(values[3]));
    } else {
        return make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                          pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
    }
}

// Whether an address is a multiple of `bytes`, a power of two.
template <typename T>
__device__ __forceinline__ bool aligned(const T* pointer, unsigned bytes) {
    return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

}  // namespace ferrotune
