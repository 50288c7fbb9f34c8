// out = mask(H P^T) + sum over projections of x W (+ bias), of x [m, depth] and W [w, depth] or [depth, w]: a base
// product that carries its LoRA term in the same f32 sums. Forward: one projection, H [m, R] and P = B's panel.
// Backward: x are the gradients dY of a group's projections, W their weights, H = G and P = A's panel; with one
// projection its term is masked.
//
// Gated: forward of gate and up at once, and hidden = activation(gate) * up of what is written of them. A tile's columns
// are 128 of gate's and the same of up's, so that a thread has both; a chunk adds to one of them.
#pragma once

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/lora.cuh"
#include "glu.cuh"

namespace ferrotune {

constexpr int GEMM_PROJECTIONS = 4;
constexpr int GEMM_CHUNKS = 12;

// Sixteen columns of H times sixteen columns of a panel [w, ..], or sixteen rows of an adapter [r, w] as it lies.
struct GemmChunk {
    uint16_t h_column;
    uint8_t panel;
    uint8_t place;  // the first of the sixteen
};

struct Gemm {
    TensorMap x[GEMM_PROJECTIONS];  // boxes of 64 columns, 128 rows
    TensorMap w[GEMM_PROJECTIONS];  // [w, depth]: 64 columns, 128 rows; [depth, w]: 64 columns, 64 rows
    TensorMap panel[GEMM_PROJECTIONS];  // 16 columns, 128 rows; of adapters: 64 columns, 16 rows
    TensorMap h;                    // 16 columns, 128 rows
    TensorMap out;                  // 32 columns, 16 rows; gated: of gate
    TensorMap up;                   // gated: alike
    TensorMap hidden;
    const float* bias;              // [w], or null
    const uint32_t* bits;           // the mask, [m, kept_words(w_columns)], or null
    uint64_t m;
    uint64_t w_columns;
    uint32_t steps[GEMM_PROJECTIONS];  // ceil(depth / 64)
    uint32_t projections;
    uint32_t lower;   // chunks whose sum is divided by PART_SCALE; 0 where that is 1
    uint32_t chunks;  // all of them, the lower ones first
    uint32_t rows_together;  // tiles of 256 rows that are taken together, for L2
    uint32_t adapters;       // 1: panels are adapters
    uint32_t activation;     // gated
    GemmChunk chunk[GEMM_CHUNKS];
};
static_assert(sizeof(Gemm) == 2176, "src/cuda/lora/gemm.rs lays it out alike");

constexpr int GEMM_THREADS = 384;  // a warpgroup that copies, two that multiply
constexpr int GEMM_ROWS = 128;     // of a block's tile; a cluster's two blocks lie one below the other
constexpr int GEMM_COLUMNS = 256;
constexpr int GEMM_DEPTH = 64;
constexpr int GEMM_STAGES = 4;
constexpr int GEMM_A_BYTES = GEMM_ROWS * GEMM_DEPTH * 2;
constexpr int GEMM_B_BYTES = GEMM_COLUMNS * GEMM_DEPTH * 2;
constexpr int GEMM_STAGE_BYTES = GEMM_A_BYTES + GEMM_B_BYTES;
constexpr int GEMM_OUT_BYTES = 16 * 32 * 2;  // of a warp's box, two of them
constexpr int GEMM_CHUNKS_A_STAGE = 4;       // of H and the panel
constexpr int GEMM_MASK_BYTES = GEMM_ROWS * GEMM_COLUMNS / 8;  // of a tile, two of them
constexpr int GEMM_MASKS = GEMM_STAGES * GEMM_STAGE_BYTES + 8 * 2 * GEMM_OUT_BYTES;
constexpr int GEMM_BARRIERS = GEMM_MASKS + 2 * GEMM_MASK_BYTES;  // of stages: full, empty; of masks: full, empty
constexpr int GEMM_MASK_BARRIERS = GEMM_BARRIERS + 2 * 8 * GEMM_STAGES;
constexpr int GEMM_SHARED = GEMM_MASK_BARRIERS + 2 * 8 * 2 + 1024;  // as it starts on 1024 bytes
static_assert(GEMM_SHARED <= 227 << 10, "a block's shared memory on Hopper");

// Where the tiles of a cluster lie: `rows_together` tiles down, then the next column, and so on.
template <bool GATED>
struct GemmTiles {
    static constexpr int COLUMNS = GATED ? GEMM_COLUMNS / 2 : GEMM_COLUMNS;
    uint32_t down, across, together;
    __device__ __forceinline__ GemmTiles(const Gemm& p)
        : down(static_cast<uint32_t>((p.m + 2 * GEMM_ROWS - 1) / (2 * GEMM_ROWS))),
          across(static_cast<uint32_t>((p.w_columns + COLUMNS - 1) / COLUMNS)),
          together(p.rows_together) {}
    __device__ __forceinline__ uint32_t count() const { return down * across; }
    __device__ __forceinline__ void place(uint32_t tile, int& row, int& column) const {
        const uint32_t band = tile / (together * across), inside = tile % (together * across);
        const uint32_t height = min(together, down - band * together);
        row = static_cast<int>((band * together + inside % height) * 2 * GEMM_ROWS);
        column = static_cast<int>(inside / height * COLUMNS);
    }
};

template <int STAGES>
struct GemmRing {
    uint32_t at = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == STAGES) at = 0, parity ^= 1;
    }
};

