// What Hopper's passes over x and over the gradients share: the roles of a block's warps, products over 64 of the depth,
// and masks, which warps of their own make ahead of their use.
#pragma once

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/lora.cuh"

namespace ferrotune {

// Two warpgroups multiply; of the other two one warp copies, and seven make masks.
constexpr int PASS_THREADS = 512;
constexpr uint32_t PASS_CONSUMERS = 8;  // warps
constexpr uint32_t PASS_MAKERS = 7;     // after the one that copies
// Registers of a thread that multiplies, the more the more sums it has, and of the others: 256 together.
__host__ __device__ constexpr int consumer_registers(int parts, int planes) { return parts * planes < 9 ? 184 : 208; }
__host__ __device__ constexpr int other_registers(int parts, int planes) {
    return 256 - consumer_registers(parts, planes);
}
constexpr int PASS_SHARED = 225 << 10;
constexpr uint32_t PASS_STAGES = 6;  // at most

// Of a stage and a projection: a bit an element, 32 columns a word.
constexpr uint32_t MASK_WORDS = 512;
constexpr uint32_t MASK_BYTES = 4 * MASK_WORDS;
constexpr uint32_t MASK_MEMORY = 8 * MASK_BYTES;
constexpr uint32_t MASK_SLOTS = 8;  // at most
constexpr uint32_t MASK_TASKS = MASK_WORDS / 64;  // two words a lane: enough arithmetic under way for a warp by itself
__host__ __device__ constexpr int words_at_once(int registers) { return registers < 64 ? 1 : 2; }

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Where masks lie: `slots` of `count` of them, and their barriers, which are full at an arrival for each 64 words.
struct MaskRing {
    uint32_t memory, full, empty;  // addresses in shared memory
    uint32_t count, slots;

    __device__ __forceinline__ MaskRing(uint32_t memory, uint32_t barriers, uint32_t count)
        : memory(memory), full(barriers), empty(barriers + 8 * MASK_SLOTS), count(count),
          slots(count <= 1 ? MASK_SLOTS : count == 2 ? 4 : 2) {}
    __device__ __forceinline__ void init() const {
        for (uint32_t slot = 0; slot < slots; ++slot) {
            barrier_init(full + 8 * slot, count * MASK_TASKS);
            barrier_init(empty + 8 * slot, PASS_CONSUMERS);
        }
    }
    __device__ __forceinline__ uint32_t slot(uint32_t step) const { return step & (slots - 1); }
    __device__ __forceinline__ uint32_t turn(uint32_t step) const { return step / slots & 1; }
    __device__ __forceinline__ uint32_t mask(uint32_t step, uint32_t i) const {
        return memory + (slot(step) * count + i) * MASK_BYTES;
    }
    __device__ __forceinline__ void wait(uint32_t step) const { barrier_wait(full + 8 * slot(step), turn(step)); }
    __device__ __forceinline__ void release(uint32_t step) const { barrier_arrive(empty + 8 * slot(step)); }
};

// How many projections have segments here.
template <int PARTS>
__device__ __forceinline__ uint32_t masks_of(const Segment (&segments)[MAX_SEGMENTS]) {
    uint32_t count = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) count += segments[part].first;
    return count;
}

