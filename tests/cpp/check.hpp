// Checks that say where they failed, and a random generator that is the same everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (false)

#define CHECK_THROWS(type, expression)                                                               \
    do {                                                                                             \
        bool thrown = false;                                                                         \
        try {                                                                                        \
            (void)(expression);                                                                      \
        } catch (const type&) {                                                                      \
            thrown = true;                                                                           \
        }                                                                                            \
        if (!thrown) {                                                                               \
            std::fprintf(stderr, "%s:%d: %s threw no %s\n", __FILE__, __LINE__, #expression, #type); \
            std::exit(1);                                                                            \
        }                                                                                            \
    } while (false)

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
    std::uint64_t bits() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_;
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(n)); }
    float normal() {
        double sum = 0;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return static_cast<float>(sum - 6);
    }
    std::vector<float> normals(std::int64_t n) {
        std::vector<float> values(static_cast<std::size_t>(n));
        for (float& value : values) value = normal();
        return values;
    }

  private:
    std::uint64_t state_;
};
