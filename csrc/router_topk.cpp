// router_topk on CPU. See moe_engine/ops/router_topk. The softmax is PyTorch's, so that the reference chooses the same
// experts.
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/softmax.h>

#include <vector>

namespace moe_engine {
namespace {

using at::Tensor;

// Does score a come before score b? NaN comes first, as in torch.sort; equal scores keep their order.
template <typename T>
bool before(T a, T b) {
  return a > b || (a != a && b == b);
}

template <typename T>
void select(const T* probs, const T* bias, int64_t experts, int64_t k, bool renormalize, T* weight, int32_t* index,
            T* score) {
  int64_t found = 0;
  for (int64_t e = 0; e < experts; e++) {
    T candidate = bias ? probs[e] + bias[e] : probs[e];
    if (found == k && !before(candidate, score[k - 1])) continue;
    int64_t slot = found < k ? found++ : k - 1;
    for (; slot > 0 && before(candidate, score[slot - 1]); slot--) {
      score[slot] = score[slot - 1];
      index[slot] = index[slot - 1];
    }
    score[slot] = candidate;
    index[slot] = e;
  }
  T total = 0;
  for (int64_t j = 0; j < k; j++) total += weight[j] = probs[index[j]];
  for (int64_t j = 0; renormalize && j < k; j++) weight[j] /= total;
}

// log sum exp(logits), from the largest logit and its probability; NaN if there is one.
template <typename T>
T log_sum(const T* logits, const T* probs, int64_t experts) {
  int64_t top = 0;
  for (int64_t e = 1; e < experts; e++) {
    if (before(logits[e], logits[top])) top = e;
  }
  return std::isinf(logits[top]) ? logits[top] : logits[top] - std::log(probs[top]);
}

template <typename T>
void differentiate(const T* grad_weight, const T* grad_probs, T grad_lse, const int32_t* index, const T* probs,
                   int64_t experts, int64_t k, bool renormalize, T* grad) {
  T total = 0, mean = 0;
  for (int64_t j = 0; j < k; j++) total += probs[index[j]];
  for (int64_t j = 0; j < k; j++) mean += grad_weight[j] * probs[index[j]] / total;
  for (int64_t e = 0; e < experts; e++) grad[e] = grad_probs[e];
  for (int64_t j = 0; j < k; j++) grad[index[j]] += renormalize ? (grad_weight[j] - mean) / total : grad_weight[j];
  T sum = 0;
  for (int64_t e = 0; e < experts; e++) sum += grad[e] * probs[e];
  for (int64_t e = 0; e < experts; e++) grad[e] = probs[e] * (grad[e] - sum + grad_lse);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> router_topk(const Tensor& logits_, int64_t k, bool renormalize,
                                                       const std::optional<Tensor>& bias_or_none) {
  Tensor logits = logits_.contiguous(), probs = at::softmax(logits, -1).contiguous();
  int64_t tokens = probs.size(0), experts = probs.size(1);
  Tensor weight = at::empty({tokens, k}, probs.options()),
         index = at::empty({tokens, k}, probs.options().dtype(at::kInt)), lse = at::empty({tokens}, probs.options());
  Tensor bias = bias_or_none ? bias_or_none->to(probs.scalar_type()).contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(probs.scalar_type(), "router_topk", [&] {
    const scalar_t* b = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, tokens, 256, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> score(k);
      for (int64_t t = begin; t < end; t++) {
        select(probs.const_data_ptr<scalar_t>() + t * experts, b, experts, k, renormalize,
               weight.data_ptr<scalar_t>() + t * k, index.data_ptr<int32_t>() + t * k, score.data());
        lse.data_ptr<scalar_t>()[t] = log_sum(logits.const_data_ptr<scalar_t>() + t * experts,
                                              probs.const_data_ptr<scalar_t>() + t * experts, experts);
      }
    });
  });
  return {weight, index, probs, lse};
}

Tensor router_topk_backward(const Tensor& grad_weight_, const Tensor& grad_probs_, const Tensor& grad_lse_,
                            const Tensor& index_, const Tensor& probs_, bool renormalize) {
  Tensor grad_weight = grad_weight_.contiguous(), grad_probs = grad_probs_.contiguous();
  Tensor grad_lse = grad_lse_.contiguous();
  Tensor index = index_.contiguous(), probs = probs_.contiguous(), grad = at::empty_like(probs);
  int64_t experts = probs.size(1), k = index.size(1);
  AT_DISPATCH_FLOATING_TYPES(probs.scalar_type(), "router_topk_backward", [&] {
    at::parallel_for(0, probs.size(0), 256, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        differentiate(grad_weight.const_data_ptr<scalar_t>() + t * k,
                      grad_probs.const_data_ptr<scalar_t>() + t * experts, grad_lse.const_data_ptr<scalar_t>()[t],
                      index.const_data_ptr<int32_t>() + t * k, probs.const_data_ptr<scalar_t>() + t * experts, experts,
                      k, renormalize, grad.data_ptr<scalar_t>() + t * experts);
      }
    });
  });
  return grad;
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("router_topk", moe_engine::router_topk);
  m.impl("router_topk_backward", moe_engine::router_topk_backward);
}
