// Routing down a tree and evaluation of two-layer blocks, for a few rows at a time.
//
// Compiled once per instruction set, with KERNELS naming the result; the width of a vector follows from it.
// Nothing here is shared between those copies (no library templates), so that no code of a newer processor
// is linked where an older one needs its own.

#include "kernel.h"

namespace fffexp {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16, kRows = 4;
#else
constexpr int kLanes = 4, kRegisters = 16, kRows = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
// in memory: any alignment
typedef float VecAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalfAt __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecAt*>(p) = v; }
inline Vec load(const bfloat16* p) {
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const HalfAt*>(p), UVec) << 16);
}
inline float value(float w) { return w; }
inline float value(bfloat16 w) {
  const uint32_t bits = uint32_t(w.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline bfloat16 rounded(float f) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if (f != f) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
// Keeps a value in a register: else GCC loads it again for every product it takes part in.
inline Vec held(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}
inline Vec broadcast(float f) { return f - Vec{}; }

// ---- sums over lanes, of several vectors at once

template <int...>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};
using Lanes = Count<kLanes>::type;

// Of every two neighbouring runs of S lanes the sum: a's first, b's first, a's second, b's second, ...
template <int S, int... I>
inline Vec merged(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / S % 2 ? I - S + kLanes : I)...) +
         __builtin_shufflevector(a, b, (I / S % 2 ? I + kLanes : I + S)...);
}
template <int S, int... I>
inline Vec folded(Vec a, Indices<I...>) {
  return a + __builtin_shufflevector(a, a, ((I + S) % kLanes)...);
}

// Lanes 0 to N - 1: the sums of v[0] to v[N - 1]. N is a power of 2, at most kLanes.
template <int N, int S = 1>
__attribute__((always_inline)) inline Vec sums(const Vec* v) {
  if constexpr (S < N) {
    Vec halves[N / S / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / S / 2; i++) halves[i] = merged<S>(v[2 * i], v[2 * i + 1], Lanes{});
    return sums<N, 2 * S>(halves);
  } else if constexpr (S < kLanes) {
    const Vec half = folded<S>(v[0], Lanes{});
    return sums<N, 2 * S>(&half);
  } else {
    return v[0];
  }
}

// to[n] = sum of v[n]; writes up to kLanes - 1 floats beyond
template <int N>
inline void store_sums(const Vec* v, float* to) {
  constexpr int kStep = N >= kLanes ? kLanes : N >= 8 && kLanes >= 8 ? 8 : N >= 4 ? 4 : N >= 2 ? 2 : 1;
  store(to, sums<kStep>(v));
  if constexpr (N > kStep) store_sums<N - kStep>(v + kStep, to + kStep);
}

// ---- activations, to float32's precision

inline Vec exp(Vec x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
  const Vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded: the sum has no bits left for a fraction
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Cephes expf
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
  return p * reinterpret_cast<Vec>(power);
}

inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

// Abramowitz and Stegun 7.1.26: within 1.5e-7
inline Vec erf(Vec x) {
  const Vec a = x < 0.0f ? -x : x;
  const Vec t = 1.0f / (1.0f + 0.3275911f * a);
  const Vec p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const Vec e = 1.0f - p * exp(-a * a);
  return x < 0.0f ? -e : e;
}

inline Vec activated(Vec x, Activation activation) {
  switch (activation) {
    case Activation::identity: return x;
    case Activation::relu: return x < 0.0f ? Vec{} : x;  // in this form NaN stays NaN
    case Activation::gelu: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + exp(-x));
    case Activation::tanh: return tanh(x);
  }
  __builtin_unreachable();
}

