// How kernels follow one another in a stream.
#pragma once

namespace ferrotune {

// Every kernel's first statement. From sm_90 on kernels are launched "programmatically": the blocks of the next one may
// take places as soon as all of this one's have begun, and wait in turn until this one is done and what it wrote is
// seen. An `early` kernel does not wait here but in finish(): it neither reads nor overwrites what the kernel before it
// writes or reads. What came before that one is done all the same, as it has begun.
__device__ __forceinline__ void begin([[maybe_unused]] bool early = false) {
#if __CUDA_ARCH__ >= 900
    if (!early) asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The last statement of one that may be early, so that whoever waits for it waits for the kernel before it, too.
__device__ __forceinline__ void finish([[maybe_unused]] bool early) {
#if __CUDA_ARCH__ >= 900
    if (early) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace ferrotune
