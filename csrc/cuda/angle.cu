// Triplet angle loss by the law of cosines, in O(N^2) memory: value, and gradient to the rows of either side.
//
//   psi(i, j, k) = cosine of the angle at j between x_i - x_j and x_k - x_j;  L = sum_ijk huber_delta(psi_s - psi_t)
//
// student, teacher [N, C] float32, bfloat16 or float16 with any strides; loss [] or [N], gradients [N, C], all float32.
// Kernels, one after another:
//   measure_kernel    distances of both sides, which rows take part and how many they are (pairs.cuh)
//   form_kernel       for N > 320: whether distances are kept in fixed point, in one number or in two (triangles.cuh)
//   reform_kernel     for N > 320: puts them into that form
//   triangles_kernel  the loss and the gradient to the distances (triangles.cuh): one launch up to N = 800, 2 at
//                     1024, 13 at 2048, 64 at 4096
//   fold_kernel       for N > 128, where the gradient lies in many matrices: their sum. Bandwidth
//   finish_kernel     the gradient of the rows (pairs.cuh) and, in one more block, the loss
// The count of rows stays on the device: the last kernel divides by it. Each starts while the one before it ends.
// Memory: E and r of both sides 12 N^2 bytes, and 8 N^2 for N > 320; 4 N^2 for each slot of each gradient, of which
// there are about 16800 / (N / 32)^2, and at least one. With eps below 1e-18 the product of two r can pass float32's
// range; all is float64 then.
#include "ops.cuh"
#include "triangles.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "angle_loss";
constexpr int kCubesOfLaunch = 2800;  // enough to keep every multiprocessor busy to the end
constexpr int kFoldFrom = 9;          // slots: fewer are summed by the kernel that reads them
constexpr int kFoldThreads = 256;

using Reduction = AngleReduction;

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
  let_next_start();
  wait_for_previous();
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
  Terms terms;
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
  sum = scale_of(finish.reduction, *finish.count) * block_sum(sum, scratch);
  if (finish.terms.loss) return write_terms(finish.terms, static_cast<float>(sum), scratch);
  if (threadIdx.x == 0) *finish.loss = static_cast<float>(sum);
}

// Grid: (columns / 32, blocks of rows, sides with a gradient, and one more for the loss).
template <class T, int kBlock>
__global__ void __launch_bounds__(kGradientThreads, 2)
    finish_kernel(Points first, Points second, SumOfSlots<T> weight, int64_t plane, int sides,
                  const __grid_constant__ Finish finish) {
  wait_for_previous();
  const int side = blockIdx.z;
  if (side == sides) {
    if (blockIdx.x + blockIdx.y == 0) finish_loss(finish, shared<FinishScratch<kBlock>>().sums);
    return;
  }
  const double factor = 2 * scale_of(finish.reduction, *finish.count);
  weight.sums += side * plane;
  const Points rows = side == 0 ? first : second;
  row_gradient<kBlock>(rows, finish.n, finish.kept, finish.blocks, weight, side == 0 ? factor : -factor,
                       side == 0 ? finish.grad_first : finish.grad_second);
}

