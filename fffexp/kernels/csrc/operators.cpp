// The operators that operators.py declares: which rows use which block, in what order, on which thread.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernel.h"

namespace fffexp {
namespace {

using at::Tensor;
using c10::string_view;

struct Choice {
  const char* name;
  const Kernels& kernels;
};

const Choice& best() {
  static const Choice chosen = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Choice{"avx512", kernels_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Choice{"avx2", kernels_avx2};
#endif
    return Choice{"plain", kernels_plain};
  }();
  return chosen;
}

// The tests run the code for older processors too.
const Choice* forced = nullptr;

const Choice& choice() { return forced ? *forced : best(); }

template <class W>
const Kernel<W>& kernel() {
  if constexpr (std::is_same_v<W, float>) return choice().kernels.float32;
  else return choice().kernels.bfloat16_;
}

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

// `batch` rows of x, of which `remaining` are left; each one's block at block[row * choices].
template <class W>
void evaluate(const Layer<W>& layer, const W* x, const int64_t* block, int64_t batch, int64_t remaining,
              int64_t choices, int64_t blocks, const float* gates, bool add, W* y) {
  const Kernel<W>& k = kernel<W>();
  std::vector<int32_t> order;
  std::vector<Span> tiles;
  arrange(block, choices, batch, blocks, order, tiles);
  const auto fill = [&](const Span& span) {
    Tile<W> tile;
    tile.rows = span.rows;
    tile.block = span.block;
    tile.add = add;
    for (int r = 0; r < span.rows; r++) {
      const int64_t row = order[span.first + r];
      tile.x[r] = x + row * layer.in;
      tile.y[r] = y + row * layer.out;
      tile.later[r] = row + batch < remaining ? tile.x[r] + batch * layer.in : tile.x[r];
      tile.gate[r] = gates ? gates[row * choices] : 1.0f;
    }
    return tile;
  };
  const int64_t count = int64_t(tiles.size());
  const int64_t work = layer.width * (layer.in + layer.out) * batch / std::max<int64_t>(1, count);
  at::parallel_for(0, count, grain(work), [&](int64_t begin, int64_t end) {
    float* memory = scratch(k.scratch(layer));
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

// So many rows stay in the cache between routing and evaluation, and still fill the tiles of their blocks.
int64_t chunk(int64_t blocks) { return std::max<int64_t>(256, kMaxRows * blocks) * at::get_num_threads(); }

// ---- tensors

struct Arguments {
  Tensor x, node_weight, node_bias, w1, b1, w2, b2;
};

const std::pair<const char*, Activation> kActivations[] = {
    {"identity", Activation::identity},   {"relu", Activation::relu}, {"gelu", Activation::gelu},
    {"gelu_tanh", Activation::gelu_tanh}, {"silu", Activation::silu}, {"tanh", Activation::tanh}};

Activation parse(string_view name) {
  for (const auto& [known, activation] : kActivations)
    if (name == known) return activation;
  TORCH_CHECK_VALUE(false, "activation '", std::string(name), "' has no compiled form");
}

template <class W>
const W* data(const Tensor& t) {
  return reinterpret_cast<const W*>(t.const_data_ptr());
}

void check(const Tensor& x, std::initializer_list<std::reference_wrapper<Tensor>> weights) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is ", x.scalar_type(),
                    "; the compiled kernel takes float32 and bfloat16");
  for (Tensor& w : weights) {
    TORCH_CHECK_VALUE(w.scalar_type() == x.scalar_type(), "weights are ", w.scalar_type(), " but x is ",
                      x.scalar_type());
    w = w.contiguous();
  }
}

// f(W{}) for the type of the weights
template <class F>
void dispatch(const Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) f(float{});
  else f(bfloat16{});
}

struct Blocks {
  Tensor w1, b1, w2, b2;

