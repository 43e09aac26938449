// Checking and reading the blocks of prepared.hpp.
#include "prepared.hpp"

namespace ttt4as {
namespace {

[[noreturn]] void refuse(const std::string& expected, const std::string& got) {
    throw InvalidArgument("prepared: expected " + expected + ", got " + got);
}

std::uint64_t sum_of(const void* data, std::size_t bytes) {
    Checksum sum;
    sum.add(data, bytes);
    return sum.value();
}

std::string shape(const BlockHeader& header) {
    return "(" + std::to_string(header.rows) + ", " + std::to_string(header.cols) + ") of " +
           std::to_string(8 * header.element) + "-bit numbers";
}

}  // namespace

BlockReader::BlockReader(const void* block, std::size_t bytes, const BlockHeader& expected, bool verify) {
    BlockHeader header;
    if (!block) refuse("an address", "NULL");
    if (reinterpret_cast<std::uintptr_t>(block) % kFieldAlign) refuse("an address aligned to 64 bytes", "another one");
    if (bytes < sizeof header) refuse("a block of at least 64 bytes", std::to_string(bytes));
    std::memcpy(&header, block, sizeof header);
    if (std::memcmp(header.magic, BlockHeader::kMagic, sizeof header.magic) != 0) {
        refuse("a block that KnnIndex::save wrote", "other bytes");
    }
    if (header.version != BlockHeader::kVersion) {
        refuse("version " + std::to_string(BlockHeader::kVersion) + " of the format",
               "version " + std::to_string(header.version) + " (or a machine of the other byte order wrote it)");
    }
    if (header.rows != expected.rows || header.cols != expected.cols || header.element != expected.element) {
        refuse("the codes of a bank " + shape(expected), "those of " + shape(header));
    }
    const std::size_t payload = bytes - sizeof header;
    if (header.first_bytes > payload || header.rest_bytes != payload - header.first_bytes) {
        refuse("64 + " + std::to_string(header.first_bytes) + " + " + std::to_string(header.rest_bytes) + " bytes",
               std::to_string(bytes) + ": it is cut short or has grown");
    }
    at_ = static_cast<const char*>(block) + sizeof header;
    left_ = payload;
    if (sum_of(at_, header.first_bytes) != header.first_sum ||
        (verify && sum_of(at_ + header.first_bytes, header.rest_bytes) != header.rest_sum)) {
        refuse("a block as it was written", "one that has changed since: its checksum differs");
    }
}

const char* BlockReader::take(std::size_t bytes) {
    require(bytes <= left_);
    const std::size_t padded = (bytes + kFieldAlign - 1) / kFieldAlign * kFieldAlign;
    require(padded <= left_);
    const char* from = at_;
    at_ += padded;
    left_ -= padded;
    return from;
}

std::size_t BlockReader::count(std::size_t size) {
    std::uint64_t n;
    std::memcpy(&n, take(sizeof n), sizeof n);
    require(n <= left_ / size);
    return static_cast<std::size_t>(n);
}

void BlockReader::require(bool holds) const {
    if (!holds) refuse("fields that fit together", "others");
}

}  // namespace ttt4as
