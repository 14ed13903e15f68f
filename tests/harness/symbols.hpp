// The variables of a shared library, with those that are not exported.
#pragma once

#include <elf.h>
#include <link.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace fastsd::host {

struct Symbol {
  std::string name;  // mangled
  size_t offset, bytes;
};

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

}  // namespace fastsd::host
