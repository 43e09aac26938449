// Element types and array views that every part of the core shares. Nothing here owns memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "ttt4as/common.hpp"

namespace ttt4as {

// IEEE 754 binary16, as NumPy and torch store float16: storage only, arithmetic happens in float.
struct TTT4AS_API Half {
    std::uint16_t bits;
};

inline float to_float(Half value) {
    const std::uint32_t exponent = (value.bits >> 10) & 0x1Fu;
    const std::uint32_t mantissa = value.bits & 0x3FFu;
    std::uint32_t bits;
    if (exponent == 0) {
        // Subnormal: an integer times 2^-24. Never a subnormal float, so flush-to-zero modes do not change it.
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &magnitude, sizeof bits);
    } else {
        const std::uint32_t bias = exponent == 0x1Fu ? 255u - 31u : 127u - 15u;
        bits = ((exponent + bias) << 23) | (mantissa << 13);
    }
    bits |= static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Rounds to nearest, ties to even; overflow becomes infinity, NaN stays NaN. Hot loops that use an instruction for it
// may give another NaN, with the upper bits of the float's.
inline Half to_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7FFFFFFFu;
    std::uint32_t result;
    if (bits >= 0x47800000u) {  // at least 2^16
        result = bits > 0x7F800000u ? 0x7E00u : 0x7C00u;
    } else if (bits < 0x38800000u) {  // below 2^-14: adding 1/2 makes the float adder round at 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        std::memcpy(&result, &magnitude, sizeof result);
        result -= 0x3F000000u;
    } else {
        result = (bits - (112u << 23) + 0xFFFu + ((bits >> 13) & 1u)) >> 13;
    }
    return Half{static_cast<std::uint16_t>(result | sign)};
}

// The upper half of a float, as torch stores bfloat16: storage only, arithmetic happens in float.
struct TTT4AS_API BFloat16 {
    std::uint16_t bits;
};

inline float to_float(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Rounds to nearest, ties to even; overflow becomes infinity, NaN stays NaN.
inline BFloat16 to_bfloat16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return BFloat16{0x7FC0u};
    return BFloat16{static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

// What a stored element is computed in, and the two conversions.
template <class T>
struct Element;

template <>
struct Element<Half> {
    using Compute = float;
    static float load(Half value) { return to_float(value); }
    static Half store(float value) { return to_half(value); }
};

template <>
struct Element<BFloat16> {
    using Compute = float;
    static float load(BFloat16 value) { return to_float(value); }
    static BFloat16 store(float value) { return to_bfloat16(value); }
};

template <>
struct Element<float> {
    using Compute = float;
    static float load(float value) { return value; }
    static float store(float value) { return value; }
};

template <>
struct Element<double> {
    using Compute = double;
    static double load(double value) { return value; }
    static double store(double value) { return value; }
};

// A feature map (channels, height, width) wherever its elements lie: strides count elements and may be zero or
// negative.
template <class T>
struct FeatureView {
    const T* data;
    std::int64_t channels, height, width;
    std::int64_t stride_channel, stride_row, stride_col;

    const T* at(std::int64_t channel, std::int64_t row, std::int64_t col) const {
        return data + channel * stride_channel + row * stride_row + col * stride_col;
    }
};

}  // namespace ttt4as
