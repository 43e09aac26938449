#define TTT4AS_BUILD_AVX2
#define TTT4AS_BUILD_VNNI
#include "simd/sketch.inl"
