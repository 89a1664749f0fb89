// Trainable Optimizer steps on the CPU: every tensor of a batch in one call, every number read and written once.
//
// Bit-identical to ../rules.py: float32 operations in the same order (compile without contraction), sums over a block
// in float64, which makes them independent of the order of summation, and storage as in ../state.py.
// The layout of Tensor, Scalars, Sums and Piece is that of batch.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr float SMALLEST_DIVISOR = 1e-30f;  // as in rules.py
constexpr double SMALLEST_SQUARE = 1e-8;    // as in factored.py
constexpr int64_t COLUMNS_HELD = 1 << 20;   // column sums, 8 bytes each, held until they are added up
constexpr int64_t CHUNK = 1 << 17;          // weights that a thread takes at a time
constexpr int64_t SMALL = 1 << 18;          // a tensor of at most so many stays in the cache between two passes
constexpr int TILE = 2048;                  // weights that stay in the cache between two loops over them
constexpr int BLOCK = 32;                   // weights that share an exponent in int8 state

enum Format : int32_t { FLOAT32, BFLOAT16, INT8 };
enum Variant : int32_t { DIAGONAL, RANK_ONE };
enum Sum { GG, PEAK, UG, WW, VW, UU, UB, ERROR, SUMS };

using bfloat16 = uint16_t;

struct Tensor {
  void* w;
  const void* g;
  void* state[3];
  uint8_t* exponents[3];
  int64_t numel, first, key;  // first: the index of this piece's first weight in the whole tensor
};

struct Scalars {
  float lr, decay, weight_decay, factor, beta, keep, own[4];  // own: the variant's
};

struct Sums {
  double of[SUMS];
};

struct Batch {
  Variant variant;
  Format weight, gradient, state;
  int states() const { return variant == DIAGONAL ? 2 : 3; }
};

// ---- Storage: float32, and bfloat16 and int8 blocks with stochastic rounding ---------------------------------------

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 of a weight's 32 random bits for each stored tensor: stream 0 is the weight, the others its state in order.
template <int stream>
inline uint32_t random16(uint32_t hash) {
  constexpr uint32_t multiplier[] = {1u, 1u, 0x9e3779b1u, 0x85ebca77u};
  return stream == 1 ? hash & 0xffffu : hash * multiplier[stream] >> 16;
}

inline float get(float x) { return x; }
inline float get(bfloat16 x) { return as_float(uint32_t(x) << 16); }

// any_nan: leave NaN as it is, since random bits could overflow into its sign; in NaN from bfloat16 they cannot.
template <bool any_nan>
inline uint32_t rounded(float x, uint32_t random) {
  uint32_t bits = as_bits(x);
  return any_nan ? bits + (random & -uint32_t(int32_t(bits & 0x7fffffffu) <= 0x7f800000)) : bits + random;
}

template <bool any_nan>
inline void put(float& to, float x, uint32_t) { to = x; }
template <bool any_nan>
inline void put(bfloat16& to, float x, uint32_t random) { to = bfloat16(rounded<any_nan>(x, random) >> 16); }

template <class T>
float largest_magnitude(const T* x, int n) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int k = 0; k < n; ++k) {
    int32_t magnitude = int32_t(as_bits(get(x[k])) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return as_float(uint32_t(largest));
}

// int8: sign(c) c^2 2^(exponent - 127), as state.py says.
inline void decode_block(const int8_t* codes, uint32_t exponent, int n, float* x) {
  const float scale = as_float(exponent << 23);
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    float c = codes[k];
    x[k] = c * std::fabs(c) * scale;
  }
}

inline void encode_block(const float* x, const uint32_t* random, int n, int8_t* codes, uint8_t* exponent) {
  const float peak = largest_magnitude(x, n);
  const uint32_t e = peak <= 3.4e38f ? (as_bits(peak / 16129.0f) + 0x7fffffu) >> 23 : 255u;
  const float inverse = e < 254 ? as_float((254 - e) << 23) : 0.0f;
  *exponent = uint8_t(e);
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    float y = std::fabs(x[k]) * inverse;
    int32_t c = int32_t(std::sqrt(y));
    float low = float(c);
    float u = float(int32_t(random[k])) * 0x1p-16f + 0x1p-17f;
    c += u * (2.0f * low + 1.0f) < y - low * low;
    codes[k] = int8_t(as_bits(x[k]) >> 31 ? -c : c);
  }
}

void decode(const Tensor& t, int which, int64_t i, int n, float* x) {
  const int8_t* codes = static_cast<const int8_t*>(t.state[which]) + i;
  const uint8_t* exponents = t.exponents[which] + i / BLOCK;
  int k = 0;
  for (; k + BLOCK <= n; k += BLOCK) decode_block(codes + k, exponents[k / BLOCK], BLOCK, x + k);
  if (k < n) decode_block(codes + k, exponents[k / BLOCK], n - k, x + k);
}

