// Partial sums to what they are sums of: G as the other LoRA kernels read it, or a gradient in its parameter's type.
#include "common/launch.cuh"
#include "common/lora.cuh"

namespace ferrotune {

struct ReduceJob {
    const float* partial;    // [ranges, rows, from_columns]
    void* to;                // element (row, column) at row * row_stride + column * column_stride
    uint64_t rows;
    uint64_t row_stride;
    uint64_t column_stride;
    uint32_t ranges;
    uint32_t from_columns;   // a multiple of 16
    uint32_t from_column;    // a multiple of 16
    uint32_t columns;        // that are written: r, or padded for G
    uint32_t type;           // of `to`
    uint32_t planes;         // parts that a value is written in, row_stride / planes apart
    uint32_t rows_first;     // 1: threads lie along the rows, where those are next to each other in `to`
    float scale;
};
static_assert(sizeof(ReduceJob) == 72, "src/cuda/lora/kernels.rs lays it out alike");

constexpr int MAX_REDUCE_JOBS = 8;

struct LoraReduce {
    ReduceJob jobs[MAX_REDUCE_JOBS];
};

__device__ __forceinline__ void store(void* to, uint32_t type, uint64_t at, float value) {
    switch (type) {
        case F32: static_cast<float*>(to)[at] = value; break;
        case F16: static_cast<f16*>(to)[at] = from_float<f16>(value); break;
        default: static_cast<bf16*>(to)[at] = from_float<bf16>(value); break;
    }
}

__device__ __forceinline__ void store_parts(const ReduceJob& job, uint64_t row, uint32_t column, float value) {
    uint64_t at = row * job.row_stride + column * job.column_stride;
    store(job.to, job.type, at, value);
    for (uint32_t part = 1; part < job.planes; ++part) {
        value = job.type == F16 ? low_part<f16>(value) : low_part<bf16>(value);
        at += job.row_stride / job.planes;
        store(job.to, job.type, at, value);
    }
}

// A thread four columns of a row, summed range by range; a row of blocks a job. Sums that are written along the rows
// change threads first, so that both sides of memory are taken in order.
__device__ __forceinline__ void lora_reduce(const LoraReduce& p) {
    __shared__ float turned[4 * THREADS + SEGMENT * MAX_SEGMENTS];
    const ReduceJob& job = p.jobs[blockIdx.y];
    const uint32_t chunks = (job.columns + 3) / 4;
    const uint32_t rows = THREADS / chunks;  // of a block at a time
    const uint32_t my_row = threadIdx.x / chunks, column = threadIdx.x % chunks * 4;
    for (uint64_t row0 = static_cast<uint64_t>(blockIdx.x) * rows; row0 < job.rows;
         row0 += static_cast<uint64_t>(gridDim.x) * rows) {
        const uint64_t row = row0 + my_row;
        const bool inside = my_row < rows && row < job.rows;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (inside) {
            const float* from = job.partial + row * job.from_columns + job.from_column + column;
            const uint64_t range = job.rows * job.from_columns;
#pragma unroll 8
            for (uint32_t i = 0; i < job.ranges; ++i) {
                const float4 more = __ldcs(reinterpret_cast<const float4*>(from + i * range));
                sum.x += more.x;
                sum.y += more.y;
                sum.z += more.z;
                sum.w += more.w;
            }
        }
        const float values[4] = {sum.x * job.scale, sum.y * job.scale, sum.z * job.scale, sum.w * job.scale};
        if (job.rows_first) {
            // [columns][rows], a column one longer than its rows.
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (my_row < rows) turned[(column + i) * (rows + 1) + my_row] = values[i];
            }
            __syncthreads();
            for (uint32_t index = threadIdx.x; index < job.columns * rows; index += THREADS) {
                const uint32_t to_row = index % rows, to_column = index / rows;
                if (row0 + to_row < job.rows) {
                    store_parts(job, row0 + to_row, to_column, turned[to_column * (rows + 1) + to_row]);
                }
            }
            __syncthreads();
        } else if (inside) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (column + i < job.columns) store_parts(job, row, column + i, values[i]);
            }
        }
    }
}

}  // namespace ferrotune

extern "C" __global__ void __launch_bounds__(256) lora_reduce(const __grid_constant__ ferrotune::LoraReduce p) {
    ferrotune::begin();
    ferrotune::lora_reduce(p);
}
