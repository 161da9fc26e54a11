// What every instruction set offers: the operations, over plain memory. Knows nothing of MLX.
//
// Each operation works on a range of its parts, [first, last), so that a pool can share them out.
// Sums are float32. Element types are those of the arrays; pointers need no alignment.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlk {

enum class Type { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
#if defined(__aarch64__)
typedef __fp16 f16;  // GCC has no _Float16 in C++ there before release 13
#else
typedef _Float16 f16;
#endif

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// A matrix (rows, columns), row after row. Dense where bits is 0: numbers of `type`. Else MLX's
// affine quantization: weight = scale * q + bias, one scale and bias for each `group` columns of a
// row; the numbers of a row are one stream of bits in 32-bit words, lowest first.
struct Matrix {
  const void* data;  // dense numbers, or words (rows, columns * bits / 32)
  Type type;         // of dense numbers, or of scales and biases
  size_t rows, columns;
  int bits = 0;   // 0, 2, 3, 4, 5, 6 or 8
  int group = 0;  // 32, 64 or 128
  const void* scales = nullptr;  // (rows, columns / group)
  const void* biases = nullptr;  // as scales
  bool is_coarse = false;        // whether activations may be taken as whole numbers of 8 bits
};

// Rows of activations (m, n), row after row.
struct Rows {
  const void* data;
  Type type;
  size_t m, n;
};

// x (batch, heads, m, dim) with any strides but the last, in elements.
struct Heads {
  const void* data;
  Type type;
  size_t batch, heads, m, dim;
  ptrdiff_t stride_batch, stride_head, stride_row;
};

// Keys or values as a cache stores them: plain numbers, or packed to 8 or 4 bits, where a number is
// scale * q + bias with one scale and bias for dim / scales.dim numbers of a row.
struct Stored {
  Heads numbers;  // packed: words of 32 / bits numbers each, the first one lowest
  int bits;       // 0 where plain
  Heads scales, biases;
};

// A cache's buffer (batch, heads, rows, dim), row after row, whose rows from `row` on are written.
struct Buffer {
  void* data;
  Type type;
  size_t rows, row;
};
// The same packed: words (batch, heads, rows, dim * bits / 32), and of each group a scale and a bias.
struct PackedBuffer {
  uint32_t* words;
  void *scales, *biases;  // (batch, heads, rows, dim / group)
  Type type;              // of scales and biases
  size_t rows, row;
  int group, bits;  // 8 or 4 bits
};

// Attention over stored rows, which come in parts: keys[i] and values[i], all stored alike.
struct Attention {
  Heads q;
  const Stored *keys, *values;
  size_t parts, rows;    // rows of all parts
  const int32_t* sight;  // (2, rows): the first and the last query that see a row; null is causal:
                         // query i sees rows up to rows - q.m + i
  float scale;
  void* out;  // (batch, m, heads, dim), of q's type
};

// Dense weights to be packed, n groups of them one after the other.
struct Groups {
  const void* values;
  Type type;  // of scales and biases, too
  size_t n;
  int group, bits;  // as a Matrix has them
};
struct PackedGroups {
  uint32_t* words;  // (n, group * bits / 32)
  void *scales, *biases;
};
// How scales and biases are searched for. cut: steps that the first range lacks.
struct Search {
  float cut;
  int rounds;
};

struct Table {
  const char* name;
  size_t panel_rows;  // of a matrix, which one part of `panels` multiplies

  // Few rows of activations: `prepare` once into scratch of `prepared_floats`, then ranges of the
  // matrix's rows. m is at most few_rows.
  size_t (*prepared_floats)(const Matrix&, size_t m);
  void (*prepare)(const Matrix&, const Rows& x, float* prepared);
  void (*few)(const Matrix&, const Rows& x, const float* prepared, void* y, size_t first, size_t last);

  // Many rows: `pack` ranges of row blocks into scratch of `packed_floats`, then ranges of panels,
  // most_panels at once, with scratch of `panel_floats` for each thread.
  size_t most_panels;
  size_t (*packed_floats)(const Matrix&, const Rows& x);
  size_t (*pack_blocks)(const Rows& x);
  void (*pack)(const Matrix&, const Rows& x, float* packed, size_t first, size_t last);
  size_t (*panel_floats)(const Matrix&, const Rows& x, size_t panels);
  void (*panels)(const Matrix&, const Rows& x, const float* packed, float* scratch, void* y,
                 size_t first, size_t last);

  void (*rms_norm)(const Rows& x, const void* weight, Type weight_type, float eps, void* y,
                   size_t first, size_t last);
  // x (m, 2 n): silu of the first n times the others. y (m, n). x.n is 2 n.
  void (*swiglu)(const Rows& x, void* y, size_t first, size_t last);
  // Parts are (batch, head) pairs. angles: (m, dim / 2) cosines, then as many sines.
  void (*rotate)(const Heads& x, const float* angles, void* y, size_t first, size_t last);
  // Parts are (batch, head) pairs. What is finite becomes no infinity in float16.
  void (*append)(const Heads& x, const Buffer& to, size_t first, size_t last);
  void (*append_packed)(const Heads& x, const PackedBuffer& to, size_t first, size_t last);
  // Parts: see attention_parts; attention_joins of them, each of one or more, are joined at last.
  // scratch: attention_floats for each thread; partial: attention_partial_floats for all.
  size_t (*attention_parts)(const Attention&);
  size_t (*attention_joins)(const Attention&);
  size_t (*attention_floats)(const Attention&);
  size_t (*attention_partial_floats)(const Attention&);
  void (*attention)(const Attention&, float* scratch, float* partial, size_t first, size_t last);
  void (*attention_join)(const Attention&, float* partial, size_t first, size_t last);

  void (*least_squares)(const Groups&, const Search&, const PackedGroups&);
  // Parts are groups. The bits are those of MLX's own operations on a CPU.
  void (*quantize)(const Groups&, const PackedGroups&, size_t first, size_t last);
  // The packed matrix, of any rows, as numbers y of its type.
  void (*dequantize)(const Matrix&, void* y, size_t first, size_t last);
};

constexpr size_t few_rows = 5;

// The largest that are taken, as they are held on the stack.
constexpr size_t most_row_groups = 4096;  // of a packed row: 131072 columns at least
constexpr size_t most_dim = 512;      // of a head

const Table* table_baseline();
#if defined(__x86_64__)
const Table* table_avx2();
const Table* table_avxvnni();
const Table* table_avx512();
const Table* table_vnni();
const Table* table_vbmi();
const Table* table_amx();
#elif defined(__aarch64__)
const Table* table_dotprod();
const Table* table_i8mm();
#endif

}  // namespace mlk