inline Vec derivative(Vec x, Activation activation) {
  switch (activation) {
    case Activation::identity: return broadcast(1.0f);
    case Activation::relu: return x > 0.0f ? broadcast(1.0f) : Vec{};
    case Activation::gelu:
      return 0.5f * (1.0f + erf(x * 0.70710678f)) + x * 0.39894228f * exp(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const Vec t = tanh(0.79788456f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x);
    }
    case Activation::silu: {
      const Vec s = 1.0f / (1.0f + exp(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::tanh: {
      const Vec t = tanh(x);
      return 1.0f - t * t;
    }
  }
  __builtin_unreachable();
}

// ---- products of M rows with N units at a time, all M x N sums in registers

constexpr int columns(int rows) {
  const int fit = (kRegisters - 1) / (rows + 1);
  return fit < 8 ? fit : 8;
}

// result[n * M + m] = x[m] . w[n], and up to kLanes - 1 floats beyond; FETCH: also brings `next`, of w's shape
template <int M, int N, bool FETCH, class W>
inline void dots(const float* const* x, const W* w, int64_t in, const W* next, const W* read, const W* later, const W* write,
                 float* result) {
  Vec acc[N * M] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Vec b[N];
    __builtin_prefetch(read + i, 0, 2);
    __builtin_prefetch(later + i, 0, 2);
    __builtin_prefetch(write + i, 1, 2);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      b[n] = load(w + n * in + i);
      if (FETCH) __builtin_prefetch(next + i * N + n * kLanes, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec a = held(load(x[m] + i));
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[n * M + m] += a * b[n];
    }
  }
  store_sums<N * M>(acc, result);
  for (; i < in; i++)
    for (int n = 0; n < N; n++)
      for (int m = 0; m < M; m++) result[n * M + m] += x[m][i] * value(w[n * in + i]);
}

// y[m][...] = gate[m] * bias + h of row m times w, for N vectors of outputs; FETCH: also brings as much of `next`
template <int M, int N, bool FETCH, class W>
inline void outputs(const float* h, int64_t width, const W* w, const W* bias, int64_t out, const float* gate, bool add,
                    const W* next, float* const* y) {
  Vec acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = load(bias + n * kLanes) * gate[m];
  for (int64_t j = 0; j < width; j++) {
    Vec b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      b[n] = load(w + j * out + n * kLanes);
      if (FETCH) __builtin_prefetch(next + (j * N + n) * kLanes, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec a = broadcast(h[j * M + m]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float* at = y[m] + n * kLanes;
      store(at, add ? load(at) + acc[m][n] : acc[m][n]);
    }
}

template <int V>
struct Constant {
  static constexpr int value = V;
};

// M rows through one block; meanwhile brings what comes next
template <int M, bool FRESH, bool NEXT, class W>
void block(const Layer<W>& layer, const float* const* x, const Tile<W>& tile, const Tile<W>& next, float* const* y, const float* gate, 
           float* h) {
  constexpr int N = columns(M);
  const int64_t in = layer.in, width = layer.width, out = layer.out;
  const W* w1 = layer.hidden_weight + tile.block * width * in;
  const W* b1 = layer.hidden_bias + tile.block * width;
  const W* w2 = layer.output_weight + tile.block * width * out;
  const W* b2 = layer.output_bias + tile.block * out;
  const W* next_w1 = layer.hidden_weight + next.block * width * in;

  int64_t j = 0;
  int group = 0;
  const auto hidden = [&](auto units) {
    constexpr int U = units.value;
    const W* read = FRESH && group == 0 ? b2 : next.x[group % next.rows];
    dots<M, U, FRESH>(x, w1 + j * in, in, w2 + j * in, read, tile.later[group % tile.rows], tile.y[group % tile.rows],
                      h + j * M);
    j += U;
    group++;
  };
  while (j + N <= width) hidden(Constant<N>{});
  while (j < width) hidden(Constant<1>{});
  for (j = 0; j < width; j++)
    for (int m = 0; m < M; m++) h[j * M + m] += value(b1[j]);
  for (int64_t i = 0; i < width * M; i += kLanes) store(h + i, activated(load(h + i), layer.activation));
  for (j = 0; j < width; j++)
    for (int m = 0; m < M; m++) h[j * M + m] *= gate[m];

  if (NEXT)
    for (j = 0; j < width; j += 64 / sizeof(W)) __builtin_prefetch(layer.hidden_bias + next.block * width + j, 0, 2);
  float* at[M];
  const auto advance = [&](int64_t o) {
    for (int m = 0; m < M; m++) at[m] = y[m] + o;
  };
  int64_t o = 0;
  for (; o + N * kLanes <= out; o += N * kLanes) {
    advance(o);
    outputs<M, N, NEXT>(h, width, w2 + o, b2 + o, out, gate, tile.add, next_w1 + o * width, at);
  }
  for (; o + kLanes <= out; o += kLanes) {
    advance(o);
    outputs<M, 1, NEXT>(h, width, w2 + o, b2 + o, out, gate, tile.add, next_w1 + o * width, at);
  }
  for (; o < out; o++)
    for (int m = 0; m < M; m++) {
      float s = value(b2[o]) * gate[m];
      for (j = 0; j < width; j++) s += h[j * M + m] * value(w2[j * out + o]);
      y[m][o] = tile.add ? y[m][o] + s : s;
    }
}

template <class W>
using Block = void (*)(const Layer<W>&, const float* const*, const Tile<W>&, const Tile<W>&, float* const*, const float*, float*);

template <class W, bool FRESH, bool NEXT>
constexpr Block<W> kBlocks[] = {
    block<1, FRESH, NEXT, W>, block<2, FRESH, NEXT, W>, block<3, FRESH, NEXT, W>, block<4, FRESH, NEXT, W>,
#if defined(__AVX512F__)
    block<5, FRESH, NEXT, W>, block<6, FRESH, NEXT, W>, block<7, FRESH, NEXT, W>, block<8, FRESH, NEXT, W>,
#endif
};

// ---- rows of weights' type as float32: themselves, or copies in scratch

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

inline const float* row_in(const float* x, int64_t, float*) { return x; }
inline const float* row_in(const bfloat16* x, int64_t n, float* copy) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(copy + i, load(x + i));
  for (; i < n; i++) copy[i] = value(x[i]);
  return copy;
}
inline float* row_out(float* y, int64_t, bool, float*) { return y; }
inline float* row_out(bfloat16* y, int64_t n, bool add, float* copy) {
  if (add) row_in(y, n, copy);
  return copy;
}
inline void write_back(float*, int64_t, const float*) {}
inline void write_back(bfloat16* y, int64_t n, const float* copy) {
  for (int64_t i = 0; i < n; i++) y[i] = rounded(copy[i]);
}

template <class W>
int64_t scratch(const Layer<W>& layer) {
  const int64_t hidden = padded(layer.width * kMaxRows + 32);
  const int64_t copies = sizeof(W) == sizeof(float) ? 0 : kMaxRows * (padded(layer.in) + padded(layer.out));
  return hidden + copies;
}

template <class W>
void evaluate(const Layer<W>& layer, const Tile<W>& tile, const Tile<W>& next, bool fresh, float* scratch) {
  float* h = scratch;
  float* copies = scratch + padded(layer.width * kMaxRows + 32);
  const float* x[kMaxRows];
  float* y[kMaxRows];
  for (int r = 0; r < tile.rows; r++) {
    x[r] = row_in(tile.x[r], layer.in, copies + r * padded(layer.in));
    y[r] = row_out(tile.y[r], layer.out, tile.add, copies + kMaxRows * padded(layer.in) + r * padded(layer.out));
  }
  const bool other = next.block != tile.block;
  const auto* table = fresh ? other ? kBlocks<W, true, true> : kBlocks<W, true, false> : other ? kBlocks<W, false, true> : kBlocks<W, false, false>;
  for (int r = 0; r < tile.rows; r += kRows) {
    const int rows = tile.rows - r < kRows ? tile.rows - r : kRows;
    table[rows - 1](layer, x + r, tile, next, y + r, tile.gate + r, h);
  }
  for (int r = 0; r < tile.rows; r++) write_back(tile.y[r], layer.out, y[r]);
}

// x . w; meanwhile brings `ahead`, of w's length, and LATER as many weights from `later`
template <bool LATER = false, class W>
inline float logit(const float* x, const W* w, int64_t in, const W* ahead, const W* later = nullptr) {
  constexpr int kSums = 4;
  Vec acc[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= in; i += kSums * kLanes)
#pragma GCC unroll 4
    for (int u = 0; u < kSums; u++) {
      __builtin_prefetch(ahead + i + u * kLanes, 0, 2);
      if (LATER) __builtin_prefetch(later + i + u * kLanes, 0, 2);
      acc[u] += load(x + i + u * kLanes) * load(w + i + u * kLanes);
    }
  for (; i + kLanes <= in; i += kLanes) acc[0] += load(x + i) * load(w + i);
  const Vec total = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  float result = sums<1>(&total)[0];
  for (; i < in; i++) result += x[i] * value(w[i]);
  return result;
}

template <class W>
void route(const Layer<W>& layer, const W* const* rows, int count, int64_t* leaf, float* scratch) {
  const int64_t in = layer.in;
  const float* x[kMaxRows];
  float* copies = scratch + padded(layer.width * kMaxRows + 32);
  for (int r = 0; r < count; r++) {
    x[r] = row_in(rows[r], in, copies + r * padded(in));
    leaf[r] = 0;
  }
  int level = 0;
  if (layer.depth >= 2 && count % kRows == 0) {  // the three nodes at the top for several rows at once
    const W* nodes = layer.node_weight;
    for (int first = 0; first < count; first += kRows) {
      float top[3 * kRows + kLanes];
      dots<kRows, 3, false>(x + first, nodes, in, nodes, nodes, nodes, nodes, top);
      for (int at = 0; at < 2; at++)
        for (int r = 0; r < kRows; r++) {
          const int64_t node = leaf[first + r] + at;
          leaf[first + r] = 2 * leaf[first + r] + (top[node * kRows + r] + value(layer.node_bias[node]) >= 0);
        }
    }
    level = 2;
  }
  const W* ahead = layer.node_weight;  // a row's next node is brought while the rows after it are decided
  for (; level < layer.depth; level++)
    for (int r = 0; r < count; r++) {
      const int64_t node = leaf[r] + (int64_t(1) << level) - 1;
      const W* w = layer.node_weight + node * in;
      leaf[r] = 2 * leaf[r] + (logit(x[r], w, in, ahead) + value(layer.node_bias[node]) >= 0);
      if (level + 1 < layer.depth) ahead = layer.node_weight + (leaf[r] + (int64_t(2) << level) - 1) * in;
    }
}

// ---- soft training

// f(first, lanes) over n floats, a vector at a time; the last may be shorter
template <class F>
inline void by_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, int(n - i));
}
inline Vec load(const float* p, int lanes) {
  if (lanes == kLanes) return load(p);
  Vec v{};
  for (int i = 0; i < lanes; i++) v[i] = p[i];
  return v;
}
inline void store(float* p, Vec v, int lanes) {
  if (lanes == kLanes) return store(p, v);
  for (int i = 0; i < lanes; i++) p[i] = v[i];
}

// each block's weight for each of its neurons; WIDTH is that of a block where it is known, else 0
template <int WIDTH>
inline void spread(const float* weights, int64_t blocks, int64_t any_width, float* to) {
  const int64_t width = WIDTH ? WIDTH : any_width;
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < width; i++) to[b * width + i] = weights[b];
}
template <int WIDTH>
inline void gather(const float* values, int64_t blocks, int64_t any_width, float* totals) {
  const int64_t width = WIDTH ? WIDTH : any_width;
  for (int64_t b = 0; b < blocks; b++) {
    const float* v = values + b * width;
    if (WIDTH == 1) {
      totals[b] = *v;
      continue;
    }
    float s[8] = {};  // several sums at a time
    int64_t i = 0;
    for (; i + 8 <= width; i += 8)
      for (int u = 0; u < 8; u++) s[u] += v[i + u];
    for (; i < width; i++) s[i % 8] += v[i];
    totals[b] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
  }
}
// f(Known<W>) with the width as a constant where it is a usual one
template <int W>
struct Known {
  static constexpr int width = W;
};
template <class F>
inline void with_width(int64_t width, const F& f) {
  switch (width) {
    case 1: return f(Known<1>{});
    case 2: return f(Known<2>{});
    case 4: return f(Known<4>{});
    case 8: return f(Known<8>{});
    case 16: return f(Known<16>{});
    case 32: return f(Known<32>{});
    default: return f(Known<0>{});
  }
}