// One thread fills the ring: what a stage holds of W, or of the panel, is halved between the cluster's blocks.
template <int DOWN_ROWS, bool GATED>
__device__ __forceinline__ void gemm_copy(const Gemm& p, uint32_t shared, uint32_t rank) {
    const uint32_t full = shared + GEMM_BARRIERS, empty = full + 8 * GEMM_STAGES;
    const GemmTiles<GATED> tiles(p);
    GemmRing<GEMM_STAGES> ring;
    for (uint32_t tile = blockIdx.x / 2; tile < tiles.count(); tile += gridDim.x / 2) {
        int row, column;
        tiles.place(tile, row, column);
        row += static_cast<int>(rank) * GEMM_ROWS;
        for (uint32_t first = 0; first < p.chunks;) {
            const uint32_t end = first < p.lower ? p.lower : p.chunks;
            const uint32_t count = min(end - first, static_cast<uint32_t>(GEMM_CHUNKS_A_STAGE));
            barrier_wait(empty + 8 * ring.at, ring.parity ^ 1);
            const uint32_t a = shared + ring.at * GEMM_STAGE_BYTES, b = a + GEMM_A_BYTES, here = full + 8 * ring.at;
            barrier_expect(here, count * (GEMM_ROWS + GEMM_COLUMNS) * 32);
            for (uint32_t i = 0; i < count; ++i) {
                const GemmChunk chunk = p.chunk[first + i];
                copy_box(a + i * GEMM_ROWS * 32, p.h, chunk.h_column, row, here);
                const uint32_t to = b + i * GEMM_COLUMNS * 32 + rank * 128 * 32;
                const TensorMap& panel = p.panel[chunk.panel];
                const int half = column + static_cast<int>(rank) * 128;
                if constexpr (GATED) {
                    // The other half's: zeros, as from outside the panel.
                    const int rows = chunk.panel == rank ? column : static_cast<int>(p.w_columns);
                    copy_box(to, panel, chunk.place, rows, here, 3);
                } else if (p.adapters) {
                    copy_box(to, panel, half, chunk.place, here, 3);
                    copy_box(to + 64 * 32, panel, half + 64, chunk.place, here, 3);
                } else {
                    copy_box(to, panel, chunk.place, half, here, 3);
                }
            }
            first += count;
            ring.next();
        }
        for (uint32_t i = 0; i < p.projections; ++i) {
            for (uint32_t step = 0; step < p.steps[i]; ++step, ring.next()) {
                const int depth = static_cast<int>(step) * GEMM_DEPTH;
                barrier_wait(empty + 8 * ring.at, ring.parity ^ 1);
                const uint32_t a = shared + ring.at * GEMM_STAGE_BYTES, b = a + GEMM_A_BYTES, here = full + 8 * ring.at;
                barrier_expect(here, GEMM_STAGE_BYTES);
                copy_box(a, p.x[i], depth, row, here);
                if constexpr (DOWN_ROWS) {
#pragma unroll
                    for (uint32_t box = 0; box < 2; ++box) {
                        const uint32_t at = 2 * rank + box;
                        copy_box(b + at * 64 * GEMM_DEPTH * 2, p.w[i], column + static_cast<int>(at) * 64, depth, here,
                                 3);
                    }
                } else if constexpr (GATED) {
                    copy_box(b + rank * 128 * GEMM_DEPTH * 2, p.w[rank], depth, column, here, 3);
                } else {
                    copy_box(b + rank * 128 * GEMM_DEPTH * 2, p.w[i], depth, column + static_cast<int>(rank) * 128,
                             here, 3);
                }
            }
        }
    }
}

