// Triplet angle loss by the law of cosines, in O(N^2) memory: value, and gradient to the rows of either side.
//
//   psi(i, j, k) = cosine of the angle at j between x_i - x_j and x_k - x_j;  L = sum_ijk huber_delta(psi_s - psi_t)
//
// student, teacher [N, C] float32, bfloat16 or float16 with any strides; loss [] or [N], gradients [N, C], all float32.
// Up to five kernels, one after another:
//   measure_kernel    distances of both sides, which rows take part and how many they are (pairs.cuh)
//   triangles_kernel  the loss and the gradient to the distances (triangles.cuh): one launch up to N = 800, 2 at
//                     1024, 13 at 2048, 64 at 4096
//   fold_kernel       for N > 128, where the gradient lies in many matrices: their sum. Bandwidth
//   finish_kernel     the gradient of the rows (pairs.cuh) and, in one more block, the loss
// The count of rows stays on the device: the last kernel divides by it.
// Memory: E and r of both sides 12 N^2 bytes; 4 N^2 for each slot of each gradient, of which there are about
// 16800 / (N / 32)^2, and at least one. With eps below 1e-18 the product of two r can pass float32's range; all is
// float64 then.
#include "ops.cuh"
#include "triangles.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "angle_loss";
constexpr int kCubesOfLaunch = 2800;  // enough to keep every multiprocessor busy to the end
constexpr int kFoldFrom = 9;          // slots: fewer are summed by the kernel that reads them
constexpr int kFoldThreads = 256;

enum class Reduction { kMean, kDistinct, kSum, kNone };

Reduction reduction_of(const std::string& name) {
  if (name == "mean") return Reduction::kMean;
  if (name == "distinct") return Reduction::kDistinct;
  if (name == "sum") return Reduction::kSum;
  STD_TORCH_CHECK(name == "none", kOp, ": unknown reduction ", name);
  return Reduction::kNone;
}

// What the sum over triplets is multiplied by, of m rows.
__device__ __forceinline__ double scale_of(Reduction reduction, double m) {
  if (reduction == Reduction::kSum) return 1;
  if (reduction == Reduction::kDistinct) return m < 3 ? 0 : 1 / (m * (m - 1) * (m - 2));  // no triplet: 0
  const double count = reduction == Reduction::kNone ? m * m : m * m * m;
  return count < 1 ? 1 : 1 / count;
}

// --- kernels

// sums [planes, slots, elements]: all slots into the first.
template <class T>
__global__ void fold_kernel(T* sums, int slots, int64_t elements, int64_t plane) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (at >= elements) return;
  T* const from = sums + blockIdx.y * plane + at;
  T total = from[0];
#pragma unroll 4
  for (int slot = 1; slot < slots; ++slot) total += from[slot * elements];
  from[0] = total;
}

// Elements of W: the sums over all slots.
template <class T>
struct SumOfSlots {
  const T* sums;
  int slots;
  int64_t elements;

  template <int kCount>
  __device__ __forceinline__ void operator()(int64_t at, double (&total)[kCount]) const {
#pragma unroll
    for (int m = 0; m < kCount; ++m) total[m] = 0;
#pragma unroll 8
    for (int slot = 0; slot < slots; ++slot) {
      const auto sum = *reinterpret_cast<const Pack<T, kCount>*>(sums + slot * elements + at);
#pragma unroll
      for (int m = 0; m < kCount; ++m) total[m] += static_cast<double>(sum.at[m]);
    }
  }
  __device__ __forceinline__ double operator()(int64_t at) const {
    double total[1];
    (*this)(at, total);
    return total[0];
  }
};

struct Finish {
  Reduction reduction;
  double delta;
  int64_t n;
  const bool* kept;
  const double* count;
  const double* partial;  // [partials] losses, or null
  int64_t partials;
  const Summary* summaries;  // [tiles]
  int64_t tiles;
  int blocks;
  float *grad_first, *grad_second, *loss;
};

template <int kBlock>
union FinishScratch {
  GradientScratch<kBlock> gradient;
  double sums[kWarp];
};

__device__ __forceinline__ void finish_loss(const Finish& finish, double* scratch) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < finish.partials; i += kGradientThreads) sum += finish.partial[i];
  sum *= 2;  // both orders of an angle's arms
  const double one_sided = one_sided_huber(finish.delta);
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < finish.tiles; i += kGradientThreads) {
    sum += one_sided * finish.summaries[i].one_sided;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *finish.loss = static_cast<float>(scale_of(finish.reduction, *finish.count) * sum);
}

