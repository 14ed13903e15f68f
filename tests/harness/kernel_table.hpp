// A kernel as the harness calls it: by name, with arguments whose kinds are known at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastsd::host {

struct Bytes {
  char* first;
  size_t size;
};

union Argument {
  void* pointer;
  int64_t integer;
  float number;
};

struct Kernel {
  const char* name;
  const char* kinds;  // per parameter: 'p'ointer, 'i'nt64_t, 'f'loat
  void (*call)(const Argument* arguments);
};

template <class Parameter>
struct Kind;  // only the kinds below can be passed at a launch
template <class Element>
struct Kind<Element*> {
  static constexpr char kLetter = 'p';
  static Element* of(Argument argument) { return static_cast<Element*>(argument.pointer); }
};
template <>
struct Kind<long long> {
  static constexpr char kLetter = 'i';
  static long long of(Argument argument) { return argument.integer; }
};
template <>
struct Kind<float> {
  static constexpr char kLetter = 'f';
  static float of(Argument argument) { return argument.number; }
};

template <auto function>
struct Caller;
template <class... Parameters, void (*function)(Parameters...)>
struct Caller<function> {
  static constexpr char kKinds[] = {Kind<Parameters>::kLetter..., '\0'};
  static void call(const Argument* arguments) { expand(arguments, std::index_sequence_for<Parameters...>()); }

 private:
  template <size_t... index>
  static void expand(const Argument* arguments, std::index_sequence<index...>) {
    function(Kind<Parameters>::of(arguments[index])...);
  }
};

template <auto function>
constexpr Kernel kernel(const char* name) {
  return {name, Caller<function>::kKinds, &Caller<function>::call};
}

}  // namespace fastsd::host
