#include "simd/sketch.inl"