template <int... I>
inline Vec interleaved(Vec a, Vec b, int half, Indices<I...>) {  // a0 b0 a1 b1 ... from the lower or upper half
  const Vec low = __builtin_shufflevector(a, b, (I % 2 ? kLanes + I / 2 : I / 2)...);
  const Vec high = __builtin_shufflevector(a, b, (kLanes / 2 + (I % 2 ? kLanes + I / 2 : I / 2))...);
  return half ? high : low;
}
template <int... I>
inline Vec every_other(Vec a, Vec b, int odd, Indices<I...>) {  // of a, then of b
  const Vec evens = __builtin_shufflevector(a, b, (2 * I)...);
  const Vec odds = __builtin_shufflevector(a, b, (2 * I + 1)...);
  return odd ? odds : evens;
}

// weights of the children of `nodes` nodes; they may overwrite the weights, of which the last go first
inline void split(const float* weights, const float* choices, int64_t nodes, float* children) {
  int64_t i = nodes;
  for (; i >= kLanes; i -= kLanes) {
    const Vec w = load(weights + i - kLanes), c = load(choices + i - kLanes);
    const Vec left = w * (1.0f - c), right = w * c;
    store(children + 2 * i - kLanes, interleaved(left, right, 1, Lanes{}));
    store(children + 2 * i - 2 * kLanes, interleaved(left, right, 0, Lanes{}));
  }
  for (i--; i >= 0; i--) {
    const float w = weights[i], c = choices[i];
    children[2 * i + 1] = w * c;
    children[2 * i] = w * (1 - c);
  }
}

