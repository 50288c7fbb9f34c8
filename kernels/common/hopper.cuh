// What only Hopper has (sm_90a): barriers in shared memory that copies arrive at, tensor-map copies, clusters of two
// blocks, and products of a warpgroup.
#pragma once

#include "common/mma.cuh"

namespace ferrotune {

// A CUtensorMap, made by the driver on the host.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// Barriers: 8 bytes of shared memory, named by their address.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barriers_visible() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and has the barrier wait for `bytes` that copies bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at this block's own barrier, or at the one of the same place in block `rank` of the cluster. Orders what the
// thread itself wrote for its own block alone: more would cost a fence of the whole device.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n\t.reg .pred done;\nagain:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A box at (column, row) of the matrix of `map` to shared memory; zeros outside the matrix.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The same to every block of the cluster in `blocks`, at the same place of its shared memory, and to its barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier,
                                         uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}

// A box of shared memory to the matrix; what lies outside it is not written.
__device__ __forceinline__ void store_box(const TensorMap& map, int column, int row, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
                 "r"(row), "r"(from)
                 : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory of all but the last PENDING groups has been read; or until all is written.
template <int PENDING>
__device__ __forceinline__ void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary stores to shared memory, before copies and warpgroup products read it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// To the same place of shared memory in block `rank` of the cluster.
__device__ __forceinline__ void store_remote(uint32_t place, uint32_t rank, float value) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "st.shared::cluster.f32 [remote], %2;\n\t}" ::"r"(place),
        "r"(rank), "f"(value)
        : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// How an operand lies in shared memory, as wgmma's descriptors say it: `rows` bytes from eight rows to the next eight;
// `columns` bytes from one swizzled box to the next, where the operand's depth runs down the rows.
enum class Swizzle : uint64_t { BYTES_128 = 1, BYTES_32 = 3 };
__device__ __forceinline__ uint64_t operand(uint32_t address, Swizzle swizzle, uint32_t rows, uint32_t columns = 16) {
    return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(columns >> 4) << 16 |
           static_cast<uint64_t>(rows >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define FERROTUNE_8(f, i) f(i), f(i + 1), f(i + 2), f(i + 3), f(i + 4), f(i + 5), f(i + 6), f(i + 7)
#define FERROTUNE_64(f, i)                                                                                        \
    FERROTUNE_8(f, i), FERROTUNE_8(f, i + 8), FERROTUNE_8(f, i + 16), FERROTUNE_8(f, i + 24),                     \
        FERROTUNE_8(f, i + 32), FERROTUNE_8(f, i + 40), FERROTUNE_8(f, i + 48), FERROTUNE_8(f, i + 56)
#define FERROTUNE_SUM(i) "+f"(sums[i])

// Until at most PENDING committed groups of products are under way: their sums, here, may then be read.
template <int PENDING>
__device__ __forceinline__ void products_wait(float (&sums)[128]) {
    asm volatile("wgmma.wait_group.sync.aligned %128;"
                 : FERROTUNE_64(FERROTUNE_SUM, 0), FERROTUNE_64(FERROTUNE_SUM, 64)
                 : "n"(PENDING)
                 : "memory");
}

#define FERROTUNE_SUMS_OF_256                                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "  \
    "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "  \
    "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "  \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define FERROTUNE_MULTIPLY_256(type)                                                                     \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %130, 0;\n\t"                                 \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " FERROTUNE_SUMS_OF_256  \
                 ", %128, %129, add, 1, 1, 0, %131;\n\t}"                                                \
                 : FERROTUNE_64(FERROTUNE_SUM, 0), FERROTUNE_64(FERROTUNE_SUM, 64)                       \
                 : "l"(a), "l"(b), "r"(add), "n"(B_DOWN_ROWS))

// sums (+)= a * b of 64 x 16 and 16 x 256. Lane l of warp w holds columns 8t + 2(l % 4) and the next of row
// 16w + l / 4, sums[4t] and [4t + 1], and of row 16w + l / 4 + 8. B_DOWN_ROWS: b's depth runs down the rows.
template <typename T, int B_DOWN_ROWS>
__device__ __forceinline__ void multiply_256(float (&sums)[128], uint64_t a, uint64_t b, uint32_t add) {
    if constexpr (std::is_same_v<T, bf16>) {
        FERROTUNE_MULTIPLY_256("bf16");
    } else {
        FERROTUNE_MULTIPLY_256("f16");
    }
}

// The same for b of 16 x N, sums as of N columns; A_DOWN_ROWS: a's depth runs down the rows, too. What follows the sums'
// names are those of a, b, `add` and what is transposed.
#define FERROTUNE_16(f, i) FERROTUNE_8(f, i), FERROTUNE_8(f, i + 8)
#define FERROTUNE_PRODUCT_OF(type, n, sums, names, a, b, add, turned, ...)                                           \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, " add ", 0;\n\t"                                        \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a ", " b            \
                 ", add, 1, 1, " turned ";\n\t}"                                                                   \
                 : sums                                                                                              \
                 : __VA_ARGS__)
#define FERROTUNE_SUMS_8 FERROTUNE_8(FERROTUNE_SUM, 0)
#define FERROTUNE_SUMS_16 FERROTUNE_16(FERROTUNE_SUM, 0)
#define FERROTUNE_SUMS_24 FERROTUNE_16(FERROTUNE_SUM, 0), FERROTUNE_8(FERROTUNE_SUM, 16)
#define FERROTUNE_SUMS_32 FERROTUNE_16(FERROTUNE_SUM, 0), FERROTUNE_16(FERROTUNE_SUM, 16)
#define FERROTUNE_SUMS_48 FERROTUNE_SUMS_32, FERROTUNE_16(FERROTUNE_SUM, 32)
#define FERROTUNE_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FERROTUNE_NAMES_16 FERROTUNE_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FERROTUNE_NAMES_24 FERROTUNE_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FERROTUNE_NAMES_32 FERROTUNE_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FERROTUNE_NAMES_48                                                                                           \
    FERROTUNE_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FERROTUNE_SHARED(n, count, a_, b_, add_, turned)                                                             \
    if constexpr (std::is_same_v<T, bf16>) {                                                                         \
        FERROTUNE_PRODUCT_OF("bf16", n, FERROTUNE_SUMS_##count, FERROTUNE_NAMES_##count, a_, b_, add_, turned,       \
                             "l"(a), "l"(b), "r"(add), "n"(A_DOWN_ROWS), "n"(B_DOWN_ROWS));                          \
    } else {                                                                                                         \
        FERROTUNE_PRODUCT_OF("f16", n, FERROTUNE_SUMS_##count, FERROTUNE_NAMES_##count, a_, b_, add_, turned,        \
                             "l"(a), "l"(b), "r"(add), "n"(A_DOWN_ROWS), "n"(B_DOWN_ROWS));                          \
    }
#define FERROTUNE_LOADED(n, count, a_, b_, add_, turned)                                                             \
    if constexpr (std::is_same_v<T, bf16>) {                                                                         \
        FERROTUNE_PRODUCT_OF("bf16", n, FERROTUNE_SUMS_##count, FERROTUNE_NAMES_##count, a_, b_, add_, turned,       \
                             "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "l"(b), "r"(add),       \
                             "n"(B_DOWN_ROWS));                                                                      \
    } else {                                                                                                         \
        FERROTUNE_PRODUCT_OF("f16", n, FERROTUNE_SUMS_##count, FERROTUNE_NAMES_##count, a_, b_, add_, turned,        \
                             "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "l"(b), "r"(add),       \
                             "n"(B_DOWN_ROWS));                                                                      \
    }
template <typename T, int N, int A_DOWN_ROWS, int B_DOWN_ROWS>
__device__ __forceinline__ void multiply_narrow(float (&sums)[N / 2], uint64_t a, uint64_t b, uint32_t add) {
    static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 96);
    if constexpr (N == 16) FERROTUNE_SHARED("16", 8, "%8", "%9", "%10", "%11, %12")
    if constexpr (N == 32) FERROTUNE_SHARED("32", 16, "%16", "%17", "%18", "%19, %20")
    if constexpr (N == 48) FERROTUNE_SHARED("48", 24, "%24", "%25", "%26", "%27, %28")
    if constexpr (N == 64) FERROTUNE_SHARED("64", 32, "%32", "%33", "%34", "%35, %36")
    if constexpr (N == 96) FERROTUNE_SHARED("96", 48, "%48", "%49", "%50", "%51, %52")
}
// With a in registers: a warp's sixteen rows as load_matrices<false> brings them.
template <typename T, int N, int A_DOWN_ROWS, int B_DOWN_ROWS>
__device__ __forceinline__ void multiply_narrow(float (&sums)[N / 2], const Fragments& a, uint64_t b, uint32_t add) {
    static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 96);
    if constexpr (N == 16) FERROTUNE_LOADED("16", 8, "{%8, %9, %10, %11}", "%12", "%13", "%14")
    if constexpr (N == 32) FERROTUNE_LOADED("32", 16, "{%16, %17, %18, %19}", "%20", "%21", "%22")
    if constexpr (N == 48) FERROTUNE_LOADED("48", 24, "{%24, %25, %26, %27}", "%28", "%29", "%30")
    if constexpr (N == 64) FERROTUNE_LOADED("64", 32, "{%32, %33, %34, %35}", "%36", "%37", "%38")
    if constexpr (N == 96) FERROTUNE_LOADED("96", 48, "{%48, %49, %50, %51}", "%52", "%53", "%54")
}

// Until all committed products are done: any sums and operands in registers may then be used.
__device__ __forceinline__ void products_wait_all() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements to shared memory; lanes as for load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}

}  // namespace ferrotune