  void check_for(const Tensor& x) {
    check(x, {w1, b1, w2, b2});
    TORCH_CHECK_VALUE(x.dim() == 2 && w1.dim() == 3 && w1.size(2) == x.size(1), "x is ", x.sizes(),
                      " but the hidden weights are ", w1.sizes());
    const int64_t blocks = w1.size(0), width = w1.size(1);
    TORCH_CHECK_VALUE(w2.dim() == 3 && w2.size(0) == blocks && w2.size(1) == width && b1.sizes() == w1.sizes().slice(0, 2) &&
                          b2.dim() == 2 && b2.size(0) == blocks && b2.size(1) == w2.size(2),
                      "blocks of ", w1.sizes(), ", ", b1.sizes(), ", ", w2.sizes(), ", ", b2.sizes(), " do not fit");
  }

  template <class W>
  Layer<W> layer(string_view activation) const {
    return {w1.size(2), w1.size(1), w2.size(2), nullptr, nullptr, 0, data<W>(w1), data<W>(b1), data<W>(w2), data<W>(b2),
            parse(activation)};
  }
};

// Depth of the tree whose nodes these are.
int check_nodes(const Tensor& x, Tensor& weight, Tensor& bias) {
  check(x, {weight, bias});
  int depth = 0;
  while ((int64_t(1) << depth) - 1 < weight.size(0)) depth++;
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1) && bias.dim() == 1 &&
                        bias.size(0) == weight.size(0) && (int64_t(1) << depth) - 1 == weight.size(0),
                    "nodes of ", weight.sizes(), ", ", bias.sizes(), " are not a tree over x of ", x.sizes());
  return depth;
}

Tensor route_op(const Tensor& x_in, Tensor node_weight, Tensor node_bias) {
  const Tensor x = x_in.contiguous();
  const int depth = check_nodes(x, node_weight, node_bias);
  Tensor leaf = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  dispatch(x, [&](auto type) {
    using W = decltype(type);
    Layer<W> layer{};
    layer.in = x.size(1);
    layer.node_weight = data<W>(node_weight);
    layer.node_bias = data<W>(node_bias);
    layer.depth = depth;
    route(layer, data<W>(x), x.size(0), leaf.mutable_data_ptr<int64_t>());
  });
  return leaf;
}

Tensor selected_op(const Tensor& x_in, const Tensor& block_in, const std::optional<Tensor>& gates_in, Tensor w1,
                   Tensor b1, Tensor w2, Tensor b2, string_view activation) {
  const Tensor x = x_in.contiguous(), block = block_in.contiguous();
  Blocks blocks{std::move(w1), std::move(b1), std::move(w2), std::move(b2)};
  blocks.check_for(x);
  const int64_t batch = x.size(0), count = blocks.w1.size(0);
  TORCH_CHECK_VALUE(block.dim() == 2 && block.size(0) == batch && block.scalar_type() == at::kLong,
                    "block is ", block.sizes(), " of ", block.scalar_type(), "; it must be a row of int64 for each of x");
  const int64_t choices = block.size(1);
  Tensor gates;
  if (gates_in) {
    gates = gates_in->to(at::kFloat).contiguous();
    TORCH_CHECK_VALUE(gates.sizes() == block.sizes(), "weights are ", gates.sizes(), " but block is ", block.sizes());
  }
  const int64_t* index = block.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * choices; i++)
    TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < count, "block ", index[i], " of ", count);
  Tensor y = choices ? at::empty({batch, blocks.w2.size(2)}, x.options()) : at::zeros({batch, blocks.w2.size(2)}, x.options());
  dispatch(x, [&](auto type) {
    using W = decltype(type);
    const Layer<W> layer = blocks.layer<W>(activation);
    // one choice after the other: within one, no two tiles write to the same row
    for (int64_t c = 0; c < choices; c++)
      evaluate<W>(layer, data<W>(x), index + c, batch, batch, choices, count,
                  gates.defined() ? gates.const_data_ptr<float>() + c : nullptr, c > 0,
                  reinterpret_cast<W*>(y.mutable_data_ptr()));
  });
  return y;
}