inline void sigmoids(const float* logits, int64_t n, float scale, float* choices) {
  by_vectors(n, [&](int64_t i, int lanes) {
    store(choices + i, 1.0f / (1.0f + exp(-scale * load(logits + i, lanes))), lanes);
  });
}

int64_t soft_scratch(const Tree& tree) { return 2 * padded(tree.blocks * tree.width) + 4 * padded(tree.blocks); }

void soft_forward(const Tree& tree, const float* z, const float* logits, int64_t rows, float* h, float* weights,
                  float* scratch) {
  const int64_t blocks = tree.blocks, n = blocks * tree.width;
  float* spread_weights = scratch;
  float* choices = scratch + padded(n);
  with_width(tree.width, [&](auto known) {
    for (int64_t r = 0; r < rows; r++, z += n, logits += blocks, h += n, weights += blocks) {
      sigmoids(logits, blocks - 1, tree.scale, choices);
      weights[0] = 1;
      for (int64_t nodes = 1; nodes < blocks; nodes *= 2) split(weights, choices + nodes - 1, nodes, weights);
      spread<known.width>(weights, blocks, tree.width, spread_weights);
      by_vectors(n, [&](int64_t i, int lanes) {
        store(h + i, activated(load(z + i, lanes), tree.activation) * load(spread_weights + i, lanes), lanes);
      });
    }
  });
}