// The three warps that neither copy nor multiply bring the masks of tiles ahead of their use.
__device__ __forceinline__ void gemm_mask(const Gemm& p, uint32_t shared, uint32_t rank) {
    const uint32_t full = shared + GEMM_MASK_BARRIERS, empty = full + 8 * 2;
    const uint32_t words = static_cast<uint32_t>(kept_words(p.w_columns));
    const GemmTiles<false> tiles(p);
    GemmRing<2> ring;
    for (uint32_t tile = blockIdx.x / 2; tile < tiles.count(); tile += gridDim.x / 2, ring.next()) {
        int row, column;
        tiles.place(tile, row, column);
        row += static_cast<int>(rank) * GEMM_ROWS;
        barrier_wait(empty + 8 * ring.at, ring.parity ^ 1);
        const uint32_t mask = shared + GEMM_MASKS + ring.at * GEMM_MASK_BYTES;
        for (uint32_t four = threadIdx.x - 32; four < GEMM_MASK_BYTES / 16; four += 96) {
            const uint64_t at_row = row + four / 2;
            const uint32_t word = column / 32 + four % 2 * 4;
            uint4 bits = make_uint4(0, 0, 0, 0);
            if (at_row < p.m && word < words) {
                bits = __ldg(reinterpret_cast<const uint4*>(p.bits + at_row * words + word));
            }
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(mask + 16 * four), "r"(bits.x), "r"(bits.y),
                         "r"(bits.z), "r"(bits.w)
                         : "memory");
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(full + 8 * ring.at);
    }
}

// The LoRA term's sums where the tile's mask keeps them, else 0.
__device__ __forceinline__ void gemm_apply_mask(float (&sums)[128], uint32_t mask) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            uint32_t words[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                         : "r"(mask + (lane / 4 + 8 * half) * (GEMM_COLUMNS / 8) + 16 * part)
                         : "memory");
            // The lane's bits are every fourth one of a word, from lane % 4 on: those of four words become one word.
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                words[word] = __funnelshift_r(words[word], words[word], lane % 4 + 32 - word);
            }
            const auto choose = [](uint32_t which, uint32_t a, uint32_t b) { return (a & which) | (b & ~which); };
            const uint32_t kept = choose(0x33333333u, choose(0x55555555u, words[0], words[1]),
                                         choose(0x55555555u, words[2], words[3]));
#pragma unroll
            for (int bit = 0; bit < 32; ++bit) {
                // Of word bit % 4, its eight columns bit / 4 % 4, and of these the lane's first or second.
                float& sum = sums[4 * (16 * part + 4 * (bit % 4) + bit / 4 % 4) + 2 * half + bit / 16];
                if ((kept & 1u << bit) == 0) sum = 0.0f;
            }
        }
    }
}

// A warp's 16 rows of the sums from FIRST on to `out`, SLICES of 32 columns.
template <typename T, int FIRST, int SLICES>
__device__ __forceinline__ void gemm_store(const TensorMap& out, const float (&sums)[128], uint32_t buffers, int row,
                                           int column) {
    const int lane = threadIdx.x % 32;
    // Sixteen bytes c of row r lie at c ^ r / 2 % 4 of the row's four.
    const uint32_t my_row = lane % 16 * 64, turn = lane % 16 / 2 % 4;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
        const uint32_t buffer = buffers + (FIRST / 16 + slice) % 2 * GEMM_OUT_BYTES;
        if (lane == 0) wait_stores_read<1>();
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* s = sums + FIRST + 16 * slice + 8 * half;
            store_matrices(buffer + my_row + ((2 * half + lane / 16) ^ turn) * 16, pack2<T>(s[0], s[1]),
                           pack2<T>(s[2], s[3]), pack2<T>(s[4], s[5]), pack2<T>(s[6], s[7]));
        }
        fence_async();
        __syncwarp();
        if (lane == 0) {
            store_box(out, column + 32 * slice, row, buffer);
            commit_stores();
        }
    }
}

