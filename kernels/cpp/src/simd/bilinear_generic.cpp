#include "simd/bilinear.inl"
