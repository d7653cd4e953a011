// Compiled with -ffp-contract=off: apart from the explicit FMAs, products and sums round one by one, as in torch.
#include "../adamw.h"

#include <type_traits>

#include "adamw_codes.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

// A row of the table is cut into items, so that large tensors are shared and small ones go whole to one thread. An item
// is whole cache lines in every storage type, whole blocks of codes, and whole groups of random numbers.
constexpr int64_t kItem = 16384;

// ---- storage: pairs of vectors, 2 W neighbouring elements ----

struct Float32 {
  using Element = float;
  static Pair load(const float* p) { return load_pair(p); }
  static void store(float* p, Pair x, bool) { store_pair(p, x); }
};
template <int kDtype>
struct Half {
  using Element = uint16_t;
  static Pair load(const uint16_t* p) { return {load_as_float(p, kDtype), load_as_float(p + W, kDtype)}; }
  static void store(uint16_t* p, Pair x, bool may_be_nan) {
    for (int i = 0; i < 2; i++) {  // each half by itself: a load of both would wait for their stores
      const f32v half = i ? x.b : x.a;
      u16v v;
      if (kDtype == kFloat16)
        v = to_float16(half);
      else
        v = may_be_nan ? to_bfloat16(half) : narrow(rounded_to_bfloat16(half) >> 16);
      memcpy(p + i * W, &v, sizeof v);
    }
  }
};
using BFloat16 = Half<kBFloat16>;
using Float16 = Half<kFloat16>;
// Its lanes are in another order, so it goes with no other type.
struct BFloat16Alone {
  using Element = uint16_t;
  static Pair load(const uint16_t* p) { return load_pair_bfloat16(p); }
  static void store(uint16_t* p, Pair x, bool may_be_nan) { store_pair_bfloat16(p, x, may_be_nan); }
};

// Random pieces of the tensors p, m, v, v' for 128 elements.
struct Random {
  uint32_t pairs[4][kMaskPairs];

  void make(uint64_t key, int64_t step, int64_t element, int kinds) {
    for (int kind = 0; kind < kinds; kind++)
      philox_pairs(key, (uint64_t)kind << 56 | step, 1, element / kMaskGroup, pairs[kind], [](u32v w) { return w; });
  }
  u32v piece(int kind, int64_t c) const {
    const u32v pair = (u32v)load((const int32_t*)pairs[kind] + c / 32 * 16 + c % 16);
    return c % 32 < 16 ? pair & 0xFFFFu : pair >> 16;
  }
  void store(int kind, int64_t c, uint16_t* p, Pair x) const {
    const f32v halves[] = {x.a, x.b};
    for (int i = 0; i < 2; i++) {
      const f32v h = halves[i];
      const u32v nan = (u32v)(h != h) & 0x7FC00000u;  // the sum of a NaN's bits may have left its exponent
      const u16v rounded = narrow((((u32v)h + piece(kind, c + i * W)) | nan) >> 16);
      memcpy(p + i * W, &rounded, sizeof rounded);
    }
  }
};

// ---- the update ----

// Where 2 W elements, or those from them on, are.
template <class P, class M>
struct At {
  const typename P::Element* grad;
  typename P::Element* param;
  typename M::Element *exp_avg, *exp_avg_sq, *largest;  // largest: null without amsgrad
  void* wide;
};

// p <- its step, of new m and v'.
template <bool kDivides>
FUSETUNE_INLINE f32v stepped(const AdamwScalars& s, f32v p, f32v m, f32v largest) {
  const f32v root = kDivides ? sqrt(largest) / s.sqrt_bias2 : sqrt(largest) * s.inverse_sqrt_bias2;
  return p * s.decay + s.negative_step_size * m / (root + s.eps);
}
FUSETUNE_INLINE f32v effective(const AdamwScalars& s, f32v g) {
  if (s.grad_scale != 1) g = g / s.grad_scale;
  return g * (s.sign * s.clip);
}
FUSETUNE_INLINE void advance(const AdamwScalars& s, f32v g, f32v& m, f32v& v) {
  m = fma(splat(s.lerp), g - m, s.lerp_from_grad ? g : m);
  v = fma(s.beta2_complement * g, g, v * s.beta2);
}

// Bytes of an element of `wide`.
template <int kWeights>
constexpr int kWideSize = kWeights == kSplit ? 2 : 4;

