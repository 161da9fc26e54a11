// The operations over whole arrays: an instruction set's table and the pool together.
#pragma once

#include "mlx_llama_kernels/pool.h"
#include "mlx_llama_kernels/table.h"

namespace mlk {

const Table& chosen();
// Take another instruction set, by name; false where this processor lacks it.
bool choose(const char* name);

// Floats that an operation takes of a pool: for all threads together, and for each.
struct Scratch {
  size_t common, each;
};
Scratch product_scratch(const Table&, const Matrix&, const Rows& x);
Scratch attention_scratch(const Table&, const Attention&);
Scratch rotation_scratch(const Heads& x);

void matrix_product(Pool&, const Table&, const Matrix&, const Rows& x, void* y);
void rms_norm(Pool&, const Table&, const Rows& x, const void* weight, Type, float eps, void* y);
void swiglu(Pool&, const Table&, const Rows& x, void* y);
// The cosines and sines that a head at a position turns by. periods: (half), 1 over the frequency.
void turn_of(const float* periods, size_t half, int position, float* cosines, float* sines);
// periods: (dim / 2); the first row stands at offset.
void rotate(Pool&, const Table&, const Heads& x, const float* periods, int offset, void* y);
// The rows of x into a cache's buffer, in its type.
void append(Pool&, const Table&, const Heads& x, const Buffer& to);
void append_packed(Pool&, const Table&, const Heads& x, const PackedBuffer& to);
void attention(Pool&, const Table&, const Attention&);
// Numbers to words, scales and biases, and back.
void quantize(Pool&, const Table&, const Groups&, const PackedGroups&);
void dequantize(Pool&, const Table&, const Matrix&, void* y);

}  // namespace mlk
