// What the operators ask of a kernel. kernel.cpp is compiled once per instruction set; this is all they share.
#pragma once

#include <cstdint>

namespace fffexp {

enum class Activation { identity, relu, gelu, gelu_tanh, silu, tanh };

// At most so many rows of one block are evaluated together.
constexpr int kMaxRows = 8;

// A tree over blocks, or blocks alone (depth 0). Matrices are row-major and contiguous, of one type W.
template <class W>
struct Layer {
  int64_t in, width, out;
  const W* node_weight;    // (2^depth - 1, in), breadth first
  const W* node_bias;      // (2^depth - 1)
  int depth;
  const W* hidden_weight;  // (blocks, width, in)
  const W* hidden_bias;    // (blocks, width)
  const W* output_weight;  // (blocks, width, out)
  const W* output_bias;    // (blocks, out)
  Activation activation;
};

// Rows that use the same block.
template <class W>
struct Tile {
  int rows;                // 1 to kMaxRows
  const W* x[kMaxRows];    // (in) each
  W* y[kMaxRows];          // (out) each
  const W* later[kMaxRows];  // inputs to bring into the cache, for after the tiles at hand
  float gate[kMaxRows];    // factor on the block's output
  bool add;                // to y instead of overwriting it
  int64_t block;
};

// Trees whose nodes are the neurons. Matrices are row-major and contiguous, of one type W.
template <class W>
struct Trees {
  int64_t in, out, trees;
  int depth;
  const W* node_weight;    // (trees, 2^depth - 1, in), breadth first
  const W* node_bias;      // (trees, 2^depth - 1)
  const W* output_weight;  // (trees, 2^depth - 1, out)
  const W* output_bias;    // (out)
  Activation activation;
};

template <class W>
struct Kernel {
  // floats of scratch memory, aligned to 64 bytes, that the two functions need
  int64_t (*scratch)(const Layer<W>&);
  // leaf[r] of rows x[r] by hard decisions: right where the logit is >= 0
  void (*route)(const Layer<W>&, const W* const* x, int rows, int64_t* leaf, float* scratch);
  // y of a tile; meanwhile brings into the cache what `next` needs, and of a fresh block the second half
  void (*evaluate)(const Layer<W>&, const Tile<W>&, const Tile<W>& next, bool fresh, float* scratch);

  // floats of scratch memory, aligned to 64 bytes, that `walk` and `sum` need
  int64_t (*tree_scratch)(const Trees<W>&);
  // of rows x[r]: the neurons on the path of each tree, numbered through over the trees, and their activations,
  // neuron[r * trees * depth + tree * depth + level]; brings their output weights into the cache
  void (*walk)(const Trees<W>&, const W* const* x, int rows, int64_t* neuron, float* h, float* scratch);
  // y = the sum of weight[row[k]] * h[k], of weight (any, columns), on top of the bias if there is one
  void (*sum)(const float* h, const int64_t* row, int64_t count, const W* weight, int64_t columns, const W* bias, W* y,
              float* scratch);
};

// The elementwise part of soft training, between its products, in float32: preactivations z (rows, blocks * width)
// and logits (rows, blocks), of which the last of a row is not used, make the leaves' weights (rows, blocks) and
// h = activation(z) * weight of the leaf.
struct Tree {
  int64_t blocks, width;
  float scale;  // of the logits
  Activation activation;
};
struct Soft {
  int64_t (*scratch)(const Tree&);  // floats, aligned to 64 bytes
  void (*forward)(const Tree&, const float* z, const float* logits, int64_t rows, float* h, float* weights,
                  float* scratch);
  // grad_more (rows, blocks - 1) is a further gradient of the logits, or null
  void (*backward)(const Tree&, const float* grad_h, const float* grad_weights, const float* z, const float* logits,
                   const float* grad_more, int64_t rows, float* grad_z, float* grad_logits, float* scratch);
};

struct bfloat16 {
  uint16_t bits;
};

struct Kernels {
  Kernel<float> float32;
  Kernel<bfloat16> bfloat16_;
  Soft soft;
  // result[k] = x . weight[row[k]], of weight (any, columns)
  void (*dots)(const float* x, const int64_t* row, int64_t count, const float* weight, int64_t columns, float* result);
};

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fffexp