// Grid: (columns / 32, blocks of rows, sides with a gradient, and one more for the loss).
template <class T, int kBlock>
__global__ void __launch_bounds__(kGradientThreads, 2)
    finish_kernel(Rows first, Rows second, SumOfSlots<T> weight, int64_t plane, int sides, Finish finish) {
  const int side = blockIdx.z;
  if (side == sides) {
    if (blockIdx.x + blockIdx.y == 0) finish_loss(finish, shared<FinishScratch<kBlock>>().sums);
    return;
  }
  const double factor = 2 * scale_of(finish.reduction, *finish.count);
  weight.sums += side * plane;
  const Rows rows = side == 0 ? first : second;
  row_gradient<kBlock>(rows, finish.n, finish.kept, finish.blocks, weight, side == 0 ? factor : -factor,
                       side == 0 ? finish.grad_first : finish.grad_second);
}

// Losses of the vertices: grid, a block of rows each. Plane 0 of the sums belongs to the first row of a pair, plane 1
// to the second.
template <class Tile>
__global__ void __launch_bounds__(kGradientThreads, 2)
    vertices_kernel(SumOfSlots<typename Tile::T> sums, int64_t plane, const Tile* tiles, Finish finish) {
  constexpr int kBlock = Tile::kBlock, kGroups = kGradientThreads / kBlock;
  auto& scratch = shared<double[kGroups][kBlock]>();
  const int own = threadIdx.x % kBlock, group = threadIdx.x / kBlock, own_block = blockIdx.x;
  const SumOfSlots<typename Tile::T> columns{sums.sums + plane, sums.slots, sums.elements};
  const double one_sided = one_sided_huber(finish.delta);
  double sum = 0;
  for (int other = 0; other < finish.blocks; ++other) {
    const int64_t tile = tile_number(own_block, other);
    const auto& r = tiles[tile].r;
    for (int e = group; e < kBlock; e += kGroups) {
      const int in_row = own * kBlock + e, in_column = e * kBlock + own, at = other >= own_block ? in_row : in_column;
      if (other >= own_block) sum += 2 * sums(tile * Tile::kArea + in_row);
      if (other <= own_block) sum += 2 * columns(tile * Tile::kArea + in_column);
      if ((r[0][at] == 0) != (r[1][at] == 0)) sum += one_sided;
    }
  }
  scratch[group][own] = sum;
  __syncthreads();
  const int64_t row = static_cast<int64_t>(own_block) * kBlock + own;
  if (group != 0 || row >= finish.n) return;
  for (int g = 1; g < kGroups; ++g) sum += scratch[g][own];
  const double scale = scale_of(finish.reduction, *finish.count);
  finish.loss[row] = finish.kept[row] ? static_cast<float>(scale * sum) : 0.0f;
}

// --- host

// What a call computes. `one` and `other` are the sides; a gradient to the second side alone makes them change places.
struct Call {
  const Tensor &one, &other;
  TakingPart takes_part;
  const float* vertex_weight;  // [N] on the device, or null
  double delta, eps;
  Reduction reduction;
  int gradients;  // of the first sides
  Tensor loss, grad_one, grad_other;
  bool want_loss;

  Kind kind() const {
    if (vertex_weight) return Kind::kWeighted;
    if (reduction == Reduction::kNone) return Kind::kVertexLoss;
    return gradients > 0 ? Kind::kGradient : Kind::kLoss;
  }
};

// How the phases are laid out: see triangles.cuh.
struct Slots {
  int count, launches;

  explicit Slots(int blocks) {
    const int64_t cubes = std::max<int64_t>(static_cast<int64_t>(blocks) * blocks / 6, 1);  // of a phase
    const int64_t wanted = test_setting("AMTML_EMULATED_SLOTS", (kCubesOfLaunch + cubes - 1) / cubes);
    launches = static_cast<int>(blocks_for(blocks, std::clamp<int64_t>(wanted, 1, blocks)));
    count = static_cast<int>(blocks_for(blocks, launches));
  }
};

template <class C>
void run_triangles(Triangles<typename C::Tile> all, const Slots& slots, const OnDevice& on) {
  const dim3 grid(static_cast<unsigned>(all.tile_count), slots.count);
  for (int n = 0; n < slots.launches; ++n) {
    all.phase = n * slots.count;
    all.first = n == 0;
    launch(triangles_kernel<C>, {grid, C::kThreads, 1, sizeof(CubeScratch<C>)}, on, all);
  }
}

