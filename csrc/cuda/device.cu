// What is asked of a GPU once, and the number that tells Python whether the library has code for it.
#include <mutex>
#include <unordered_map>

#include "common.cuh"

namespace amtml {

#ifdef AMTML_EMULATED_CUDA

void keep_for_kernels(const Tensor& t) {
  if (emulation::depth() > 0) emulation::kept().push_back(std::make_shared<Tensor>(t));
}

// How many kernels this thread has launched, and how many of them early, for tests.
extern "C" __attribute__((visibility("default"))) unsigned amtml_emulated_launches() { return emulation::launches(); }
extern "C" __attribute__((visibility("default"))) unsigned amtml_emulated_early_launches() {
  return emulation::early_launches();
}

const DeviceFacts& facts_of(int) {
  const char* pairs = std::getenv("AMTML_EMULATED_PAIRS");
  static thread_local DeviceFacts facts;
  facts = {90, !pairs || std::string(pairs) != "1"};
  return facts;
}

#else

namespace {

__global__ void probe_kernel() {}  // all kernels are compiled for the same devices

struct Known {
  std::mutex lock;
  std::unordered_map<int, DeviceFacts> facts;
  std::unordered_map<const void*, std::unordered_map<int, size_t> > shared_bytes;
};

Known& known() {
  static Known* const all = new Known;  // lives as long as the process: threads may ask to its end
  return *all;
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "amtml_fast: ", what, ": ", cudaGetErrorString(error));
}

// 0 where the library has no code for the current device.
int code_here() {
  cudaFuncAttributes compiled = {};
  if (cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(probe_kernel)) == cudaSuccess) {
    return compiled.ptxVersion;
  }
  cudaGetLastError();  // or the next launch would report it
  return 0;
}

}  // namespace

const DeviceFacts& facts_of(int device) {
  const std::lock_guard<std::mutex> guard(known().lock);
  const auto found = known().facts.find(device);
  if (found != known().facts.end()) return found->second;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "a GPU does not answer");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "a GPU does not answer");
  const int code = code_here();
  STD_TORCH_CHECK(code > 0, "amtml_fast: the library has no CUDA kernels for compute capability ", major, ".", minor,
                  "; build it with TORCH_CUDA_ARCH_LIST=", major, ".", minor);
  return known().facts[device] = {code, minor == 0 && major <= 10};
}

void allow_shared(const void* kernel, int device, size_t bytes) {
  const std::lock_guard<std::mutex> guard(known().lock);
  size_t& allowed = known().shared_bytes[kernel][device];
  if (bytes <= allowed) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "a kernel gets too little shared memory");
  allowed = bytes;
}

namespace {

// The compute capability, times 10, of the code that device number `device` would run; 0 where there is none.
int64_t cuda_code(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return code_here();
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CompositeExplicitAutograd, m) { m.impl("cuda_code", TORCH_BOX(&cuda_code)); }

}  // namespace

#endif

}  // namespace amtml
