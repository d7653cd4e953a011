// The only file that includes pybind11: one definition per launcher, its argument names, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "adamw.h"
#include "bindings_tensors.h"
#include "cpu/dispatch.h"
#include "dora.h"
#include "flash_attention.h"
#include "lora.h"
#include "quantize.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using fusetune::FlashAttention;

// Python passes addresses as integers.
template <class T>
using Wire = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T from_wire(Wire<T> value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
}

// A member of a struct of arguments: an address is an integer, strides are a tuple.
template <class T>
void field(py::class_<FlashAttention>& cls, const char* name, T FlashAttention::* member) {
  using fusetune::MaskStrides, fusetune::Strides;
  auto set = [&](auto setter) { cls.def_property(name, nullptr, setter); };
  if constexpr (std::is_same_v<T, Strides>)
    set([member](FlashAttention& c, std::array<int64_t, 3> s) { c.*member = {s[0], s[1], s[2]}; });
  else if constexpr (std::is_same_v<T, MaskStrides>)
    set([member](FlashAttention& c, std::array<int64_t, 4> s) { c.*member = {s[0], s[1], s[2], s[3]}; });
  else
    set([member](FlashAttention& c, Wire<T> value) { c.*member = from_wire<T>(value); });
}

// The launcher of the ISA level in use, callable from Python without the GIL.
template <size_t Levels, class... Args>
auto cpu_launcher(void (*const (&levels)[Levels])(Args...)) {
  return [&levels](Wire<Args>... args) {
    py::gil_scoped_release release;
    levels[fusetune::cpu::level()](from_wire<Args>(args)...);
  };
}

#ifdef FUSETUNE_WITH_CUDA
template <class... Args>
auto cuda_launcher(void (*launch)(Args...)) {
  return [launch](Wire<Args>... args) { launch(from_wire<Args>(args)...); };
}
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Launchers of fusetune's compiled kernels; their contracts are the headers in csrc/.";
  m.attr("with_cuda") = kWithCuda;
  m.attr("cuda_archs") = FUSETUNE_CUDA_ARCHS;
  m.attr("compiler") = FUSETUNE_COMPILER;

  m.def("isa", &fusetune::cpu::isa);
  m.def("isa_built", &fusetune::cpu::isa_built);
  m.def("isa_available", &fusetune::cpu::isa_available);
  m.def("set_isa", &fusetune::cpu::set_isa, "level"_a);

  m.def(
      "read_tensors",
      [](py::handle api, py::handle tensor, py::handle parameter, py::list objects, uintptr_t out, int64_t room) {
        using fusetune::TensorReader;
        return TensorReader(api.ptr(), tensor.ptr(), parameter.ptr(), (int64_t*)out, room).list(objects.ptr());
      },
      "api"_a, "tensor"_a, "parameter"_a, "objects"_a, "out"_a, "room"_a);

  m.def("lora_forward", cpu_launcher(fusetune::cpu::lora_forward), "x"_a, "s"_a, "adapters"_a, "factors"_a,
        "adapter_count"_a, "projections"_a, "projection_count"_a, "M"_a, "K"_a, "x_row"_a, "dtype"_a, "adapter_dtype"_a,
        "y_dtype"_a, "fast"_a, "threads"_a);
  m.def("lora_backward", cpu_launcher(fusetune::cpu::lora_backward), "x"_a, "s"_a, "dx0"_a, "adapters"_a, "factors"_a,
        "adapter_count"_a, "projections"_a, "projection_count"_a, "M"_a, "K"_a, "x_row"_a, "dtype"_a, "adapter_dtype"_a,
        "dx_dtype"_a, "fast"_a, "threads"_a);

  m.def("dora_norm", cpu_launcher(fusetune::cpu::dora_norm), "w"_a, "a"_a, "b"_a, "norm"_a, "N"_a, "K"_a, "R"_a,
        "w_row"_a, "w_col"_a, "scale"_a, "dtype"_a, "adapter_dtype"_a, "threads"_a);
  m.def("dora_forward", cpu_launcher(fusetune::cpu::dora_forward), "pre"_a, "g"_a, "bias"_a, "rest"_a, "y"_a, "M"_a,
        "N"_a, "dtype"_a, "threads"_a);
  m.def("dora_backward", cpu_launcher(fusetune::cpu::dora_backward), "dy"_a, "pre"_a, "g"_a, "dpre"_a, "dg"_a,
        "dbias"_a, "M"_a, "N"_a, "dy_row"_a, "dtype"_a, "threads"_a);
  m.def("dora_dropout", cpu_launcher(fusetune::cpu::dora_dropout), "x"_a, "out"_a, "M"_a, "K"_a, "x_row"_a,
        "dropout_p"_a, "seed"_a, "dtype"_a, "threads"_a);

  py::class_<FlashAttention> call(m, "FlashAttention");
  call.def(py::init([] { return FlashAttention{}; }));
  // clang-format off
