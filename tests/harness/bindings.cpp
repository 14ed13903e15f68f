// The harness as a Python module: load a library of kernels, launch one of them.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.hpp"
#include "image.hpp"

namespace py = pybind11;
using namespace fastsd::host;

namespace {

using Extent = std::array<unsigned, 3>;

Argument convert(char kind, const py::handle& value, const std::string& name) {
  Argument argument;
  const std::string given = py::str(py::type::of(value).attr("__name__"));
  switch (kind) {
    case 'p':
      if (!value.is_none() && !py::hasattr(value, "data_ptr")) {
        throw py::type_error(name + ": expected a Tensor or None; got " + given);
      }
      argument.pointer =
          value.is_none() ? nullptr : reinterpret_cast<void*>(value.attr("data_ptr")().cast<uintptr_t>());
      return argument;
    case 'i':
      if (!py::isinstance<py::int_>(value)) throw py::type_error(name + ": expected an int; got " + given);
      argument.integer = value.cast<int64_t>();
      return argument;
    default:
      if (!py::isinstance<py::float_>(value)) throw py::type_error(name + ": expected a float; got " + given);
      argument.number = value.cast<float>();
      return argument;
  }
}

// All that a tensor has a part of.
Memory storage(const py::object& tensor, const std::string& name) {
  const py::object storage = tensor.attr("untyped_storage")();
  const auto first = storage.attr("data_ptr")().cast<uintptr_t>();
  return {reinterpret_cast<const char*>(first), storage.attr("nbytes")().cast<size_t>(), "the storage of " + name,
          false};
}

// What the driver would refuse.
void check_limits(const Extent& grid, const Extent& block, size_t shared_bytes) {
  constexpr size_t kMaxShared = 227 * 1024;
  const bool empty = !grid[0] || !grid[1] || !grid[2] || !block[0] || !block[1] || !block[2];
  if (empty || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) {
    throw py::value_error("grid: expected 1 to (2147483647, 65535, 65535) blocks, none of them empty");
  }
  if (block[0] > 1024 || block[1] > 1024 || block[2] > 64 || size_t{block[0]} * block[1] * block[2] > 1024) {
    throw py::value_error("block: expected at most 1024 threads");
  }
  if (shared_bytes > kMaxShared) {
    throw py::value_error("shared_bytes: expected at most " + std::to_string(kMaxShared) + "; got " +
                          std::to_string(shared_bytes));
  }
}

class Library {
 public:
  explicit Library(const std::string& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error(dlerror());
    kernels_ = static_cast<const Kernel*>(dlsym(handle, "fastsd_kernels"));
    const auto static_shared = reinterpret_cast<Bytes (*)()>(dlsym(handle, "fastsd_static_shared"));
    if (!kernels_ || !static_shared) throw std::runtime_error(path + " is not a library of kernels");
    static_shared_ = static_shared();
    for (const Symbol& symbol : data_symbols(path)) {
      Dl_info image;
      dladdr(kernels_, &image);
      const char* first = static_cast<const char*>(image.dli_fbase) + symbol.offset;
      const size_t offset = static_cast<size_t>(first - static_shared_.first);
      if (offset < static_shared_.size) variables_.push_back({first, symbol.bytes, symbol.name, true});
    }
  }

  void launch(const std::string& name, const Extent& grid, const Extent& block, size_t shared_bytes,
              const std::vector<py::object>& args, uint64_t seed) const {
    const Kernel& kernel = find(name);
    check_limits(grid, block, shared_bytes);
    if (args.size() != std::strlen(kernel.kinds)) {
      throw py::type_error(name + ": expected " + std::to_string(std::strlen(kernel.kinds)) + " arguments; got " +
                           std::to_string(args.size()));
    }
    Launch launch{kernel,
                  {},
                  {grid[0], grid[1], grid[2]},
                  {block[0], block[1], block[2]},
                  shared_bytes,
                  static_shared_,
                  static_variables(kernel),
                  seed};
    for (size_t i = 0; i < args.size(); ++i) {
      const std::string place = "args[" + std::to_string(i) + "]";
      launch.arguments.push_back(convert(kernel.kinds[i], args[i], name + ", " + place));
      if (kernel.kinds[i] == 'p' && !args[i].is_none()) launch.memory.push_back(storage(args[i], place));
    }
    run(launch);
  }

 private:
  const Kernel& find(const std::string& name) const {
    for (const Kernel* kernel = kernels_; kernel->name; ++kernel) {
      if (name == kernel->name) return *kernel;
    }
    throw py::value_error("the library has no kernel " + name);
  }

  // Those that may be the kernel's: not what another one declares in its own body.
  std::vector<Memory> static_variables(const Kernel& kernel) const {
    const auto declares = [](const Kernel& function, const Memory& variable) {
      const std::string name = function.name;
      return variable.name.rfind("_ZZ" + std::to_string(name.size()) + name + "E", 0) == 0;
    };
    std::vector<Memory> own;
    for (const Memory& variable : variables_) {
      bool of_other = false;
      for (const Kernel* other = kernels_; other->name; ++other) {
        of_other |= other != &kernel && declares(*other, variable);
      }
      if (!of_other) own.push_back({variable.first, variable.bytes, "static shared memory", true});
    }
    return own;
  }

  const Kernel* kernels_;
  Bytes static_shared_;
  std::vector<Memory> variables_;  // in static shared memory, by their symbols
};

}  // namespace

PYBIND11_MODULE(harness, module) {
  py::class_<Library>(module, "Library")
      .def(py::init<const std::string&>())
      .def("launch", &Library::launch, py::arg("kernel"), py::kw_only(), py::arg("grid"), py::arg("block"),
           py::arg("shared_bytes"), py::arg("args"), py::arg("seed"));
}