Tensor fff_op(const Tensor& x_in, Tensor node_weight, Tensor node_bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
              string_view activation) {
  const Tensor x = x_in.contiguous();
  const int depth = check_nodes(x, node_weight, node_bias);
  Blocks blocks{std::move(w1), std::move(b1), std::move(w2), std::move(b2)};
  blocks.check_for(x);
  const int64_t batch = x.size(0), count = blocks.w1.size(0);
  TORCH_CHECK_VALUE(count == int64_t(1) << depth, count, " leaves are not those of ", node_weight.size(0), " nodes");
  Tensor y = at::empty({batch, blocks.w2.size(2)}, x.options());
  dispatch(x, [&](auto type) {
    using W = decltype(type);
    Layer<W> layer = blocks.layer<W>(activation);
    layer.node_weight = data<W>(node_weight);
    layer.node_bias = data<W>(node_bias);
    layer.depth = depth;
    W* out = reinterpret_cast<W*>(y.mutable_data_ptr());
    const int64_t step = chunk(count);
    std::vector<int64_t> leaf(std::min(batch, step));
    for (int64_t first = 0; first < batch; first += step) {
      const int64_t rows = std::min(step, batch - first);
      const W* in = data<W>(x) + first * layer.in;
      route(layer, in, rows, leaf.data());
      evaluate<W>(layer, in, leaf.data(), rows, batch - first, 1, count, nullptr, false, out + first * layer.out);
    }
  });
  return y;
}

// ---- trees whose nodes are the neurons

Tensor tree_ff_op(const Tensor& x_in, Tensor node_weight, Tensor node_bias, Tensor output_weight, Tensor output_bias,
                  string_view activation) {
  const Tensor x = x_in.contiguous();
  check(x, {node_weight, node_bias, output_weight, output_bias});
  TORCH_CHECK_VALUE(x.dim() == 2 && node_weight.dim() == 3 && output_weight.dim() == 3 && output_bias.dim() == 1 &&
                        node_weight.size(2) == x.size(1) && node_bias.sizes() == node_weight.sizes().slice(0, 2) &&
                        output_weight.sizes().slice(0, 2) == node_bias.sizes() &&
                        output_weight.size(2) == output_bias.size(0),
                    "x of ", x.sizes(), " and trees of ", node_weight.sizes(), ", ", node_bias.sizes(), ", ",
                    output_weight.sizes(), ", ", output_bias.sizes(), " do not fit");
  int depth = 0;
  while ((int64_t(1) << depth) - 1 < node_weight.size(1)) depth++;
  TORCH_CHECK_VALUE(depth && (int64_t(1) << depth) - 1 == node_weight.size(1), node_weight.size(1),
                    " neurons are not a tree");
  const int64_t batch = x.size(0), evaluated = node_weight.size(0) * depth;
  Tensor y = at::empty({batch, output_bias.size(0)}, x.options());
  dispatch(x, [&](auto type) {
    using W = decltype(type);
    const Trees<W> trees{x.size(1), y.size(1), node_weight.size(0), depth, data<W>(node_weight), data<W>(node_bias),
                         data<W>(output_weight), data<W>(output_bias), parse(activation)};
    const Kernel<W>& k = kernel<W>();
    const W* in = data<W>(x);
    W* out = reinterpret_cast<W*>(y.mutable_data_ptr());
    const int64_t groups = (batch + kMaxRows - 1) / kMaxRows;
    at::parallel_for(0, groups, grain(kMaxRows * evaluated * (trees.in + trees.out)), [&](int64_t begin, int64_t end) {
      const int64_t own = k.tree_scratch(trees), of_group = kMaxRows * evaluated;
      float* memory = scratch(own + 3 * of_group);
      float* h = memory + own;
      int64_t* neuron = reinterpret_cast<int64_t*>(h + of_group);
      for (int64_t g = begin; g < end; g++) {
        const int64_t first = g * kMaxRows;
        const int rows = int(std::min<int64_t>(kMaxRows, batch - first));
        const W* row[kMaxRows];
        for (int r = 0; r < rows; r++) row[r] = in + (first + r) * trees.in;
        k.walk(trees, row, rows, neuron, h, memory);
        for (int r = 0; r < rows; r++)
          k.sum(h + r * evaluated, neuron + r * evaluated, evaluated, trees.output_weight, trees.out,
                trees.output_bias, out + (first + r) * trees.out, memory);
      }
    });
  });
  return y;
}

