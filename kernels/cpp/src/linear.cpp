// The tables of linear.hpp and svm_kernels.hpp for the instruction set in use.
#include "linear.hpp"

#include "by_isa.hpp"
#include "svm_kernels.hpp"

namespace ttt4as {
namespace {

const LinearTable& table() noexcept { return TTT4AS_BY_ISA(linear_table); }

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

const SvmKernels& svm_kernels() noexcept { return TTT4AS_BY_ISA(svm_table); }

}  // namespace ttt4as
