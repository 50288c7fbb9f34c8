// Rotary position embeddings (Su et al., 2021) of queries and keys, in the half-split layout of GPT-NeoX and Llama.
#include <type_traits>

#include "common/launch.cuh"
#include "common/vectors.cuh"

namespace ferrotune {

// A tensor [batch, heads, length, head size]; strides in elements, the last one is 1.
struct Heads {
    const void* from;
    void* to;
    uint64_t batch;
    uint64_t head;
    uint64_t position;
    uint64_t to_batch;
    uint64_t to_head;
    uint64_t to_position;
};

struct Rope {
    Heads q;
    Heads k;
    const void* cos;  // [1 or batch, length, rotary], rows contiguous, of the type of q
    const void* sin;
    uint64_t table_batch;  // strides of both, in elements
    uint64_t table_position;
    uint32_t length;
    uint32_t q_heads;
    uint32_t k_heads;
    uint32_t size;      // of a head
    uint32_t rotary;    // even: elements of a head that are turned; the rest is copied
    uint32_t backward;  // 1: the transposed rotation
    uint32_t vectors;   // 1: sixteen bytes at a time fit everywhere
    uint32_t reserved;
};
static_assert(sizeof(Rope) == 192, "src/cuda/rope.rs lays it out alike");

constexpr int ROPE_THREADS = 256;

// y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 of elements i and i + rotary/2; backward is its transpose.
__device__ __forceinline__ float2 turn(float x1, float x2, float2 c, float2 s, bool backward) {
    return backward ? make_float2(x1 * c.x + x2 * s.y, x2 * c.y - x1 * s.x)
                    : make_float2(x1 * c.x - x2 * s.x, x2 * c.y + x1 * s.y);
}

// Heads of a thread, all of which it reads before it writes one.
constexpr uint32_t ROPE_HEADS = 4;

// A block a token; N elements, and those that they are turned with, of ROPE_HEADS heads a thread.
// Floor: 2 * (q_heads + k_heads) * size * sizeof(T) a token over 2.96 TB/s.
template <typename T, int N>
__device__ __forceinline__ void rope(const Rope& p) {
    using Lanes = std::conditional_t<N == 1, T, uint4>;
    const uint32_t position = blockIdx.x % p.length, batch = blockIdx.x / p.length;
    const uint32_t half = p.rotary / 2, turned = half / N;
    const uint32_t items = turned + (p.size - p.rotary) / N;  // of a head
    const uint32_t heads = p.q_heads + p.k_heads, apart = (heads + ROPE_HEADS - 1) / ROPE_HEADS;
    const uint64_t table = batch * p.table_batch + position * p.table_position;
    const auto lanes = [](const T* from) { return *reinterpret_cast<const Lanes*>(from); };
    const auto floats = [](const Lanes& raw, float(&values)[N]) {
        if constexpr (N == 1) {
            values[0] = to_float(raw);
        } else {
            unpack16<T>(raw, values);
        }
    };
    const auto store = [](T* to, const float(&values)[N]) {
        if constexpr (N == 1) {
            *to = from_float<T>(values[0]);
        } else {
            store16(to, pack16<T>(values));
        }
    };
    for (uint32_t item = threadIdx.x; item < apart * items; item += blockDim.x) {
        const uint32_t first = item / items, at = item % items;
        const bool copied = at >= turned;
        const uint32_t i = copied ? p.rotary + (at - turned) * N : at * N;
        const auto from = [&](uint32_t head) {
            const bool is_q = head < p.q_heads;
            const Heads& x = is_q ? p.q : p.k;
            const uint32_t h = is_q ? head : head - p.q_heads;
            return static_cast<const T*>(x.from) + (batch * x.batch + h * x.head + position * x.position + i);
        };
        const auto to = [&](uint32_t head) {
            const bool is_q = head < p.q_heads;
            const Heads& x = is_q ? p.q : p.k;
            const uint32_t h = is_q ? head : head - p.q_heads;
            return static_cast<T*>(x.to) + (batch * x.to_batch + h * x.to_head + position * x.to_position + i);
        };
        Lanes raw[ROPE_HEADS][2];
#pragma unroll
        for (uint32_t j = 0; j < ROPE_HEADS; ++j) {
            const uint32_t head = first + j * apart;
            if (head >= heads) continue;
            const T* x = from(head);
            raw[j][0] = lanes(x);
            if (!copied) raw[j][1] = lanes(x + half);
        }
        if (copied) {
#pragma unroll
            for (uint32_t j = 0; j < ROPE_HEADS; ++j) {
                if (first + j * apart < heads) *reinterpret_cast<Lanes*>(to(first + j * apart)) = raw[j][0];
            }
            continue;
        }
        const T* cos = static_cast<const T*>(p.cos) + table + i;
        const T* sin = static_cast<const T*>(p.sin) + table + i;
        float c1[N], c2[N], s1[N], s2[N];
        floats(lanes(cos), c1);
        floats(lanes(cos + half), c2);
        floats(lanes(sin), s1);
        floats(lanes(sin + half), s2);
#pragma unroll
        for (uint32_t j = 0; j < ROPE_HEADS; ++j) {
            const uint32_t head = first + j * apart;
            if (head >= heads) continue;
            float x1[N], x2[N];
            floats(raw[j][0], x1);
            floats(raw[j][1], x2);
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                const float2 y = turn(x1[lane], x2[lane], make_float2(c1[lane], c2[lane]),
                                      make_float2(s1[lane], s2[lane]), p.backward);
                x1[lane] = y.x;
                x2[lane] = y.y;
            }
            T* out = to(head);
            store(out, x1);
            store(out + half, x2);
        }
    }
}

template <typename T>
__device__ __forceinline__ void rope(const Rope& p) {
    if (p.vectors) {
        rope<T, LANES<T>>(p);
    } else {
        rope<T, 1>(p);
    }
}

}  // namespace ferrotune

extern "C" {
__global__ void __launch_bounds__(ferrotune::ROPE_THREADS) rope_f32(const __grid_constant__ ferrotune::Rope p) {
    ferrotune::begin();
    ferrotune::rope<float>(p);
}
__global__ void __launch_bounds__(ferrotune::ROPE_THREADS) rope_f16(const __grid_constant__ ferrotune::Rope p) {
    ferrotune::begin();
    ferrotune::rope<ferrotune::f16>(p);
}
__global__ void __launch_bounds__(ferrotune::ROPE_THREADS) rope_bf16(const __grid_constant__ ferrotune::Rope p) {
    ferrotune::begin();
    ferrotune::rope<ferrotune::bf16>(p);
}
}