// ---- products with rows that each sample chooses, in float32

// samples, rows of each, rows of the matrix
std::tuple<int64_t, int64_t> check_rows(const Tensor& row, const Tensor& first, int64_t rows) {
  TORCH_CHECK_VALUE(row.dim() == 2 && row.scalar_type() == at::kLong && first.dim() == 2 && first.size(0) == row.size(0),
                    "row is ", row.sizes(), " of ", row.scalar_type(), " but there are ", first.sizes(), " samples");
  const int64_t* index = row.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < row.numel(); i++)
    TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < rows, "row ", index[i], " of ", rows);
  return {row.size(0), row.size(1)};
}

Tensor native_dots(const Tensor& x_in, const Tensor& row_in, const Tensor& weight_in) {
  const Tensor x = x_in.contiguous(), row = row_in.contiguous(), weight = weight_in.contiguous();
  const auto [samples, k] = check_rows(row, x, weight.size(0));
  const int64_t columns = weight.size(1);
  TORCH_CHECK_VALUE(x.size(1) == columns, "x is ", x.sizes(), " but the rows are ", weight.sizes());
  Tensor result = at::empty({samples, k}, x.options());
  const float *xs = x.const_data_ptr<float>(), *ws = weight.const_data_ptr<float>();
  const int64_t* rows = row.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, samples, grain(k * columns), [&, k = k](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      choice().kernels.dots(xs + s * columns, rows + s * k, k, ws, columns, out + s * k);
  });
  return result;
}

Tensor native_sum(const Tensor& h_in, const Tensor& row_in, const Tensor& weight_in) {
  const Tensor h = h_in.contiguous(), row = row_in.contiguous(), weight = weight_in.contiguous();
  const auto [samples, k] = check_rows(row, h, weight.size(0));
  TORCH_CHECK_VALUE(h.size(1) == k, "h is ", h.sizes(), " but row is ", row.sizes());
  const int64_t columns = weight.size(1);
  Tensor result = at::empty({samples, columns}, h.options());
  const float *hs = h.const_data_ptr<float>(), *ws = weight.const_data_ptr<float>();
  const int64_t* rows = row.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, samples, grain(k * columns), [&, k = k](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      choice().kernels.float32.sum(hs + s * k, rows + s * k, k, ws, columns, nullptr, out + s * columns, nullptr);
  });
  return result;
}

Tensor native_outer(const Tensor& h_in, const Tensor& row_in, const Tensor& x_in, int64_t rows) {
  const Tensor h = h_in.contiguous(), row = row_in.contiguous(), x = x_in.contiguous();
  const auto [samples, k] = check_rows(row, x, rows);
  TORCH_CHECK_VALUE(h.sizes() == row.sizes(), "h is ", h.sizes(), " but row is ", row.sizes());
  const int64_t columns = x.size(1);
  const float *hs = h.const_data_ptr<float>(), *xs = x.const_data_ptr<float>();
  const int64_t* index = row.const_data_ptr<int64_t>();
  // the samples of each row, and their weights
  std::vector<int64_t> ends(rows + 1, 0), sample(samples * k);
  std::vector<float> weight(samples * k);
  for (int64_t i = 0; i < samples * k; i++) ends[index[i] + 1]++;
  for (int64_t n = 0; n < rows; n++) ends[n + 1] += ends[n];
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  for (int64_t i = 0; i < samples * k; i++) {
    const int64_t at = next[index[i]]++;
    sample[at] = i / k;
    weight[at] = hs[i];
  }
  Tensor result = at::empty({rows, columns}, x.options());
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(samples * k * columns / std::max<int64_t>(1, rows)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      choice().kernels.float32.sum(weight.data() + ends[n], sample.data() + ends[n], ends[n + 1] - ends[n], xs, columns,
                                   nullptr, out + n * columns, nullptr);
  });
  return result;
}

// ---- soft training

void check_soft(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                    " is ", t.sizes(), " of ", t.scalar_type(), "; it must be [", rows, ", ", columns, "] of Float");
}

