#include "simd/svm.inl"
