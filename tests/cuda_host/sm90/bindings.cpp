// The module of the tests of Hopper's kernels: launchers as csrc/bindings.cpp names them, and kernels that are here.
#include <pybind11/pybind11.h>

#include "../../../csrc/flash_attention.h"
#include "../runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(fusetune_cuda_host_sm90, m) {
  m.def("cuda_flash_attention_sm90_forward", [](const fusetune::FlashAttention& call, uintptr_t stream) {
    fusetune::cuda::flash_attention_sm90_forward(call, (void*)stream);
  });
  m.def("cuda_flash_attention_sm90_workspace", &fusetune::cuda::flash_attention_sm90_workspace);
  m.def("cuda_flash_attention_sm90_backward",
        [](const fusetune::FlashAttention& call, uintptr_t workspace, uintptr_t stream) {
          fusetune::cuda::flash_attention_sm90_backward(call, (float*)workspace, (void*)stream);
        });
  m.def("allow",
        [](uintptr_t begin, size_t bytes, uint64_t storage) { cuda_host::allow((void*)begin, bytes, storage); });
  m.def("forget_allowed", &cuda_host::forget_allowed);
  m.def("reverse_order", &cuda_host::reverse_order);
}
