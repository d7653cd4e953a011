// Compiled with -ffp-contract=off: apart from the two explicit FMAs, products and sums round one by one, as in torch.
#include "../adamw.h"

#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

// A row of the table is cut into items, so that large tensors are shared and small ones go whole to one thread; an item
// is whole cache lines in every storage type.
constexpr int64_t kItem = 16384;

struct Float32 {
  using Element = float;
  static Pair load(const float* p) { return load_pair(p); }
  static void store(float* p, Pair x, bool) { store_pair(p, x); }
};
struct BFloat16 {
  using Element = uint16_t;
  static Pair load(const uint16_t* p) { return load_pair_bfloat16(p); }
  static void store(uint16_t* p, Pair x, bool may_be_nan) { store_pair_bfloat16(p, x, may_be_nan); }
};
struct Float16 {
  using Element = uint16_t;
  static Pair load(const uint16_t* p) { return {load_as_float(p, kFloat16), load_as_float(p + W, kFloat16)}; }
  static void store(uint16_t* p, Pair x, bool) {
    store_from_float(p, x.a, kFloat16);
    store_from_float(p + W, x.b, kFloat16);
  }
};

template <bool kAmsgrad>
FUSETUNE_INLINE void update(const AdamwScalars& s, f32v g, f32v& p, f32v& m, f32v& v, f32v& max_sq) {
  g = g * s.sign;
  if (s.grad_scale != 1) g = g / s.grad_scale;
  m = fma(splat(s.lerp), g - m, s.lerp_from_grad ? g : m);
  v = fma(s.beta2_complement * g, g, v * s.beta2);
  max_sq = kAmsgrad ? max(max_sq, v) : v;
  p = p * s.decay + s.negative_step_size * m / (sqrt(max_sq) / s.sqrt_bias2 + s.eps);
}

// 2 W elements
template <bool kAmsgrad, class Type, class Element = typename Type::Element>
FUSETUNE_INLINE void update_pair(const AdamwScalars& s, const Element* grad, Element* param, Element* exp_avg,
                                 Element* exp_avg_sq, Element* largest) {
  Pair g = Type::load(grad), p = Type::load(param), m = Type::load(exp_avg), v = Type::load(exp_avg_sq), max_sq{};
  if (kAmsgrad) max_sq = Type::load(largest);
  update<kAmsgrad>(s, g.a, p.a, m.a, v.a, max_sq.a);
  update<kAmsgrad>(s, g.b, p.b, m.b, v.b, max_sq.b);
  const bool nan = any_nan(p.a) || any_nan(p.b);  // a NaN anywhere has reached p
  Type::store(param, p, nan);
  Type::store(exp_avg, m, nan);
  Type::store(exp_avg_sq, v, nan);
  if (kAmsgrad) Type::store(largest, max_sq, nan);
}

template <bool kAmsgrad, class Type, class Element = typename Type::Element>
void update_range(const AdamwScalars& s, const int64_t* row, int64_t begin, int64_t end) {
  Element* const grad = (Element*)row[kGrad] + begin;
  Element* const written[] = {(Element*)row[kParam] + begin, (Element*)row[kExpAvg] + begin,
                              (Element*)row[kExpAvgSq] + begin, (Element*)row[kMaxSq] + begin};
  const int64_t n = end - begin, whole = n / (2 * W) * (2 * W);
  for (int64_t i = 0; i < whole; i += 2 * W)
    update_pair<kAmsgrad, Type>(s, grad + i, written[0] + i, written[1] + i, written[2] + i, written[3] + i);
  if (whole < n) {
    constexpr int kWritten = kAmsgrad ? 4 : 3;
    const size_t bytes = (n - whole) * sizeof(Element);
    Element last_grad[2 * W] = {}, last[4][2 * W] = {};
    memcpy(last_grad, grad + whole, bytes);
    for (int t = 0; t < kWritten; t++) memcpy(last[t], written[t] + whole, bytes);
    update_pair<kAmsgrad, Type>(s, last_grad, last[0], last[1], last[2], last[3]);
    for (int t = 0; t < kWritten; t++) memcpy(written[t] + whole, last[t], bytes);
  }
}

template <class Type>
void update_item(const AdamwScalars& s, const int64_t* row, int64_t begin, int64_t end) {
  row[kMaxSq] ? update_range<true, Type>(s, row, begin, end) : update_range<false, Type>(s, row, begin, end);
}

}  // namespace

void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, int threads) {
  if (found_inf && *found_inf != 0) return;
  struct Row {
    AdamwScalars scalars;
    int64_t first_item;
  };
  const Buffer<Row> plan(rows + 1);
  int64_t items = 0, elements = 0;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t* row = table + r * kAdamwColumns;
    const double step = *(float*)row[kStep] += 1;
    const bool as_before =
        r && row[kGroup] == row[kGroup - kAdamwColumns] && step == *(const float*)row[kStep - kAdamwColumns];
    plan[r] = {as_before ? plan[r - 1].scalars : adamw_scalars(hypers + row[kGroup] * kAdamwHypers, step, grad_scale),
               items};
    items += (row[kNumel] + kItem - 1) / kItem;
    elements += row[kNumel];
  }
  plan[rows].first_item = items;

  auto body = [&](int64_t item, float*) {
    int64_t low = 0, high = rows;  // the row whose items include this one
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan[middle].first_item <= item ? low : high) = middle;
    }
    const int64_t* row = table + low * kAdamwColumns;
    const int64_t begin = (item - plan[low].first_item) * kItem;
    const int64_t end = row[kNumel] < begin + kItem ? row[kNumel] : begin + kItem;
    switch (row[kDtype]) {
      case kFloat32: update_item<Float32>(plan[low].scalars, row, begin, end); break;
      case kBFloat16: update_item<BFloat16>(plan[low].scalars, row, begin, end); break;
      default: update_item<Float16>(plan[low].scalars, row, begin, end);
    }
  };
  parallel(elements < 32768 ? 1 : threads, 0, Phase{items, body});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
