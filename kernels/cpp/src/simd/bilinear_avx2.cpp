#define TTT4AS_BUILD_AVX2
#include "simd/bilinear.inl"
