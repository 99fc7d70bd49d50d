// What the losses that set teachers against a student share on the host's side: the problem from the arguments, and the
// sums over rows.
#include "kd_rows.cuh"

namespace amtml::gpu {
namespace {

// Rows that are not ignored, a part for each block.
__global__ void count_kernel(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t* parts) {
  let_next_start();
  int64_t mine = 0;
#pragma unroll 4
  for (int64_t i = first_of_grid(); i < n; i += step_of_grid()) mine += labels[i] != ignore_index;
  const int64_t count = block_sum(mine, &shared<int64_t>());
  if (threadIdx.x == 0) parts[blockIdx.x] = count;
}

__global__ void sum_kernel(SummedRows rows, RowSums* parts) {
  let_next_start();
  wait_for_previous();
  const RowSums sums = sum_rows(rows, first_of_grid(), step_of_grid(), &shared<double>());
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

__global__ void reduce_kernel(KDProblem pr, SummedRows all, float* loss, float* ce, float* kl) {
  wait_for_previous();
  const RowSums sums = all_sums(all, &shared<double>());
  if (threadIdx.x != 0) return;
  const double rows = pr.mean_rows ? fmax(sums.count, 1.0) : 1;
  const double of_ce = sums.ce / rows, of_kl = sums.kl / (pr.mean_classes ? rows * pr.classes : rows);
  if (ce) *ce = static_cast<float>(of_ce);
  if (kl) *kl = static_cast<float>(of_kl);
  *loss = static_cast<float>(weighted(pr, of_ce, of_kl));
}

Spread sum_blocks(int count) { return {count, kSumThreads, 1, kWarp * sizeof(double), true}; }

}  // namespace

void sum_parts(const SummedRows& rows, RowSums* parts, const OnDevice& on) {
  launch(sum_kernel, sum_blocks(kParts), on, rows, parts);
}

void reduce_rows(const KDProblem& pr, const Tensor& rows, float* loss, float* ce, float* kl, const OnDevice& on) {
  const double* terms = static_cast<const double*>(rows.const_data_ptr());
  SummedRows all{terms, terms + pr.rows, pr.rows, pr.labels, pr.ignore_index, nullptr};
  std::optional<Tensor> memory;
  if (pr.rows > kSumAlone) {
    memory = empty(rows, {kParts, sizeof(RowSums) / sizeof(double)}, ScalarType::Double);
    RowSums* parts = static_cast<RowSums*>(memory->mutable_data_ptr());
    sum_parts(all, parts, on);
    all.parts = parts;
  }
  launch(reduce_kernel, sum_blocks(1), on, pr, all, loss, ce, kl);
}

void KDTensors::fill(KDProblem& pr, const char* op, const Tensor& student, int64_t teachers,
                     const std::optional<Tensor>& given_weights, const std::optional<Tensor>& given_labels,
                     const KDSettings& set, const OnDevice& on) {
  STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, op, ": student must be [N, C] with C >= 1");
  const int64_t n = student.size(0);
  pr.rows = n, pr.classes = student.size(1), pr.teachers = static_cast<int>(teachers);
  pr.student = Rows(student);
  pr.ignore_index = set.ignore_index;
  pr.temperature = static_cast<float>(set.temperature), pr.unit = kLog2e / pr.temperature;
  pr.ce_weight = static_cast<float>(set.ce_weight), pr.kl_weight = static_cast<float>(set.kl_weight);
  pr.kl_scale = static_cast<float>(set.kl_scale), pr.label_smoothing = static_cast<float>(set.label_smoothing);
  pr.mean_classes = set.reduction == "mean", pr.mean_rows = pr.mean_classes || set.reduction == "batchmean";
  if (given_weights) {
    weights = given_weights;
    check_shape(op, "weights", *weights, {n, teachers});
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float, op, ": weights must be float32");
    pr.weights = static_cast<const float*>(weights->const_data_ptr());
    pr.weights_row = weights->stride(0), pr.weights_column = weights->stride(1);
  }
  if (given_labels) {
    check_shape(op, "labels", *given_labels, {n});
    STD_TORCH_CHECK(given_labels->scalar_type() == ScalarType::Long, op, ": labels must be int64");
    labels = dense(*given_labels);
    pr.labels = static_cast<const int64_t*>(labels->const_data_ptr());
    if (pr.mean_rows && n > kCountInline) {
      counted = empty(student, {kParts}, ScalarType::Long);
      int64_t* parts = static_cast<int64_t*>(counted->mutable_data_ptr());
      launch(count_kernel, {kParts, kSumThreads, 1, kWarp * sizeof(int64_t)}, on, pr.labels, n, set.ignore_index,
             parts);
      pr.counted = parts;
    }
  }
}

}  // namespace amtml::gpu
