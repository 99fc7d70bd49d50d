// Mean squared error of hints: the value and its gradient in one pass, the sum in two.
//
// Traffic: both inputs once, the gradient once; bandwidth binds.
#include "common.cuh"

namespace amtml {
namespace {

constexpr char kOp[] = "hint_loss";
constexpr int kThreads = 256, kPerThread = 8;

struct Scratch {
  double sums[kWarp];
};

__global__ void mse_kernel(Values prediction, Values target, int64_t n, float scale, float* grad, double* partial) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = start + k * kThreads + threadIdx.x;
    if (i >= n) continue;
    const float difference = prediction[i] - target[i];
    sum += difference * difference;
    if (grad) grad[i] = scale * difference;
  }
  const double total = block_sum(static_cast<double>(sum), shared<Scratch>().sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void mean_kernel(const double* partial, int64_t count, double divisor, float* mean) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, shared<Scratch>().sums);
  if (threadIdx.x == 0) *mean = static_cast<float>(sum / divisor);
}

std::tuple<Tensor, Tensor> hint_mse_fwd(const Tensor& prediction, const Tensor& target, bool need_grad) {
  Shape shape;
  for (int64_t d = 0; d < prediction.dim(); ++d) shape.push_back(prediction.size(d));
  check_shape(kOp, "target", target, shape);
  const OnDevice on(prediction);
  const Tensor u = dense(prediction), v = dense(target);
  const int64_t n = u.numel();
  Tensor loss = empty(u, {}, ScalarType::Float), grad = empty_or_none(u, need_grad, shape, ScalarType::Float);
  const unsigned blocks = blocks_for(n, kThreads * kPerThread);
  Tensor partial = empty(u, {blocks}, ScalarType::Double);
  const double divisor = static_cast<double>(std::max<int64_t>(n, 1));
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  float* out = need_grad ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  launch(mse_kernel, {blocks, kThreads, 1, sizeof(Scratch)}, on, Values(u), Values(v), n,
         static_cast<float>(2 / divisor), out, sums);
  launch(mean_kernel, {1, kThreads, 1, sizeof(Scratch)}, on, sums, static_cast<int64_t>(blocks), divisor,
         static_cast<float*>(loss.mutable_data_ptr()));
  return {loss, grad};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) { m.impl("hint_mse_fwd", TORCH_BOX(&hint_mse_fwd)); }

}  // namespace
}  // namespace amtml
