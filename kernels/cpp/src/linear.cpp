// The tables of linear.hpp and svm_kernels.hpp for the instruction set in use.
#include "linear.hpp"

#include "svm_kernels.hpp"
#include "ttt4as/simd.hpp"

namespace ttt4as {
namespace {

const LinearTable& table() noexcept {
#if defined(TTT4AS_HAVE_X86_VARIANTS)
    if (isa() == Isa::avx512) return avx512::linear_table;
    if (isa() == Isa::avx2) return avx2::linear_table;
#endif
    return generic::linear_table;
}

}  // namespace

template <>
const LinearKernels<float, float>& linear_kernels<float, float>() noexcept {
    return table().ff;
}
template <>
const LinearKernels<float, double>& linear_kernels<float, double>() noexcept {
    return table().fd;
}
template <>
const LinearKernels<double, double>& linear_kernels<double, double>() noexcept {
    return table().dd;
}
template <>
MaxAbs<float> max_abs_kernel<float>() noexcept {
    return table().max_abs_f;
}
template <>
MaxAbs<double> max_abs_kernel<double>() noexcept {
    return table().max_abs_d;
}
template <>
Moments<float> moments_kernel<float>() noexcept {
    return table().moments_f;
}
template <>
Moments<double> moments_kernel<double>() noexcept {
    return table().moments_d;
}

const SvmKernels& svm_kernels() noexcept {
#if defined(TTT4AS_HAVE_X86_VARIANTS)
    if (isa() == Isa::avx512) return avx512::svm_table;
    if (isa() == Isa::avx2) return avx2::svm_table;
#endif
    return generic::svm_table;
}

}  // namespace ttt4as