// p in float32, and back.
template <class P, int kWeights>
FUSETUNE_INLINE Pair load_weights(const typename P::Element* param, const void* wide) {
  if constexpr (kWeights == kMaster) return load_pair((const float*)wide);
  if constexpr (kWeights == kSplit) {
    Pair x;
    for (int i = 0; i < 2; i++) {
      u16v upper, lower;
      memcpy(&upper, (const uint16_t*)param + i * W, sizeof upper);
      memcpy(&lower, (const uint16_t*)wide + i * W, sizeof lower);
      const u32v low = widen(lower);
      (i ? x.b : x.a) = (f32v)((widen(upper) << 16) + low - ((low & 0x8000u) << 1));
    }
    return x;
  }
  return P::load(param);
}
template <class P, int kWeights>
FUSETUNE_INLINE void store_weights(typename P::Element* param, void* wide, Pair x, bool nan, const Random& random,
                                   int64_t c) {
  if constexpr (kWeights == kStochastic) {
    random.store(0, c, (uint16_t*)param, x);
  } else if constexpr (kWeights == kSplit) {
    for (int i = 0; i < 2; i++) {
      const f32v h = i ? x.b : x.a;
      const u32v bits = nan ? h != h ? splat(0x7FC00000u) : (u32v)h : (u32v)h;
      const u16v upper = narrow((bits + 0x8000u) >> 16), lower = narrow(bits & 0xFFFFu);
      memcpy((uint16_t*)param + i * W, &upper, sizeof upper);
      memcpy((uint16_t*)wide + i * W, &lower, sizeof lower);
    }
  } else {
    P::store(param, x, nan);
    if constexpr (kWeights == kMaster) store_pair((float*)wide, x);
  }
}

// 2 W elements; c is the first one's number in its group of 128.
template <class P, class M, int kWeights>
FUSETUNE_INLINE void update_pair(const AdamwScalars& s, const At<P, M>& t, const Random& random, int64_t c) {
  constexpr bool kDivides = kWeights == kPlain && std::is_same_v<P, Float32> && std::is_same_v<M, Float32>;
  constexpr bool kRandom = kWeights == kStochastic && std::is_same_v<M, BFloat16>;
  const Pair g = P::load(t.grad);
  Pair p = load_weights<P, kWeights>(t.param, t.wide), m = M::load(t.exp_avg), v = M::load(t.exp_avg_sq);
  advance(s, effective(s, g.a), m.a, v.a);
  advance(s, effective(s, g.b), m.b, v.b);
  Pair largest = v;
  if (t.largest) {
    largest = M::load(t.largest);
    largest.a = max(largest.a, v.a);
    largest.b = max(largest.b, v.b);
  }
  p.a = stepped<kDivides>(s, p.a, m.a, largest.a);
  p.b = stepped<kDivides>(s, p.b, m.b, largest.b);
  const bool nan = any_nan(p);  // a NaN anywhere has reached p
  store_weights<P, kWeights>(t.param, t.wide, p, nan, random, c);
  const auto keep = [&](int kind, typename M::Element* to, Pair x) {
    if constexpr (kRandom)
      random.store(kind, c, to, x);
    else
      M::store(to, x, nan);
  };
  keep(1, t.exp_avg, m);
  keep(2, t.exp_avg_sq, v);
  if (t.largest) keep(3, t.largest, largest);
}

// What `update` does from `at` on for `count` elements, where it wants `whole` of them: on copies that are filled up
// with zeros.
template <class P, class M, int kWhole, class Update>
void on_copies(const At<P, M>& at, int64_t count, int wide_size, Update update) {
  typename P::Element grad[kWhole] = {}, param[kWhole] = {};
  typename M::Element moments[3][kWhole] = {};
  float wide[kWhole] = {};
  memcpy(grad, at.grad, count * sizeof *grad);
  memcpy(param, at.param, count * sizeof *param);
  typename M::Element* const from[] = {at.exp_avg, at.exp_avg_sq, at.largest};
  for (int i = 0; i < 3; i++)
    if (from[i]) memcpy(moments[i], from[i], count * sizeof **moments);
  if (at.wide) memcpy(wide, at.wide, count * wide_size);
  update(At<P, M>{grad, param, moments[0], moments[1], at.largest ? moments[2] : nullptr, wide});
  memcpy(at.param, param, count * sizeof *param);
  for (int i = 0; i < 3; i++)
    if (from[i]) memcpy(from[i], moments[i], count * sizeof **moments);
  if (at.wide) memcpy(at.wide, wide, count * wide_size);
}

