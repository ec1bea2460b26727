// The operators: which rows use which block, in what order, on which thread.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernel.h"

namespace fffexp {
namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& best = [&]() -> const Kernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
    return kernels_plain;
  }();
  return best;
#else
  return kernels_plain;
#endif
}

template <class W>
const Kernel<W>& kernel();
template <>
const Kernel<float>& kernel<float>() { return kernels().float32; }
template <>
const Kernel<bfloat16>& kernel<bfloat16>() { return kernels().bfloat16_; }

// Grows and stays, one per thread: a call allocates nothing but its output.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < floats + 16) memory.resize(floats + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
}

// A thread is worth starting for about this many multiply-adds.
constexpr int64_t kGrain = 1 << 18;

int64_t grain(int64_t work_of_one) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_of_one)); }

template <class W>
void route(const Layer<W>& layer, const W* x, int64_t batch, int64_t* leaf) {
  const Kernel<W>& k = kernel<W>();
  const int64_t groups = (batch + kMaxRows - 1) / kMaxRows;
  at::parallel_for(0, groups, grain(kMaxRows * layer.depth * layer.in), [&](int64_t begin, int64_t end) {
    float* memory = scratch(k.scratch(layer));
    for (int64_t g = begin; g < end; g++) {
      const int64_t first = g * kMaxRows;
      const int rows = int(std::min<int64_t>(kMaxRows, batch - first));
      const W* row[kMaxRows];
      for (int r = 0; r < rows; r++) row[r] = x + (first + r) * layer.in;
      k.route(layer, row, rows, leaf + first, memory);
    }
  });
}

struct Span {
  int64_t block;
  int32_t first, rows;
};

// Rows in the order of their blocks, and the tiles they make: of a block's rows as evenly as may be.
void arrange(const int64_t* block, int64_t stride, int64_t batch, int64_t blocks, std::vector<int32_t>& order,
             std::vector<Span>& tiles) {
  order.resize(batch);
  tiles.clear();
  const auto split = [&](int64_t of, int32_t first, int32_t end) {
    for (int32_t left = (end - first + kMaxRows - 1) / kMaxRows; left > 0; left--) {
      const int32_t rows = (end - first + left - 1) / left;
      tiles.push_back({of, first, rows});
      first += rows;
    }
  };
  if (blocks <= 4 * batch) {
    std::vector<int32_t> ends(blocks, 0);
    for (int64_t r = 0; r < batch; r++) ends[block[r * stride]]++;
    for (int64_t b = 0, sum = 0; b < blocks; b++) {
      const int32_t rows = ends[b];
      ends[b] = int32_t(sum);
      sum += rows;
      split(b, ends[b], int32_t(sum));
    }
    for (int64_t r = 0; r < batch; r++) order[ends[block[r * stride]]++] = int32_t(r);
  } else {
    for (int64_t r = 0; r < batch; r++) order[r] = int32_t(r);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return block[a * stride] < block[b * stride]; });
    for (int64_t first = 0, end; first < batch; first = end) {
      const int64_t of = block[order[first] * stride];
      for (end = first; end < batch && block[order[end] * stride] == of;) end++;
      split(of, int32_t(first), int32_t(end));
    }
  }
}

template <class W>
void evaluate(const Layer<W>& layer, const W* x, const int64_t* block, int64_t batch, int64_t choices, int64_t blocks,
              const float* gates, W* y, int64_t remaining) {
  const Kernel<W>& k = kernel<W>();
  std::vector<int32_t> order;
  std::vector<Span> tiles;
  // one choice after the other: within one, no two tiles write to the same row
  for (int64_t choice = 0; choice < choices; choice++) {
    arrange(block + choice, choices, batch, blocks, order, tiles);
    const int64_t count = int64_t(tiles.size());
    const int64_t work = layer.width * (layer.in + layer.out) * batch / std::max<int64_t>(1, count);
    at::parallel_for(0, count, grain(work), [&](int64_t begin, int64_t end) {
      float* memory = scratch(k.scratch(layer));
      const auto fill = [&](const Span& span) {
        Tile<W> tile;
        tile.rows = span.rows;
        tile.block = span.block;
        tile.add = choice > 0;
        for (int r = 0; r < span.rows; r++) {
          const int64_t row = order[span.first + r];
          tile.x[r] = x + row * layer.in;
          tile.later[r] = row + batch < remaining ? tile.x[r] + batch * layer.in : tile.x[r];
          tile.y[r] = y + row * layer.out;
          tile.gate[r] = gates ? gates[row * choices + choice] : 1.0f;
        }
        return tile;
      };
      Tile<W> tile = fill(tiles[begin]);
      bool fresh = true;
      for (int64_t t = begin; t < end; t++) {
        const Tile<W> next = t + 1 < end ? fill(tiles[t + 1]) : tile;
        k.evaluate(layer, tile, next, fresh, memory);
        fresh = next.block != tile.block;
        tile = next;
      }
    });
  }
}

Activation parse(c10::string_view name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "tanh") return Activation::tanh;
  TORCH_CHECK_VALUE(false, "activation '", std::string(name), "' has no compiled form");
}

template <class W>
const W* data(const at::Tensor& t) { return reinterpret_cast<const W*>(t.const_data_ptr()); }

template <class W>
Layer<W> blocks_of(const at::Tensor& w1, const at::Tensor& b1, const at::Tensor& w2, const at::Tensor& b2,
                   c10::string_view activation) {
  return {w1.size(2), w1.size(1), w2.size(2), nullptr, nullptr, 0, data<W>(w1), data<W>(b1), data<W>(w2), data<W>(b2),
          parse(activation)};
}

at::Tensor fff(const at::Tensor& x_in, const at::Tensor& node_weight, const at::Tensor& node_bias, const at::Tensor& w1,
               const at::Tensor& b1, const at::Tensor& w2, const at::Tensor& b2, c10::string_view activation) {
  const at::Tensor x = x_in.contiguous();
  const int64_t batch = x.size(0);
  at::Tensor y = at::empty({batch, w2.size(2)}, x.options());
  const auto run = [&](auto type) {
    using W = decltype(type);
    Layer<W> layer = blocks_of<W>(w1, b1, w2, b2, activation);
    layer.node_weight = data<W>(node_weight);
    layer.node_bias = data<W>(node_bias);
    while ((int64_t(1) << layer.depth) < w1.size(0)) layer.depth++;
    // so many rows stay in the cache between routing and evaluation, and fill the tiles of their leaves
    const int64_t chunk = std::max<int64_t>(256, kMaxRows * w1.size(0)) * at::get_num_threads();
    std::vector<int64_t> leaf(std::min(batch, chunk));
    for (int64_t b = 0; b < batch; b += chunk) {
      const int64_t rows = std::min(chunk, batch - b);
      route(layer, data<W>(x) + b * layer.in, rows, leaf.data());
      evaluate<W>(layer, data<W>(x) + b * layer.in, leaf.data(), rows, 1, w1.size(0), nullptr, reinterpret_cast<W*>(y.data_ptr()) + b * layer.out, batch - b);
    }
  };
  if (x.scalar_type() == at::kFloat) run(float{});
  else run(bfloat16{});
  return y;
}

}  // namespace
}  // namespace fffexp

TORCH_LIBRARY_FRAGMENT(fffexp, m) {
  m.def("fff(Tensor x, Tensor node_weight, Tensor node_bias, Tensor hidden_weight, Tensor hidden_bias, Tensor output_weight, Tensor output_bias, str activation) -> Tensor");
}
TORCH_LIBRARY_IMPL(fffexp, CPU, m) {
  m.impl("fff", fffexp::fff);
}
