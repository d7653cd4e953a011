// The module of the tests: fusetune's CUDA launchers as csrc/bindings.cpp names them, and kernels that are here.
#include <pybind11/pybind11.h>

#include "../../csrc/adamw.h"
#include "../../csrc/flash_attention.h"
#include "../../csrc/lora.h"
#include "../../csrc/quantize.h"
#include "planted.h"
#include "products.h"
#include "runtime.h"

namespace py = pybind11;

namespace {

template <class T>
using Wire = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;  // Python passes addresses as integers

template <class... Arguments>
auto launcher(void (*launch)(Arguments...)) {
  return [launch](Wire<Arguments>... arguments) { launch((Arguments)arguments...); };
}

}  // namespace

PYBIND11_MODULE(fusetune_cuda_host, m) {
  m.def("product", launcher(fusetune::cuda::product));
  m.def("load_fragments", launcher(fusetune::cuda::load_fragments));
  m.def("multiply_fragments", launcher(fusetune::cuda::multiply_fragments));
  m.def("round_to_tf32", launcher(fusetune::cuda::round_to_tf32));
  m.def("exponentials", launcher(fusetune::cuda::exponentials));
  m.def("copy_groups", launcher(fusetune::cuda::copy_groups));

#ifndef ON_GPU
  m.def("cuda_flash_attention_forward", launcher(fusetune::cuda::flash_attention_forward));
  m.def("cuda_flash_attention_backward", launcher(fusetune::cuda::flash_attention_backward));
  m.def("cuda_adamw_step", launcher(fusetune::cuda::adamw_step));
  m.def("cuda_adamw_grad_norm", launcher(fusetune::cuda::adamw_grad_norm));
  m.def("cuda_adamw_grad_norm_workspace", fusetune::cuda::adamw_grad_norm_workspace);
  m.def("cuda_lora_down", launcher(fusetune::cuda::lora_down));
  m.def("cuda_lora_up", launcher(fusetune::cuda::lora_up));
  m.def("cuda_lora_outer", launcher(fusetune::cuda::lora_outer));
  m.def("cuda_lora_outer_workspace", fusetune::cuda::lora_outer_workspace);
  m.def("cuda_dequantize", launcher(fusetune::cuda::dequantize));

  m.def("planted", [](const std::string& name, uintptr_t out, int size) { planted(name, (float*)out, size); });
  m.def("allow",
        [](uintptr_t begin, size_t bytes, uint64_t storage) { cuda_host::allow((void*)begin, bytes, storage); });
  m.def("forget_allowed", &cuda_host::forget_allowed);
  m.def("reverse_order", &cuda_host::reverse_order);
#endif
}
