// The extension module. Loading it registers the ops of the other files, on LibTorch's stable ABI: one binary serves
// every torch from 2.10 on. The module itself has one function, on the limited Python API.

#include <Python.h>

#include "isa.h"

namespace {

PyObject* best_isa(PyObject*, PyObject*) {
  return PyLong_FromLongLong(static_cast<long long>(fastsd::best_isa()));
}

PyMethodDef methods[] = {
    {"best_isa", best_isa, METH_NOARGS, "The widest instruction set of this machine: 0 baseline, 1 AVX2, 2 AVX-512."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "CPU kernels of fastsd.", 0, methods};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) {
  return PyModule_Create(&module);
}
