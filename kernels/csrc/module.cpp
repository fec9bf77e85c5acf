// The Python face of the CPU backend. Buffers come in as addresses: no link to torch, no copies. The
// Python side (toptwo_kernels/cpu) checks shapes and keeps buffers alive.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "probe.h"
#include "program.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace toptwo;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct NamedKernels {
  const Kernels* kernels;
  bool available;
};

std::vector<NamedKernels> all_kernels() {
  std::vector<NamedKernels> found{{&kScalar, true}};
#if defined(TOPTWO_X86)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  found.push_back({&kAvx2, avx2});
  found.push_back({&kAvx512, avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")});
#endif
  return found;
}

// Names of the instruction sets that this build has kernels for and this processor runs, best last.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const NamedKernels& each : all_kernels())
    if (each.available) names.emplace_back(each.kernels->name);
  return names;
}

const Kernels& find_kernels(const std::string& name) {
  for (const NamedKernels& each : all_kernels())
    if (each.available && name == each.kernels->name) return *each.kernels;
  throw std::invalid_argument("no kernels for the instruction set " + name + " on this processor");
}

Matrix matrix(int format, int64_t rows, int64_t cols, Address data) {
  return {Format(format), rows, cols, at<const uint8_t>(data)};
}

// Threads and kernels, shared by all programs of a backend.
struct Workers {
  Team team;
  const Kernels& kernels;
  Workers(int threads, const std::string& isa, bool pinned) : team(threads, pinned), kernels(find_kernels(isa)) {}

  // source_format: Format of the source's numbers. Packs `count` matrices that lie one after the other.
  void pack(Address source, int source_format, int64_t source_rows, bool paired, int format, int64_t rows,
            int64_t cols, int64_t count, Address target) {
    constexpr int64_t chunk = 4;
    const Matrix shape = matrix(format, rows, cols, target);
    const int64_t chunks = (shape.blocks() + chunk - 1) / chunk;
    const int64_t source_bytes = source_rows * cols * (Format(source_format) == Format::f32 ? 4 : 2);
    team.run([&](Team::Member& member) {
      member.for_each(count * chunks, [&](int64_t i) {
        Matrix one = shape;
        one.data += i / chunks * shape.bytes();
        const int64_t begin = i % chunks * chunk;
        kernels.pack({at<const uint8_t>(source) + i / chunks * source_bytes, source_rows, paired,
                      Format(source_format), one, begin, std::min(shape.blocks(), begin + chunk)});
      });
    });
  }

  void unpack(int format, int64_t rows, int64_t cols, Address data, Address target) {
    const Matrix m = matrix(format, rows, cols, data);
    team.run([&](Team::Member& member) {
      member.for_each(rows, [&](int64_t row) { kernels.unpack_row(m, row, at<float>(target) + row * cols); });
    });
  }

  // params: per row temperature, top_k, top_p, min_p, uniform.
  void sample(Address logits, int64_t rows, int64_t vocab, Address params, Address ids) {
    team.run([&](Team::Member& member) {
      member.for_each(rows, [&](int64_t row) {
        const double* p = at<const double>(params) + 5 * row;
        at<int64_t>(ids)[row] = kernels.sample(
            {at<const float>(logits) + row * vocab, vocab, p[0], p[2], p[3], p[4], int64_t(p[1])});
      });
    });
  }
};

int64_t matrix_bytes(int format, int64_t rows, int64_t cols) { return matrix(format, rows, cols, 0).bytes(); }

// Advice on a range of pages: `huge` ones for weights, or that the source of a packed tensor is done with.
void advise(Address address, int64_t bytes, const std::string& advice) {
#if defined(__linux__)
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = round_up(int64_t(address), page), end = int64_t(address + bytes) / page * page;
  if (end > begin) madvise(at<void>(Address(begin)), size_t(end - begin), advice == "huge" ? MADV_HUGEPAGE : MADV_DONTNEED);
#endif
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU backend of toptwo_kernels.";
  m.def("instruction_sets", &instruction_sets, "Instruction sets of this processor that kernels exist for, best last.");
  m.def("matrix_bytes", &matrix_bytes, "weight_format"_a, "rows"_a, "cols"_a);
  m.def("advise", &advise, "address"_a, "num_bytes"_a, "advice"_a);
  m.def("checksum", [](Address data, int64_t bytes) { return checksum(at<const uint8_t>(data), bytes); },
        nb::call_guard<nb::gil_scoped_release>(), "data"_a, "num_bytes"_a);

  nb::class_<Workers>(m, "Workers")
      .def(nb::init<int, const std::string&, bool>(), "threads"_a, "instruction_set"_a, "pinned"_a = false)
      .def_prop_ro("threads", [](const Workers& w) { return w.team.size(); })
      .def_prop_ro("instruction_set", [](const Workers& w) { return w.kernels.name; })
      .def("pack", &Workers::pack, nb::call_guard<nb::gil_scoped_release>())
      .def("unpack", &Workers::unpack, nb::call_guard<nb::gil_scoped_release>())
      .def("sample", &Workers::sample, nb::call_guard<nb::gil_scoped_release>())
      .def("read_bandwidth", [](Workers& w, Address data, int64_t bytes) {
        return read_bandwidth(w.team, at<const uint8_t>(data), bytes);
      }, nb::call_guard<nb::gil_scoped_release>())
      .def("peak", [](Workers& w, const std::string& what) { return peak(w.team, what); },
           nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Program>(m, "Program")
      .def("__init__", [](Program* self, Workers& w, int64_t max_tokens) {
        new (self) Program(w.team, w.kernels, max_tokens);
      }, nb::keep_alive<1, 2>(), "workers"_a, "max_tokens"_a)
      .def("__len__", &Program::size)
      .def("embed", [](Program& p, int format, int64_t rows, int64_t cols, Address table, Address out) {
        p.add(make_embed(matrix(format, rows, cols, table), at<float>(out)));
      })
      .def("norm", [](Program& p, bool centered, Address x, Address weight, Address bias, float eps, int64_t size,
                      int64_t stride, int64_t first, int64_t count, Address out, int extent) {
        p.add(make_norm(centered, at<float>(x), {at<float>(weight), at<float>(bias), eps, size},
                        {stride, first, count}, at<float>(out), Extent(extent)));
      })
      .def("select", [](Program& p, Address x, int64_t size, Address out) {
        p.add(make_select(at<float>(x), size, at<float>(out)));
      })
      .def("add", [](Program& p, Address x, Address y, int64_t size, int extent) {
        p.add(make_add(at<float>(x), at<float>(y), size, Extent(extent)));
      })
      .def("scale", [](Program& p, Address x, float factor, int64_t size, int extent) {
        p.add(make_elementwise(Elementwise::scale, at<float>(x), factor, size, Extent(extent)));
      })
      .def("clamp", [](Program& p, Address x, float limit, int64_t size, int extent) {
        p.add(make_elementwise(Elementwise::clip, at<float>(x), limit, size, Extent(extent)));
      })
      .def("linear", [](Program& p, Address x, int format, int64_t rows, int64_t cols, Address weight, int64_t heads,
                        int64_t rest, Address bias, Address out, int extent) {
        p.add(make_linear(at<float>(x), matrix(format, rows, cols, weight), {heads, rest}, at<float>(bias),
                          at<float>(out), Extent(extent)));
      })
      .def("attention", [](Program& p, Address qkv, Address cos, Address sin, int64_t half, Address k, Address v,
                           int kv_format, int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale,
                           int64_t window, float soft_cap, Address sinks, Address out) {
        p.add(make_attention(at<float>(qkv), {at<float>(cos), at<float>(sin), half},
                             {at<void>(k), at<void>(v), Format(kv_format)},
                             {num_heads, num_kv_heads, dim, scale, window, soft_cap, at<float>(sinks)},
                             at<float>(out)));
      })
      .def("latent_attention", [](Program& p, Address q, Address latents, Address cos, Address sin, int64_t half,
                                  Address kv, int kv_format, int64_t num_heads, int64_t latent_dim, int64_t rope_dim,
                                  float scale, Address out) {
        p.add(make_latent_attention(at<float>(q), at<float>(latents), {at<float>(cos), at<float>(sin), half},
                                    {at<void>(kv), nullptr, Format(kv_format)},
                                    {num_heads, latent_dim, rope_dim, scale}, at<float>(out)));
      })
      .def("route", [](Program& p, Address x, int64_t cols, Address router, int64_t num_experts, int64_t top_k,
                       int score, bool over_selected, bool renormalize, float scale, int64_t num_groups,
                       int64_t top_groups, bool best_two, float jitter, Address logit_bias, Address selection_bias,
                       Address ids, Address weights) {
        p.add(make_route(at<float>(x), matrix(int(Format::f32), num_experts, cols, router),
                         {num_experts, top_k, RouterSpec::Score(score), over_selected, renormalize, scale, num_groups,
                          top_groups, best_two, jitter, at<float>(logit_bias), at<float>(selection_bias)},
                         at<int64_t>(ids), at<float>(weights)));
      })
      .def("experts", [](Program& p, Address x, Address ids, Address weights, int64_t top_k, Address counts,
                         int format, int64_t hidden, int64_t ffn, Address gate_up, Address down, int64_t num_experts,
                         int activation, Address gate_up_bias, Address down_bias, float limit, Address out) {
        p.add(make_experts(at<float>(x), {at<int64_t>(ids), at<float>(weights), top_k, at<int64_t>(counts)},
                           {matrix(format, 2 * round_up(ffn, kRows), hidden, gate_up),
                            matrix(format, hidden, ffn, down), num_experts, Epilogue(activation),
                            at<float>(gate_up_bias), at<float>(down_bias), limit},
                           at<float>(out)));
      })
      // sizes: tokens, rows, selected, table width; the arrays of step.h in order.
      .def("run", [](Program& p, int64_t tokens, int64_t rows, int64_t selected, int64_t table_width, Address ids,
                     Address positions, Address slots, Address query_starts, Address context_lens,
                     Address block_tables, Address selection) {
        Step step;
        step.num_tokens = tokens, step.num_rows = rows, step.num_selected = selected;
        step.ids = at<int64_t>(ids), step.positions = at<int64_t>(positions), step.slots = at<int64_t>(slots);
        step.query_starts = at<int64_t>(query_starts), step.context_lens = at<int64_t>(context_lens);
        step.block_tables = at<int64_t>(block_tables), step.table_width = table_width;
        step.selected = at<int64_t>(selection);
        p.run(step);
      }, nb::call_guard<nb::gil_scoped_release>());
}