template <class Tile>
void run_triangles(const Triangles<Tile>& all, const Call& call, const Slots& slots, const OnDevice& on) {
  const bool both = call.gradients == 2;
  switch (call.kind()) {
    case Kind::kLoss:
      return run_triangles<Config<Tile, Kind::kLoss, 0>>(all, slots, on);
    case Kind::kVertexLoss:
      return run_triangles<Config<Tile, Kind::kVertexLoss, 2>>(all, slots, on);
    case Kind::kGradient:
      return both ? run_triangles<Config<Tile, Kind::kGradient, 2>>(all, slots, on)
                  : run_triangles<Config<Tile, Kind::kGradient, 1>>(all, slots, on);
    case Kind::kWeighted:
      return both ? run_triangles<Config<Tile, Kind::kWeighted, 2>>(all, slots, on)
                  : run_triangles<Config<Tile, Kind::kWeighted, 1>>(all, slots, on);
  }
}

// The kernels in order. Tile says how pairs are kept.
template <class Tile>
void run(const Call& call, const OnDevice& on) {
  using T = typename Tile::T;
  constexpr int kBlock = Tile::kBlock;
  const Tiling tiling(call.takes_part.n, kBlock);
  const Slots slots(tiling.blocks);
  const Kind kind = call.kind();
  const bool one_loss = call.want_loss && kind != Kind::kVertexLoss, weighted = call.vertex_weight != nullptr;
  const int planes = kind == Kind::kVertexLoss ? 2 : call.gradients;
  const int64_t tiles = tiling.tiles(), elements = tiles * Tile::kArea, plane = slots.count * elements;
  auto doubles = [&](size_t bytes) { return empty(call.one, {static_cast<int64_t>(bytes / 8)}, ScalarType::Double); };
  const Tensor pairs = doubles(tiles * sizeof(Tile)), sums = doubles(planes * plane * sizeof(T));
  const Tensor summaries = doubles(tiles * sizeof(Summary)), count = doubles(8);
  const Tensor kept = empty(call.one, {tiling.blocks * kBlock}, ScalarType::Bool);
  const Tensor partial = doubles(one_loss ? slots.count * tiles * 8 : 0);
  const Tensor weight = empty(call.one, {weighted ? tiling.blocks * kBlock : 0}, ScalarType::Float);

  const Rows one(call.one), other(call.other);
  Distances<Tile> found;
  found.tiles = data<Tile>(pairs), found.summaries = data<Summary>(summaries);
  found.kept = data<bool>(kept), found.count = data<double>(count);
  found.weight = weighted ? data<float>(weight) : nullptr, found.given = call.vertex_weight;
  measure(one, other, call.takes_part, tiling, call.eps, found, on);

  Triangles<Tile> all;
  all.tiles = found.tiles, all.tile_count = tiles, all.blocks = tiling.blocks;
  all.sums = data<T>(sums), all.plane = plane;
  all.weight = found.weight, all.delta = static_cast<typename Tile::A>(call.delta);
  all.loss = one_loss ? data<double>(partial) : nullptr;
  run_triangles(all, call, slots, on);

  SumOfSlots<T> folded{all.sums, slots.count, elements};
  if (planes > 0 && slots.count >= kFoldFrom) {
    launch(fold_kernel<T>, {dim3(blocks_for(elements, kFoldThreads), planes), kFoldThreads}, on, all.sums, slots.count,
           elements, plane);
    folded.slots = 1;
  }

  Finish finish;
  finish.reduction = call.reduction, finish.delta = call.delta, finish.n = call.takes_part.n;
  finish.kept = found.kept, finish.count = found.count, finish.blocks = tiling.blocks;
  finish.partial = all.loss, finish.partials = slots.count * tiles;
  finish.summaries = found.summaries, finish.tiles = tiles;
  finish.grad_first = data<float>(call.grad_one), finish.grad_second = data<float>(call.grad_other);
  finish.loss = data<float>(call.loss);
  const unsigned blocks = tiling.blocks;
  if (kind == Kind::kVertexLoss) {
    launch(vertices_kernel<Tile>, {blocks, kGradientThreads, 1, kGradientThreads * sizeof(double)}, on, folded, plane,
           all.tiles, finish);
    return;
  }
  const int64_t widest = call.gradients == 2 ? std::max(one.width, other.width) : one.width;
  const unsigned columns = std::max(blocks_for(widest, kColumns), 1u), parts = call.gradients + one_loss;
  const dim3 grid = call.gradients > 0 ? dim3(columns, blocks, parts) : dim3(1, 1, parts);
  launch(finish_kernel<T, kBlock>, {grid, kGradientThreads, 1, sizeof(FinishScratch<kBlock>)}, on, one, other, folded,
         plane, call.gradients, finish);
}

