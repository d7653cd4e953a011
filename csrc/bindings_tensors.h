// Where the memory of torch tensors is, read from their Python objects without torch: by the C functions of DLPack's
// exchange API (dlpack.h 1.2 and later, `DLPackExchangeAPI`), which the tensor's type has as a capsule. A method call in
// Python takes 80 ns a tensor, and an optimizer asks for thousands. Included by bindings.cpp alone, as it needs Python.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fusetune {

// The parts of dlpack.h that are needed; names are its own.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* prev_api;
  void *managed_tensor_allocator, *managed_tensor_from_py_object_no_sync, *managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

// Writes [3, room]: the tensors' addresses; their numbers of elements; and their kinds, equal for equal dtype, device
// and contiguity. False for what has no memory of its own, with no Python error set.
class TensorReader {
 public:
  // `capsule`: torch.Tensor.__dlpack_c_exchange_api__; `tensor`, `parameter`: the two types that are read, as others
  // may have several tensors inside.
  TensorReader(PyObject* capsule, PyObject* tensor, PyObject* parameter, int64_t* out, int64_t room)
      : types_{tensor, parameter}, out_(out), room_(room) {
    auto* api = (DLPackExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    while (api && api->major != 1) api = api->prev_api;
    read_ = api ? api->dltensor_from_py_object_no_sync : nullptr;
    PyErr_Clear();
  }

  // Tensors of a list, in which dicts stand for their values.
  bool list(PyObject* objects) {
    const Py_ssize_t count = PyList_GET_SIZE(objects);
    for (Py_ssize_t i = 0; i < count; i++) {
      if (i + kAhead < count) each(PyList_GET_ITEM(objects, i + kAhead), prefetch);
      if (!each(PyList_GET_ITEM(objects, i), [this](PyObject* object) { return one(object); })) return false;
    }
    return count_ == room_;
  }

 private:
  // After a training step the tensors are in no cache, and reading one waits for memory several times. A tensor's object
  // has a pointer to what it wraps after its head: what is fetched in vain does no harm.
  static constexpr Py_ssize_t kAhead = 4;
  static bool prefetch(PyObject* object) {
    if (Py_TYPE(object)->tp_basicsize < (Py_ssize_t)(sizeof(PyObject) + 2 * sizeof(void*))) return true;
    for (int word = 0; word < 2; word++) {
      const char* wrapped = ((char**)(object + 1))[word];
      for (int line = 0; line < 3; line++) __builtin_prefetch(wrapped + 64 * line);
    }
    return true;
  }

  template <class F>
  static bool each(PyObject* object, F f) {
    if (!PyDict_Check(object)) return f(object);
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(object, &position, &key, &value))
      if (!f(value)) return false;
    return true;
  }

  bool one(PyObject* object) {
    PyObject* const type = (PyObject*)Py_TYPE(object);
    DLTensor t;
    if (!read_ || count_ == room_ || (type != types_[0] && type != types_[1])) return false;
    if (read_(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    int64_t numel = 1;
    bool contiguous = true;
    for (int d = t.ndim - 1; d >= 0; d--) {
      contiguous = contiguous && (t.shape[d] == 1 || !t.strides || t.strides[d] == numel);
      numel *= t.shape[d];
    }
    out_[count_] = (int64_t)t.data + (int64_t)t.byte_offset;
    out_[room_ + count_] = numel;
    out_[2 * room_ + count_] = t.code | t.bits << 8 | (int64_t)t.device_type << 16 | (int64_t)t.device_id << 32 |
                               (int64_t)(contiguous || numel == 0) << 62;
    count_++;
    return true;
  }

  PyObject* const types_[2];
  int64_t* const out_;
  const int64_t room_;
  int64_t count_ = 0;
  int (*read_)(void*, DLTensor*);
};

}  // namespace fusetune
