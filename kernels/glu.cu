#include "glu.cuh"

#define FERROTUNE_GLU(NAME, T, BACKWARD)                                                                  \
    __global__ void __launch_bounds__(ferrotune::GLU_THREADS) NAME(const __grid_constant__ ferrotune::Glu p) { \
        ferrotune::begin();                                                                               \
        ferrotune::glu<T, BACKWARD>(p);                                                                   \
    }

extern "C" {
FERROTUNE_GLU(glu_f32, float, false)
FERROTUNE_GLU(glu_f16, ferrotune::f16, false)
FERROTUNE_GLU(glu_bf16, ferrotune::bf16, false)
FERROTUNE_GLU(glu_backward_f32, float, true)
FERROTUNE_GLU(glu_backward_f16, ferrotune::f16, true)
FERROTUNE_GLU(glu_backward_bf16, ferrotune::bf16, true)
}