template <int stream>
void encode(const Tensor& t, int64_t i, int n, const float* x, const uint32_t* hashes) {
  int8_t* codes = static_cast<int8_t*>(t.state[stream - 1]) + i;
  uint8_t* exponents = t.exponents[stream - 1] + i / BLOCK;
  for (int k = 0; k < n; k += BLOCK) {
    uint32_t random[BLOCK];
    const int m = std::min(BLOCK, n - k);
    for (int j = 0; j < m; ++j) random[j] = random16<stream>(hashes[k + j]);
    if (m == BLOCK)
      encode_block(x + k, random, BLOCK, codes + k, exponents + k / BLOCK);
    else
      encode_block(x + k, random, m, codes + k, exponents + k / BLOCK);
  }
}

// ---- The rules -----------------------------------------------------------------------------------------------------

// DECAYS: whether there is any weight decay to compute.
template <bool DECAYS>
struct Diagonal {
  static constexpr int STATES = 2;
  float lr, decay, weight_decay, factor, beta, keep, alpha, room;

  explicit Diagonal(const Scalars& s)
      : lr(s.lr), decay(s.decay), weight_decay(s.weight_decay), factor(s.factor), beta(s.beta), keep(s.keep),
        alpha(s.own[0]), room(s.own[1]) {}

  inline void operator()(float& w, float g, float& a, float& b, float&, float& error, float& norm) const {
    g = (DECAYS ? g + weight_decay * w : g) * factor;
    float q = w * w;
    q = q < SMALLEST_DIVISOR ? SMALLEST_DIVISOR : q;
    float guarded = room / q;
    guarded = guarded < alpha ? guarded : alpha;
    float target = g - a * w;
    float r = b - target;
    a = a - guarded * w * r;
    b = keep * b + beta * target;
    float G = a * w + b;
    w = DECAYS ? (w - lr * G) - decay * w : w - lr * G;
    error += (G - g) * (G - g);
    norm += g * g;
  }
};

template <bool DECAYS>
struct RankOne {
  static constexpr int STATES = 3;
  float lr, decay, weight_decay, factor, beta, keep, s, s_new, gain_u, gain_v;

  explicit RankOne(const Scalars& x)
      : lr(x.lr), decay(x.decay), weight_decay(x.weight_decay), factor(x.factor), beta(x.beta), keep(x.keep),
        s(x.own[0]), s_new(x.own[1]), gain_u(x.own[2]), gain_v(x.own[3]) {}

  inline void operator()(float& w, float g, float& u, float& v, float& b, float& error, float& norm) const {
    g = (DECAYS ? g + weight_decay * w : g) * factor;
    float target = g - s * u;
    float r = b - target;
    u = u - gain_u * r;
    v = v - gain_v * w;
    b = keep * b + beta * target;
    float G = s_new * u + b;
    w = DECAYS ? (w - lr * G) - decay * w : w - lr * G;
    error += (G - g) * (G - g);
    norm += g * g;
  }
};

// One tile whose state is float32 or bfloat16.
template <class Rule, class W, class T, class S>
void step_tile(const Rule rule, W* w, const T* g, S* const* state, int n, uint32_t counter, double* sums) {
  constexpr int N = Rule::STATES;
  constexpr bool halves = sizeof(W) + sizeof(T) + sizeof(S) == 6;
  constexpr bool random = sizeof(W) + sizeof(S) < 8;
  S* const s0 = state[0];
  S* const s1 = state[1];
  S* const s2 = state[N - 1];
  float error = 0, norm = 0;
  int begin = 0;
  if constexpr (halves) {
    // Two bfloat16 at a time as the halves of a word, which needs no shuffling of lanes.
    bool aligned = (uintptr_t(w) | uintptr_t(g) | uintptr_t(s0) | uintptr_t(s1) | uintptr_t(s2)) % 4 == 0;
    if (aligned) {
      auto ww = reinterpret_cast<uint32_t*>(w);
      auto gg = reinterpret_cast<const uint32_t*>(g);
      auto u0 = reinterpret_cast<uint32_t*>(s0), u1 = reinterpret_cast<uint32_t*>(s1),
           u2 = reinterpret_cast<uint32_t*>(s2);
      auto low = [](uint32_t x) { return as_float(x << 16); };
      auto high = [](uint32_t x) { return as_float(x & 0xffff0000u); };
      auto join = [](float x, uint32_t rx, float y, uint32_t ry) {
        return rounded<false>(x, rx) >> 16 | (rounded<false>(y, ry) & 0xffff0000u);
      };
      begin = n / 2 * 2;
#pragma omp simd reduction(+ : error, norm)
      for (int k = 0; k < n / 2; ++k) {
        float x = low(ww[k]), y = high(ww[k]);
        float x0 = low(u0[k]), x1 = low(u1[k]), x2 = N == 3 ? low(u2[k]) : 0;
        float y0 = high(u0[k]), y1 = high(u1[k]), y2 = N == 3 ? high(u2[k]) : 0;
        rule(x, low(gg[k]), x0, x1, x2, error, norm);
        rule(y, high(gg[k]), y0, y1, y2, error, norm);
        uint32_t hx = mix(counter + 2 * k), hy = mix(counter + 2 * k + 1);
        ww[k] = join(x, random16<0>(hx), y, random16<0>(hy));
        u0[k] = join(x0, random16<1>(hx), y0, random16<1>(hy));
        u1[k] = join(x1, random16<2>(hx), y1, random16<2>(hy));
        if constexpr (N == 3) u2[k] = join(x2, random16<3>(hx), y2, random16<3>(hy));
      }
    }
  }
#pragma omp simd reduction(+ : error, norm)
  for (int k = begin; k < n; ++k) {
    float x = get(w[k]);
    float x0 = get(s0[k]), x1 = get(s1[k]), x2 = N == 3 ? get(s2[k]) : 0;
    rule(x, get(g[k]), x0, x1, x2, error, norm);
    uint32_t hash = random ? mix(counter + k) : 0;
    put<!halves>(w[k], x, random16<0>(hash));
    put<!halves>(s0[k], x0, random16<1>(hash));
    put<!halves>(s1[k], x1, random16<2>(hash));
    if constexpr (N == 3) put<!halves>(s2[k], x2, random16<3>(hash));
  }
  sums[ERROR] += error;
  sums[GG] += norm;
}

