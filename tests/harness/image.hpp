// What a library of kernels says of itself: its variables, its constants, and the lines of its instructions.
#pragma once

#include <elf.h>
#include <link.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace fastsd::host {

struct Symbol {
  std::string name;  // mangled
  size_t offset, bytes;
};

// The variables, with those that are not exported.
inline std::vector<Symbol> data_symbols(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string image((std::istreambuf_iterator<char>(file)), {});
  const auto header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
  const auto sections = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
  std::vector<Symbol> found;
  for (unsigned i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
    const auto symbols = reinterpret_cast<const ElfW(Sym)*>(image.data() + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(*symbols); ++k) {
      if ((symbols[k].st_info & 0xf) != STT_OBJECT || !symbols[k].st_size) continue;
      found.push_back({names + symbols[k].st_name, symbols[k].st_value, symbols[k].st_size});
    }
  }
  return found;
}

// Whether an address lies in a part of the library, loaded at `base`, that is not written.
inline bool is_constant(const char* base, size_t address) {
  const auto header = reinterpret_cast<const ElfW(Ehdr)*>(base);
  const auto segments = reinterpret_cast<const ElfW(Phdr)*>(base + header->e_phoff);
  const size_t offset = address - reinterpret_cast<size_t>(base);
  for (unsigned i = 0; i < header->e_phnum; ++i) {
    const ElfW(Phdr) & segment = segments[i];
    const bool fixed = segment.p_type == PT_GNU_RELRO || (segment.p_type == PT_LOAD && !(segment.p_flags & PF_W));
    if (fixed && offset - segment.p_vaddr < segment.p_memsz) return true;
  }
  return false;
}

// "conv2d.cu:12", or "product.cuh:34 (for conv2d.cu:12)": the innermost line of a kernel, and that of the .cu which it
// was inlined into.
inline std::string line_of(const std::string& path, size_t offset) {
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx 2>/dev/null", path.c_str(), offset);
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), &pclose);
  std::string innermost, unit;
  char text[4096];
  while (pipe && std::fgets(text, sizeof(text), pipe.get())) {
    std::string line = text;
    line = line.substr(0, line.find_first_of(" \n"));
    line = line.substr(line.rfind('/') + 1);
    const std::string file = line.substr(0, line.find(':')), ending = file.substr(file.rfind('.') + 1);
    // device.cuh is taken for the hardware
    if (innermost.empty() && (ending == "cu" || (ending == "cuh" && file != "device.cuh"))) innermost = line;
    if (unit.empty() && ending == "cu") unit = line;
  }
  if (innermost.empty()) return "an unknown line";
  return innermost == unit || unit.empty() ? innermost : innermost + " (for " + unit + ")";
}

}  // namespace fastsd::host