void soft_backward(const Tree& tree, const float* grad_h, const float* grad_weights, const float* z, const float* logits,
                   const float* grad_more, int64_t rows, float* grad_z, float* grad_logits, float* scratch) {
  const int64_t blocks = tree.blocks, n = blocks * tree.width;
  float* spread_weights = scratch;
  float* products = scratch + padded(n);
  float* choices = products + padded(n);
  float* reach = choices + padded(blocks);    // weights of nodes, then of leaves, breadth first
  float* below = reach + 2 * padded(blocks);  // gradient by the weights of the children at hand
  with_width(tree.width, [&](auto known) {
    for (int64_t r = 0; r < rows; r++, grad_h += n, z += n, grad_z += n, grad_logits += blocks) {
      sigmoids(logits + r * blocks, blocks - 1, tree.scale, choices);
      reach[0] = 1;
      for (int64_t nodes = 1; nodes < blocks; nodes *= 2)
        split(reach + nodes - 1, choices + nodes - 1, nodes, reach + 2 * nodes - 1);
      spread<known.width>(reach + blocks - 1, blocks, tree.width, spread_weights);
      by_vectors(n, [&](int64_t i, int lanes) {
        const Vec g = load(grad_h + i, lanes), x = load(z + i, lanes);
        store(products + i, g * activated(x, tree.activation), lanes);
        store(grad_z + i, g * load(spread_weights + i, lanes) * derivative(x, tree.activation), lanes);
      });
      gather<known.width>(products, blocks, tree.width, below);
      for (int64_t b = 0; b < blocks; b++) below[b] += grad_weights[r * blocks + b];
      for (int64_t nodes = blocks / 2; nodes >= 1; nodes /= 2) {
        const int64_t first = nodes - 1;
        int64_t i = 0;
        for (; i + kLanes <= nodes; i += kLanes) {
          const Vec a = load(below + 2 * i), b = load(below + 2 * i + kLanes);
          const Vec left = every_other(a, b, 0, Lanes{}), right = every_other(a, b, 1, Lanes{});
          const Vec c = load(choices + first + i);
          store(grad_logits + first + i, load(reach + first + i) * (right - left) * c * (1.0f - c) * tree.scale);
          store(below + i, left * (1.0f - c) + right * c);
        }
        for (; i < nodes; i++) {
          const float left = below[2 * i], right = below[2 * i + 1], c = choices[first + i];
          grad_logits[first + i] = reach[first + i] * (right - left) * c * (1 - c) * tree.scale;
          below[i] = left * (1 - c) + right * c;
        }
      }
      if (grad_more)
        for (int64_t node = 0; node < blocks - 1; node++) grad_logits[node] += grad_more[r * (blocks - 1) + node];
      grad_logits[blocks - 1] = 0;
    }
  });
}