#define FIELD(name) field(call, #name, &FlashAttention::name)
  FIELD(q); FIELD(k); FIELD(v); FIELD(o); FIELD(lse); FIELD(q_stride); FIELD(k_stride); FIELD(v_stride);
  FIELD(o_stride); FIELD(B); FIELD(H); FIELD(Hkv); FIELD(Sq); FIELD(Sk); FIELD(D); FIELD(Dv); FIELD(dtype);
  FIELD(scale); FIELD(softcap); FIELD(left); FIELD(right); FIELD(top_left); FIELD(keep); FIELD(keep_row);
  FIELD(mask); FIELD(mask_stride); FIELD(bias); FIELD(bias_dtype); FIELD(bias_stride); FIELD(relative); FIELD(N);
  FIELD(sinks); FIELD(q_starts); FIELD(k_starts); FIELD(members); FIELD(dropout_p); FIELD(seed); FIELD(seed_cell);
  FIELD(grad_o); FIELD(grad_o_stride); FIELD(grad_lse); FIELD(dq); FIELD(dk); FIELD(dv); FIELD(dq_stride);
  FIELD(dk_stride); FIELD(dv_stride); FIELD(dbias); FIELD(dbias_stride); FIELD(drelative); FIELD(dsinks);
  FIELD(workspace);
#undef FIELD
  // clang-format on
  m.def("flash_attention_forward", cpu_launcher(fusetune::cpu::flash_attention_forward), "call"_a, "threads"_a);
  m.def("flash_attention_backward", cpu_launcher(fusetune::cpu::flash_attention_backward), "call"_a, "threads"_a);

  m.def("adamw_step", cpu_launcher(fusetune::cpu::adamw_step), "table"_a, "rows"_a, "hypers"_a, "grad_scale"_a,
        "found_inf"_a, "grad_norm"_a, "max_grad_norm"_a, "threads"_a);
  m.def("adamw_grad_norm", cpu_launcher(fusetune::cpu::adamw_grad_norm), "table"_a, "rows"_a, "grad_scale"_a, "norm"_a,
        "threads"_a);

  m.def("quantize_nf4", cpu_launcher(fusetune::cpu::quantize_nf4), "w"_a, "codes"_a, "absmax"_a, "count"_a, "block"_a,
        "dtype"_a, "threads"_a);
  m.def("dequantize", cpu_launcher(fusetune::cpu::dequantize), "codes"_a, "absmax"_a, "nested"_a, "out"_a, "n0"_a,
        "n1"_a, "k0"_a, "k1"_a, "K"_a, "block"_a, "bits"_a, "dtype"_a, "threads"_a);
#ifdef FUSETUNE_WITH_CUDA
  m.def("cuda_lora_down", cuda_launcher(fusetune::cuda::lora_down), "t"_a, "w"_a, "out"_a, "M"_a, "C"_a, "R"_a,
        "t_row"_a, "w_rank"_a, "w_col"_a, "out_row"_a, "factor"_a, "dropout_p"_a, "seed"_a, "masks"_a, "dtype"_a,
        "w_dtype"_a, "stream"_a);
  m.def("cuda_lora_up", cuda_launcher(fusetune::cuda::lora_up), "t"_a, "w"_a, "bias"_a, "out"_a, "M"_a, "C"_a, "R"_a,
        "t_row"_a, "w_rank"_a, "w_col"_a, "out_row"_a, "factor"_a, "dropout_p"_a, "seed"_a, "masks"_a, "accumulate"_a,
        "dtype"_a, "w_dtype"_a, "bias_dtype"_a, "stream"_a);
  m.def("cuda_lora_outer_workspace", fusetune::cuda::lora_outer_workspace, "M"_a, "C"_a, "R"_a, "dropout_p"_a,
        "masks"_a);
  m.def("cuda_lora_outer", cuda_launcher(fusetune::cuda::lora_outer), "t"_a, "u"_a, "out"_a, "workspace"_a, "M"_a,
        "C"_a, "R"_a, "t_row"_a, "u_row"_a, "out_rank"_a, "out_col"_a, "factor"_a, "dropout_p"_a, "seed"_a, "masks"_a,
        "dtype"_a, "dot_dtype"_a, "out_dtype"_a, "stream"_a);
  m.def("cuda_flash_attention_forward", cuda_launcher(fusetune::cuda::flash_attention_forward), "call"_a, "stream"_a);
  m.def("cuda_flash_attention_backward", cuda_launcher(fusetune::cuda::flash_attention_backward), "call"_a, "stream"_a);
  m.def("cuda_adamw_step", cuda_launcher(fusetune::cuda::adamw_step), "table"_a, "rows"_a, "hypers"_a, "grad_scale"_a,
        "found_inf"_a, "grad_norm"_a, "max_grad_norm"_a, "workspace"_a, "stream"_a);
  m.def("cuda_adamw_grad_norm", cuda_launcher(fusetune::cuda::adamw_grad_norm), "table"_a, "rows"_a, "grad_scale"_a,
        "norm"_a, "workspace"_a, "stream"_a);
  m.def("cuda_adamw_grad_norm_workspace", fusetune::cuda::adamw_grad_norm_workspace);
  m.def("cuda_dequantize", cuda_launcher(fusetune::cuda::dequantize), "codes"_a, "absmax"_a, "nested"_a, "out"_a,
        "n0"_a, "n1"_a, "k0"_a, "k1"_a, "K"_a, "block"_a, "bits"_a, "dtype"_a, "stream"_a);
#endif
#ifdef FUSETUNE_WITH_SM90
  m.def("cuda_flash_attention_sm90_forward", cuda_launcher(fusetune::cuda::flash_attention_sm90_forward), "call"_a,
        "stream"_a);
  m.def("cuda_flash_attention_sm90_workspace", fusetune::cuda::flash_attention_sm90_workspace, "B"_a, "H"_a, "Sq"_a);
  m.def("cuda_flash_attention_sm90_backward", cuda_launcher(fusetune::cuda::flash_attention_sm90_backward), "call"_a,
        "workspace"_a, "stream"_a);
#endif
}