// ---- One tile of a tensor, in whatever formats it has ----------------------------------------------------------------

template <class Tile>
void for_tiles(int64_t low, int64_t high, Tile tile) {
  for (int64_t i = low; i < high; i += TILE) tile(i, int(std::min<int64_t>(TILE, high - i)));
}

// Weights or gradients as float32: in place, or converted into buffer.
const float* floats(Format format, const void* x, int64_t i, int n, float* buffer) {
  if (format == FLOAT32) return static_cast<const float*>(x) + i;
  const bfloat16* halves = static_cast<const bfloat16*>(x) + i;
  for (int k = 0; k < n; ++k) buffer[k] = get(halves[k]);
  return buffer;
}

const float* state_floats(const Batch& batch, const Tensor& t, int which, int64_t i, int n, float* buffer) {
  if (batch.state != INT8) return floats(batch.state, t.state[which], i, n, buffer);
  decode(t, which, i, n, buffer);
  return buffer;
}

// Calls f with the typed pointers to weights and gradients.
template <class F>
void with_types(const Batch& batch, const Tensor& t, int64_t i, F f) {
  auto with_gradient = [&](auto* w) {
    if (batch.gradient == FLOAT32)
      f(w, static_cast<const float*>(t.g) + i);
    else
      f(w, static_cast<const bfloat16*>(t.g) + i);
  };
  if (batch.weight == FLOAT32)
    with_gradient(static_cast<float*>(t.w) + i);
  else
    with_gradient(static_cast<bfloat16*>(t.w) + i);
}

// Calls f with typed pointers to the state; int8 codes are decoded.
template <class F>
void with_state(const Batch& batch, const Tensor& t, int64_t i, int n, F f) {
  if (batch.state == FLOAT32) {
    float* state[3];
    for (int j = 0; j < batch.states(); ++j) state[j] = static_cast<float*>(t.state[j]) + i;
    f(state);
  } else if (batch.state == BFLOAT16) {
    bfloat16* state[3];
    for (int j = 0; j < batch.states(); ++j) state[j] = static_cast<bfloat16*>(t.state[j]) + i;
    f(state);
  } else {
    float decoded[3][TILE];
    float* state[3] = {decoded[0], decoded[1], decoded[2]};
    for (int j = 0; j < batch.states(); ++j) decode(t, j, i, n, decoded[j]);
    f(state);
  }
}

template <class Rule>
void step_any(const Batch& batch, const Tensor& t, const Scalars& scalars, int64_t i, int n, double* sums) {
  const Rule rule(scalars);
  const uint32_t counter = uint32_t(t.first + i) + uint32_t(t.key);
  with_state(batch, t, i, n, [&](auto* state) {
    with_types(batch, t, i, [&](auto* w, auto* g) { step_tile(rule, w, g, state, n, counter, sums); });
    if constexpr (sizeof(**state) == 4) {
      if (batch.state == INT8) {
        uint32_t hashes[TILE];
        for (int k = 0; k < n; ++k) hashes[k] = mix(counter + k);
        encode<1>(t, i, n, state[0], hashes);
        encode<2>(t, i, n, state[1], hashes);
        if constexpr (Rule::STATES == 3) encode<3>(t, i, n, state[2], hashes);
      }
    }
  });
}

using float4 = float __attribute__((vector_size(16)));
using int4 = int32_t __attribute__((vector_size(16)));
using double4 = double __attribute__((vector_size(32)));

inline double4 widen(float4 x) {
#ifdef __AVX__  // one instruction, for which GCC 12 makes four
  return (double4)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, double4);