// Losses of the vertices: grid, a block of rows each. Plane 0 of the sums belongs to the first row of a pair, plane 1
// to the second.
template <class Tile>
__global__ void __launch_bounds__(kGradientThreads, 2)
    vertices_kernel(SumOfSlots<typename Tile::T> sums, int64_t plane, const Tile* tiles,
                    const __grid_constant__ Finish finish) {
  wait_for_previous();
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

Kind kind_of(const AngleCall& call) {
  if (call.vertex_weight) return Kind::kWeighted;
  if (call.reduction == Reduction::kNone) return Kind::kVertexLoss;
  return call.gradients > 0 ? Kind::kGradient : Kind::kLoss;
}

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
void run_triangles(Triangles<typename C::Tile> all, const Rows& rows, const Slots& slots, const OnDevice& on) {
  const dim3 grid(blocks(all.tile_count), slots.count);
  for (int n = 0; n < slots.launches; ++n) {
    all.phase = n * slots.count;
    all.first = n == 0;
    launch(triangles_kernel<C>, {grid, C::kThreads, 1, kScratchBytes<C>, true}, on, all, rows);
  }
}

template <class Tile>
void run_triangles(const Triangles<Tile>& all, const Rows& rows, const AngleCall& call, const Slots& slots,
                   const OnDevice& on) {
  const bool both = call.gradients == 2;
  switch (kind_of(call)) {
    case Kind::kLoss:
      return run_triangles<Config<Tile, Kind::kLoss, 0>>(all, rows, slots, on);
    case Kind::kVertexLoss:
      return run_triangles<Config<Tile, Kind::kVertexLoss, 2>>(all, rows, slots, on);
    case Kind::kGradient:
      return both ? run_triangles<Config<Tile, Kind::kGradient, 2>>(all, rows, slots, on)
                  : run_triangles<Config<Tile, Kind::kGradient, 1>>(all, rows, slots, on);
    case Kind::kWeighted:
      return both ? run_triangles<Config<Tile, Kind::kWeighted, 2>>(all, rows, slots, on)
                  : run_triangles<Config<Tile, Kind::kWeighted, 1>>(all, rows, slots, on);
  }
}

// What the kernels hand to each other.
template <class Tile>
struct Layout {
  using T = typename Tile::T;
  Tiling tiling;
  Slots slots;
  int planes;
  int64_t tiles, plane;  // elements of a plane of sums
  Distances<Tile> found;
  T* sums;
  double* partial;  // losses, or null
  Form* form;       // where fixed point is tried, and with it
  double* rests;

  Layout(const AngleCall& call, Pieces& pieces) : tiling(call.takes_part.n, Tile::kBlock), slots(tiling.blocks) {
    const bool per_vertex = kind_of(call) == Kind::kVertexLoss;
    planes = per_vertex ? 2 : call.gradients;
    tiles = tiling.tiles(), plane = slots.count * tiles * Tile::kArea;
    const int64_t padded = static_cast<int64_t>(tiling.blocks) * Tile::kBlock;
    found.tiles = pieces.take<Tile>(tiles), found.summaries = pieces.take<Summary>(tiles);
    found.kept = pieces.take<bool>(padded), found.count = pieces.take<double>(1);
    found.weight = call.vertex_weight ? pieces.take<float>(padded) : nullptr, found.given = call.vertex_weight;
    sums = pieces.take<T>(planes * plane);
    partial = call.loss && !per_vertex ? pieces.take<double>(slots.count * tiles) : nullptr;
    form = kTriesFixed<Tile> ? pieces.take<Form>(1) : nullptr;
    rests = kTriesFixed<Tile> ? pieces.take<double>(2 * tiles * Tile::kArea) : nullptr;
  }
};

// The kernels in order. Tile says how pairs are kept.
template <class Tile>
void run(const AngleCall& call, void* scratch, const OnDevice& on, bool early) {
  using T = typename Tile::T;
  constexpr int kBlock = Tile::kBlock;
  Pieces pieces(scratch);
  const Layout<Tile> has(call, pieces);
  const int64_t elements = has.tiles * Tile::kArea;
  measure(call.one, call.other, call.takes_part, has.tiling, call.eps, has.found, on, early);

  Triangles<Tile> all;
  all.tiles = has.found.tiles, all.tile_count = has.tiles, all.blocks = has.tiling.blocks;
  all.sums = has.sums, all.plane = has.plane;
  all.weight = has.found.weight, all.delta = static_cast<typename Tile::A>(call.delta);
  all.loss = has.partial;
  all.form = has.form, all.rests = has.rests, all.summaries = has.found.summaries;
  const Rows rows{call.one, call.other, has.found.kept};
  if constexpr (kTriesFixed<Tile>) {
    const unsigned tiles = static_cast<unsigned>(has.tiles);
    launch(form_kernel<T>, {1, kGradientThreads, 1, sizeof(FormScratch), true}, on, has.found.summaries, has.tiles,
           has.form);
    launch(reform_kernel<Tile>, {tiles, kGradientThreads, 1, 0, true}, on, has.found.tiles, has.rests, rows, has.form);
    run_triangles(all.template with<FixedTile<Tile>>(), rows, call, has.slots, on);
  }
  run_triangles(all, rows, call, has.slots, on);

  SumOfSlots<T> folded{all.sums, has.slots.count, elements};
  if (has.planes > 0 && has.slots.count >= kFoldFrom) {
    launch(fold_kernel<T>, {dim3(blocks_for(elements, kFoldThreads), has.planes), kFoldThreads, 1, 0, true}, on,
           all.sums, has.slots.count, elements, has.plane);
    folded.slots = 1;
  }

  Finish finish;
  finish.reduction = call.reduction, finish.delta = call.delta, finish.n = call.takes_part.n;
  finish.kept = has.found.kept, finish.count = has.found.count, finish.blocks = has.tiling.blocks;
  finish.partial = all.loss, finish.partials = has.slots.count * has.tiles;
  finish.summaries = has.found.summaries, finish.tiles = has.tiles;
  finish.grad_first = call.grad_one, finish.grad_second = call.grad_other;
  finish.loss = call.loss, finish.terms = call.terms;
  const unsigned blocks = has.tiling.blocks;
  if (kind_of(call) == Kind::kVertexLoss) {
    launch(vertices_kernel<Tile>, {blocks, kGradientThreads, 1, kGradientThreads * sizeof(double), true}, on, folded,
           has.plane, all.tiles, finish);
    return;
  }
  const int64_t widest = call.gradients == 2 ? std::max(call.one.width, call.other.width) : call.one.width;
  const unsigned columns = std::max(blocks_for(widest, kColumns), 1u);
  const unsigned parts = call.gradients + (has.partial ? 1 : 0);
  const dim3 grid = call.gradients > 0 ? dim3(columns, blocks, parts) : dim3(1, 1, parts);
  launch(finish_kernel<T, kBlock>, {grid, kGradientThreads, 1, sizeof(FinishScratch<kBlock>), true}, on, call.one,
         call.other, folded, has.plane, call.gradients, finish);
}

// use(Tile*) with how pairs are kept, of that call on that device.
template <class Use>
auto with_tile(const AngleCall& call, const OnDevice& on, const Use& use) {
  auto with = [&](auto sum, auto value) {
    using T = decltype(sum);
    using A = decltype(value);
    return small_blocks(call.takes_part.n) ? use(static_cast<PairTile<T, A, 16>*>(nullptr))
                                           : use(static_cast<PairTile<T, A, 32>*>(nullptr));
  };
  if (call.eps < 1e-18) return use(static_cast<PairTile<double, double, 16>*>(nullptr));  // rare: one size does
  return on.facts.fast_double ? with(double{}, float{}) : with(FloatPair{}, float{});
}

// All or those of a mask of bools. What it points into must outlive it in the stream's order only.
TakingPart taking_part(const Tensor& student, const std::optional<Tensor>& row_mask) {
  TakingPart takes_part;
  takes_part.n = student.size(0);
  if (!row_mask) return takes_part;
  check_shape(kOp, "row_mask", *row_mask, {takes_part.n});
  STD_TORCH_CHECK(row_mask->scalar_type() == ScalarType::Bool, kOp, ": row_mask must be bool");
  takes_part.labels = row_mask->const_data_ptr(), takes_part.stride = row_mask->stride(0);
  return takes_part;
}

// Gradients to student and teacher; the loss where `loss` is given.
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& row_mask,
                               const float* vertex_weight, double delta, double eps, Reduction reduction,
                               bool need_student, bool need_teacher, float* loss) {
  check_sides(kOp, student, teacher);
  const OnDevice on(student);
  auto gradient = [](const Tensor& like, bool wanted) {
    return empty_or_none(like, wanted, {like.size(0), like.size(1)}, ScalarType::Float);
  };
  const Tensor grad_student = gradient(student, need_student), grad_teacher = gradient(teacher, need_teacher);
  const bool swap = need_teacher && !need_student;  // the loss is the same with its sides exchanged
  AngleCall call{Points(student), Points(teacher), taking_part(student, row_mask)};
  call.vertex_weight = vertex_weight, call.delta = delta, call.eps = eps, call.reduction = reduction;
  call.gradients = need_student + need_teacher, call.loss = loss;
  call.grad_one = data<float>(grad_student), call.grad_other = data<float>(grad_teacher);
  if (swap) std::swap(call.one, call.other), std::swap(call.grad_one, call.grad_other);
  const Tensor scratch = empty(student, {static_cast<int64_t>(angle_scratch(call, on) / 8)}, ScalarType::Double);
  angle(call, scratch.mutable_data_ptr(), on, false);
  return {grad_student, grad_teacher};
}

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps, Name reduction,
                                             bool need_student_grad, bool need_teacher_grad) {
  const Reduction how = reduction_of(reduction);
  const bool none = how == Reduction::kNone;
  const Tensor loss = empty(student, none ? Shape{student.size(0)} : Shape{}, ScalarType::Float);
  const auto [grad_student, grad_teacher] =
      run(student, teacher, row_mask, nullptr, delta, eps, how, need_student_grad && !none, need_teacher_grad && !none,
          static_cast<float*>(loss.mutable_data_ptr()));
  return {loss, grad_student, grad_teacher};
}