// A maker's share of the masks of all steps. Those of a step are of WORDS words a row, from the row and the column that
// `place` gives; columns of the masked matrix are a multiple of 8. They also go to `bits`, [m, kept_words(columns)],
// unless null. Eight words a row lie as `kept_word` says. AT_ONCE: words of a lane, as registers allow.
template <int PARTS, uint32_t WORDS, int AT_ONCE, typename Place>
__device__ __forceinline__ void make_masks(const Masks& masks, const Segment (&segments)[MAX_SEGMENTS],
                                           const MaskRing& ring, uint32_t maker, uint32_t steps, const Place& place,
                                           uint32_t* bits, uint64_t m) {
    const uint64_t seed = *masks.seed;
    const uint32_t lane = threadIdx.x % 32, words = static_cast<uint32_t>(kept_words(masks.columns));
    const uint32_t calls = static_cast<uint32_t>(masks.columns / 8);  // a row; of all rows they are no more than 2^32
    const uint32_t my_row = lane / WORDS, my_word = lane % WORDS;
    const uint32_t my_call = my_row * calls + 4 * my_word, my_place = my_row * words + my_word;
    static_assert(WORDS == 4 || WORDS == 8);
    uint32_t order = 0, found = 0;  // the first segment of mask i in byte i
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        if (segments[part].first) order |= static_cast<uint32_t>(part) << 8 * found++;
    }
    const uint32_t tasks = ring.count * MASK_TASKS;
    // Of fifteen tasks three are for the maker that has a quarter of the multiprocessor with the copying warp, two for each
    // of the others: there two share a quarter, and are a third faster together than a warp by itself.
    const uint32_t period = maker == 3 ? 10 : 15;
    uint32_t stride = maker == 3 ? 5 : 7 + (0x46u >> maker & 1u);
    uint32_t now = ~0u;  // the projection whose segment this is
    Segment segment;
    for (uint32_t step = 0, task = maker;; task += stride, stride = period - stride) {
        for (; task >= tasks; task -= tasks) ++step;
        if (step >= steps) return;
        const uint32_t i = task / MASK_TASKS;
        if (i != now) segment = segments[order >> 8 * i & 0xFFu], now = i;
        uint64_t row0;
        uint32_t column0;
        place(step, row0, column0);
        row0 += task % MASK_TASKS * (64 / WORDS);
        uint32_t kept[2] = {};
#pragma unroll AT_ONCE
        for (int half = 0; half < 2; ++half, row0 += 32 / WORDS) {
            kept[0] = kept[1];
            kept[1] = kept_of_four_calls(seed, segment, static_cast<uint32_t>(row0) * calls + column0 / 8 + my_call);
            if (bits != nullptr && row0 + my_row < m && column0 / 32 + my_word < words) {
                bits[row0 * words + column0 / 32 + my_place] = kept[1];
            }
        }
        barrier_wait(ring.empty + 8 * ring.slot(step), ring.turn(step) ^ 1);
        const uint32_t to = ring.mask(step, i) + 4 * (task % MASK_TASKS * 64);
        store_shared(to + 4 * lane, __uint_as_float(kept[0]));
        store_shared(to + 128 + 4 * (WORDS == 8 ? lane ^ 4 : lane), __uint_as_float(kept[1]));
        __syncwarp();
        if (lane == 0) barrier_arrive(ring.full + 8 * ring.slot(step));
    }
}

// The lower half of `pair` where byte LOW of {signs, more} has its sign set, and the upper one where byte HIGH has.
template <int LOW, int HIGH>
__device__ __forceinline__ uint32_t keep_pair(uint32_t pair, uint32_t signs, uint32_t more) {
    uint32_t keep;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(keep) : "r"(signs), "r"(more), "n"(0x8888 + 0x0011 * LOW + 0x1100 * HIGH));
    return pair & keep;
}

// Four operands of a warp's sixteen rows and 64 columns of x at `tile`, with 128 bytes a row as a copy swizzles them;
// rows of `mask` are `stride` bytes.
__device__ __forceinline__ void load_kept_rows(Fragments (&kept)[4], uint32_t tile, uint32_t mask, uint32_t stride) {
    const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t mask_row = mask + (threadIdx.x / 32 % 4 * 16 + lane / 4) * stride, shift = 3 - lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t first = load_shared(mask_row + 4 * half), second = load_shared(mask_row + 8 * stride + 4 * half);
        // Signs of bytes 0 and 2, and of 1 and 3: of columns 8 and 24 on, and with four bits more of 0 and 16 on.
        const uint32_t odd = first << shift, even = first << (shift + 4);
        const uint32_t odd8 = second << shift, even8 = second << (shift + 4);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            Fragments& f = kept[2 * half + k];
            f = load_matrices_at(tile + row * 128 + 16 * ((4 * half + 2 * k + lane / 16) ^ (row % 8)));
            const auto keep = [&](uint32_t pair, uint32_t signs) {
                return k == 0 ? keep_pair<0, 2>(pair, signs, 0) : keep_pair<1, 3>(pair, signs, 0);
            };
            f.part[0] = keep(f.part[0], even);
            f.part[1] = keep(f.part[1], even8);
            f.part[2] = keep(f.part[2], odd);
            f.part[3] = keep(f.part[3], odd8);
        }
    }
}

// Where word `word` of row `row` lies among eight words a row, in bytes: as a copy swizzles 32 bytes.
__device__ __forceinline__ uint32_t kept_word(uint32_t row, uint32_t word) {
    return 32 * row + 4 * (word ^ (row / 4 % 2 * 4));
}

