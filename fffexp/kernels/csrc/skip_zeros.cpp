// The product of sparse activations with a matrix, of which only the rows of non-zero ones are read.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace fffexp {
namespace {

using at::Tensor;

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

inline float value(float w) { return w; }
inline float value(c10::BFloat16 w) {
  const uint32_t bits = uint32_t(w.x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// y += the sum of h[k] * row[k], of n columns; four rows at a time, so that y is loaded and stored less often
template <class W>
__attribute__((always_inline)) inline void add_rows(const float* h, const W* const* row, int64_t count, int64_t n,
                                                    float* __restrict__ y) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const W *a = row[k], *b = row[k + 1], *c = row[k + 2], *d = row[k + 3];
    const float ha = h[k], hb = h[k + 1], hc = h[k + 2], hd = h[k + 3];
    for (int64_t i = 0; i < n; i++)
      y[i] += (ha * value(a[i]) + hb * value(b[i])) + (hc * value(c[i]) + hd * value(d[i]));
  }
  for (; k < count; k++)
    for (int64_t i = 0; i < n; i++) y[i] += h[k] * value(row[k][i]);
}

FOR_EACH_PROCESSOR void add(const float* h, const float* const* row, int64_t count, int64_t n, float* y) {
  add_rows(h, row, count, n, y);
}
FOR_EACH_PROCESSOR void add_bfloat16(const float* h, const c10::BFloat16* const* row, int64_t count, int64_t n, float* y) {
  add_rows(h, row, count, n, y);
}
inline void add(const float* h, const c10::BFloat16* const* row, int64_t count, int64_t n, float* y) {
  add_bfloat16(h, row, count, n, y);
}

template <class W>
void skip_zeros(const W* h, const W* weight, const W* bias, int64_t batch, int64_t width, int64_t columns, W* y) {
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, width * columns));
  at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> values(width), sum(columns);
    std::vector<const W*> rows(width);
    for (int64_t r = begin; r < end; r++) {
      int64_t count = 0;
      for (int64_t j = 0; j < width; j++) {  // without a branch, which would be guessed wrong
        values[count] = value(h[r * width + j]);
        rows[count] = weight + j * columns;
        count += values[count] != 0;
      }
      for (int64_t i = 0; i < columns; i++) sum[i] = value(bias[i]);
      add(values.data(), rows.data(), count, columns, sum.data());
      for (int64_t i = 0; i < columns; i++) y[r * columns + i] = W(sum[i]);
    }
  });
}

Tensor skip_zeros_op(const Tensor& h_in, const Tensor& weight_in, const Tensor& bias_in) {
  const Tensor h = h_in.contiguous(), weight = weight_in.contiguous(), bias = bias_in.contiguous();
  TORCH_CHECK_VALUE(h.dim() == 2 && weight.dim() == 2 && bias.dim() == 1 && h.size(1) == weight.size(0) &&
                        weight.size(1) == bias.size(0),
                    "h of ", h.sizes(), ", weight of ", weight.sizes(), " and bias of ", bias.sizes(), " do not fit");
  TORCH_CHECK_VALUE(h.scalar_type() == weight.scalar_type() && h.scalar_type() == bias.scalar_type(), "h is ",
                    h.scalar_type(), ", weight ", weight.scalar_type(), ", bias ", bias.scalar_type());
  TORCH_CHECK_VALUE(h.scalar_type() == at::kFloat || h.scalar_type() == at::kBFloat16, "h is ", h.scalar_type(),
                    "; the compiled kernel takes float32 and bfloat16");
  const int64_t batch = h.size(0), width = h.size(1), columns = weight.size(1);
  // dense products of several rows read a weight once for all of them
  if (batch > 1 && at::count_nonzero(h).item<int64_t>() * std::min<int64_t>(batch, 4) > h.numel())
    return at::addmm(bias, h, weight);
  Tensor y = at::empty({batch, columns}, h.options());
  if (h.scalar_type() == at::kFloat)
    skip_zeros(h.const_data_ptr<float>(), weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), batch, width,
               columns, y.mutable_data_ptr<float>());
  else
    skip_zeros(h.const_data_ptr<at::BFloat16>(), weight.const_data_ptr<at::BFloat16>(),
               bias.const_data_ptr<at::BFloat16>(), batch, width, columns, y.mutable_data_ptr<at::BFloat16>());
  return y;
}

}  // namespace
}  // namespace fffexp

TORCH_LIBRARY_IMPL(fffexp, CPU, m) { m.impl("native_skip_zeros", fffexp::skip_zeros_op); }
