#define TTT4AS_BUILD_AVX512
#define TTT4AS_BUILD_VNNI
#include "simd/sketch.inl"