// ---- 8-bit moments ----

struct Codes {
  using Element = uint8_t;
};

// A block of 256 elements: p, m, v, then the codes of m and v.
template <class P, int kWeights>
void update_block(const AdamwScalars& scalars, const At<P, Codes>& t, float* absmax, float* absmax_sq,
                  const Random* random) {
  const AdamwScalars s = scalars;
  static const auto signed_tables = SignedCodes::Tables::make();
  static const auto unsigned_tables = UnsignedCodes::Tables::make();
  alignas(64) float m[kQuantBlock], v[kQuantBlock];
  const Decoder decode_m(signed_tables, *absmax), decode_v(unsigned_tables, *absmax_sq);
  u32v bits_m{}, bits_v{};  // without their signs, as integers, the bits of floats are in the order of their sizes
  for (int i = 0; i < kQuantBlock; i += 2 * W) {
    const Pair g = P::load(t.grad + i);
    void* const wide = (char*)t.wide + i * kWideSize<kWeights>;
    Pair p = load_weights<P, kWeights>(t.param + i, wide);
    for (int half = 0; half < 2; half++) {
      const int at = i + half * W;
      f32v mean = SignedCodes::decode(decode_m, load_bytes(t.exp_avg + at));
      f32v square = UnsignedCodes::decode(decode_v, load_bytes(t.exp_avg_sq + at));
      advance(s, effective(s, half ? g.b : g.a), mean, square);
      f32v& w = half ? p.b : p.a;
      w = stepped<false>(s, w, mean, square);
      store(m + at, mean);
      store(v + at, square);
      bits_m = max(bits_m, (u32v)mean << 1);
      bits_v = max(bits_v, (u32v)square);  // not negative, but for a NaN
    }
    store_weights<P, kWeights>(t.param + i, wide, p, any_nan(p), random[i / kMaskGroup], i % kMaskGroup);
  }
  *absmax = encode_block<SignedCodes>(signed_tables, m, bits_m, t.exp_avg);
  *absmax_sq = encode_block<UnsignedCodes>(unsigned_tables, v, bits_v << 1, t.exp_avg_sq);
}

// ---- rows of the table ----

struct Item {
  const AdamwScalars& scalars;
  const int64_t* table;
  int64_t rows, row, begin, end;

  int64_t column(AdamwColumn c) const { return table[c * rows + row]; }
  template <class P, class M>
  At<P, M> at(int wide_size) const {
    const auto element = [&](AdamwColumn c, int size) { return column(c) ? column(c) + begin * size : 0; };
    constexpr int kP = sizeof(typename P::Element), kM = sizeof(typename M::Element);
    return {(typename P::Element*)element(kGrad, kP),   (typename P::Element*)element(kParam, kP),
            (typename M::Element*)element(kExpAvg, kM), (typename M::Element*)element(kExpAvgSq, kM),
            (typename M::Element*)element(kMaxSq, kM),  (void*)element(kWide, wide_size)};
  }
  void make(Random& random, int64_t element, int kinds) const {
    random.make(column(kKey), (int64_t)*(const float*)column(kStep), element, kinds);
  }
};

template <class P, class M>
FUSETUNE_INLINE At<P, M> moved(const At<P, M>& t, int64_t i, int wide_size) {
  return {t.grad + i,
          t.param + i,
          t.exp_avg + i,
          t.exp_avg_sq + i,
          t.largest ? t.largest + i : nullptr,
          t.wide ? (char*)t.wide + i * wide_size : nullptr};
}

template <class P, class M, int kWeights>
void update_item(const Item& item) {
  constexpr int kWide = kWideSize<kWeights>;
  constexpr int kKinds = std::is_same_v<M, BFloat16> ? 4 : 1;
  const AdamwScalars s = item.scalars;  // a copy, which no store may change
  const At<P, M> t = item.at<P, M>(kWide);
  Random random;
  const int64_t n = item.end - item.begin;
  constexpr int64_t kStride = kWeights == kStochastic ? kMaskGroup : kItem;
  for (int64_t first = 0; first < n; first += kStride) {
    if (kWeights == kStochastic) item.make(random, item.begin + first, t.largest || kKinds == 1 ? kKinds : 3);
    const int64_t stop = n < first + kStride ? n : first + kStride;
    int64_t i = first;
    for (; i + 2 * W <= stop; i += 2 * W) update_pair<P, M, kWeights>(s, moved(t, i, kWide), random, i - first);
    if (i < stop)
      on_copies<P, M, 2 * W>(moved(t, i, kWide), stop - i, kWide,
                             [&](const At<P, M>& copy) { update_pair<P, M, kWeights>(s, copy, random, i - first); });
  }
}