__device__ __forceinline__ void gemm_add_bias(const Gemm& p, float (&sums)[128], int column) {
#pragma unroll
    for (int t = 0; t < 32; ++t) {
        const int at = column + 8 * t + 2 * static_cast<int>(threadIdx.x % 4);
        if (at < static_cast<int>(p.w_columns)) {
            const float2 bias = __ldg(reinterpret_cast<const float2*>(p.bias + at));
            sums[4 * t] += bias.x, sums[4 * t + 1] += bias.y;
            sums[4 * t + 2] += bias.x, sums[4 * t + 3] += bias.y;
        }
    }
}

// activation(gate) * up of 32 columns, of both as they are rounded to T, in the place of gate and to `hidden`.
template <typename T, int FIRST>
__device__ __forceinline__ void gemm_gate(const Gemm& p, float (&sums)[128], uint32_t buffers, int row, int column) {
    const auto all = [&](uint32_t activation) {
#pragma unroll
        for (int i = FIRST; i < FIRST + 16; ++i) {
            const float gate = to_float(from_float<T>(sums[i])), up = to_float(from_float<T>(sums[64 + i]));
            sums[i] = activate<false, false>(activation, gate).x * up;
        }
    };
    // Not kept as they were stored, beside the sums.
#pragma unroll
    for (int i = FIRST; i < FIRST + 16; ++i) asm volatile("" : "+f"(sums[i]), "+f"(sums[64 + i]));
    if (p.activation == SILU) {
        all(SILU);
    } else {
        all(GELU_TANH);
    }
    gemm_store<T, FIRST, 1>(p.hidden, sums, buffers, row, column + 2 * FIRST);
}

