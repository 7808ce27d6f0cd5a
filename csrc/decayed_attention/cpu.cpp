// Decayed attention on the CPU; built once a CPU level.
#include "decayed_attention/cpu_backward.h"
#include "decayed_attention/cpu_forward.h"
#include "decayed_attention/decayed_attention.h"

namespace viops::decayed_attention {
namespace {

template <class T>
void forward(const Inputs& inputs, const TensorView& out, const TensorView* logsumexp,
             const TensorView* inner) {
  Forward<T>(inputs, out, logsumexp, inner).run();
}

template <class T>
void backward(const TensorView& grad_out, const Inputs& inputs, const TensorView& logsumexp,
              const TensorView* inner, const TensorView& grad_q, const TensorView& grad_k,
              const TensorView& grad_v, const TensorView* grad_log_decay) {
  Backward<T>(grad_out, inputs, logsumexp, inner, grad_q, grad_k, grad_v, grad_log_decay).run();
}

const CpuKernels kernels = {
    [](const Inputs& inputs, const TensorView& out, const TensorView* logsumexp, const TensorView* inner) {
      VIOPS_FOR_DTYPE(inputs.q, forward, inputs, out, logsumexp, inner)
    },
    [](const TensorView& grad_out, const Inputs& inputs, const TensorView&, const TensorView& logsumexp,
       const TensorView* inner, const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v,
       const TensorView* grad_log_decay) {
      VIOPS_FOR_DTYPE(inputs.q, backward, grad_out, inputs, logsumexp, inner, grad_q, grad_k, grad_v,
                      grad_log_decay)
    },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::decayed_attention
