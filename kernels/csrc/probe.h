// What this machine can do at most, measured with the team that computes: the figures that benchmarks
// are read beside. And the checksum of packed files.
#pragma once

#include <cstdint>
#include <string>

#include "team.h"

namespace toptwo {

// Bytes per second that the team reads from memory, each member in four streams.
double read_bandwidth(Team& team, const uint8_t* data, int64_t bytes);

// Operations per second (a multiply-add is two) from registers: "fma" in f32, or "int8" with AVX2's
// multiply-add chain. 0 where the processor lacks the instructions.
double peak(Team& team, const std::string& what);

// 64 bits over all bytes, at the speed of memory. It finds damage, not forgery.
uint64_t checksum(const uint8_t* data, int64_t bytes);

}  // namespace toptwo
