// ssd_core._C: the compiled functions, and how they were built.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/grad_filter.h"
#include "cpu/isa.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/linear_distill.h"
#include "cpu/linear_head.h"
#include "cpu/linear_logprob.h"
#include "cpu/logit_rows.h"
#include "cpu/ranks.h"
#include "cpu/sample.h"
#include "cpu/workspace.h"

namespace ssd_core {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["torch_version"] = SSD_CORE_TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  py::list isas;
  for (const cpu::Isa isa : cpu::compiled_isas()) {
    isas.append(cpu::isa_name(isa));
  }
  info["isa"] = isas;
#if defined(INTRA_OP_PARALLEL)  // what at::parallel_for itself looks at
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

at::Tensor map_floats(void (*kernel)(const float*, float*, int64_t), const at::Tensor& x) {
  TORCH_CHECK(
      x.device().is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous(),
      "x: expected a contiguous float32 CPU tensor, got ", x.toString(), " with strides ", x.strides());
  at::Tensor y = at::empty_like(x);
  kernel(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel());
  return y;
}

}  // namespace
}  // namespace ssd_core

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace ssd_core;
  m.def("build_info", &build_info, "How this extension was compiled.");
  m.def("cpu_isa", [] { return cpu::isa_name(cpu::active_isa()); }, "The instruction set in use.");
  m.def("linear_cross_entropy", &cpu::linear_cross_entropy, py::call_guard<py::gil_scoped_release>());
  m.def("linear_cross_entropy_bytes", &cpu::linear_cross_entropy_bytes);
  m.def("linear_distill", &cpu::linear_distill, py::call_guard<py::gil_scoped_release>());
  m.def("linear_distill_bytes", &cpu::linear_distill_bytes);
  m.def("linear_logprob", &cpu::linear_logprob, py::call_guard<py::gil_scoped_release>());
  m.def("linear_logprob_bytes", &cpu::linear_logprob_bytes);
  m.def("grad_filter_bytes", &cpu::grad_filter_bytes);
  m.def("ranks_bytes", &cpu::ranks_bytes);
  m.def("softmax_rows", &cpu::softmax_rows, py::call_guard<py::gil_scoped_release>());
  m.def("softmax_rows_backward", &cpu::softmax_rows_backward, py::call_guard<py::gil_scoped_release>());
  m.def("cross_entropy_rows", &cpu::cross_entropy_rows, py::call_guard<py::gil_scoped_release>());
  m.def("logprob_rows", &cpu::logprob_rows, py::call_guard<py::gil_scoped_release>());
  m.def("distill_rows", &cpu::distill_rows, py::call_guard<py::gil_scoped_release>());
  m.def("tile_shape", &cpu::tile_shape);
  m.def("product_itemsize", &cpu::product_itemsize);
  m.def("kept_workspace_bytes", &cpu::kept_workspace_bytes);
  m.def("release_workspace", &cpu::release_workspace);
  m.def("sample", &cpu::sample, py::call_guard<py::gil_scoped_release>());
  // The kernels' own functions, exposed so that their error bounds can be tested.
  m.def("exp_nonpositive", [](const at::Tensor& x) { return map_floats(cpu::active_row_kernels().exp, x); });
  m.def("expm1_nonpositive", [](const at::Tensor& x) { return map_floats(cpu::active_row_kernels().expm1, x); });
  m.def("log1p_nonpositive", [](const at::Tensor& x) { return map_floats(cpu::active_row_kernels().log1p, x); });
  m.def("tanh", [](const at::Tensor& x) { return map_floats(cpu::active_row_kernels().tanh, x); });
}
