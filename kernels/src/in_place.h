// Buffers of a cache among the inputs of an operation with several outputs, written in place.
#pragma once

#include <algorithm>

#include "on_cpu.h"

namespace mlk::graph {

// Lets the last outputs take the place of as many inputs, from inputs[first] on: their memory where
// nobody else holds it, else memory of their own, for `copy_apart`.
inline void take_over(mx::Stream stream, const std::vector<array>& inputs, size_t first,
                      std::vector<array>& outputs, size_t n) {
  // The inputs are those of each output. All are computed now, so one of them may hold them alone.
  for (array& out : outputs) {
    if (&out.inputs() != &inputs && !out.is_tracer()) out.inputs().clear();
  }
  auto begin = inputs.begin() + first;
  auto is_free = [](const array& buffer) { return buffer.is_donatable(); };
  // MLX holds what an operation made until the stream has done it. Waiting costs less than a copy.
  if (!std::all_of(begin, begin + n, is_free)) mx::synchronize(stream);
  for (size_t i = 0; i < n; ++i) {
    array& out = outputs[outputs.size() - n + i];
    if (is_free(begin[i]) && begin[i].flags().row_contiguous) out.copy_shared_buffer(begin[i]);
    else out.set_data(mx::allocator::malloc(out.nbytes()));
  }
}

// On the stream: what the buffers held, from inputs[first] on, where they have memory of their own.
inline void copy_apart(const std::vector<array>& inputs, size_t first, std::vector<array>& buffers) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    const array& from = inputs[first + i];
    char* to = buffers[i].data<char>();
    if (from.data<char>() != to) std::memcpy(to, Straight(from).data(), buffers[i].nbytes());
  }
}

}  // namespace mlk::graph
