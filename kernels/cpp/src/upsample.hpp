// The decision's way to full resolution.
#pragma once

#include <cstdint>

#include "bilinear_kernels.hpp"
#include "svm_samples.hpp"

namespace ttt4as {

// Values on the features' grid -> float (height, width) and where they are > 0. `lines` holds
// 2 * width floats: each row of the grid is spread along the width once, and two of them are blended for each output
// row.
inline void upsample_decision(const double* values, const GridTap* rows, const GridTap* cols, std::int64_t height,
                              std::int64_t width, float* lines, float* decision, std::uint8_t* mask) {
    std::int64_t held[2] = {-1, -1};  // the row of the grid that each line holds
    const auto line_of = [&](std::int64_t offset, std::int64_t other) {
        for (int k = 0; k < 2; ++k) {
            if (held[k] == offset) return lines + k * width;
        }
        const int k = held[0] == other ? 1 : 0;
        held[k] = offset;
        float* line = lines + k * width;
        const double* row = values + offset;
        for (std::int64_t x = 0; x < width; ++x) {
            const double left = row[cols[x].lower];
            line[x] = static_cast<float>(left + cols[x].weight * (row[cols[x].upper] - left));
        }
        return line;
    };
    for (std::int64_t y = 0; y < height; ++y) {
        const float* top = line_of(rows[y].lower, rows[y].upper);
        const float* bottom = line_of(rows[y].upper, rows[y].lower);
        bilinear_table().decide(top, bottom, static_cast<float>(rows[y].weight), width, decision + y * width,
                                mask + y * width);
    }
}

}  // namespace ttt4as