// Four operands of 64 rows and sixteen columns of x, transposed: columns 16 * SIXTEEN.. of the 32 whose masks' words are
// word `word` of the eight of a row at `mask`; `chunk` is the first column's place in the row, in 16 bytes.
template <int SIXTEEN>
__device__ __forceinline__ void load_kept_columns(Fragments (&kept)[4], uint32_t tile, uint32_t chunk, uint32_t mask,
                                                  uint32_t word) {
    const uint32_t lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8;
    // Columns lane / 4 and, from there, each eighth: every fourth bit of the lower half, or, odd ones, of the upper half.
    const uint32_t turn = 3 - lane / 8 + lane / 4 % 2 * 16;
    const uint32_t mask_row = mask + kept_word(lane % 4 * 2, word);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t place = (16 * k + row) * 128 + 16 * ((chunk + lane / 8 % 2) ^ (row % 8));
        Fragments& f = kept[k];
        f = load_matrices_at<true>(tile + place);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
            const uint32_t at = mask_row + (16 * k + 8 * eight) * 32;
            const uint32_t low = load_shared(at), high = load_shared(at + 32);
            const auto keep = [&](uint32_t pair, uint32_t by) {
                return keep_pair<SIXTEEN, 4 + SIXTEEN>(pair, __funnelshift_l(low, low, by), __funnelshift_l(high, high, by));
            };
            f.part[2 * eight] = keep(f.part[2 * eight], turn + 4);
            f.part[2 * eight + 1] = keep(f.part[2 * eight + 1], turn);
        }
    }
}

// Sums that are kept apart, of as many columns as are taken together. `never` is 0, which the compiler does not know: where
// it does, ptxas 13.0 leaves out some of the products that start them, or gives each its own registers.
__host__ __device__ constexpr int together(int parts) { return parts < 2 ? 1 : 2; }
template <int PARTS, int PLANES>
struct Apart {
    float sums[PLANES == 1 ? 1 : 8 * PLANES * together(PARTS)] = {};
    uint32_t never;
    __device__ __forceinline__ explicit Apart(uint64_t rows) : never(static_cast<uint32_t>(rows >> 63)) {}
};

// sums += products over 64 of the depth with `a(k)`, k of four steps of sixteen. `b(part, k)` are the sixteen columns of
// a part, PLANES times where values are sums of that many, and of the parts after it. With one plane the products are
// left under way. With three they are done: tensor cores cut their sums off, and those of 64 are kept apart and added in
// f32.
template <typename T, int PARTS, int PLANES, int A_DOWN_ROWS, int B_DOWN_ROWS, int ALL, typename A, typename B>
__device__ __forceinline__ void multiply_64(float (&sums)[8 * PARTS], Apart<ALL, PLANES>& apart, const A& a,
                                            const B& b) {
    if constexpr (PLANES == 1) {
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_narrow<T, 16 * PARTS, A_DOWN_ROWS, B_DOWN_ROWS>(sums, a(k), b(0, k), 1);
    } else {
        static_assert(PLANES == 3);
        constexpr float SCALE = 1.0f / PART_SCALE<T>;
        constexpr int TOGETHER = together(PARTS);
#pragma unroll
        for (int part = 0; part < PARTS; part += TOGETHER) {
            const auto some = [&](auto count) {
                constexpr int COUNT = decltype(count)::value;
                float now[24 * COUNT];
                products_begin();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    multiply_narrow<T, 48 * COUNT, A_DOWN_ROWS, B_DOWN_ROWS>(now, a(k), b(part, k), k == 0 ? apart.never : 1);
                }
                products_commit();
                products_wait_all();
#pragma unroll
                for (int i = 0; i < 8 * COUNT; ++i) {
                    const float* of = now + i / 8 * 24 + i % 8;
                    sums[8 * part + i] += of[0] + (of[8] + of[16] * SCALE) * SCALE;
                }
            };
            if (part + TOGETHER <= PARTS) {
                some(std::integral_constant<int, TOGETHER>());
            } else {
                some(std::integral_constant<int, 1>());
            }
        }
    }
}

// The same, done, with operands that `load(kept, i)` brings under the mask of projection i of `count`.
template <typename T, int PARTS, int PLANES, int B_DOWN_ROWS, typename Load, typename B>
__device__ __forceinline__ void multiply_kept(float (&sums)[8 * PARTS], Apart<PARTS, PLANES>& apart,
                                              const Segment (&segments)[MAX_SEGMENTS], uint32_t count,
                                              const Load& load, const B& b) {
    Fragments kept[4] = {};
    const auto a = [&](int k) { return kept[k]; };
    if (PARTS == 1 || count == 1) {
        load(kept, 0);
        if constexpr (PLANES == 1) products_begin();
        multiply_64<T, PARTS, PLANES, 0, B_DOWN_ROWS>(sums, apart, a, b);
        if constexpr (PLANES == 1) {
            products_commit();
            products_wait_all();
        }
        return;
    }
    uint32_t i = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        if (segments[part].first) load(kept, i++);
        float now[8] = {};
        if constexpr (PLANES == 1) products_begin();
        multiply_64<T, 1, PLANES, 0, B_DOWN_ROWS>(now, apart, a, [&](int, int k) { return b(part, k); });
        if constexpr (PLANES == 1) {
            products_commit();
            products_wait_all();
        }
#pragma unroll
        for (int at = 0; at < 8; ++at) sums[8 * part + at] += now[at];
    }
}

}  // namespace ferrotune
