// What every operator shares, on every device: tensor types of torch's stable ABI, dtypes, argument checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace amtml {

// A string that torch hands to an operator. For std::string torch's header makes a copy that it never frees: 48 bytes a
// call.
struct Name : std::string {
  using std::string::string;
};

}  // namespace amtml

template <>
struct torch::stable::detail::ToImpl<amtml::Name> {
  static amtml::Name call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    amtml::Name name(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

namespace amtml {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;
using Tensor5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensor8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Sizes or strides of a tensor. (As std::vectors they were every fifth memory block that a small loss asked for.)
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) push_back(size);
  }
  void push_back(int64_t size) {
    STD_TORCH_CHECK(count_ < kMost, "a tensor must have at most ", kMost, " dimensions");
    sizes_[count_++] = size;
  }
  size_t size() const { return count_; }
  const int64_t* data() const { return sizes_; }
  int64_t& operator[](size_t d) { return sizes_[d]; }
  int64_t operator[](size_t d) const { return sizes_[d]; }

 private:
  static constexpr size_t kMost = 6;
  int64_t sizes_[kMost] = {};
  size_t count_ = 0;
};

// The dtype that sums, products and exponentials are made in.
inline ScalarType wide_dtype(ScalarType a) { return a == ScalarType::Double ? a : ScalarType::Float; }

// Calls run(T{}) with T the element type of dtype.
template <class F>
void dispatch(ScalarType dtype, const char* op, F&& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, float16 or bfloat16");
  }
}

template <class A>
constexpr ScalarType dtype_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Calls run(A{}) with A float or double.
template <class F>
void dispatch_wide(ScalarType wide, F&& run) {
  if (wide == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const Shape& wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  for (size_t d = 0; same && d < wanted.size(); ++d) same = t.size(d) == wanted[d];
  if (same) return;
  auto text = [](size_t n, auto size) {
    std::string s = "[";
    for (size_t d = 0; d < n; ++d) s += (d ? ", " : "") + std::to_string(size(d));
    return s + "]";
  };
  STD_TORCH_CHECK(false, op, ": ", name, " must be ", text(wanted.size(), [&](size_t d) { return wanted[d]; }),
                  ", got ", text(t.dim(), [&](size_t d) { return t.size(d); }));
}

// Fills new memory with NaN (and integers with -1) where AMTML_FILL_MEMORY=1, for tests: an element that a kernel
// leaves unwritten is seen then.
inline void fill_for_tests(void* data, size_t bytes) {
  static const bool fill = [] {
    const char* given = std::getenv("AMTML_FILL_MEMORY");
    return given && std::string(given) == "1";
  }();
  if (fill && bytes > 0) std::memset(data, 0xff, bytes);
}

// Asks for pages of 2 MB under new memory that the allocator has just mapped (glibc maps what is larger than 32 MB anew
// each time): to touch 4 KB after 4 KB the first time takes longer than a loss does. A kernel that gives them to
// nobody, or to everybody, ignores it.
inline void ask_for_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr size_t kMapped = size_t{32} << 20, kPage = size_t{2} << 20;
  if (bytes < kMapped) return;
  const size_t start = (reinterpret_cast<size_t>(data) + kPage - 1) / kPage * kPage;
  const size_t end = (reinterpret_cast<size_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// Where the tests' emulator of CUDA must keep memory alive until kernels have ended, as a GPU's allocator does.
#ifdef AMTML_EMULATED_CUDA
void keep_for_kernels(const Tensor& t);
#else
inline void keep_for_kernels(const Tensor&) {}
#endif

// A new tensor on the device of `like`. By way of torch's C interface: a call through the dispatcher costs five times
// as much, and a small loss makes a dozen tensors.
inline Tensor empty_strided(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), type, device_type, device_index, &handle));
  const Tensor made(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    const size_t bytes = made.numel() * made.element_size();
    ask_for_huge_pages(made.mutable_data_ptr(), bytes);
    fill_for_tests(made.mutable_data_ptr(), bytes);
  }
  keep_for_kernels(made);
  return made;
}

// Contiguous.
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Shape strides = shape;
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  return empty_strided(like, shape, strides, dtype);
}

// t in another dtype, and contiguous as well: t itself where it is that already.
inline Tensor converted(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  const Tensor made = torch::stable::to(t, dtype);
  keep_for_kernels(made);
  return made;
}
inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const Tensor made = torch::stable::contiguous(t);
  keep_for_kernels(made);
  return made;
}
inline Tensor dense(const Tensor& t, ScalarType dtype) { return dense(converted(t, dtype)); }

inline Tensor empty_or_none(const Tensor& like, bool wanted, const Shape& shape, ScalarType dtype) {
  return empty(like, wanted ? shape : Shape{0}, dtype);
}

}  // namespace amtml
