// Softmax cross-entropy of a chunk of logits: each row's loss, and in place of the logits their gradient.
#pragma once

#include <cfloat>

#include "common/memory.cuh"
#include "common/types.cuh"

namespace ferrotune {

struct CrossEntropy {
    void* logits;           // [rows, stride], 16-byte aligned; the first `classes` of a row count
    const int64_t* labels;  // [rows]
    float* losses;          // [rows]
    const float* multiplier;
    int64_t ignore_index;
    uint64_t stride;        // elements, a multiple of 16 bytes
    uint32_t classes;
    uint32_t cached;        // 16-byte vectors of a row for which there is dynamic shared memory
    float smoothing;
    float softcap;          // 0: none
    uint32_t gradient;      // 1: logits become multiplier * d loss / d logits
    uint32_t reserved;
};
static_assert(sizeof(CrossEntropy) == 72, "src/cuda/cross_entropy.rs lays it out alike");

// exp(x) for x <= 0. Where logits have 16 bits, their rounding hides the two units of 2^-22 that this one is off by.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
    if constexpr (sizeof(T) == 4) {
        return expf(x);
    } else {
        float power;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
        return power;
    }
}

// tanh(x); to 2e-7 for logits of 16 bits. Its derivative, as 1 - tanh(x)^2 would lose what is left of it for large x.
struct Tangent {
    float value;
    float slope;
};
template <typename T>
__device__ __forceinline__ Tangent hyperbolic_tangent(float x) {
    const float fall = exponential<T>(-2.0f * fabsf(x));
    const float part = __fdividef(1.0f, 1.0f + fall);
    const float slope = 4.0f * fall * part * part;
    if constexpr (sizeof(T) == 4) {
        return {tanhf(x), slope};
    } else {
        return {copysignf((1.0f - fall) * part, x), slope};
    }
}

// What a row's loss and gradient need: its largest logit, the sum of exp(logit - max), and that of the logits.
struct RowSums {
    float max = -FLT_MAX;  // finite, so that a logit of -inf counts as nothing
    float sum = 0.0f;
    float total = 0.0f;

    __device__ __forceinline__ RowSums() {}
    __device__ __forceinline__ RowSums(float max, float sum, float total) : max(max), sum(sum), total(total) {}

    template <typename T, int N>
    __device__ __forceinline__ void add(const float (&logits)[N]) {
        float largest = logits[0];
#pragma unroll
        for (int i = 1; i < N; ++i) {
            largest = fmaxf(largest, logits[i]);
        }
        if (largest > max) {
            sum *= exponential<T>(max - largest);
            max = largest;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sum += exponential<T>(logits[i] - max);
            total += logits[i];
        }
    }

    template <typename T>
    __device__ __forceinline__ void merge(float other_max, float other_sum, float other_total) {
        const float largest = fmaxf(max, other_max);
        sum = sum * exponential<T>(max - largest) + other_sum * exponential<T>(other_max - largest);
        max = largest;
        total += other_total;
    }

    template <typename T>
    __device__ __forceinline__ void merge_lanes() {
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) {
            const float other_max = __shfl_xor_sync(0xFFFFFFFFu, max, lane);
            const float other_sum = __shfl_xor_sync(0xFFFFFFFFu, sum, lane);
            merge<T>(other_max, other_sum, __shfl_xor_sync(0xFFFFFFFFu, total, lane));
        }
    }
};

// The logits that the loss is of, from those of the product: softcap * tanh(logit / softcap), or the same.
template <typename T, bool CAPPED, int N>
__device__ __forceinline__ void cap(float (&logits)[N], float softcap, float inverse) {
    if constexpr (CAPPED) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            logits[i] = softcap * hyperbolic_tangent<T>(logits[i] * inverse).value;
        }
    }
}

// Of a row, once its sums are known.
struct Gradient {
    float max;
    float by_exponential;  // multiplier / sum
    float everywhere;      // -multiplier * smoothing / classes
    float at_label;        // -multiplier * (1 - smoothing)
    uint32_t label;
    float softcap;
    float inverse;         // 1 / softcap

    // Of the N logits from class `first` on.
    template <typename T, bool CAPPED, int N>
    __device__ __forceinline__ void replace(float (&logits)[N], uint32_t first) const {
        float slopes[N];
        if constexpr (CAPPED) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const Tangent tangent = hyperbolic_tangent<T>(logits[i] * inverse);
                logits[i] = softcap * tangent.value;
                slopes[i] = tangent.slope;
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            logits[i] = fmaf(exponential<T>(logits[i] - max), by_exponential, everywhere);
        }
        if (label - first < static_cast<uint32_t>(N)) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                logits[i] += label == first + i ? at_label : 0.0f;
            }
        }
        if constexpr (CAPPED) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                logits[i] *= slopes[i];
            }
        }
    }
};

template <typename T>
__device__ __forceinline__ void unpack16(uint4 vector, float (&values)[16 / sizeof(T)]) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            values[i] = __uint_as_float(words[i]);
        } else {
            const float2 pair = unpack2<T>(words[i]);
            values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
        }
    }
}

