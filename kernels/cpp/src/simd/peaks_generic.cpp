#include "simd/peaks.inl"