Tree tree_of(const Tensor& z, const Tensor& logits, const Tensor& scale, string_view activation) {
  const int64_t blocks = logits.dim() == 2 ? logits.size(1) : 0;
  TORCH_CHECK_VALUE(blocks > 0 && (blocks & (blocks - 1)) == 0 && z.dim() == 2 && z.size(1) > 0 && z.size(1) % blocks == 0,
                    "z of ", z.sizes(), " and logits of ", logits.sizes(), " are not those of a tree");
  check_soft(z, "z", z.size(0), z.size(1));
  check_soft(logits, "logits", z.size(0), blocks);
  return {blocks, z.size(1) / blocks, scale.item<float>(), parse(activation)};
}

// f(first row, rows, scratch memory) on every thread
template <class F>
void by_rows(const Tree& tree, int64_t rows, const F& f) {
  const Soft& soft = choice().kernels.soft;
  at::parallel_for(0, rows, grain(8 * tree.blocks * (tree.width + 1)), [&](int64_t begin, int64_t end) {
    f(begin, end - begin, scratch(soft.scratch(tree)));
  });
}

std::tuple<Tensor, Tensor> soft_op(const Tensor& z_in, const Tensor& logits_in, const Tensor& scale,
                                   string_view activation) {
  const Tree tree = tree_of(z_in, logits_in, scale, activation);
  const Tensor z = z_in.contiguous(), logits = logits_in.contiguous();
  Tensor h = at::empty_like(z), weights = at::empty_like(logits);
  const int64_t n = z.size(1), blocks = tree.blocks;
  const float *zs = z.const_data_ptr<float>(), *ls = logits.const_data_ptr<float>();
  float *hs = h.mutable_data_ptr<float>(), *ws = weights.mutable_data_ptr<float>();
  by_rows(tree, z.size(0), [&](int64_t first, int64_t rows, float* memory) {
    choice().kernels.soft.forward(tree, zs + first * n, ls + first * blocks, rows, hs + first * n, ws + first * blocks,
                                  memory);
  });
  return {h, weights};
}

std::tuple<Tensor, Tensor> soft_backward_op(const Tensor& grad_h_in, const Tensor& grad_weights_in, const Tensor& z_in,
                                            const Tensor& logits_in, const Tensor& scale,
                                            const std::optional<Tensor>& grad_more_in, string_view activation) {
  const Tree tree = tree_of(z_in, logits_in, scale, activation);
  const int64_t batch = z_in.size(0), n = z_in.size(1), blocks = tree.blocks;
  check_soft(grad_h_in, "grad_h", batch, n);
  check_soft(grad_weights_in, "grad_weights", batch, blocks);
  const Tensor grad_h = grad_h_in.contiguous(), grad_weights = grad_weights_in.contiguous();
  const Tensor z = z_in.contiguous(), logits = logits_in.contiguous();
  Tensor more;
  if (grad_more_in) check_soft(more = grad_more_in->contiguous(), "grad_more", batch, blocks - 1);
  Tensor grad_z = at::empty_like(z), grad_logits = at::empty_like(logits);
  const float *gh = grad_h.const_data_ptr<float>(), *gw = grad_weights.const_data_ptr<float>();
  const float *zs = z.const_data_ptr<float>(), *ls = logits.const_data_ptr<float>();
  const float* gm = more.defined() ? more.const_data_ptr<float>() : nullptr;
  float *gz = grad_z.mutable_data_ptr<float>(), *gl = grad_logits.mutable_data_ptr<float>();
  by_rows(tree, batch, [&](int64_t first, int64_t rows, float* memory) {
    choice().kernels.soft.backward(tree, gh + first * n, gw + first * blocks, zs + first * n, ls + first * blocks,
                                   gm ? gm + first * (blocks - 1) : nullptr, rows, gz + first * n, gl + first * blocks,
                                   memory);
  });
  return {grad_z, grad_logits};
}

// ---- autocast: weights keep their type (casting all of them would cost more than it saves), the result is cast

