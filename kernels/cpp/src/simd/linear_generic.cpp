#include "simd/linear.inl"
