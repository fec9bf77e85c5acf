// The Python face of the CPU backend. It holds no kernels yet: it reports what the processor
// offers, so that the build and the run-time dispatch on instruction sets are in place.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace nb = nanobind;

namespace {

// Names of the instruction sets that kernels can be dispatched on, best last.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) found.emplace_back("avx512");
  if (__builtin_cpu_supports("avx512vnni")) found.emplace_back("avx512_vnni");
#endif
  return found;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU backend of toptwo_kernels.";
  m.def("instruction_sets", &instruction_sets, "Instruction sets of this processor, best last.");
}
