// Token reorganization for Python: the checks that guard memory, then the kernels.
#include <memory>
#include <string>

#include "common/cuda_call.h"
#include "common/python_tensor.h"
#include "common/threads.h"
#include "token_reorganization/token_reorganization.h"

namespace viops::token_reorganization {
namespace {

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

template <class... Views>
void check_on_cpu(const Views&... views) {
  (views.check_on_cpu(), ...);
}

// An argument that may be None.
struct OptionalArgument {
  OptionalArgument(const char* name, py::handle object) {
    if (!object.is_none()) view.reset(new TensorArgument(name, object));
  }
  std::unique_ptr<TensorArgument> view;
};

// q, k [B, H, N, D] of one floating dtype, H, N and D at least 1.
void check_queries_and_keys(const TensorView& q, const TensorView& k) {
  q.check_rank(4, "B, H, N, D");
  q.check_floating();
  k.check_shape({q.shape[0], q.shape[1], q.shape[2], q.shape[3]}, "B, H, N, D");
  k.check_same_dtype(q);
  if (q.shape[1] < 1 || q.shape[2] < 1 || q.shape[3] < 1) {
    throw std::invalid_argument("q: expected H, N and D of at least 1");
  }
}

// scores [B, P] with P at most N, and probabilities [B, H, N].
void check_scores_and_probabilities(const TensorView& q, const TensorView& scores,
                                    const TensorView& probabilities) {
  scores.check_rank(2, "B, P");
  scores.check_shape({q.shape[0], scores.shape[1]}, "B, P");
  if (scores.shape[1] > q.shape[2]) {
    throw std::invalid_argument(std::string(scores.name) +
                                ": expected at most N = " + std::to_string(q.shape[2]) + " columns, got " +
                                std::to_string(scores.shape[1]));
  }
  probabilities.check_shape({q.shape[0], q.shape[1], q.shape[2]}, "B, H, N");
  probabilities.check_dtype(q.dtype == DType::float64 ? DType::float64 : DType::float32);
  probabilities.check_contiguous();
}

// q [B, H, N, D] float32 and others of its shape, and logsumexp [B, H, N].
void check_attention(const TensorView& q, std::initializer_list<const TensorView*> others,
                     const TensorView& logsumexp) {
  q.check_rank(4, "B, H, N, D");
  q.check_dtype(DType::float32);
  if (q.shape[1] < 1 || q.shape[2] < 1 || q.shape[3] < 1) {
    throw std::invalid_argument("q: expected H, N and D of at least 1");
  }
  q.check_on_cpu();
  for (const TensorView* other : others) {
    other->check_on_cpu();
    other->check_shape({q.shape[0], q.shape[1], q.shape[2], q.shape[3]}, "B, H, N, D");
    other->check_same_dtype(q);
  }
  logsumexp.check_on_cpu();
  logsumexp.check_shape({q.shape[0], q.shape[1], q.shape[2]}, "B, H, N");
  logsumexp.check_same_dtype(q);
  logsumexp.check_contiguous();
}

void softmax_attention_forward(py::handle q_, py::handle k_, py::handle v_, double scale, py::handle out_,
                               py::handle logsumexp_) {
  const TensorArgument q("q", q_), k("k", k_), v("v", v_), out("out", out_),
      logsumexp("logsumexp", logsumexp_);
  check_attention(q, {&k, &v, &out}, logsumexp);
  py::gil_scoped_release released;
  kernels().softmax_attention_forward(q, k, v, scale, out, logsumexp);
}

void softmax_attention_backward(py::handle grad_out_, py::handle q_, py::handle k_, py::handle v_,
                                py::handle out_, py::handle logsumexp_, double scale, py::handle grad_q_,
                                py::handle grad_k_, py::handle grad_v_) {
  const TensorArgument grad_out("grad_out", grad_out_), q("q", q_), k("k", k_), v("v", v_), out("out", out_);
  const TensorArgument logsumexp("logsumexp", logsumexp_);
  const TensorArgument grad_q("grad_q", grad_q_), grad_k("grad_k", grad_k_), grad_v("grad_v", grad_v_);
  check_attention(q, {&grad_out, &k, &v, &out, &grad_q, &grad_k, &grad_v}, logsumexp);
  py::gil_scoped_release released;
  kernels().softmax_attention_backward(grad_out, q, k, v, out, logsumexp, scale, grad_q, grad_k, grad_v);
}

void class_attention_scores_forward(py::handle q_, py::handle k_, double scale, py::handle scores_,
                                    py::handle probabilities_) {
  const TensorArgument q("q", q_), k("k", k_), scores("scores", scores_);
  const TensorArgument probabilities("probabilities", probabilities_);
  check_on_cpu(q, k, scores, probabilities);
  check_queries_and_keys(q, k);
  check_scores_and_probabilities(q, scores, probabilities);
  scores.check_dtype(DType::float32);
  scores.check_contiguous();
  py::gil_scoped_release released;
  kernels().class_attention_scores_forward(q, k, scale, scores, probabilities);
}

void class_attention_scores_backward(py::handle grad_scores_, py::handle q_, py::handle k_,
                                     py::handle probabilities_, double scale, py::handle grad_q_,
                                     py::handle grad_k_) {
  const TensorArgument grad_scores("grad_scores", grad_scores_), q("q", q_), k("k", k_);
  const TensorArgument probabilities("probabilities", probabilities_);
  const TensorArgument grad_q("grad_q", grad_q_), grad_k("grad_k", grad_k_);
  check_on_cpu(grad_scores, q, k, probabilities, grad_q, grad_k);
  check_queries_and_keys(q, k);
  check_scores_and_probabilities(q, grad_scores, probabilities);
  grad_scores.check_dtype(DType::float32);
  for (const TensorView* grad :
       {static_cast<const TensorView*>(&grad_q), static_cast<const TensorView*>(&grad_k)}) {
    grad->check_shape({q.shape[0], q.shape[1], q.shape[2], q.shape[3]}, "B, H, N, D");
    grad->check_same_dtype(q);
  }
  py::gil_scoped_release released;
  kernels().class_attention_scores_backward(grad_scores, q, k, probabilities, scale, grad_q, grad_k);
}

// Checks tokens [B, M, C] against keep, P and x's [B, N, C]: M = N - P + keep, or one more.
void check_tokens(const TensorView& tokens, int64_t batch, int64_t num_prefix, int64_t keep,
                  int64_t channels) {
  tokens.check_rank(3, "B, M, C");
  const int64_t fused = tokens.shape[1] - num_prefix - keep;
  tokens.check_shape({batch, num_prefix + keep + (fused == 1), channels},
                     "B, num_prefix + keep + (0 or 1), C");
}

int64_t check_index(const TensorView& index, int64_t batch, int64_t num_patches) {
  index.check_dtype(DType::int64);
  index.check_rank(2, "B, keep");
  index.check_shape({batch, index.shape[1]}, "B, keep");
  if (num_patches > INT32_MAX) {
    throw std::invalid_argument("scores: expected at most 2^31 - 1 patches, got " +
                                std::to_string(num_patches));
  }
  if (index.shape[1] > num_patches) {
    throw std::invalid_argument(std::string(index.name) + ": expected at most " +
                                std::to_string(num_patches) + " places (the number of patches), got " +
                                std::to_string(index.shape[1]));
  }
  return index.shape[1];
}

int64_t check_num_prefix(int64_t num_prefix, int64_t num_tokens, int64_t rest) {
  if (num_prefix < 0 || num_prefix > num_tokens - rest) {
    throw std::invalid_argument("num_prefix: expected 0 to " + std::to_string(num_tokens - rest) + ", got " +
                                std::to_string(num_prefix));
  }
  return num_prefix;
}

// Runs a kernel that reads an index, and raises where it found a wrong place.
template <class RunOnCpu>
void run_with_index(int64_t num_patches, const RunOnCpu& run) {
  WrongPlace wrong;
  {
    py::gil_scoped_release released;
    wrong = run();
  }
  if (wrong.found) {
    throw std::invalid_argument("index: expected places from 0 to " + std::to_string(num_patches - 1) +
                                ", each at most once in a row, got " + std::to_string(wrong.place) +
                                (wrong.place >= 0 && wrong.place < num_patches ? " twice" : ""));
  }
}

void reorganize_tokens_forward(py::handle x_, py::handle scores_, py::handle tokens_, py::handle index_) {
  const TensorArgument x("x", x_), scores("scores", scores_), tokens("tokens", tokens_),
      index("index", index_);
  const CudaCall cuda({&x, &scores, &tokens, &index});
  x.check_rank(3, "B, N, C");
  x.check_floating();
  scores.check_rank(2, "B, P");
  scores.check_floating();
  scores.check_shape({x.shape[0], scores.shape[1]}, "B, P");
  const int64_t num_prefix = check_num_prefix(x.shape[1] - scores.shape[1], x.shape[1], 0);
  const int64_t keep = check_index(index, x.shape[0], scores.shape[1]);
  check_tokens(tokens, x.shape[0], num_prefix, keep, x.shape[2]);
  tokens.check_same_dtype(x);
  tokens.check_contiguous();
  index.check_contiguous();
  py::gil_scoped_release released;
  if (cuda) return cuda_kernels.reorganize_tokens_forward(x, scores, tokens, index, cuda.stream());
  kernels().reorganize_tokens_forward(x, scores, tokens, index);
}

void reorganize_tokens_backward(py::handle grad_tokens_, py::handle x_, py::handle scores_, py::handle index_,
                                py::handle grad_x_, py::handle grad_scores_) {
  const TensorArgument grad_tokens("grad_tokens", grad_tokens_), scores("scores", scores_),
      index("index", index_);
  const OptionalArgument x("x", x_), grad_x("grad_x", grad_x_), grad_scores("grad_scores", grad_scores_);
  const CudaCall cuda(
      {&grad_tokens, x.view.get(), &scores, &index, grad_x.view.get(), grad_scores.view.get()});
  grad_tokens.check_rank(3, "B, M, C");
  grad_tokens.check_floating();
  scores.check_rank(2, "B, P");
  scores.check_floating();
  const int64_t batch = grad_tokens.shape[0], channels = grad_tokens.shape[2], num_patches = scores.shape[1];
  scores.check_shape({batch, num_patches}, "B, P");
  const int64_t keep = check_index(index, batch, num_patches);
  if ((x.view == nullptr) != (grad_scores.view == nullptr)) {
    throw std::invalid_argument("x: expected a tensor where grad_scores is one, and None where it is None");
  }
  for (const auto* view : {x.view.get(), grad_x.view.get()}) {
    if (!view) continue;
    view->check_rank(3, "B, N, C");
    const int64_t num_prefix = check_num_prefix(view->shape[1] - num_patches, view->shape[1], 0);
    view->check_shape({batch, num_prefix + num_patches, channels}, "B, N, C");
    view->check_same_dtype(grad_tokens);
    check_tokens(grad_tokens, batch, num_prefix, keep, channels);
  }
  if (x.view && grad_x.view) x.view->check_shape({batch, grad_x.view->shape[1], channels}, "B, N, C");
  if (grad_x.view) grad_x.view->check_contiguous();
  if (grad_scores.view) {
    grad_scores.view->check_shape({batch, num_patches}, "B, P");
    grad_scores.view->check_same_dtype(scores);
    grad_scores.view->check_contiguous();
  }
  if (cuda) {
    py::gil_scoped_release released;
    return cuda_kernels.reorganize_tokens_backward(grad_tokens, x.view.get(), scores, index,
                                                   grad_x.view.get(), grad_scores.view.get(), cuda.stream());
  }
  run_with_index(num_patches, [&] {
    return kernels().reorganize_tokens_backward(grad_tokens, x.view.get(), scores, index, grad_x.view.get(),
                                                grad_scores.view.get());
  });
}

void restore_tokens_forward(py::handle tokens_, py::handle index_, int64_t num_prefix, py::handle x_) {
  const TensorArgument tokens("tokens", tokens_), index("index", index_), x("x", x_);
  const CudaCall cuda({&tokens, &index, &x});
  tokens.check_rank(3, "B, M, C");
  tokens.check_floating();
  const int64_t batch = tokens.shape[0], channels = tokens.shape[2];
  x.check_rank(3, "B, N, C");
  const int64_t num_patches = x.shape[1] - check_num_prefix(num_prefix, x.shape[1], 0);
  x.check_shape({batch, x.shape[1], channels}, "B, N, C");
  x.check_same_dtype(tokens);
  x.check_contiguous();
  const int64_t keep = check_index(index, batch, num_patches);
  check_tokens(tokens, batch, num_prefix, keep, channels);
  if (cuda) {
    py::gil_scoped_release released;
    return cuda_kernels.restore_tokens_forward(tokens, index, num_patches, x, cuda.stream());
  }
  run_with_index(num_patches,
                 [&] { return kernels().restore_tokens_forward(tokens, index, num_patches, x); });
}

void restore_tokens_backward(py::handle grad_x_, py::handle index_, int64_t num_prefix,
                             py::handle grad_tokens_) {
  const TensorArgument grad_x("grad_x", grad_x_), index("index", index_),
      grad_tokens("grad_tokens", grad_tokens_);
  const CudaCall cuda({&grad_x, &index, &grad_tokens});
  grad_x.check_rank(3, "B, N, C");
  grad_x.check_floating();
  const int64_t batch = grad_x.shape[0], channels = grad_x.shape[2];
  const int64_t num_patches = grad_x.shape[1] - check_num_prefix(num_prefix, grad_x.shape[1], 0);
  const int64_t keep = check_index(index, batch, num_patches);
  check_tokens(grad_tokens, batch, num_prefix, keep, channels);
  grad_tokens.check_same_dtype(grad_x);
  grad_tokens.check_contiguous();
  if (cuda) {
    py::gil_scoped_release released;
    return cuda_kernels.restore_tokens_backward(grad_x, index, num_patches, grad_tokens, cuda.stream());
  }
  run_with_index(num_patches,
                 [&] { return kernels().restore_tokens_backward(grad_x, index, num_patches, grad_tokens); });
}

}  // namespace

void bind(py::module_& module) {
  module.def("softmax_attention_forward", &softmax_attention_forward);
  module.def("softmax_attention_backward", &softmax_attention_backward);
  module.def("class_attention_scores_forward", &class_attention_scores_forward);
  module.def("class_attention_scores_backward", &class_attention_scores_backward);
  module.def("reorganize_tokens_forward", &reorganize_tokens_forward);
  module.def("reorganize_tokens_backward", &reorganize_tokens_backward);
  module.def("restore_tokens_forward", &restore_tokens_forward);
  module.def("restore_tokens_backward", &restore_tokens_backward);
}

}  // namespace viops::token_reorganization
