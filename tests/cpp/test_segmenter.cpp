// The fused method, held to images.hpp. Parity with the reference is held from Python.
#include <array>

#include "images.hpp"

int main() {
    ttt4as::set_num_threads(4);
    ttt4as::Loss loss = ttt4as::Loss::squared_hinge;
    const auto memory = [&](const Image& in, std::size_t samples) {
        const auto positions = static_cast<std::size_t>(in.fh * in.fw), side = std::size_t(in.height + in.width);
        const std::size_t channels = (static_cast<std::size_t>(in.channels) + 15) / 32 * 32 + 16;
        return (loss == ttt4as::Loss::hinge ? 7 : 2) * channels * positions * sizeof(float) + 120 * positions +
               60 * samples + 32 * side + in.map.size() / 2 + (std::size_t(1) << 20);
    };
    const std::vector<Image> images = awkward_images();
    for (const Image& in : images) {
        for (ttt4as::Loss each : {ttt4as::Loss::squared_hinge, ttt4as::Loss::hinge}) {
            loss = each;
            ttt4as::SegmenterOptions options;
            options.loss = loss;
            options.threads = 1;
            ttt4as::Segmenter one(options);
            options.threads = 4;
            ttt4as::Segmenter four(options);
            check_segmenter(one, four, in, memory, loss == ttt4as::Loss::squared_hinge ? 2e-4f : 1e30f);
        }
    }
    // Many samples, and many products of the grid's points: what the bound is made of.
    for (const auto& [size, channels, grid, nominal] :
         {std::array{128, 64, 16, 2000}, {192, 4, 8, 1 << 20}, {192, 17, 30, 3000}}) {
        Random random(4);
        Image in{size, size, channels, grid, grid, random.normals(size * size), random.normals(channels * grid * grid)};
        for (ttt4as::Loss each : {ttt4as::Loss::squared_hinge, ttt4as::Loss::hinge}) {
            ttt4as::SegmenterOptions options;
            options.loss = loss = each;
            options.n_nominal = nominal;
            options.neighbor_radius = 2;
            ttt4as::Segmenter segmenter(options);
            const Result out = run(segmenter, in);
            CHECK(segmenter.memory() <= memory(in, std::size_t(out.info.n_anomalous + out.info.n_nominal)));
        }
    }
    check_many_callers<ttt4as::Segmenter>(images[0]);
    check_bad_input<ttt4as::Segmenter>();
    {  // options that are set later hold for what was kept of the earlier ones too
        const Image in = image(64, 48, 8, 4, 4, 9);
        ttt4as::SegmenterOptions options;
        ttt4as::Segmenter segmenter(options);
        const std::int64_t before = run(segmenter, in).info.n_nominal;
        options.n_nominal = 9;
        segmenter.set_options(options);
        CHECK(before > 50 && run(segmenter, in).info.n_nominal <= 12);
        const Image turned = image(48, 64, 8, 4, 4, 9);  // of as many pixels, and another grid
        ttt4as::Segmenter fresh(options);
        CHECK(run(segmenter, turned).labels == run(fresh, turned).labels);
    }
#if defined(COUNTS_ALLOCATIONS)
    {
        ttt4as::SegmenterOptions options;
        options.n_nominal = 1000;
        const auto make = [&] { return ttt4as::Segmenter(options); };
        check_images_that_change<ttt4as::Segmenter>(make, image(64, 64, 32, 8, 8, 1), image(200, 200, 64, 20, 20, 2));
    }
#endif
    {
        Image in = image(32, 32, 8, 4, 4, 9);
        const std::vector<std::int64_t> candidates = {3, 500, 1000};
        std::vector<std::uint8_t> mask(32 * 32);
        std::vector<float> decision(32 * 32);
        std::vector<std::int8_t> labels(32 * 32);
        ttt4as::SegmentInput<float> input;
        input.anomaly_map = in.map.data();
        input.height = input.width = 32;
        input.features = in.features.data();
        input.channels = 8;
        input.feature_height = input.feature_width = 4;
        input.candidates = candidates.data();
        ttt4as::Segmenter segmenter;
        for (const auto& [n, limit] : {std::pair{3, -500}, {3, -1}, {-3, 3}}) {
            input.n_candidates = n;
            input.limit = limit;
            CHECK_THROWS(ttt4as::InvalidArgument, segmenter(input, {mask.data(), decision.data(), labels.data()}));
        }
    }
    using Options = ttt4as::SegmenterOptions;
    refuses<ttt4as::Segmenter, Options>([](Options& o) { o.C = -1; }, "C: expected a finite number > 0, got -1");
    refuses<ttt4as::Segmenter, Options>([](Options& o) { o.tol = std::numeric_limits<double>::infinity(); },
                                        "tol: expected a finite number > 0, got inf");
    refuses<ttt4as::Segmenter, Options>([](Options& o) { o.loss = static_cast<ttt4as::Loss>(2); },
                                        "loss: expected Loss::squared_hinge or Loss::hinge, got 2");
    refuses<ttt4as::Segmenter, Options>([](Options& o) { o.percentile = 100.5; },
                                        "percentile: expected a number in [0, 100], got 100.5");

    ttt4as_options options;
    ttt4as_default_options(&options);
    ttt4as_default_options(nullptr);
    ttt4as::Segmenter segmenter;
    check_c_functions(ttt4as_segmenter_create(&options), segmenter, images[1]);
    CHECK(ttt4as_segment(nullptr, nullptr, 3, 3, nullptr, 1, 1, 1, 0, nullptr, nullptr, nullptr) ==
          TTT4AS_INVALID_ARGUMENT);
    options.tol = 0;
    CHECK(!ttt4as_segmenter_create(&options));
    ttt4as_segmenter_destroy(nullptr);
    return 0;
}