// A block of threads a row, at most 1024 of them; shared memory keeps what it can of the row, so that the rest alone is
// read again, the latest first: from L2, as that rest of all rows in work is at most some 40 MB.
//
// Floor: the row read once and written once, 2 * classes * sizeof(T) / 2.96 TB/s; 1024 x 128256 bf16: 178 us.
template <typename T, bool CAPPED>
__device__ __forceinline__ void cross_entropy(const CrossEntropy& p) {
    constexpr uint32_t PER = 16 / sizeof(T);
    constexpr int UNROLL = 4;
    extern __shared__ uint4 cache[];
    __shared__ float maxima[32], sums_of_warps[32], totals[32];

    T* row = static_cast<T*>(p.logits) + blockIdx.x * p.stride;
    uint4* vectors = reinterpret_cast<uint4*>(row);
    const uint32_t thread = threadIdx.x, threads = blockDim.x;
    const uint32_t whole = p.classes / PER;  // vectors; a thread each takes the classes beyond them
    const uint32_t cached = min(p.cached, whole);
    const uint32_t last = whole * PER + thread;
    const int64_t label = p.labels[blockIdx.x];

    if (label == p.ignore_index) {
        if (thread == 0) p.losses[blockIdx.x] = 0.0f;
        if (p.gradient == 0) return;
        for (uint32_t i = thread; i < whole; i += threads) {
            store16(vectors + i, make_uint4(0, 0, 0, 0));
        }
        if (last < p.classes) row[last] = from_float<T>(0.0f);
        return;
    }

    const float inverse = CAPPED ? 1.0f / p.softcap : 0.0f;
    RowSums sums;
    const auto add = [&](uint4 vector) {
        float logits[PER];
        unpack16<T>(vector, logits);
        cap<T, CAPPED>(logits, p.softcap, inverse);
        sums.add<T>(logits);
    };
    uint32_t at = thread;
    for (; at + (UNROLL - 1) * threads < cached; at += UNROLL * threads) {
        uint4 loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            loaded[u] = load_once<uint4>(vectors + at + u * threads);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            cache[at + u * threads] = loaded[u];
            add(loaded[u]);
        }
    }
    for (; at < cached; at += threads) {
        const uint4 vector = load_once<uint4>(vectors + at);
        cache[at] = vector;
        add(vector);
    }
    at = cached + thread;
    for (; at + (UNROLL - 1) * threads < whole; at += UNROLL * threads) {
        uint4 loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            loaded[u] = vectors[at + u * threads];
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            add(loaded[u]);
        }
    }
    for (; at < whole; at += threads) {
        add(vectors[at]);
    }
    float rest[1] = {0.0f};
    if (last < p.classes) {
        rest[0] = to_float(row[last]);
        float capped[1] = {rest[0]};
        cap<T, CAPPED>(capped, p.softcap, inverse);
        sums.add<T>(capped);
    }

    const bool valid = label >= 0 && label < p.classes;
    float of_label[1] = {valid ? to_float(row[label]) : 0.0f};  // before anyone overwrites it
    cap<T, CAPPED>(of_label, p.softcap, inverse);
    sums.merge_lanes<T>();
    const uint32_t warp = thread / 32, lane = thread % 32;
    if (lane == 0) {
        maxima[warp] = sums.max, sums_of_warps[warp] = sums.sum, totals[warp] = sums.total;
    }
    __syncthreads();
    sums = RowSums();
    if (lane < threads / 32) {
        sums = {maxima[lane], sums_of_warps[lane], totals[lane]};
    }
    sums.merge_lanes<T>();

    if (thread == 0) {
        const float logarithm = logf(sums.sum);
        const float surprise = sums.max - of_label[0] + logarithm;
        const float spread = sums.max - sums.total / p.classes + logarithm;
        const float loss = p.smoothing == 0.0f ? surprise : surprise + p.smoothing * (spread - surprise);
        p.losses[blockIdx.x] = valid ? loss : __int_as_float(0x7FFFFFFF);
    }
    if (p.gradient == 0) return;

    const float multiplier = valid ? *p.multiplier : __int_as_float(0x7FFFFFFF);
    const Gradient gradient = {sums.max,
                               multiplier / sums.sum,
                               -multiplier * p.smoothing / p.classes,
                               -multiplier * (1.0f - p.smoothing),
                               static_cast<uint32_t>(label),
                               p.softcap,
                               inverse};
    const auto replace = [&](uint4 vector, uint32_t index) {
        float logits[PER];
        unpack16<T>(vector, logits);
        gradient.replace<T, CAPPED>(logits, index * PER);
        store16(vectors + index, pack16<T>(logits));
    };
    uint32_t end = whole;  // of the vectors that are left beyond the cached ones
    for (; cached + UNROLL * threads <= end; end -= UNROLL * threads) {
        uint4 loaded[UNROLL];
        const uint32_t top = end - 1 - thread;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            loaded[u] = vectors[top - u * threads];
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            replace(loaded[u], top - u * threads);
        }
    }
    for (at = cached + thread; at < end; at += threads) {
        replace(vectors[at], at);
    }
    for (at = thread; at < cached; at += threads) {
        replace(cache[at], at);
    }
    if (last < p.classes) {
        gradient.replace<T, CAPPED>(rest, last);
        row[last] = from_float<T>(rest[0]);
    }
}

}  // namespace ferrotune