#endif
}

// sum + x y. Products of widened float32 are exact, so it does not matter whether they are rounded before the sum.
inline double4 plus_product(double4 sum, double4 x, double4 y) {
#ifdef __FMA__
  return (double4)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
#else
  return sum + x * y;
#endif
}

inline double total(double4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// Loads eight consecutive numbers, in an order that is the same for all tensors of one type.
inline void eight(const float* x, float4& p, float4& q) {
  std::memcpy(&p, x, sizeof p);
  std::memcpy(&q, x + 4, sizeof q);
}

inline void eight(const bfloat16* x, float4& p, float4& q) {
  int4 pairs;
  std::memcpy(&pairs, x, sizeof pairs);
  p = (float4)(pairs << 16);
  q = (float4)(pairs & int32_t(0xffff0000u));
}

// Adds GG, PEAK and, if with_u, UG. Reads g and u at four places at a time: a single stream of reads reaches half of
// the memory's bandwidth.
template <bool with_u, class T>
void add_gradient_products(const T* g, const T* u, float factor, int64_t n, double* sums) {
  const int64_t m = n / 32 * 8;
  double4 gg[4] = {}, ug[4] = {};
  int4 largest = {};
  for (int64_t k = 0; k < m; k += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float4 p, q;
      eight(g + j * m + k, p, q);
      const double4 gp = widen(p), gq = widen(q);
      gg[j] = plus_product(gg[j], gp, gp);
      gg[j] = plus_product(gg[j], gq, gq);
      const int4 a = (int4)p & 0x7fffffff, b = (int4)q & 0x7fffffff;
      largest = a > largest ? a : largest;
      largest = b > largest ? b : largest;
      if (with_u) {
        eight(u + j * m + k, p, q);
        ug[j] = plus_product(ug[j], widen(p), gp);
        ug[j] = plus_product(ug[j], widen(q), gq);
      }
    }
  double found_gg = total((gg[0] + gg[1]) + (gg[2] + gg[3])), found_ug = total((ug[0] + ug[1]) + (ug[2] + ug[3]));
  int32_t top = std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3]));
  for (int64_t k = 4 * m; k < n; ++k) {
    const float x = get(g[k]);
    found_gg += double(x) * double(x);
    if (with_u) found_ug += double(get(u[k])) * double(x);
    top = std::max(top, int32_t(as_bits(x) & 0x7fffffffu));
  }
  sums[GG] += found_gg;
  sums[UG] += factor * found_ug;
  sums[PEAK] = std::max(sums[PEAK], double(as_float(uint32_t(top))));
}

// Adds WW of Diagonal.
template <class T>
void add_squares(const T* w, int64_t n, double* sums) {
  double4 ww[4] = {};
  int64_t k = 0;
  for (; k + 16 <= n; k += 16)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float4 p, q;
      eight(w + k + 8 * j, p, q);
      ww[2 * j] = plus_product(ww[2 * j], widen(p), widen(p));
      ww[2 * j + 1] = plus_product(ww[2 * j + 1], widen(q), widen(q));
    }
  double found = total((ww[0] + ww[1]) + (ww[2] + ww[3]));
  for (; k < n; ++k) found += double(get(w[k])) * double(get(w[k]));
  sums[WW] += found;
}

// Adds WW, VW, UU and UB of RankOne.
template <class T>
void add_products(const T* w, const T* u, const T* v, const T* b, int n, double* sums) {
  double4 ww[2] = {}, vw[2] = {}, uu[2] = {}, ub[2] = {};
  int k = 0;
  for (; k + 8 <= n; k += 8) {
    float4 w4[2], u4[2], v4[2], b4[2];
    eight(w + k, w4[0], w4[1]);
    eight(u + k, u4[0], u4[1]);
    eight(v + k, v4[0], v4[1]);
    eight(b + k, b4[0], b4[1]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const double4 x = widen(w4[j]), y = widen(u4[j]);
      ww[j] = plus_product(ww[j], x, x);
      vw[j] = plus_product(vw[j], widen(v4[j]), x);
      uu[j] = plus_product(uu[j], y, y);
      ub[j] = plus_product(ub[j], y, widen(b4[j]));
    }
  }
  double found[4] = {total(ww[0] + ww[1]), total(vw[0] + vw[1]), total(uu[0] + uu[1]), total(ub[0] + ub[1])};
  for (; k < n; ++k) {
    const double x = get(w[k]), y = get(u[k]);
    found[0] += x * x;
    found[1] += double(get(v[k])) * x;
    found[2] += y * y;
    found[3] += y * double(get(b[k]));
  }
  sums[WW] += found[0];
  sums[VW] += found[1];
  sums[UU] += found[2];
  sums[UB] += found[3];
}