std::tuple<Tensor, Tensor> angle_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                     std::optional<Tensor> row_mask, double delta, double eps, bool need_student_grad,
                                     bool need_teacher_grad) {
  check_sides(kOp, student, teacher);
  check_shape(kOp, "grad_loss", grad_loss, {student.size(0)});
  if (!need_student_grad && !need_teacher_grad) {
    return {empty(student, {0}, ScalarType::Float), empty(teacher, {0}, ScalarType::Float)};
  }
  const Tensor incoming = dense(grad_loss, ScalarType::Float);
  return run(student, teacher, row_mask, static_cast<const float*>(incoming.const_data_ptr()), delta, eps,
             Reduction::kNone, need_student_grad, need_teacher_grad, nullptr);
}

}  // namespace

size_t angle_scratch(const AngleCall& call, const OnDevice& on) {
  return with_tile(call, on, [&](auto* tile) {
    Pieces pieces;
    const Layout<std::remove_pointer_t<decltype(tile)>> has(call, pieces);
    return pieces.bytes();
  });
}

void angle(const AngleCall& call, void* scratch, const OnDevice& on, bool early) {
  with_tile(call, on, [&](auto* tile) { run<std::remove_pointer_t<decltype(tile)>>(call, scratch, on, early); });
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("angle_fwd", TORCH_BOX(&angle_fwd));
  m.impl("angle_bwd", TORCH_BOX(&angle_bwd));
}

}  // namespace amtml::gpu