template <class F>
Tensor in_type_of(const Tensor& weight, const Tensor& x, const F& run) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  return run(x.to(weight.scalar_type()));
}

Tensor route_autocast(const Tensor& x, Tensor node_weight, Tensor node_bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fffexp::route", "").typed<decltype(route_op)>();
  return in_type_of(node_weight, x, [&](const Tensor& rows) { return op.call(rows, node_weight, node_bias); });
}

Tensor selected_autocast(const Tensor& x, const Tensor& block, const std::optional<Tensor>& gates, Tensor w1, Tensor b1,
                         Tensor w2, Tensor b2, string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fffexp::selected", "").typed<decltype(selected_op)>();
  return in_type_of(w1, x, [&](const Tensor& rows) { return op.call(rows, block, gates, w1, b1, w2, b2, activation); })
      .to(at::autocast::get_autocast_dtype(at::kCPU));
}

Tensor fff_autocast(const Tensor& x, Tensor node_weight, Tensor node_bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                    string_view activation) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fffexp::fff", "").typed<decltype(fff_op)>();
  return in_type_of(w1, x, [&](const Tensor& rows) { return op.call(rows, node_weight, node_bias, w1, b1, w2, b2, activation); })
      .to(at::autocast::get_autocast_dtype(at::kCPU));
}

Tensor tree_ff_autocast(const Tensor& x, Tensor node_weight, Tensor node_bias, Tensor output_weight, Tensor output_bias,
                        string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fffexp::tree_ff", "").typed<decltype(tree_ff_op)>();
  return in_type_of(node_weight, x, [&](const Tensor& rows) {
           return op.call(rows, node_weight, node_bias, output_weight, output_bias, activation);
         })
      .to(at::autocast::get_autocast_dtype(at::kCPU));
}

std::string instruction_set() { return choice().name; }

// For tests: "plain", "avx2" or "avx512"; "" for the best again. False where the processor lacks it.
bool force_instruction_set(string_view name) {
  static const Choice all[] = {{"plain", kernels_plain},
#if defined(__x86_64__)
                               {"avx2", kernels_avx2},
                               {"avx512", kernels_avx512}
#endif
  };
  forced = nullptr;
  if (name.empty()) return true;
  for (const Choice& each : all) {
    if (name == each.name) forced = &each;
    if (std::string(each.name) == best().name) break;  // in rising order: what follows would not run here
  }
  return forced != nullptr;
}

}  // namespace
}  // namespace fffexp

TORCH_LIBRARY_FRAGMENT(fffexp, m) {
  m.def("instruction_set() -> str", fffexp::instruction_set);
  m.def("force_instruction_set(str name) -> bool", fffexp::force_instruction_set);
  m.def("native_dots(Tensor x, Tensor row, Tensor weight) -> Tensor");
  m.def("native_sum(Tensor h, Tensor row, Tensor weight) -> Tensor");
  m.def("native_outer(Tensor h, Tensor row, Tensor x, int rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(fffexp, CPU, m) {
  m.impl("route", fffexp::route_op);
  m.impl("selected", fffexp::selected_op);
  m.impl("fff", fffexp::fff_op);
  m.impl("fff_inference", fffexp::fff_op);
  m.impl("tree_ff", fffexp::tree_ff_op);
  m.impl("tree_ff_inference", fffexp::tree_ff_op);
  m.impl("native_dots", fffexp::native_dots);
  m.impl("native_sum", fffexp::native_sum);
  m.impl("native_outer", fffexp::native_outer);
  m.impl("soft", fffexp::soft_op);
  m.impl("soft_backward", fffexp::soft_backward_op);
}

TORCH_LIBRARY_IMPL(fffexp, AutocastCPU, m) {
  m.impl("route", fffexp::route_autocast);
  m.impl("selected", fffexp::selected_autocast);
  m.impl("fff", fffexp::fff_autocast);
  m.impl("fff_inference", fffexp::fff_autocast);
  m.impl("tree_ff", fffexp::tree_ff_autocast);
  m.impl("tree_ff_inference", fffexp::tree_ff_autocast);
}