// Adds the sums over weights and state as stored: those after a step are, to the bit, those before the next one.
void add_weight_sums(const Batch& batch, const Tensor& t, int64_t i, int64_t n, double* sums) {
  if (batch.variant == DIAGONAL) return with_types(batch, t, i, [&](auto* w, auto*) { add_squares(w, n, sums); });
  for_tiles(i, i + n, [&](int64_t i, int n) {
    if (batch.weight == BFLOAT16 && batch.state == BFLOAT16) {
      auto at = [&](const void* x) { return static_cast<const bfloat16*>(x) + i; };
      return add_products(at(t.w), at(t.state[0]), at(t.state[1]), at(t.state[2]), n, sums);
    }
    float w[TILE], u[TILE], v[TILE], b[TILE];
    add_products(floats(batch.weight, t.w, i, n, w), state_floats(batch, t, 0, i, n, u),
                 state_floats(batch, t, 1, i, n, v), state_floats(batch, t, 2, i, n, b), n, sums);
  });
}

// Adds the sums over the gradient, including coupled weight decay.
void add_gradient_sums(const Batch& batch, const Tensor& t, const Scalars& scalars, int64_t i, int64_t n,
                       double* sums) {
  const bool rank_one = batch.variant == RANK_ONE;
  const float decay = scalars.weight_decay;
  auto add = [&](const auto* g, const auto* u, int64_t n) {
    if (rank_one)
      add_gradient_products<true>(g, u, scalars.factor, n, sums);
    else
      add_gradient_products<false>(g, u, scalars.factor, n, sums);
  };
  // Directly from memory, unless weight decay or another format of u prevents it.
  if (decay == 0 && (!rank_one || batch.state == batch.gradient))
    return with_types(batch, t, i, [&](auto*, auto* g) {
      using T = decltype(g);
      add(g, rank_one ? static_cast<T>(t.state[0]) + i : g, n);
    });
  for_tiles(i, i + n, [&](int64_t i, int n) {
    float x[TILE], y[TILE];
    const float* g = floats(batch.gradient, t.g, i, n, x);
    if (decay != 0) {
      const float* w = floats(batch.weight, t.w, i, n, y);
      for (int k = 0; k < n; ++k) x[k] = g[k] + decay * w[k];
      g = x;
    }
    add(g, rank_one ? state_floats(batch, t, 0, i, n, y) : g, n);
  });
}

// ---- All tensors, over the threads -----------------------------------------------------------------------------------

// Entry point of the OpenMP library that torch has loaded: its threads exist already, and wait for work in a busy loop
// that would slow down any others.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp = nullptr;

template <class Work>
void run_on(int threads, Work& work) {
  if (threads <= 1) return work();
  if (openmp) return openmp([](void* w) { (*static_cast<Work*>(w))(); }, &work, unsigned(threads), 0u);
  std::vector<std::thread> others;
  for (int k = 1; k < threads; ++k) others.emplace_back(std::ref(work));
  work();
  for (auto& thread : others) thread.join();
}

enum Which { IN_CHUNKS, SMALL_WHOLE };  // all tensors, in chunks; only the small ones, each as one chunk

// Calls work(tensor's index, begin, end, sums of these weights). A thread takes the next chunk when it is free; the
// chunks' sums are added up in order, so they do not depend on the threads. A second pass goes backwards, to begin with
// what the first has left in the cache.
template <class Work>
void over_chunks(Which which, bool backwards, int64_t count, const Tensor* tensors, Sums* sums, int threads,
                 Work work) {
  std::vector<int64_t> begin(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t chunks = (tensors[i].numel + CHUNK - 1) / CHUNK;
    begin[i + 1] = begin[i] + (which == IN_CHUNKS ? chunks : tensors[i].numel <= SMALL);
  }
  const int64_t chunks = begin[count];
  std::vector<Sums> partial(chunks, Sums{});
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t k; (k = next++) < chunks;) {
      const int64_t c = backwards ? chunks - 1 - k : k;
      const int64_t i = std::upper_bound(begin.begin(), begin.end(), c) - begin.begin() - 1;
      const bool last = c + 1 == begin[i + 1];
      const int64_t low = (c - begin[i]) * CHUNK, high = last ? tensors[i].numel : low + CHUNK;
      work(i, low, high, partial[c].of);
    }
  };
  run_on(int(std::min<int64_t>(threads, chunks)), take);
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = Sums{};
    for (int64_t c = begin[i]; c < begin[i + 1]; ++c)
      for (int k = 0; k < SUMS; ++k)
        sums[i].of[k] = k == PEAK ? std::max(sums[i].of[k], partial[c].of[k]) : sums[i].of[k] + partial[c].of[k];
  }
}

void add_sums(const Batch& batch, const Tensor& t, const Scalars& scalars, int64_t low, int64_t high, bool weights,
              double* sums) {
  add_gradient_sums(batch, t, scalars, low, high - low, sums);
  if (weights) add_weight_sums(batch, t, low, high - low, sums);
}