template <typename T, int DOWN_ROWS, bool GATED>
__device__ __forceinline__ void gemm_multiply(const Gemm& p, uint32_t shared, uint32_t rank) {
    const uint32_t full = shared + GEMM_BARRIERS, empty = full + 8 * GEMM_STAGES;
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0) - 4, group = warp / 4;
    const uint32_t buffers = shared + GEMM_STAGES * GEMM_STAGE_BYTES + warp * 2 * GEMM_OUT_BYTES;
    const GemmTiles<GATED> tiles(p);
    GemmRing<GEMM_STAGES> ring;
    GemmRing<2> masks;
    uint32_t held = GEMM_STAGES;  // the stage whose products may be under way
    const auto release = [&](uint32_t stage) {
        // One thread for each of the cluster's blocks, whose copies came to both.
        if (stage < GEMM_STAGES && threadIdx.x % 128 < 2) barrier_arrive(empty + 8 * stage, threadIdx.x % 128);
    };
    float sums[128];
    for (uint32_t tile = blockIdx.x / 2; tile < tiles.count(); tile += gridDim.x / 2) {
        int row, column;
        tiles.place(tile, row, column);
        uint32_t add = 0;
        for (uint32_t first = 0; first < p.chunks;) {
            const uint32_t end = first < p.lower ? p.lower : p.chunks;
            const uint32_t count = min(end - first, static_cast<uint32_t>(GEMM_CHUNKS_A_STAGE));
            barrier_wait(full + 8 * ring.at, ring.parity);
            const uint32_t a = shared + ring.at * GEMM_STAGE_BYTES + group * 64 * 32;
            const uint32_t b = shared + ring.at * GEMM_STAGE_BYTES + GEMM_A_BYTES;
            products_begin();
            for (uint32_t i = 0; i < count; ++i, add = 1) {
                const uint64_t of_h = operand(a + i * GEMM_ROWS * 32, Swizzle::BYTES_32, 256);
                const uint32_t panel = b + i * GEMM_COLUMNS * 32;
                if (p.adapters) {
                    multiply_256<T, 1>(sums, of_h, operand(panel, Swizzle::BYTES_128, 1024, 64 * 32), add);
                } else {
                    multiply_256<T, 0>(sums, of_h, operand(panel, Swizzle::BYTES_32, 256), add);
                }
            }
            products_commit();
            first += count;
            const bool masked = first == p.chunks && p.bits != nullptr;
            if (first == p.lower || masked) {
                products_wait<0>(sums);
                release(held);
                release(ring.at);
                held = GEMM_STAGES;
                const float scale = first == p.lower ? 1.0f / PART_SCALE<T> : 1.0f;
                if (scale != 1.0f) {
#pragma unroll
                    for (int i = 0; i < 128; ++i) sums[i] *= scale;
                }
                if (masked) {
                    const uint32_t mask_full = shared + GEMM_MASK_BARRIERS + 8 * masks.at;
                    barrier_wait(mask_full, masks.parity);
                    gemm_apply_mask(
                        sums, shared + GEMM_MASKS + masks.at * GEMM_MASK_BYTES + warp * 16 * (GEMM_COLUMNS / 8));
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) barrier_arrive(mask_full + 8 * 2);
                    masks.next();
                }
            } else {
                products_wait<1>(sums);
                release(held);
                held = ring.at;
            }
            ring.next();
        }
        for (uint32_t i = 0; i < p.projections; ++i) {
            for (uint32_t step = 0; step < p.steps[i]; ++step) {
                barrier_wait(full + 8 * ring.at, ring.parity);
                const uint32_t a = shared + ring.at * GEMM_STAGE_BYTES + group * 64 * GEMM_DEPTH * 2;
                const uint32_t b = shared + ring.at * GEMM_STAGE_BYTES + GEMM_A_BYTES;
                const uint64_t of_a = operand(a, Swizzle::BYTES_128, 1024);
                const uint64_t of_b = DOWN_ROWS ? operand(b, Swizzle::BYTES_128, 1024, 64 * GEMM_DEPTH * 2)
                                                : operand(b, Swizzle::BYTES_128, 1024);
                products_begin();
#pragma unroll
                for (int part = 0; part < GEMM_DEPTH / 16; ++part, add = 1) {
                    // Sixteen of the depth: 32 bytes along the rows, or two groups of eight rows.
                    multiply_256<T, DOWN_ROWS>(sums, of_a + 2 * part, of_b + (DOWN_ROWS ? 128 : 2) * part, add);
                }
                products_commit();
                products_wait<1>(sums);
                release(held);
                held = ring.at;
                ring.next();
            }
        }
        products_wait<0>(sums);
        release(held);
        held = GEMM_STAGES;
        row += static_cast<int>(rank * GEMM_ROWS + warp * 16);
        if constexpr (GATED) {
            gemm_store<T, 0, 4>(p.out, sums, buffers, row, column);
            gemm_store<T, 64, 4>(p.up, sums, buffers, row, column);
            gemm_gate<T, 0>(p, sums, buffers, row, column);
            gemm_gate<T, 16>(p, sums, buffers, row, column);
            gemm_gate<T, 32>(p, sums, buffers, row, column);
            gemm_gate<T, 48>(p, sums, buffers, row, column);
        } else {
            if (p.bias != nullptr) gemm_add_bias(p, sums, column);
            gemm_store<T, 0, 8>(p.out, sums, buffers, row, column);
        }
    }
    wait_stores();
}

// Floor: 2 m w depth / 790 TFLOP/s (what the chip's power allows); 8192 x 4096 x 4096: 348 us.
template <typename T, int DOWN_ROWS, bool GATED>
__device__ __forceinline__ void gemm(const Gemm& p) {
    extern __shared__ unsigned char memory[];
    const uint32_t shared = (shared_address(memory) + 1023u) & ~1023u;
    const uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < GEMM_STAGES; ++stage) {
            barrier_init(shared + GEMM_BARRIERS + 8 * stage, 1);
            barrier_init(shared + GEMM_BARRIERS + 8 * (GEMM_STAGES + stage), 4);  // two warpgroups of two blocks
        }
        for (int mask = 0; mask < 2; ++mask) {
            barrier_init(shared + GEMM_MASK_BARRIERS + 8 * mask, 3);
            barrier_init(shared + GEMM_MASK_BARRIERS + 8 * (2 + mask), 8);
        }
        barriers_visible();
    }
    cluster_sync();
    begin();
    if (threadIdx.x < 128) {
        give_registers<56>();
        if (threadIdx.x == 0) {
            gemm_copy<DOWN_ROWS, GATED>(p, shared, rank);
        } else if (threadIdx.x >= 32 && p.bits != nullptr) {
            gemm_mask(p, shared, rank);
        }
    } else {
        take_registers<224>();
        gemm_multiply<T, DOWN_ROWS, GATED>(p, shared, rank);
    }
    cluster_sync();  // a block that ends must not be arrived at
}

}  // namespace ferrotune
