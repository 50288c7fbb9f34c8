// Adapters to panels, and biases to one f32 vector: what the other LoRA kernels read.
#include "common/launch.cuh"
#include "common/lora.cuh"

namespace ferrotune {

// One matrix to some columns of a panel, or (`bias_of` set in place of a panel) two vectors to one.
struct PackJob {
    const void* from;      // element (row, column) at row * row_stride + column * column_stride
    const void* more;      // bias jobs: the other vector, or null
    void* to;
    uint64_t rows;         // of the panel: k or n
    uint64_t row_stride;
    uint64_t column_stride;
    uint32_t columns;      // r
    uint32_t parts;        // segments of the panel that are written, zeros beyond r
    uint32_t to_stride;    // elements a row of the panel
    uint32_t to_column;
    uint32_t to_plane;     // elements from a part of a value to the next
    uint32_t planes;       // 0 for a bias: to[i] = from[i] + scale * more[i] in f32
    uint32_t type;         // of `from`
    uint32_t more_type;
    float scale;
    uint32_t reserved;
};

constexpr int MAX_PACK_JOBS = 12;

struct LoraPack {
    PackJob jobs[MAX_PACK_JOBS];
};
static_assert(sizeof(PackJob) == 88, "src/cuda/lora/kernels.rs lays it out alike");

__device__ __forceinline__ float element(const void* from, uint32_t type, uint64_t at) {
    switch (type) {
        case F32: return static_cast<const float*>(from)[at];
        case F16: return to_float(static_cast<const f16*>(from)[at]);
        default: return to_float(static_cast<const bf16*>(from)[at]);
    }
}

// Eight columns of a row, all loads under way together; zeros beyond r.
template <typename From>
__device__ __forceinline__ void load_eight(float (&values)[8], const PackJob& job, uint64_t row, uint32_t first) {
    const From* from = static_cast<const From*>(job.from) + row * job.row_stride + first * job.column_stride;
    From loaded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        loaded[i] = first + i < job.columns ? from[i * job.column_stride] : from_float<From>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(loaded[i]);
}

// A thread eight columns of a row; threads lie as `from` does; a row of blocks a job.
template <typename T>
__device__ __forceinline__ void lora_pack(const LoraPack& p) {
    const PackJob& job = p.jobs[blockIdx.y];
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (job.planes == 0) {
        for (; index < job.rows; index += step) {
            float value = job.from != nullptr ? element(job.from, job.type, index * job.row_stride) : 0.0f;
            if (job.more != nullptr) value += job.scale * element(job.more, job.more_type, index * job.column_stride);
            static_cast<float*>(job.to)[index] = value;
        }
        return;
    }
    const uint32_t eights = job.parts * 2;
    const bool rows_first = job.column_stride != 1;  // as `from` lies
    for (; index < job.rows * eights; index += step) {
        const uint64_t row = rows_first ? index % job.rows : index / eights;
        const uint32_t first = static_cast<uint32_t>(rows_first ? index / job.rows : index % eights) * 8;
        float values[8];
        switch (job.type) {
            case F32: load_eight<float>(values, job, row, first); break;
            case F16: load_eight<f16>(values, job, row, first); break;
            default: load_eight<bf16>(values, job, row, first); break;
        }
        T* to = static_cast<T*>(job.to) + row * job.to_stride + job.to_column + first;
        for (uint32_t plane = 0; plane < job.planes; ++plane, to += job.to_plane) {
            *reinterpret_cast<uint4*>(to) = pack16<T>(values);
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = low_part<T>(values[i]);
        }
    }
}

}  // namespace ferrotune

extern "C" {
__global__ void __launch_bounds__(256) lora_pack_f16(const __grid_constant__ ferrotune::LoraPack p) {
    ferrotune::begin();
    ferrotune::lora_pack<ferrotune::f16>(p);
}
__global__ void __launch_bounds__(256) lora_pack_bf16(const __grid_constant__ ferrotune::LoraPack p) {
    ferrotune::begin();
    ferrotune::lora_pack<ferrotune::bf16>(p);
}
}
