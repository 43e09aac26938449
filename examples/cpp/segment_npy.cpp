// segment_npy MAP.npy FEATURES.npy MASK.pgm [DECISION.f32]: the mask of one image, from a float32 (H, W) anomaly map
// and float32 (C, h, w) features. DECISION.f32 receives the decision map as raw floats.
#include <cstdio>
#include <exception>

#include "npy.hpp"
#include "ttt4as/segmenter.hpp"

int main(int argc, char** argv) try {
    if (argc < 4 || argc > 5) {
        std::fprintf(stderr, "usage: %s MAP.npy FEATURES.npy MASK.pgm [DECISION.f32]\n", argv[0]);
        return 2;
    }
    const Npy map = read_npy(argv[1]), features = read_npy(argv[2]);
    if (map.shape.size() != 2 || features.shape.size() != 3) throw std::runtime_error("expected (H, W) and (C, h, w)");
    const std::int64_t height = map.shape[0], width = map.shape[1];
    const auto size = static_cast<std::size_t>(height * width);
    std::vector<std::uint8_t> mask(size);
    std::vector<float> decision(size);
    std::vector<std::int8_t> labels(size);

    ttt4as::Segmenter segmenter;  // the paper's options; keep it: it keeps its memory
    ttt4as::SegmentInput<float> input;
    input.anomaly_map = map.values.data();
    input.height = height;
    input.width = width;
    input.features = features.values.data();
    input.channels = features.shape[0];
    input.feature_height = features.shape[1];
    input.feature_width = features.shape[2];
    const ttt4as::SegmentResult result = segmenter(input, {mask.data(), decision.data(), labels.data()});
    if (result.bad != ttt4as::BadInput::none) throw std::runtime_error("expected finite values");
    std::printf("status %d, %lld anomalous and %lld nominal samples, gap %.1e\n", static_cast<int>(result.status),
                static_cast<long long>(result.n_anomalous), static_cast<long long>(result.n_nominal), result.svm.gap);

    for (auto& pixel : mask) pixel = pixel ? 255 : 0;
    std::ofstream image(argv[3], std::ios::binary);
    image << "P5\n" << width << ' ' << height << "\n255\n";
    image.write(reinterpret_cast<const char*>(mask.data()), static_cast<std::streamsize>(size));
    if (argc == 5) {
        std::ofstream raw(argv[4], std::ios::binary);
        raw.write(reinterpret_cast<const char*>(decision.data()), static_cast<std::streamsize>(size * sizeof(float)));
        if (!raw) throw std::runtime_error("cannot write the decision map");
    }
    if (!image) throw std::runtime_error("cannot write the mask");
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "segment_npy: %s\n", error.what());
    return 1;
}