void step_chunk(const Batch& batch, const Tensor& t, const Scalars& scalars, int64_t low, int64_t high, bool weights,
                double* sums) {
  for_tiles(low, high, [&](int64_t i, int n) {
    const bool decays = scalars.weight_decay != 0 || scalars.decay != 0;
    if (batch.variant == DIAGONAL)
      decays ? step_any<Diagonal<true>>(batch, t, scalars, i, n, sums)
             : step_any<Diagonal<false>>(batch, t, scalars, i, n, sums);
    else
      decays ? step_any<RankOne<true>>(batch, t, scalars, i, n, sums)
             : step_any<RankOne<false>>(batch, t, scalars, i, n, sums);
    if (weights) add_weight_sums(batch, t, i, n, sums);
  });
}

// Computes the scalars of a block's step from its sums: rules.rms_factor, relative and rank_one_scalars.
void finish(const Batch& batch, bool rms, bool relative, int64_t numel, double* found, Scalars& s) {
  auto positive = [](auto x) { return x < SMALLEST_DIVISOR ? decltype(x)(SMALLEST_DIVISOR) : x; };
  if (rms) {
    const float factor = float(std::sqrt(double(numel)) / positive(std::sqrt(found[GG])));
    s.factor *= factor;
    found[UG] *= factor;
    found[PEAK] *= factor;
  }
  const float ww = float(found[WW]);
  float alpha = s.own[0];
  const float room = s.own[1];
  if (batch.variant == DIAGONAL) {
    if (relative) s.own[0] = alpha / positive(float(found[WW] / double(numel)));
    return;
  }
  const float vw = float(found[VW]), uu = float(found[UU]), ub = float(found[UB]), ug = float(found[UG]);
  const float c = vw * uu + ub - ug, q = vw * vw + uu * ww;
  if (relative) alpha = alpha / positive(std::max(q, ww / float(numel)));
  const float guarded = room / positive(q);
  alpha = guarded < alpha ? guarded : alpha;
  s.own[0] = vw;
  s.own[1] = vw - alpha * c * ww;
  s.own[2] = alpha * vw;
  s.own[3] = alpha * c;
}

// ---- Rows and columns of gradients brought to the same scale: factored.py -------------------------------------------

// Rows of a gradient, or part of one row; row, column: its first element's, among the rows and columns of all matrices.
struct Piece {
  void* g;
  int64_t rows, columns, row, column;
};

struct Rows {
  const Piece* of;
  int64_t low, high;  // the rows that a thread takes at a time
};

int64_t rows_of_chunk(const Piece& p) {
  const int64_t few = (p.rows * p.columns + COLUMNS_HELD - 1) / COLUMNS_HELD;  // bounds the column sums held
  return std::max({int64_t(1), 4 * CHUNK / std::max<int64_t>(1, p.columns), few});
}

std::vector<Rows> in_rows(int64_t count, const Piece* pieces) {
  std::vector<Rows> chunks;
  for (const Piece* p = pieces; p < pieces + count; ++p) {
    const int64_t step = rows_of_chunk(*p);
    for (int64_t low = 0; low < p->rows; low += step) chunks.push_back({p, low, std::min(p->rows, low + step)});
  }
  return chunks;
}

template <class Work>
void over_rows(const std::vector<Rows>& chunks, int threads, Work work) {
  std::atomic<size_t> next{0};
  auto take = [&] {
    for (size_t k; (k = next++) < chunks.size();) work(k);
  };
  run_on(int(std::min<size_t>(threads, chunks.size())), take);
}

inline float4 four(const float* x) {
  float4 p;
  std::memcpy(&p, x, sizeof p);
  return p;
}

inline float4 four(const bfloat16* x) {
#ifdef __AVX__  // one instruction, for which GCC 12 makes several
  return (float4)((int4)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)x)) << 16);
#else
  return float4{get(x[0]), get(x[1]), get(x[2]), get(x[3])};
#endif
}

// ROWS rows at a time, so that the columns' sums are read and written less often.
template <int ROWS, class T>
void add_squares_of_rows(const T* g, int64_t n, double* of_rows, double* of_columns) {
  double4 rows[ROWS] = {};
  double rest[ROWS] = {};
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    double4 column;
    std::memcpy(&column, of_columns + j, sizeof column);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const double4 x = widen(four(g + i * n + j));
      rows[i] = plus_product(rows[i], x, x);
      column = plus_product(column, x, x);
    }
    std::memcpy(of_columns + j, &column, sizeof column);
  }
  for (; j < n; ++j)
    for (int i = 0; i < ROWS; ++i) {
      const double x = get(g[i * n + j]), square = x * x;
      rest[i] += square;
      of_columns[j] += square;
    }
  for (int i = 0; i < ROWS; ++i) of_rows[i] += total(rows[i]) + rest[i];
}

