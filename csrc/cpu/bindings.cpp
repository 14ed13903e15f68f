// The extension module. Loading it registers the ops of the other files, on LibTorch's stable ABI: one binary serves
// every torch from 2.10 on. The module itself has functions on the limited Python API. Memory goes to torch as a DLPack
// capsule: its deleter is C, so that a tensor may die in any thread, and nothing of Python runs meanwhile.

#include <Python.h>

#include <cstdint>

#include "isa.h"
#include "memory.h"

namespace {

// As https://dmlc.github.io/dlpack lays them out, before version 1.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLUInt = 1;
constexpr const char* kUnused = "dltensor";  // until a consumer has taken it

struct Lease {
  DLManagedTensor managed;
  int64_t bytes, stride;
};

void end_lease(DLManagedTensor* managed) {
  auto* lease = static_cast<Lease*>(managed->context);
  fastsd::give_block_back(managed->tensor.data, size_t(lease->bytes));
  delete lease;
}

void end_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kUnused)) return;
  end_lease(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kUnused)));
}

PyObject* take_block(PyObject*, PyObject* size) {
  const int64_t bytes = PyLong_AsLongLong(size);
  if (bytes == -1 && PyErr_Occurred()) return nullptr;
  if (bytes < 1) return PyErr_Format(PyExc_ValueError, "bytes: expected at least 1; got %lld", (long long)bytes);
  void* data = fastsd::take_block(size_t(bytes));
  if (!data) Py_RETURN_NONE;
  auto* lease = new Lease{{}, bytes, 1};
  lease->managed = {{data, kDLCPU, 0, 1, kDLUInt, 8, 1, &lease->bytes, &lease->stride, 0}, lease, end_lease};
  PyObject* capsule = PyCapsule_New(&lease->managed, kUnused, end_unused);
  if (!capsule) end_lease(&lease->managed);
  return capsule;
}

PyObject* kept_bytes(PyObject*, PyObject*) {
  return PyLong_FromSize_t(fastsd::kept_bytes());
}

PyObject* release_blocks(PyObject*, PyObject*) {
  fastsd::release_blocks();
  Py_RETURN_NONE;
}

PyObject* best_isa(PyObject*, PyObject*) {
  return PyLong_FromLongLong(static_cast<long long>(fastsd::best_isa()));
}

PyMethodDef methods[] = {
    {"best_isa", best_isa, METH_NOARGS, "The widest instruction set of this machine: 0 baseline, 1 AVX2, 2 AVX-512."},
    {"take_block", take_block, METH_O, "That many bytes, as a DLPack capsule; None where there is no memory left."},
    {"kept_bytes", kept_bytes, METH_NOARGS, "How many bytes of blocks nobody uses."},
    {"release_blocks", release_blocks, METH_NOARGS, "Gives what nobody uses back to the system."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "CPU kernels of fastsd.", 0, methods};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) {
  return PyModule_Create(&module);
}
