#include "gemm_sm90a.cuh"

// nt: W is [w, depth]; nn: [depth, w]; gated: nt of gate and up.
#define FERROTUNE_GEMM(name, ...)                                                        \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) name( \
        const __grid_constant__ ferrotune::Gemm p) {                                     \
        ferrotune::gemm<__VA_ARGS__>(p);                                                 \
    }

FERROTUNE_GEMM(gemm_nt_f16, ferrotune::f16, 0, false)
FERROTUNE_GEMM(gemm_nt_bf16, ferrotune::bf16, 0, false)
FERROTUNE_GEMM(gemm_nn_f16, ferrotune::f16, 1, false)
FERROTUNE_GEMM(gemm_nn_bf16, ferrotune::bf16, 1, false)
FERROTUNE_GEMM(gemm_gated_f16, ferrotune::f16, 0, true)
FERROTUNE_GEMM(gemm_gated_bf16, ferrotune::bf16, 0, true)
