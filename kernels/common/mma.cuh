// Tensor-core products of 16-bit types with f32 accumulators, and what feeds them: asynchronous copies to shared
// memory and matrix loads from it. sm_80 and newer.
#pragma once

#include "common/types.cuh"

namespace ferrotune {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory; zeros where `inside` is false, and `from` is then not read.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of the thread's last groups of copies are under way. Takes 0 to 4.
__device__ __forceinline__ void wait_copies(uint32_t pending) {
    switch (pending) {
        case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
        case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
        case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
        case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
        default: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    }
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8i + j holds the address of row j of matrix i, 16 bytes; it receives, of
// each matrix, elements 2(lane % 4) and the next of row lane / 4; transposed: of column lane / 4, rows 2(lane % 4) and
// the next.
struct Fragments {
    uint32_t part[4];
};

template <bool TRANSPOSED = false>
__device__ __forceinline__ Fragments load_matrices_at(uint32_t row) {
    Fragments f;
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f.part[0]), "=r"(f.part[1]), "=r"(f.part[2]), "=r"(f.part[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f.part[0]), "=r"(f.part[1]), "=r"(f.part[2]), "=r"(f.part[3])
                     : "r"(row)
                     : "memory");
    }
    return f;
}
template <bool TRANSPOSED>
__device__ __forceinline__ Fragments load_matrices(const void* row) {
    return load_matrices_at<TRANSPOSED>(shared_address(row));
}

// sums += a * b for a 16 x 16 (rows, depth) and b 16 x 8 (depth, columns). A lane holds sums of row lane / 4, columns
// 2(lane % 4) and the next, then of row lane / 4 + 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const Fragments& a, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<bf16>(float (&sums)[4], const Fragments& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<f16>(float (&sums)[4], const Fragments& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}

// A value is the sum of parts of type T, the second over PART_SCALE, the third over its square: three hold f32's 24 bits
// of mantissa. f16's smaller exponents would lose what is not scaled.
template <typename T>
constexpr float PART_SCALE = 1.0f;
template <>
constexpr float PART_SCALE<f16> = 2048.0f;

// What the first part leaves, scaled for the next.
template <typename T>
__device__ __forceinline__ float low_part(float value) {
    return (value - to_float(from_float<T>(value))) * PART_SCALE<T>;
}

}  // namespace ferrotune
