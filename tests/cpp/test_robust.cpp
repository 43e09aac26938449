// The robust preset, held to images.hpp. Parity with the reference is held from Python.
#include "images.hpp"
#include "ttt4as/robust.hpp"

int main() {
    ttt4as::set_num_threads(4);
    // The lattice of half a cell has at most four places for each position of the features, or the map's pixels.
    const auto memory = [](const Image& in, std::size_t samples) {
        const auto channels = static_cast<std::size_t>(in.channels);
        const std::size_t lattice = std::min(in.map.size(), 20 * static_cast<std::size_t>(in.fh * in.fw));
        return 10 * samples * (channels + 16) * sizeof(float) + 40 * lattice +
               12 * static_cast<std::size_t>(in.fh * in.fw) + 24 * static_cast<std::size_t>(in.height + in.width) +
               400 * channels + (std::size_t(4) << 20);
    };
    const std::vector<Image> images = awkward_images();
    for (const Image& in : images) {
        for (ttt4as::Loss loss : {ttt4as::Loss::squared_hinge, ttt4as::Loss::hinge}) {
            for (bool standardize : {true, false}) {
                ttt4as::RobustOptions options;
                options.loss = loss;
                options.standardize = standardize;
                const bool exact = standardize && loss == ttt4as::Loss::squared_hinge;
                if (exact) options.tol = 1e-8;
                options.threads = 1;
                ttt4as::RobustSegmenter one(options);
                options.threads = 4;
                ttt4as::RobustSegmenter four(options);
                check_segmenter(one, four, in, memory, exact ? 2e-3f : 1e30f);
            }
        }
    }
    {  // as much on any number of threads
        ttt4as::set_num_threads(256);
        const Image in = image(224, 224, 128, 28, 28, 3);
        std::size_t held[2];
        for (int many = 0; many < 2; ++many) {
            ttt4as::RobustOptions options;
            options.threads = many ? 256 : 8;
            ttt4as::RobustSegmenter segmenter(options);
            run(segmenter, in);
            held[many] = segmenter.memory();
        }
        CHECK(held[0] == held[1]);
        ttt4as::set_num_threads(4);
    }
    check_many_callers<ttt4as::RobustSegmenter>(images[0]);
    check_bad_input<ttt4as::RobustSegmenter>();
#if defined(COUNTS_ALLOCATIONS)
    for (const double C : {0.01, 1.0, 100.0}) {  // one route of the SVM and the other
        ttt4as::RobustOptions options;
        options.C = C;
        options.n_core = 300;
        options.n_background = 500;
        const auto make = [&] { return ttt4as::RobustSegmenter(options); };
        check_images_that_change<ttt4as::RobustSegmenter>(make, image(8, 8, 300, 2, 2, 1),
                                                          image(128, 128, 300, 32, 32, 2));
    }
#endif
    using Options = ttt4as::RobustOptions;
    const double infinite = std::numeric_limits<double>::infinity();
    const struct {
        double Options::* option;
        double value;
        const char* message;
    } beyond[] = {
        {&Options::nominal_share, 1, "nominal_share: expected a number in [0, 0.99], got 1"},
        {&Options::nominal_weight, -1, "nominal_weight: expected a number in [0, 1], got -1"},
        {&Options::base_quantile, 2, "base_quantile: expected a number in [0, 1], got 2"},
        {&Options::core, 1, "core: expected a number in [0, 0.99], got 1"},
        {&Options::hard_share, 2, "hard_share: expected a number in [0, 1], got 2"},
        {&Options::size_exponent, 3, "size_exponent: expected a number in [0, 2], got 3"},
        {&Options::score_weight, -1, "score_weight: expected a finite number >= 0, got -1"},
    };
    for (const auto& one : beyond) {
        refuses<ttt4as::RobustSegmenter, Options>([&](Options& o) { o.*one.option = one.value; }, one.message);
    }
    refuses<ttt4as::RobustSegmenter, Options>([](Options& o) { o.height = 1; },
                                              "height: expected a number in [0.01, 0.99], got 1");
    refuses<ttt4as::RobustSegmenter, Options>([&](Options& o) { o.nominal_level = infinite; },
                                              "nominal_level: expected a finite number, got inf");
    refuses<ttt4as::RobustSegmenter, Options>([&](Options& o) { o.core_weight = infinite; },
                                              "core_weight: expected a finite number > 0, got inf");
    refuses<ttt4as::RobustSegmenter, Options>([&](Options& o) { o.background_weight = infinite; },
                                              "background_weight: expected a finite number > 0, got inf");
    refuses<ttt4as::RobustSegmenter, Options>([&](Options& o) { o.tol = infinite; },
                                              "tol: expected a finite number > 0, got inf");
    refuses<ttt4as::RobustSegmenter, Options>([](Options& o) { o.n_core = -3; },
                                              "n_core: expected an integer >= 1, got -3");

    ttt4as_robust_options options;
    ttt4as_default_robust_options(&options);
    CHECK(std::isnan(options.nominal_level) && std::isnan(options.height));
    ttt4as::RobustSegmenter segmenter;
    check_c_functions(ttt4as_robust_segmenter_create(&options), segmenter, images[1]);
    ttt4as::RobustOptions calibrated;
    options.nominal_level = *(calibrated.nominal_level = 0.4);
    options.height = *(calibrated.height = 0.6);
    options.recentre = calibrated.recentre = false;
    segmenter.set_options(calibrated);
    check_c_functions(ttt4as_robust_segmenter_create(&options), segmenter, images[1]);
    calibrated = {};
    calibrated.n_core = calibrated.n_background = std::numeric_limits<std::int64_t>::max();
    calibrated.hard_share = 1;
    segmenter.set_options(calibrated);  // as many samples as an integer holds
    CHECK(run(segmenter, images[1]).info.n_nominal > 0);
    options.recentre = 2;
    CHECK(!ttt4as_robust_segmenter_create(&options));
    CHECK(std::string(ttt4as_last_error()) == "recentre: expected 0 or 1, got 2");
    return 0;
}