template <class T>
void add_squares_of(const Rows& chunk, double* of_rows, double* of_columns) {
  const int64_t n = chunk.of->columns;
  const T* g = static_cast<const T*>(chunk.of->g);
  int64_t i = chunk.low;
  for (; i + 4 <= chunk.high; i += 4) add_squares_of_rows<4>(g + i * n, n, of_rows + i, of_columns);
  for (; i < chunk.high; ++i) add_squares_of_rows<1>(g + i * n, n, of_rows + i, of_columns);
}

void add_squares(Format format, const Rows& chunk, double* of_rows, double* of_columns) {
  format == FLOAT32 ? add_squares_of<float>(chunk, of_rows, of_columns)
                    : add_squares_of<bfloat16>(chunk, of_rows, of_columns);
}

// Adds the pieces' squares to the sums of their rows and columns; the chunks' column sums in order, whatever the
// threads, and for so many pieces at a time that the column sums held stay small.
void add_all_squares(Format format, int64_t count, const Piece* pieces, double* sums, int threads) {
  for (int64_t end, begin = 0; begin < count; begin = end) {
    int64_t held = 0;
    for (end = begin; end < count && held < COLUMNS_HELD; ++end) {
      const int64_t step = rows_of_chunk(pieces[end]);
      held += (pieces[end].rows + step - 1) / step * pieces[end].columns;
    }
    const std::vector<Rows> chunks = in_rows(end - begin, pieces + begin);
    std::vector<std::vector<double>> columns(chunks.size());
    over_rows(chunks, threads, [&](size_t k) {
      columns[k].resize(chunks[k].of->columns);
      add_squares(format, chunks[k], sums + chunks[k].of->row, columns[k].data());
    });
    for (size_t k = 0; k < chunks.size(); ++k)
      for (size_t j = 0; j < columns[k].size(); ++j) sums[chunks[k].of->column + int64_t(j)] += columns[k][j];
  }
}

// Rounds to the nearest number of the gradient's format, ties to even; NaN that comes from bfloat16 stays NaN.
template <class T>
inline float nearest(float x) {
  if constexpr (sizeof(T) == 4) return x;
  const uint32_t bits = as_bits(x);
  return as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

inline void put(float& to, float x) { to = x; }
inline void put(bfloat16& to, float x) { to = bfloat16(as_bits(x) >> 16); }

template <class T>
void scale_by(const Rows& chunk, const float* of_rows, const float* of_columns) {
  const int64_t n = chunk.of->columns;
  for (int64_t i = chunk.low; i < chunk.high; ++i) {
    T* g = static_cast<T*>(chunk.of->g) + i * n;
    const float of_row = of_rows[i];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) put(g[j], nearest<T>(nearest<T>(get(g[j]) * of_row) * of_columns[j]));
  }
}

void scale(Format format, const Rows& chunk, const float* of_rows, const float* of_columns) {
  format == FLOAT32 ? scale_by<float>(chunk, of_rows, of_columns) : scale_by<bfloat16>(chunk, of_rows, of_columns);
}

void scale_all(Format format, int64_t count, const Piece* pieces, const float* factors, int threads) {
  const std::vector<Rows> chunks = in_rows(count, pieces);
  over_rows(chunks, threads, [&](size_t k) {
    const Piece& piece = *chunks[k].of;
    scale(format, chunks[k], factors + piece.row, factors + piece.column);
  });
}

// Computes the factors of a matrix's rows, or columns, from their sums of squares: factored._factors_.
template <class T>
void factors_of(const double* squares, int64_t n, float* factors) {
  double4 four = {};
  int64_t i = 0;
  for (double4 x; i + 4 <= n; i += 4, four += x) std::memcpy(&x, squares + i, sizeof x);
  double sum = total(four);
  for (; i < n; ++i) sum += squares[i];
  double mean = sum / double(n);
  mean = mean < std::numeric_limits<double>::min() ? std::numeric_limits<double>::min() : mean;
  for (i = 0; i < n; ++i) {
    double x = squares[i] / mean;
    x = x < SMALLEST_SQUARE ? SMALLEST_SQUARE : x;
    factors[i] = nearest<T>(float(1 / std::sqrt(x)));
  }
}

// A matrix's factors, in the gradient's own format.
std::vector<float> factors_of(Format format, const Piece& matrix, const double* squares) {
  std::vector<float> factors(matrix.rows + matrix.columns);
  const auto of = format == FLOAT32 ? factors_of<float> : factors_of<bfloat16>;
  of(squares, matrix.rows, factors.data());
  of(squares + matrix.rows, matrix.columns, factors.data() + matrix.rows);
  return factors;
}

}  // namespace