// ---- trees whose nodes are the neurons

template <class W>
int64_t tree_scratch(const Trees<W>& trees) {
  return sizeof(W) == sizeof(float) ? 0 : kMaxRows * padded(trees.in) + padded(trees.out);
}

template <class W>
void walk(const Trees<W>& trees, const W* const* rows, int count, int64_t* neuron, float* h, float* scratch) {
  const int64_t in = trees.in, nodes = (int64_t(1) << trees.depth) - 1, evaluated = trees.trees * trees.depth;
  const float* x[kMaxRows];
  for (int r = 0; r < count; r++) x[r] = row_in(rows[r], in, scratch + r * padded(in));
  // several paths at a time: the next neuron of one is brought while the others are decided
  const int64_t paths = count * trees.trees;
  for (int64_t first = 0; first < paths; first += kMaxRows) {
    const int together = int(paths - first < kMaxRows ? paths - first : kMaxRows);
    const float* input[kMaxRows];
    int64_t root[kMaxRows], node[kMaxRows], to[kMaxRows];
    for (int p = 0; p < together; p++) {
      const int64_t row = (first + p) / trees.trees, tree = (first + p) % trees.trees;
      input[p] = x[row];
      root[p] = tree * nodes;
      node[p] = 0;
      to[p] = (first + p) * trees.depth;
    }
    const W* ahead = trees.node_weight + root[0] * in;
    for (int level = 0; level < trees.depth; level++)
      for (int p = 0; p < together; p++) {
        const int64_t at = root[p] + node[p];
        const float z = logit<true>(input[p], trees.node_weight + at * in, in, ahead, trees.output_weight + at * trees.out) +
                        value(trees.node_bias[at]);
        neuron[to[p] + level] = at;
        h[to[p] + level] = z;
        node[p] = 2 * node[p] + 1 + (z >= 0);
        if (level + 1 < trees.depth) ahead = trees.node_weight + (root[p] + node[p]) * in;
      }
  }
  by_vectors(count * evaluated, [&](int64_t i, int lanes) {
    store(h + i, activated(load(h + i, lanes), trees.activation), lanes);
  });
}

void gathered_dots(const float* x, const int64_t* row, int64_t count, const float* weight, int64_t columns, float* result) {
  for (int64_t k = 0; k < count; k++) {
    const float* next = weight + row[k + 1 < count ? k + 1 : k] * columns;
    result[k] = logit(x, weight + row[k] * columns, columns, next);
  }
}

// N vectors of y
template <int N, class W>
inline void weighted(const float* h, const int64_t* row, int64_t count, const W* weight, int64_t columns, const W* bias,
                     float* y) {
  Vec acc[N];
  for (int n = 0; n < N; n++) acc[n] = bias ? load(bias + n * kLanes) : Vec{};
  for (int64_t k = 0; k < count; k++) {
    const W* w = weight + row[k] * columns;
    const Vec a = broadcast(h[k]);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[n] += a * load(w + n * kLanes);
  }
  for (int n = 0; n < N; n++) store(y + n * kLanes, acc[n]);
}

template <class W>
void gathered_sum(const float* h, const int64_t* row, int64_t count, const W* weight, int64_t columns, const W* bias,
                  W* result, float* scratch) {
  float* y = row_out(result, columns, false, scratch);
  int64_t i = 0;
  for (; i + 8 * kLanes <= columns; i += 8 * kLanes)
    weighted<8>(h, row, count, weight + i, columns, bias ? bias + i : nullptr, y + i);
  for (; i + kLanes <= columns; i += kLanes)
    weighted<1>(h, row, count, weight + i, columns, bias ? bias + i : nullptr, y + i);
  for (; i < columns; i++) {
    float s = bias ? value(bias[i]) : 0;
    for (int64_t k = 0; k < count; k++) s += h[k] * value(weight[row[k] * columns + i]);
    y[i] = s;
  }
  write_back(result, columns, y);
}

template <class W>
constexpr Kernel<W> kKernel = {scratch<W>, route<W>, evaluate<W>, tree_scratch<W>, walk<W>, gathered_sum<W>};

}  // namespace

const Kernels KERNELS = {kKernel<float>, kKernel<bfloat16>, {soft_scratch, soft_forward, soft_backward}, gathered_dots};

}  // namespace fffexp
