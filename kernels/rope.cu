// Rotary position embeddings (Su et al., 2021) of queries and keys, in the half-split layout of GPT-NeoX and Llama.
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

constexpr int ROPE_THREADS = 512;

// y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 of elements i and i + rotary/2; backward is its transpose.
__device__ __forceinline__ float2 turn(float x1, float x2, float2 c, float2 s, bool backward) {
    return backward ? make_float2(x1 * c.x + x2 * s.y, x2 * c.y - x1 * s.x)
                    : make_float2(x1 * c.x - x2 * s.x, x2 * c.y + x1 * s.y);
}

// A block a token. Floor: 2 * (q_heads + k_heads) * size * sizeof(T) a token over 2.96 TB/s.
template <typename T, int N>
__device__ __forceinline__ void rope(const Rope& p) {
    uint32_t position = blockIdx.x % p.length;
    uint32_t batch = blockIdx.x / p.length;
    uint32_t half = p.rotary / 2;
    uint32_t turned = half / N;
    uint32_t items = turned + (p.size - p.rotary) / N;  // of a head
    uint32_t all = (p.q_heads + p.k_heads) * items;
    uint64_t table = batch * p.table_batch + position * p.table_position;
    const T* cos = static_cast<const T*>(p.cos) + table;
    const T* sin = static_cast<const T*>(p.sin) + table;
    for (uint32_t item = threadIdx.x; item < all; item += blockDim.x) {
        uint32_t head = item / items;
        uint32_t at = item % items;
        bool is_q = head < p.q_heads;
        const Heads& x = is_q ? p.q : p.k;
        uint32_t h = is_q ? head : head - p.q_heads;
        const T* from = static_cast<const T*>(x.from) + batch * x.batch + h * x.head + position * x.position;
        T* to = static_cast<T*>(x.to) + batch * x.to_batch + h * x.to_head + position * x.to_position;
        if (at >= turned) {
            uint32_t i = p.rotary + (at - turned) * N;
            if constexpr (N == 1) {
                to[i] = from[i];
            } else {
                store16(to + i, *reinterpret_cast<const uint4*>(from + i));
            }
            continue;
        }
        uint32_t i = at * N;
        if constexpr (N == 1) {
            float2 y = turn(to_float(from[i]), to_float(from[i + half]),
                            make_float2(to_float(cos[i]), to_float(cos[i + half])),
                            make_float2(to_float(sin[i]), to_float(sin[i + half])), p.backward);
            to[i] = from_float<T>(y.x);
            to[i + half] = from_float<T>(y.y);
        } else {
            float x1[N], x2[N], c1[N], c2[N], s1[N], s2[N];
            unpack16<T>(*reinterpret_cast<const uint4*>(from + i), x1);
            unpack16<T>(*reinterpret_cast<const uint4*>(from + i + half), x2);
            unpack16<T>(*reinterpret_cast<const uint4*>(cos + i), c1);
            unpack16<T>(*reinterpret_cast<const uint4*>(cos + i + half), c2);
            unpack16<T>(*reinterpret_cast<const uint4*>(sin + i), s1);
            unpack16<T>(*reinterpret_cast<const uint4*>(sin + i + half), s2);
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                float2 y = turn(x1[lane], x2[lane], make_float2(c1[lane], c2[lane]),
                                make_float2(s1[lane], s2[lane]), p.backward);
                x1[lane] = y.x;
                x2[lane] = y.y;
            }
            store16(to + i, pack16<T>(x1));
            store16(to + i + half, pack16<T>(x2));
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