void run(const Call& call) {
  const OnDevice on(call.one);
  auto with = [&](auto sum, auto value) {
    using T = decltype(sum);
    using A = decltype(value);
    small_blocks(call.takes_part.n) ? run<PairTile<T, A, 16>>(call, on) : run<PairTile<T, A, 32>>(call, on);
  };
  if (call.eps < 1e-18) return run<PairTile<double, double, 16>>(call, on);  // rare: one size does
  has_fast_double(call.one) ? with(double{}, float{}) : with(FloatPair{}, float{});
}

// Labels in a dtype that the kernels read, or the mask of bools; it must outlive them in the stream's order only.
TakingPart taking_part(const AngleRows& rows, Tensor& labels) {
  TakingPart takes_part;
  takes_part.n = rows.student.size(0);
  if (!rows.row_mask && !rows.labels) return takes_part;
  labels = rows.row_mask ? *rows.row_mask : *rows.labels;
  check_shape(kOp, rows.row_mask ? "row_mask" : "labels", labels, {takes_part.n});
  if (rows.row_mask) {
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Bool, kOp, ": row_mask must be bool");
  } else if (labels.scalar_type() != ScalarType::Int) {
    labels = converted(labels, ScalarType::Long);
  }
  takes_part.labels = labels.const_data_ptr();
  takes_part.stride = labels.stride(0);
  takes_part.skip = rows.row_mask ? 0 : rows.ignore_index;
  takes_part.size = labels.element_size();
  return takes_part;
}

// Gradients to student and teacher; `loss` is filled if it is wanted.
std::tuple<Tensor, Tensor> run(const AngleRows& rows, const float* vertex_weight, double delta, double eps,
                               Reduction reduction, bool need_student, bool need_teacher, const Tensor& loss,
                               bool want_loss) {
  Tensor labels;
  const bool swap = need_teacher && !need_student;  // the loss is the same with its sides exchanged
  const Tensor &one = swap ? rows.teacher : rows.student, &other = swap ? rows.student : rows.teacher;
  const int gradients = need_student + need_teacher;
  auto gradient = [&](const Tensor& like, bool wanted) {
    return empty_or_none(like, wanted, {like.size(0), like.size(1)}, ScalarType::Float);
  };
  Call call{one, other};
  call.takes_part = taking_part(rows, labels), call.vertex_weight = vertex_weight;
  call.delta = delta, call.eps = eps, call.reduction = reduction, call.gradients = gradients;
  call.loss = loss, call.want_loss = want_loss;
  call.grad_one = gradient(one, gradients > 0), call.grad_other = gradient(other, gradients > 1);
  run(call);
  if (swap) return {call.grad_other, call.grad_one};
  return {call.grad_one, call.grad_other};
}

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps,
                                             std::string reduction, bool need_student_grad, bool need_teacher_grad) {
  return angle_rows({student, teacher, row_mask, std::nullopt, 0}, delta, eps, reduction, need_student_grad,
                    need_teacher_grad);
}

std::tuple<Tensor, Tensor> angle_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                     std::optional<Tensor> row_mask, double delta, double eps, bool need_student_grad,
                                     bool need_teacher_grad) {
  const AngleRows rows{student, teacher, row_mask, std::nullopt, 0};
  check_sides(kOp, rows.student, rows.teacher);
  check_shape(kOp, "grad_loss", grad_loss, {student.size(0)});
  const Tensor incoming = dense(grad_loss, ScalarType::Float), none = empty(student, {0}, ScalarType::Float);
  return run(rows, static_cast<const float*>(incoming.const_data_ptr()), delta, eps, Reduction::kNone,
             need_student_grad, need_teacher_grad, none, false);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> angle_rows(const AngleRows& rows, double delta, double eps,
                                              const std::string& reduction, bool need_student_grad,
                                              bool need_teacher_grad) {
  check_sides(kOp, rows.student, rows.teacher);
  const Reduction how = reduction_of(reduction);
  const bool none = how == Reduction::kNone;
  const Tensor loss = empty(rows.student, none ? Shape{rows.student.size(0)} : Shape{}, ScalarType::Float);
  const auto [grad_student, grad_teacher] =
      run(rows, nullptr, delta, eps, how, need_student_grad && !none, need_teacher_grad && !none, loss, true);
  return {loss, grad_student, grad_teacher};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("angle_fwd", TORCH_BOX(&angle_fwd));
  m.impl("angle_bwd", TORCH_BOX(&angle_bwd));
}

}  // namespace amtml::gpu
