// What the losses that set teachers against a student share on the host's side: the problem from the arguments, and the
// sums over rows.
#include "kd_rows.cuh"

namespace amtml::gpu {
namespace {

// Of a pass over numbers, of which every block of the grid has a part.
__device__ int64_t first_of_grid() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t step_of_grid() { return int64_t{gridDim.x} * blockDim.x; }

// Rows that are not ignored, a part for each block.
__global__ void count_kernel(const int64_t* labels, int64_t n, int64_t ignore_index, int64_t* parts) {
  let_next_start();
  int64_t mine = 0;
#pragma unroll 4
  for (int64_t i = first_of_grid(); i < n; i += step_of_grid()) mine += labels[i] != ignore_index;
  const int64_t count = block_sum(mine, &shared<int64_t>());
  if (threadIdx.x == 0) parts[blockIdx.x] = count;
}

// Sums over rows: of cross-entropies, of KLs, and how many rows count.
struct RowSums {
  double ce, kl, count;
};

__device__ RowSums block_sums(RowSums mine) {
  double* scratch = &shared<double>();
  for (double* sum : {&mine.ce, &mine.kl, &mine.count}) {
    *sum = block_sum(*sum, scratch);
    __syncthreads();
  }
  return mine;
}

__device__ RowSums sum_rows(const KDProblem& pr, const double* ce_rows, const double* kl_rows) {
  RowSums sums{};
#pragma unroll 4
  for (int64_t i = first_of_grid(); i < pr.rows; i += step_of_grid()) {
    sums.ce += ce_rows[i];
    sums.kl += kl_rows[i];
    sums.count += !pr.ignored(i);
  }
  return block_sums(sums);
}

__global__ void sum_kernel(KDProblem pr, const double* ce_rows, const double* kl_rows, RowSums* parts) {
  let_next_start();
  wait_for_previous();
  const RowSums sums = sum_rows(pr, ce_rows, kl_rows);
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

// parts: [kParts], or null: the rows are added up here.
__global__ void reduce_kernel(KDProblem pr, const RowSums* parts, const double* ce_rows, const double* kl_rows,
                              float* loss, float* ce, float* kl) {
  wait_for_previous();
  const RowSums none{},
      sums = parts ? block_sums(threadIdx.x < kParts ? parts[threadIdx.x] : none) : sum_rows(pr, ce_rows, kl_rows);
  if (threadIdx.x != 0) return;
  const double rows = pr.mean_rows ? fmax(sums.count, 1.0) : 1;
  const double of_ce = sums.ce / rows, of_kl = sums.kl / (pr.mean_classes ? rows * pr.classes : rows);
  if (ce) *ce = static_cast<float>(of_ce);
  if (kl) *kl = static_cast<float>(of_kl);
  *loss = static_cast<float>(weighted(pr, of_ce, of_kl));
}

}  // namespace

void reduce_rows(const KDProblem& pr, const Tensor& rows, float* loss, float* ce, float* kl, const OnDevice& on) {
  const double *ce_rows = static_cast<const double*>(rows.const_data_ptr()), *kl_rows = ce_rows + pr.rows;
  Spread spread{kParts, kSumThreads, 1, kWarp * sizeof(double), true};
  std::optional<Tensor> memory;
  RowSums* parts = nullptr;
  if (pr.rows > kSumAlone) {
    memory = empty(rows, {kParts, sizeof(RowSums) / sizeof(double)}, ScalarType::Double);
    parts = static_cast<RowSums*>(memory->mutable_data_ptr());
    launch(sum_kernel, spread, on, pr, ce_rows, kl_rows, parts);
  }
  spread.grid = 1;
  launch(reduce_kernel, spread, on, pr, parts, ce_rows, kl_rows, loss, ce, kl);
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
