// A stack of its own, and the change to and from it without a system call.
#pragma once

#include <cstddef>
#include <memory>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Saves what a call preserves on the stack in use, notes the stack in *from, and goes on where `to` was noted.
extern "C" void fastsd_switch(void** from, void* to);
#endif

namespace fastsd::host {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  // Makes the next enter() call `function`, which must not return.
  void prepare(void (*function)());
  void enter();
  // Goes back to enter(); `for_good` if it is not to be entered again.
  void leave(bool for_good);
  // Has to be the first that `function` does.
  void arrive();

  const char* stack() const { return stack_.get(); }

 private:
  std::unique_ptr<char[]> stack_{new char[kStackBytes]};
#ifdef __x86_64__
  void *own_ = nullptr, *other_ = nullptr;
#else
  ucontext_t own_, other_;
#endif
  // AddressSanitizer has to know the stacks
  void *fake_stack_ = nullptr, *other_fake_stack_ = nullptr;
  const void* other_stack_ = nullptr;
  size_t other_stack_bytes_ = 0;
};

inline void Fiber::prepare(void (*function)()) {
  fake_stack_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  // a fiber that was abandoned after a failure leaves its frames poisoned
  __asan_unpoison_memory_region(stack_.get(), kStackBytes);
#endif
#ifdef __x86_64__
  // as fastsd_switch leaves a stack: six registers, then where to return to, which sees a stack as after a call
  auto top = reinterpret_cast<void**>(reinterpret_cast<size_t>(stack_.get() + kStackBytes) & ~size_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(function);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  own_ = top;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_.get();
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = nullptr;
  makecontext(&own_, function, 0);
#endif
}

inline void Fiber::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&other_fake_stack_, stack_.get(), kStackBytes);
#endif
#ifdef __x86_64__
  fastsd_switch(&other_, own_);
#else
  swapcontext(&other_, &own_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(other_fake_stack_, nullptr, nullptr);
#endif
}

inline void Fiber::arrive() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &other_stack_, &other_stack_bytes_);
#endif
}

inline void Fiber::leave([[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, other_stack_, other_stack_bytes_);
#endif
#ifdef __x86_64__
  fastsd_switch(&own_, other_);
#else
  swapcontext(&own_, &other_);
#endif
  arrive();
}

}  // namespace fastsd::host
