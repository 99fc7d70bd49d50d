// The loops over numbers of any dtype, compiled once for all kernels.
#include "convert.h"

#include "simd.h"

namespace amtml {

template <class A>
void widen(const void* from, ScalarType dtype, int64_t stride, int64_t n, A* to) {
  dispatch(dtype, "amtml_fast", [&](auto zero) {
    const auto* x = static_cast<const decltype(zero)*>(from);
    vectorized([&] AMTML_BODY() {
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(x[i]);
      } else if (stride == 0) {  // the gradient of a sum
        std::fill_n(to, n, n > 0 ? static_cast<A>(*x) : A(0));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(x[i * stride]);
      }
    });
  });
}

template <class A>
void narrow(const A* from, int64_t n, void* to, ScalarType dtype) {
  dispatch(dtype, "amtml_fast", [&](auto zero) {
    using T = decltype(zero);
    T* x = static_cast<T*>(to);
    vectorized([&] AMTML_BODY() {  // without `omp simd`, with which GCC gives up vectors here
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(from[i]);
    });
  });
}

template <class A>
void scatter(const A* from, const int64_t* at, int64_t n, void* to, ScalarType dtype) {
  dispatch(dtype, "amtml_fast", [&](auto zero) {
    using T = decltype(zero);
    T* x = static_cast<T*>(to);
    for (int64_t i = 0; i < n; ++i) x[at[i]] = static_cast<T>(from[i]);
  });
}

template void widen(const void*, ScalarType, int64_t, int64_t, float*);
template void widen(const void*, ScalarType, int64_t, int64_t, double*);
template void narrow(const float*, int64_t, void*, ScalarType);
template void narrow(const double*, int64_t, void*, ScalarType);
template void scatter(const float*, const int64_t*, int64_t, void*, ScalarType);
template void scatter(const double*, const int64_t*, int64_t, void*, ScalarType);

}  // namespace amtml
