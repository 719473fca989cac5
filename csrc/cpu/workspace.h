// Buffers that outlive a call. Fresh pages are cleared by the system, in a virtual machine they may come from its host,
// and a call that is given new ones each time can take half as long again. So what a call has used is kept for the next
// one on any thread, and what that does not use is given back.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace ssd_core::cpu {

class Workspace {
 public:
  Workspace();   // takes what is kept
  ~Workspace();  // keeps what was used
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Uninitialised. Nothing may hold it when the workspace ends.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

 private:
  std::vector<at::Tensor> kept_, used_;  // of bytes
};

int64_t kept_workspace_bytes();
void release_workspace();

}  // namespace ssd_core::cpu
