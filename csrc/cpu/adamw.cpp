// Compiled with -ffp-contract=off: apart from the two explicit FMAs, products and sums round one by one, as in torch.
#include "../adamw.h"

#include "parallel.h"
#include "rows.h"

namespace fusetune::cpu::FUSETUNE_LEVEL {

namespace {

struct Scalars {
  float decay, beta1_complement, beta2, beta2_complement, sqrt_bias2, eps, negative_step_size, sign, grad_scale;
};

Scalars scalars(const double* hyper, double step, const float* grad_scale) {
  const double bias1 = 1 - pow(hyper[kBeta1], step), bias2 = 1 - pow(hyper[kBeta2], step);
  return {
      (float)(1 - hyper[kLr] * hyper[kWeightDecay]),
      (float)(1 - hyper[kBeta1]),
      (float)hyper[kBeta2],
      (float)(1 - hyper[kBeta2]),
      (float)__builtin_sqrt(bias2),
      (float)hyper[kEps],
      (float)(-(hyper[kLr] / bias1)),
      hyper[kMaximize] ? -1.0f : 1.0f,
      grad_scale ? *grad_scale : 1.0f,
  };
}

// A row of the table, cut into items so that large tensors are shared and small ones go whole to one thread. An item is
// whole cache lines in every storage type.
constexpr int64_t kItem = 16384;

struct Float32 {
  float* p;
  f32v load(int64_t i, int64_t n) const { return n == W ? cpu::FUSETUNE_LEVEL::load(p + i) : load_first(p + i, n); }
  void store(int64_t i, f32v x, int64_t n) const {
    n == W ? cpu::FUSETUNE_LEVEL::store(p + i, x) : store_first(p + i, x, n);
  }
};
template <int kType>
struct Half {
  uint16_t* p;
  f32v load(int64_t i, int64_t n) const { return load_as_float(p + i, kType, n); }
  void store(int64_t i, f32v x, int64_t n) const { store_from_float(p + i, x, kType, n); }
};

template <bool kAmsgrad, class Tensor>
FUSETUNE_INLINE void update(const Scalars& s, Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq,
                            Tensor max_sq, int64_t i, int64_t n) {
  f32v g = grad.load(i, n) * s.sign;
  if (s.grad_scale != 1) g = g / s.grad_scale;
  f32v p = param.load(i, n) * s.decay;
  f32v m = exp_avg.load(i, n);
  m = fma(splat(s.beta1_complement), g - m, m);
  f32v v = fma(s.beta2_complement * g, g, exp_avg_sq.load(i, n) * s.beta2);
  f32v largest = v;
  if (kAmsgrad) {
    largest = max(max_sq.load(i, n), v);
    max_sq.store(i, largest, n);
  }
  p = p + s.negative_step_size * m / (sqrt(largest) / s.sqrt_bias2 + s.eps);
  param.store(i, p, n);
  exp_avg.store(i, m, n);
  exp_avg_sq.store(i, v, n);
}

template <bool kAmsgrad, class Tensor>
void update_range(const Scalars& s, const int64_t* row, int64_t begin, int64_t end) {
  auto tensor = [&](AdamwColumn column) { return Tensor{(decltype(Tensor::p))row[column]}; };
  const Tensor param = tensor(kParam), grad = tensor(kGrad), exp_avg = tensor(kExpAvg), exp_avg_sq = tensor(kExpAvgSq),
               max_sq = tensor(kMaxSq);
  int64_t i = begin;
  for (; i + W <= end; i += W) update<kAmsgrad>(s, param, grad, exp_avg, exp_avg_sq, max_sq, i, W);
  if (i < end) update<kAmsgrad>(s, param, grad, exp_avg, exp_avg_sq, max_sq, i, end - i);
}

template <class Tensor>
void update_item(const Scalars& s, const int64_t* row, int64_t begin, int64_t end) {
  row[kMaxSq] ? update_range<true, Tensor>(s, row, begin, end) : update_range<false, Tensor>(s, row, begin, end);
}

}  // namespace

void adamw_step(const int64_t* table, int64_t rows, const double* hypers, const float* grad_scale,
                const float* found_inf, int threads) {
  if (found_inf && *found_inf == 1) return;
  struct Row {
    Scalars scalars;
    int64_t first_item;
  };
  const Buffer<Row> plan(rows + 1);
  int64_t items = 0, elements = 0;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t* row = table + r * kAdamwColumns;
    const double step = *(float*)row[kStep] += 1;
    const bool as_before = r && row[kGroup] == row[kGroup - kAdamwColumns] &&
                           step == *(const float*)row[kStep - kAdamwColumns];
    plan[r] = {as_before ? plan[r - 1].scalars : scalars(hypers + row[kGroup] * kAdamwHypers, step, grad_scale), items};
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
      case kBFloat16: update_item<Half<kBFloat16>>(plan[low].scalars, row, begin, end); break;
      default: update_item<Half<kFloat16>>(plan[low].scalars, row, begin, end);
    }
  };
  parallel(elements < 32768 ? 1 : threads, 0, Phase{items, body});
}

}  // namespace fusetune::cpu::FUSETUNE_LEVEL
