// Images to segment, and what every segmenter must hold: the same bits on any number of threads, nearly the same in
// either layout, no allocation after the first call, and the memory it says.
#pragma once

#include <limits>
#include <string>
#include <thread>

#include "allocations.hpp"
#include "check.hpp"
#include "ttt4as/c_api.h"
#include "ttt4as/segmenter.hpp"
#include "ttt4as/threads.hpp"

namespace {

struct Image {
    std::int64_t height, width, channels, fh, fw;
    std::vector<float> map, features;
};

// A smooth map with a few bumps, and features that change where they are.
Image image(std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t fh, std::int64_t fw,
            std::uint64_t seed, float scale = 1) {
    Random random(seed);
    Image made{height, width, channels, fh, fw, random.normals(height * width), {}};
    for (float& value : made.map) value *= 0.01f;
    made.features.resize(static_cast<std::size_t>(channels * fh * fw));
    const std::vector<float> direction = random.normals(channels), mean = random.normals(channels);
    std::vector<double> where(static_cast<std::size_t>(fh * fw), 0.0);
    for (int bump = 0; bump < 3; ++bump) {
        const double cy = random.uniform(), cx = random.uniform();
        const auto level = [&](double y, double x) {
            return std::exp(-((y - cy) * (y - cy) + (x - cx) * (x - cx)) * 60);
        };
        for (std::int64_t i = 0; i < height * width; ++i) {
            made.map[i] += static_cast<float>(level((i / width + 0.5) / height, (i % width + 0.5) / width));
        }
        for (std::int64_t p = 0; p < fh * fw; ++p) where[p] += level((p / fw + 0.5) / fh, (p % fw + 0.5) / fw);
    }
    for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t p = 0; p < fh * fw; ++p) {
            made.features[c * fh * fw + p] =
                scale * (mean[c] + static_cast<float>(where[p]) * direction[c] + 0.3f * random.normal());
        }
    }
    return made;
}

std::vector<Image> awkward_images() {
    return {image(64, 64, 96, 8, 8, 1),         image(61, 47, 33, 7, 11, 2),      image(96, 96, 200, 12, 12, 3, 20),
            image(20, 30, 5, 40, 50, 4),        image(50, 50, 1, 50, 50, 5),      image(33, 35, 70, 1, 1, 6),
            image(224, 224, 256, 28, 28, 7, 4), image(40, 40, 64, 9, 9, 8, 1e35f)};
}

struct Result {
    std::vector<std::uint8_t> mask;
    std::vector<float> decision;
    std::vector<std::int8_t> labels;
    ttt4as::SegmentResult info;
};

template <class Segmenter>
Result run(Segmenter& segmenter, const Image& in, const std::vector<float>* channels_last = nullptr) {
    const auto size = static_cast<std::size_t>(in.height * in.width);
    Result out{std::vector<std::uint8_t>(size, 7), std::vector<float>(size), std::vector<std::int8_t>(size, 7), {}};
    ttt4as::SegmentInput<float> input;
    input.anomaly_map = in.map.data();
    input.height = in.height;
    input.width = in.width;
    input.features = channels_last ? channels_last->data() : in.features.data();
    input.channels = in.channels;
    input.feature_height = in.fh;
    input.feature_width = in.fw;
    input.channels_last = channels_last != nullptr;
    [[maybe_unused]] const long before = allocations;
    out.info = segmenter(input, {out.mask.data(), out.decision.data(), out.labels.data()});
    out.info.svm.passes = static_cast<int>(allocations - before);  // reused to carry the count
    return out;
}

bool same(const Result& a, const Result& b) {
    return a.mask == b.mask && a.decision == b.decision && a.labels == b.labels && a.info.status == b.info.status;
}

// Two segmenters with the same options, for one and for four threads, on one image. `memory` bytes at most for
// (image, samples); decisions of the two layouts differ by less than `close`.
template <class Segmenter, class Memory>
void check_segmenter(Segmenter& one, Segmenter& four, const Image& in, Memory&& memory, float close) {
    const Result first = run(one, in), again = run(one, in), parallel = run(four, in);
    CHECK(first.info.bad == ttt4as::BadInput::none);
    CHECK(same(first, again));
    CHECK(same(first, parallel));
#if defined(COUNTS_ALLOCATIONS)
    CHECK(again.info.svm.passes == 0);
    CHECK(run(four, in).info.svm.passes == 0);
#endif
    CHECK(one.memory() <= memory(in, static_cast<std::size_t>(first.info.n_anomalous + first.info.n_nominal)));
    for (std::size_t i = 0; i < first.mask.size(); ++i) {
        CHECK(first.mask[i] == (first.decision[i] > 0));
        CHECK(first.labels[i] >= -1 && first.labels[i] <= 1);
        CHECK(std::isfinite(first.decision[i]));
    }
    // Channels last is the same image, summed in another order.
    std::vector<float> last(in.features.size());
    for (std::int64_t c = 0; c < in.channels; ++c) {
        for (std::int64_t p = 0; p < in.fh * in.fw; ++p) last[p * in.channels + c] = in.features[c * in.fh * in.fw + p];
    }
    const Result other = run(one, in, &last);
    CHECK(other.labels == first.labels && other.info.status == first.info.status);
    if (first.info.status != ttt4as::SegmentStatus::ok) return;
    for (std::size_t i = 0; i < first.mask.size(); ++i) CHECK(std::abs(other.decision[i] - first.decision[i]) < close);
}

