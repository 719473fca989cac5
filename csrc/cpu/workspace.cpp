#include "workspace.h"

#include <ATen/Context.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "head_operands.h"

namespace ssd_core::cpu {

namespace {

constexpr int64_t kSmall = 1 << 20;  // bytes that the allocator keeps by itself

std::mutex mutex;

// Never destroyed: what it holds would outlive the allocator.
std::vector<at::Tensor>& kept() {
  static auto* buffers = new std::vector<at::Tensor>;
  return *buffers;
}

bool poisons() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

}  // namespace

Workspace::Workspace() {
  const std::lock_guard<std::mutex> lock(mutex);
  kept_.swap(kept());
}

Workspace::~Workspace() {
  kept_.clear();
  const std::lock_guard<std::mutex> lock(mutex);
  kept().swap(used_);  // those of a call that went on beside this one are given back
}

at::Tensor Workspace::empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < kSmall || poisons()) {
    return cpu::empty(sizes, at::TensorOptions(dtype));
  }
  const c10::InferenceMode normal(false);  // the next call may not be in it
  // the smallest that is large enough, and not so large that much of it would lie idle
  auto best = kept_.end();
  for (auto it = kept_.begin(); it != kept_.end(); ++it) {
    const int64_t size = it->numel();
    if (size >= bytes && size <= bytes + bytes / 8 && (best == kept_.end() || size < best->numel())) {
      best = it;
    }
  }
  if (best == kept_.end()) {
    kept_.clear();  // of another call's sizes: both together would be too much
    used_.push_back(cpu::empty({bytes}, at::TensorOptions(at::kByte)));
  } else {
    used_.push_back(std::move(*best));
    kept_.erase(best);
  }
  return used_.back().slice(0, 0, bytes).view(dtype).view(sizes);
}

int64_t kept_workspace_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t bytes = 0;
  for (const at::Tensor& buffer : kept()) {
    bytes += buffer.numel();
  }
  return bytes;
}

void release_workspace() {
  std::vector<at::Tensor> released;
  const std::lock_guard<std::mutex> lock(mutex);
  released.swap(kept());
}

}  // namespace ssd_core::cpu
