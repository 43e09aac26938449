#define TTT4AS_BUILD_AVX512
#include "simd/bilinear.inl"
