// The two checksums of a bundle: SHA-256 (FIPS 180-4) of every file, CRC-32 (ISO 3309) of the container.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace edgekit {

// 64 lower-case hex digits.
std::string sha256(const void* data, size_t bytes);

uint32_t crc32(const void* data, size_t bytes);

}  // namespace edgekit