template <class P, int kWeights>
void update_coded_item(const Item& item) {
  constexpr int kWide = kWideSize<kWeights>;
  const At<P, Codes> t = item.at<P, Codes>(kWide);
  float* const absmax = (float*)item.column(kAbsmax) + item.begin / kQuantBlock;
  float* const absmax_sq = (float*)item.column(kAbsmaxSq) + item.begin / kQuantBlock;
  Random random[kQuantBlock / kMaskGroup];
  const int64_t n = item.end - item.begin;
  for (int64_t i = 0; i < n; i += kQuantBlock) {
    if (kWeights == kStochastic)
      for (int j = 0; j < kQuantBlock / kMaskGroup; j++) item.make(random[j], item.begin + i + j * kMaskGroup, 1);
    const auto update = [&](const At<P, Codes>& at) {
      update_block<P, kWeights>(item.scalars, at, absmax + i / kQuantBlock, absmax_sq + i / kQuantBlock, random);
    };
    const At<P, Codes> at = moved(t, i, kWide);
    if (i + kQuantBlock <= n)
      update(at);
    else
      on_copies<P, Codes, kQuantBlock>(at, n - i, kWide, [&](const At<P, Codes>& copy) {
        memset(copy.exp_avg + (n - i), SignedCodes::kZero, kQuantBlock - (n - i));
        update(copy);
      });
  }
}

// An item in its format.
void update(const Item& item) {
#define CASE(dtype, P, state, M, weights) \
  case adamw_format(dtype, state, weights): return update_item<P, M, weights>(item);
#define CODED(dtype, P, weights) \
  case adamw_format(dtype, kInt8, weights): return update_coded_item<P, weights>(item);
  switch (item.column(kFormat)) {
    CASE(kFloat32, Float32, kFloat32, Float32, kPlain)
    CASE(kFloat32, Float32, kBFloat16, BFloat16, kPlain)
    CODED(kFloat32, Float32, kPlain)
    CASE(kBFloat16, BFloat16Alone, kBFloat16, BFloat16Alone, kPlain)
    CASE(kBFloat16, BFloat16, kFloat32, Float32, kPlain)
    CODED(kBFloat16, BFloat16, kPlain)
    CASE(kFloat16, Float16, kFloat16, Float16, kPlain)
    CASE(kFloat16, Float16, kFloat32, Float32, kPlain)
    CASE(kFloat16, Float16, kBFloat16, BFloat16, kPlain)
    CODED(kFloat16, Float16, kPlain)
    CASE(kBFloat16, BFloat16, kBFloat16, BFloat16, kStochastic)
    CASE(kBFloat16, BFloat16, kFloat32, Float32, kStochastic)
    CODED(kBFloat16, BFloat16, kStochastic)
    CASE(kBFloat16, BFloat16, kBFloat16, BFloat16, kMaster)
    CASE(kBFloat16, BFloat16, kFloat32, Float32, kMaster)
    CODED(kBFloat16, BFloat16, kMaster)
    CASE(kFloat16, Float16, kFloat16, Float16, kMaster)
    CASE(kFloat16, Float16, kFloat32, Float32, kMaster)
    CASE(kFloat16, Float16, kBFloat16, BFloat16, kMaster)
    CODED(kFloat16, Float16, kMaster)
    CASE(kBFloat16, BFloat16, kBFloat16, BFloat16, kSplit)
    CASE(kBFloat16, BFloat16, kFloat32, Float32, kSplit)
    CODED(kBFloat16, BFloat16, kSplit)
  }
#undef CASE
#undef CODED
}

// The rows of a table cut into items.
struct Items {
  const int64_t* table;
  int64_t rows;
  Buffer<int64_t> items, elements;  // before each row, and in all