extern "C" {

void use_openmp(void* parallel) { openmp = reinterpret_cast<Parallel>(parallel); }

// Sums over the gradients (GG, PEAK, UG) and, with `weights`, over weights and state (WW, VW, UU, UB).
void reduce(int32_t variant, int32_t weight, int32_t gradient, int32_t state, int64_t count, const Tensor* tensors,
            const Scalars* scalars, Sums* sums, int32_t weights, int32_t threads) {
  const Batch batch{Variant(variant), Format(weight), Format(gradient), Format(state)};
  over_chunks(IN_CHUNKS, false, count, tensors, sums, threads, [&](int64_t j, int64_t low, int64_t high, double* out) {
    add_sums(batch, tensors[j], scalars[j], low, high, weights, out);
  });
}

// One step of every tensor. Sums: ERROR, GG as the rule saw it and, with `weights`, those over new weights and state.
void update(int32_t variant, int32_t weight, int32_t gradient, int32_t state, int64_t count, const Tensor* tensors,
            const Scalars* scalars, Sums* sums, int32_t weights, int32_t threads) {
  const Batch batch{Variant(variant), Format(weight), Format(gradient), Format(state)};
  over_chunks(IN_CHUNKS, true, count, tensors, sums, threads, [&](int64_t j, int64_t low, int64_t high, double* out) {
    step_chunk(batch, tensors[j], scalars[j], low, high, weights, out);
  });
}

// Adds the squares of pieces to the sums of all rows and columns.
void add_row_and_column_squares(int32_t format, int64_t count, const Piece* pieces, double* sums, int32_t threads) {
  add_all_squares(Format(format), count, pieces, sums, threads);
}

// Multiplies pieces by their rows' and columns' factors.
void scale_rows_and_columns(int32_t format, int64_t count, const Piece* pieces, const float* factors, int32_t threads) {
  scale_all(Format(format), count, pieces, factors, threads);
}

// Does both for whole matrices, one after the other, so that a small one is read from memory once, by one thread.
void equalize(int32_t format, int64_t count, const Piece* matrices, int32_t threads) {
  const Format kind = Format(format);
  auto is_small = [](const Piece& matrix) { return matrix.rows * matrix.columns <= SMALL; };
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t k; (k = next++) < count;) {
      const Piece& matrix = matrices[k];
      if (!is_small(matrix)) continue;
      const Rows rows{&matrix, 0, matrix.rows};
      std::vector<double> squares(matrix.rows + matrix.columns);
      add_squares(kind, rows, squares.data(), squares.data() + matrix.rows);
      const std::vector<float> factors = factors_of(kind, matrix, squares.data());
      scale(kind, rows, factors.data(), factors.data() + matrix.rows);
    }
  };
  run_on(int(std::min<int64_t>(threads, count)), take);
  for (const Piece* matrix = matrices; matrix < matrices + count; ++matrix) {
    if (is_small(*matrix)) continue;
    const Piece alone{matrix->g, matrix->rows, matrix->columns, 0, matrix->rows};
    std::vector<double> squares(matrix->rows + matrix->columns);
    add_all_squares(kind, 1, &alone, squares.data(), threads);
    scale_all(kind, 1, &alone, factors_of(kind, alone, squares.data()).data(), threads);
  }
}

// Does both passes tensor by tensor, each a block of its own, so that what stays in the cache is read from memory once.
// Small tensors go to one thread each, the others to all threads. `held`: the last step's sums over weights and state,
// or null. PEAK is that of the scaled gradient.
void measure_and_update(int32_t variant, int32_t weight, int32_t gradient, int32_t state, int64_t count,
                        const Tensor* tensors, Scalars* scalars, Sums* sums, int32_t weights, int32_t threads,
                        const Sums* held, int32_t rms, int32_t relative) {
  const Batch batch{Variant(variant), Format(weight), Format(gradient), Format(state)};
  std::vector<Sums> found(count);
  auto measure = [&](int64_t j, int64_t low, int64_t high, double* out) {
    add_sums(batch, tensors[j], scalars[j], low, high, weights && !held, out);
  };
  auto with_held = [&](int64_t j) {
    if (weights && held) std::copy(held[j].of + WW, held[j].of + ERROR, found[j].of + WW);
    finish(batch, rms, relative, tensors[j].numel, found[j].of, scalars[j]);
  };
  auto move = [&](int64_t j, int64_t low, int64_t high, double* out) {
    step_chunk(batch, tensors[j], scalars[j], low, high, weights, out);
  };
  over_chunks(SMALL_WHOLE, false, count, tensors, sums, threads, [&](int64_t j, int64_t low, int64_t high, double* out) {
    measure(j, low, high, found[j].of);
    with_held(j);
    move(j, low, high, out);
  });
  for (int64_t j = 0; j < count; ++j) {
    if (tensors[j].numel > SMALL) {
      auto of_this = [&](auto work) {
        return [=](int64_t, int64_t low, int64_t high, double* out) { work(j, low, high, out); };
      };
      over_chunks(IN_CHUNKS, false, 1, tensors + j, &found[j], threads, of_this(measure));
      with_held(j);
      over_chunks(IN_CHUNKS, true, 1, tensors + j, &sums[j], threads, of_this(move));
    }
    sums[j].of[PEAK] = found[j].of[PEAK];
  }
}
}
