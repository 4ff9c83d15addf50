// Launches a kernel and turns a failed launch into an exception that names it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace btinet {
namespace cuda {

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("btinet_kernels: the CUDA kernel " + std::string(name) +
                           " could not be launched: " + cudaGetErrorString(status) + ".");
}

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  void* stream;
};

template <class Task>
void launch(const Launch& how, void (*kernel)(Task), const Task& task) {
  if (how.blocks == 0) return;
  if (how.blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("btinet_kernels: the CUDA kernel " + std::string(how.name) +
                             " would need more than 2^31 - 1 blocks; split the batch.");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.stream = static_cast<cudaStream_t>(how.stream);
  check(cudaLaunchKernelEx(&config, kernel, task), how.name);
  check(cudaGetLastError(), how.name);
}

}  // namespace cuda
}  // namespace btinet
