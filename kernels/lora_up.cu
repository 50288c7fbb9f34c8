#include "lora_up.cuh"

extern "C" {
__global__ void __launch_bounds__(256) lora_up_f16(const __grid_constant__ ferrotune::LoraUp p) {
    ferrotune::lora_up<ferrotune::f16>(p);
}
__global__ void __launch_bounds__(256) lora_up_bf16(const __grid_constant__ ferrotune::LoraUp p) {
    ferrotune::lora_up<ferrotune::bf16>(p);
}
}