#if defined(COUNTS_ALLOCATIONS)
// Images of other sizes in between bring no allocation; after one for which memory ran out, the others are what they
// were.
template <class Segmenter, class Make>
void check_images_that_change(Make&& make, const Image& small, const Image& large) {
    Segmenter segmenter = make();
    const Result want = run(segmenter, small);
    run(segmenter, large);
    run(segmenter, small);
    CHECK(run(segmenter, large).info.svm.passes == 0);
    with_every_failure(
        1,
        [&] {
            Segmenter fresh = make();
            run(fresh, small);
            return fresh;
        },
        [&](Segmenter& fresh) { run(fresh, large); }, [&](Segmenter& fresh) { CHECK(same(run(fresh, small), want)); });
}
#endif

// What cannot be used, and what has nothing to say.
template <class Segmenter>
void check_bad_input() {
    Segmenter segmenter;
    Image in = image(32, 32, 8, 4, 4, 9);
    std::fill(in.map.begin(), in.map.end(), 1.5f);
    const Result constant = run(segmenter, in);
    CHECK(constant.info.status == ttt4as::SegmentStatus::degenerate);
    for (auto pixel : constant.mask) CHECK(pixel == 0);
    in.map[17] = std::numeric_limits<float>::infinity();
    CHECK(run(segmenter, in).info.bad == ttt4as::BadInput::anomaly_map);
    CHECK(run(segmenter, in).info.status == ttt4as::SegmentStatus::non_finite);
    in = image(32, 32, 8, 4, 4, 9);
    in.features[5] = std::numeric_limits<float>::quiet_NaN();
    CHECK(run(segmenter, in).info.bad == ttt4as::BadInput::features);
    CHECK(run(segmenter, in).info.status == ttt4as::SegmentStatus::non_finite);
    in.height = 0;
    CHECK_THROWS(ttt4as::InvalidArgument, run(segmenter, in));
    in = image(32, 32, 8, 4, 4, 9);
    for (const std::int64_t channels : {std::int64_t(0), std::int64_t(1) << 37, std::int64_t(1) << 58}) {
        in.channels = channels;
        CHECK_THROWS(ttt4as::InvalidArgument, run(segmenter, in));
    }
}

// The message that names an option, what it takes and what it got.
template <class Segmenter, class Options, class Change>
void refuses(Change change, const std::string& message) {
    Options options;
    change(options);
    std::string said = "nothing";
    try {
        Segmenter segmenter(options);
    } catch (const ttt4as::InvalidArgument& error) {
        said = error.what();
    }
    CHECK(said == message);
}

// Several threads, each with its own.
template <class Segmenter>
void check_many_callers(const Image& in) {
    Segmenter first;
    const Result expected = run(first, in);
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
        callers.emplace_back([&] {
            Segmenter segmenter;
            for (int round = 0; round < 5; ++round) CHECK(same(run(segmenter, in), expected));
        });
    }
    for (auto& caller : callers) caller.join();
}

// The C functions give the same bits, and errors as codes. Destroys the handle.
template <class Segmenter>
void check_c_functions(ttt4as_segmenter* handle, Segmenter& segmenter, const Image& in) {
    CHECK(handle);
    const Result want = run(segmenter, in);
    std::vector<std::uint8_t> mask(want.mask.size());
    std::vector<float> decision(want.mask.size());
    std::vector<std::int8_t> labels(want.mask.size());
    CHECK(ttt4as_segment(handle, in.map.data(), in.height, in.width, in.features.data(), in.channels, in.fh, in.fw, 0,
                         mask.data(), decision.data(), labels.data()) == static_cast<int>(want.info.status));
    CHECK(mask == want.mask && decision == want.decision && labels == want.labels);
    CHECK(ttt4as_segment(handle, nullptr, 3, 3, nullptr, 1, 1, 1, 0, mask.data(), decision.data(), labels.data()) ==
          TTT4AS_INVALID_ARGUMENT);
    CHECK(ttt4as_last_error()[0] != '\0');
    ttt4as_segmenter_destroy(handle);
}

}  // namespace
