#include "probe.h"

#include <atomic>
#include <chrono>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace toptwo {

namespace {

double seconds_since(std::chrono::steady_clock::time_point began) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

uint64_t word(const uint8_t* p) {
  uint64_t w;
  std::memcpy(&w, p, 8);
  return w;
}

constexpr int64_t kRounds = 20'000'000;
constexpr int64_t kStreams = 4;  // of each member: one alone does not keep memory busy

#if defined(__x86_64__)
// Ten independent chains: two units, each with a latency of four or five. Named one by one, because the
// compiler keeps an array in memory.
__attribute__((target("avx2,fma"))) float fma_chain() {
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  __m256 x0 = a, x1 = a, x2 = a, x3 = a, x4 = a, x5 = a, x6 = a, x7 = a, x8 = a, x9 = a;
  for (int64_t i = 0; i < kRounds; ++i) {
    x0 = _mm256_fmadd_ps(x0, a, b), x1 = _mm256_fmadd_ps(x1, a, b), x2 = _mm256_fmadd_ps(x2, a, b);
    x3 = _mm256_fmadd_ps(x3, a, b), x4 = _mm256_fmadd_ps(x4, a, b), x5 = _mm256_fmadd_ps(x5, a, b);
    x6 = _mm256_fmadd_ps(x6, a, b), x7 = _mm256_fmadd_ps(x7, a, b), x8 = _mm256_fmadd_ps(x8, a, b);
    x9 = _mm256_fmadd_ps(x9, a, b);
    __asm__ volatile("" : "+x"(x0), "+x"(x1), "+x"(x2), "+x"(x3), "+x"(x4), "+x"(x5), "+x"(x6), "+x"(x7), "+x"(x8), "+x"(x9));
  }
  const __m256 s = _mm256_add_ps(_mm256_add_ps(x0, x1), _mm256_add_ps(x2, x3));
  const __m256 t = _mm256_add_ps(_mm256_add_ps(x4, x5), _mm256_add_ps(x6, x7));
  return _mm256_cvtss_f32(_mm256_add_ps(_mm256_add_ps(s, t), _mm256_add_ps(x8, x9)));
}

__attribute__((target("avx2"))) int int8_chain() {
  __m256i acc[8], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 16
    for (auto& x : acc) {
      __asm__ volatile("" : "+x"(b));
      x = _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      __asm__ volatile("" : "+x"(x));
    }
  for (int i = 1; i < 8; ++i) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
  return _mm256_cvtsi256_si32(acc[0]);
}

// Adds up four streams of `part` bytes that lie one after the other.
__attribute__((target("avx2"))) int64_t read_avx2(const uint8_t* base, int64_t part) {
  __m256i sum[kStreams] = {};
  for (int64_t i = 0; i < part; i += 64)
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) {
      const __m256i* line = reinterpret_cast<const __m256i*>(base + s * part + i);
      sum[s] = _mm256_add_epi64(sum[s], _mm256_add_epi64(_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)));
    }
  const __m256i total = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  return _mm256_extract_epi64(total, 0) + _mm256_extract_epi64(total, 1);
}
#endif

int64_t read_streams(const uint8_t* base, int64_t part) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) return read_avx2(base, part);
#endif
  uint64_t sum = 0;
  for (int64_t i = 0; i < part; i += 8)
    for (int64_t s = 0; s < kStreams; ++s) sum += word(base + s * part + i);
  return int64_t(sum);
}

}  // namespace

double read_bandwidth(Team& team, const uint8_t* data, int64_t bytes) {
  const int64_t part = bytes / team.size() / kStreams / 64 * 64;
  std::atomic<int64_t> sink{0};
  const auto began = std::chrono::steady_clock::now();
  team.run([&](Team::Member& member) { sink += read_streams(data + member.index() * part * kStreams, part); });
  return double(part * kStreams * team.size()) / seconds_since(began);
}

double peak(Team& team, const std::string& what) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0.0;
  const bool fma = what == "fma";
  std::atomic<int64_t> sink{0};
  const auto began = std::chrono::steady_clock::now();
  team.run([&](Team::Member&) { sink += fma ? int64_t(fma_chain()) : int8_chain(); });
  return double(team.size()) * double(kRounds) * (fma ? 10 * 16.0 : 8 * 64.0) / seconds_since(began);
#else
  return 0.0;
#endif
}

uint64_t checksum(const uint8_t* data, int64_t bytes) {
  // Four independent lanes of multiply-and-rotate keep the multiplier busy.
  constexpr uint64_t prime = 0x9E3779B97F4A7C15ull;
  uint64_t lane[4] = {prime, ~prime, prime << 1, prime >> 1};
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32)
    for (int64_t s = 0; s < 4; ++s) {
      uint64_t x = (lane[s] ^ word(data + i + 8 * s)) * prime;
      lane[s] = x << 29 | x >> 35;
    }
  uint64_t total = uint64_t(bytes);
  for (uint64_t x : lane) total = (total ^ x) * prime, total ^= total >> 32;
  for (; i < bytes; ++i) total = (total ^ data[i]) * prime, total ^= total >> 32;
  return total;
}

}  // namespace toptwo
