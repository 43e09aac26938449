// Reads the NPY files that numpy.save writes: float32, C order, version 1 to 3, in the byte order of this
// (little-endian) machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Npy {
    std::vector<std::int64_t> shape;
    std::vector<float> values;
};

inline Npy read_npy(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    char magic[8];
    if (!file.read(magic, 8) || std::memcmp(magic, "\x93NUMPY", 6) != 0)
        throw std::runtime_error(path + ": not an NPY file");
    const int length_bytes = magic[6] == 1 ? 2 : 4;
    unsigned char length[4] = {};
    if (!file.read(reinterpret_cast<char*>(length), length_bytes)) throw std::runtime_error(path + ": cut short");
    const std::size_t size = length[0] | length[1] << 8 | length[2] << 16 | static_cast<std::size_t>(length[3]) << 24;
    if (size > (1u << 20)) throw std::runtime_error(path + ": header too long");
    std::string header(size, ' ');
    if (!file.read(&header[0], static_cast<std::streamsize>(size))) throw std::runtime_error(path + ": cut short");
    if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos) {
        throw std::runtime_error(path + ": expected float32 in C order, got " + header);
    }
    Npy array;
    const auto open = header.find('(', header.find("'shape'"));
    const auto close = header.find(')', open);
    if (open == std::string::npos || close == std::string::npos) throw std::runtime_error(path + ": no shape");
    std::int64_t count = 1;
    const char* text = header.c_str() + open + 1;
    while (text < header.c_str() + close) {
        char* end;
        const long long extent = std::strtoll(text, &end, 10);
        if (end == text) {
            ++text;
            continue;
        }
        if (extent < 0 || (extent > 0 && count > (std::int64_t(1) << 40) / extent)) {
            throw std::runtime_error(path + ": impossible shape");
        }
        array.shape.push_back(extent);
        count *= extent;
        text = end;
    }
    array.values.resize(static_cast<std::size_t>(count));
    const auto bytes = static_cast<std::streamsize>(array.values.size() * sizeof(float));
    if (!file.read(reinterpret_cast<char*>(array.values.data()), bytes)) throw std::runtime_error(path + ": cut short");
    return array;
}
