// How a function that runs on both sides is marked: inlined into each instruction set's copy of a CPU loop,
// and a __host__ __device__ function under nvcc.
#pragma once

#if defined(__CUDACC__)
#define NNFAST_UNROLL _Pragma("unroll")
#define NNFAST_INLINE __host__ __device__ __forceinline__
#else
#define NNFAST_UNROLL
#define NNFAST_INLINE inline __attribute__((always_inline))
#endif
