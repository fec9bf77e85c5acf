// The kernels for one instruction set: this file's compile flags choose it.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"
#include "kernels.h"
// Everything below is compiled for this instruction set and must not be merged with another's.
namespace toptwo {
namespace {
#include "simd/scalar.h"

#include "impl/vector.h"
#include "impl/gemm.h"
#include "impl/attention.h"
#include "impl/pack.h"
#include "impl/sample.h"
}  // namespace

extern const Kernels kScalar = {"scalar", quantize_row, gemm, rms_norm, layer_norm, rope, scale, clip, add_scaled,
                              store_k, store_v, attend, unpack_row, pack, sample};

}  // namespace toptwo
