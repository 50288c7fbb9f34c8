#include "gemm_sm90a.cuh"

// nt: W is [w, depth]; nn: [depth, w].
#define FERROTUNE_GEMM(name, T, down_rows)                                              \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) name( \
        const __grid_constant__ ferrotune::Gemm p) {                                    \
        ferrotune::gemm<ferrotune::T, down_rows>(p);                                    \
    }

FERROTUNE_GEMM(gemm_nt_f16, f16, 0)
FERROTUNE_GEMM(gemm_nt_bf16, bf16, 0)
FERROTUNE_GEMM(gemm_nn_f16, f16, 1)
FERROTUNE_GEMM(gemm_nn_bf16, bf16, 1)