  Items(const int64_t* table, int64_t rows) : table(table), rows(rows), items(rows + 1), elements(rows + 1) {
    items[0] = elements[0] = 0;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t numel = table[kNumel * rows + r];
      items[r + 1] = items[r] + (numel + kItem - 1) / kItem;
      elements[r + 1] = elements[r] + numel;
    }
  }
  int64_t count() const { return items[rows]; }
  int threads(int wanted) const { return elements[rows] < 32768 ? 1 : wanted; }

  // The last row that begins at `at` or before.
  int64_t row_of(const Buffer<int64_t>& begins, int64_t at) const {
    int64_t low = 0, high = rows;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begins[middle] <= at ? low : high) = middle;
    }
    return low;
  }
  void range(int64_t item, int64_t& row, int64_t& begin, int64_t& end) const {
    row = row_of(items, item);
    begin = (item - items[row]) * kItem;
    const int64_t numel = table[kNumel * rows + row];
    end = numel < begin + kItem ? numel : begin + kItem;
  }
  // Equal shares of the elements, as the bytes of an element differ little within a set.
  int64_t first_of(int thread, int threads) const {
    if (thread == threads) return count();
    const int64_t element = elements[rows] * thread / threads, row = row_of(elements, element);
    return items[row] + (element - elements[row]) / kItem;
  }
};

double sum_of_squares(const void* p, int dtype, int64_t n);

}  // namespace

void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, const float* grad_norm, float max_grad_norm, int threads) {
  if (found_inf && *found_inf != 0) return;
  const Items items(table, rows);
  const Buffer<AdamwScalars> scalars(rows);
  for (int64_t r = 0; r < rows; r++) {
    float* const count = (float*)table[kStep * rows + r];
    const double step = *count += 1;
    const int64_t group = table[kGroup * rows + r];
    const bool as_before =
        r && group == table[kGroup * rows + r - 1] && step == *(const float*)table[kStep * rows + r - 1];
    const double* hyper = hypers + group * kAdamwHypers;
    scalars[r] = as_before ? scalars[r - 1]
                           : adamw_scalars(hyper, hyper[kLearningRate], step, grad_scale, grad_norm, max_grad_norm);
  }
  const auto first_of = [&](int thread, int count) { return items.first_of(thread, count); };
  const auto body = [&](int64_t item, float*) {
    int64_t row, begin, end;
    items.range(item, row, begin, end);
    update({scalars[row], table, rows, row, begin, end});
  };
  threads = items.threads(threads);
  parallel(threads, 0, Shares(threads, items.count(), first_of, body));
}

void adamw_grad_norm(const int64_t* table, int64_t rows, const float* grad_scale, float* norm, int threads) {
  const Items items(table, rows);
  const Buffer<double> sums(items.count() + 1);
  const auto body = [&](int64_t item, float*) {
    int64_t row, begin, end;
    items.range(item, row, begin, end);
    const int dtype = table[kFormat * rows + row] & 15;
    sums[item] = sum_of_squares(at((const void*)table[kGrad * rows + row], dtype, begin), dtype, end - begin);
  };
  parallel(items.threads(threads), 0, Phase{items.count(), body});
  double sum = 0;
  for (int64_t i = 0; i < items.count(); i++) sum += sums[i];
  *norm = (float)(std::sqrt(sum) / (grad_scale ? *grad_scale : 1.0f));
}

namespace {

// In 16 sums, element i in sum i mod 16, whatever the level's vectors: the bits are the same everywhere.
double sum_of_squares(const void* p, int dtype, int64_t n) {
  constexpr int kSums = 32 / W;  // vectors of W / 2 doubles
  f64v sums[kSums] = {};
  const auto add = [&](const float* x) {
    for (int i = 0; i < kSums; i++) {
      const f64v d = load_as_double(x + i * (W / 2));
      sums[i] += d * d;
    }
  };
  const auto load16 = [&](int64_t i, int64_t count) {
    float x[16] = {};
    load_row(at(p, dtype, i), dtype, count, x);
    add(x);
  };
  int64_t i = 0;
  if (dtype == kFloat32)
    for (; i + 16 <= n; i += 16) add((const float*)p + i);
  else
    for (; i + 16 <= n; i += 16) load16(i, 16);
  if (i < n) load16(i, n - i);
  double sum = 0;
  for (int lane = 0; lane < 16; lane++) sum += sums[lane / (W / 2)][lane % (W / 2)];
  return sum;
}

}  // namespace

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
