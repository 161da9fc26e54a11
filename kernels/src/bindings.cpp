#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "operations.h"
#include "primitives.h"
#include "token_pass.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_kernels, m) {
  m.attr("MOST_GROUPS") = mlk::most_row_groups;
  m.attr("MOST_HEAD_DIM") = mlk::most_dim;
  m.def("quantized_matmul", &mlk::graph::quantized_matmul, "x"_a, "weight"_a, "scales"_a, "biases"_a,
        nb::kw_only(), "group_size"_a, "bits"_a,
        "x (..., in) times the transposed packed matrix (out, in * bits / 32) -> (..., out).");
  m.def("matmul", &mlk::graph::matmul, "x"_a, "weight"_a,
        "x (..., in) times the transposed matrix (out, in), summed in float32 -> (..., out), of x's dtype.");
  m.def("rms_norm", &mlk::graph::rms_norm, "x"_a, "weight"_a, "eps"_a,
        "Rows of x scaled to unit root mean square, then by weight.");
  m.def("swiglu", &mlk::graph::swiglu, "x"_a, "x (..., 2 n) -> silu of the first n times the others.");
  m.def("rotate", &mlk::graph::rotate, "x"_a, "periods"_a, "offset"_a,
        "RoPE of x (B, heads, L, D), half-split pairs, the first row at position offset.");
  m.def("append", &mlk::graph::append, "buffer"_a, "x"_a, "row"_a,
        "The buffer (B, K, S, D) with x (B, K, L, D) in its rows from row on, in its dtype; what is finite\n"
        "stays so in float16. In place where nobody else holds it.");
  m.def("append_packed", &mlk::graph::append_packed, "buffers"_a, "x"_a, "row"_a, nb::kw_only(),
        "group_size"_a, "bits"_a,
        "The buffers [words (B, K, S, D * bits / 32), scales, biases (B, K, S, D / group_size)] with x\n"
        "(B, K, L, D) packed in their rows from row on: what `quantize` and `append` of each give.");
  m.def("attention", &mlk::graph::attention, "q"_a, "keys"_a, "values"_a, "rows"_a, "scale"_a,
        "sight"_a = nb::none(),
        "The last m rows of q (B, H, m, D) over the first rows[i] of each part i of keys and values, which\n"
        "are [(B, K, S, D)] or packed [words, scales, biases]. sight (2, sum of rows) int32: the first and\n"
        "the last of the m that see a row; without it each sees the rows up to its own.");
  nb::class_<mlk::graph::TokenPass>(
      m, "TokenPass",
      "One token's way through a model whose activations are float32, in one operation.")
      .def(nb::init<const mlk::graph::Packed&, const std::vector<mlk::graph::Layer>&, const mlk::graph::mx::array&,
                    const std::vector<mlk::graph::Packed>&, const mlk::graph::mx::array&, int, int, float, float>(),
           "embeddings"_a, "layers"_a, "norm"_a, "output"_a, "periods"_a, "n_heads"_a, "n_kv_heads"_a, "eps"_a,
           "scale"_a,
           "Matrices are (arrays, group_size, bits), 0 where dense, those of one input in a list. Layers are\n"
           "(attention_norm, wqkv, wo, ffn_norm, w13, w2). Evaluates them.")
      .def("__call__", &mlk::graph::TokenPass::operator(), "token"_a, "keys"_a, "values"_a, "row"_a, "n_rows"_a,
           "position"_a, "sight"_a.none(), "after"_a.none(), "is_coarse"_a,
           "Logits (1, 1, V) of what follows a token (1, 1) uint32, what says that the pass is over, and each\n"
           "layer's keys and values [(1, K, S, D)], or packed, with its own in `row`. It sees the first n_rows,\n"
           "or of these what sight (2, n_rows) says. after: what the last pass returned second; given it, the\n"
           "very buffers are written, which nobody else may hold, and none are returned.");
  m.def("quantize", &mlk::graph::quantize, "x"_a, nb::kw_only(), "group_size"_a, "bits"_a,
        "x (..., in) packed: [words (..., in * bits / 32), scales, biases (..., in / group_size)], the bits\n"
        "of mx.quantize on a CPU.");
  m.def("dequantize", &mlk::graph::dequantize, "weight"_a, "scales"_a, "biases"_a, nb::kw_only(),
        "group_size"_a, "bits"_a,
        "Packed numbers (..., in * bits / 32) as (..., in) of the scales' dtype, the bits of mx.dequantize.");
  m.def("keep_likeliest", &mlk::graph::keep_likeliest, "scores"_a, "top_k"_a, "top_p"_a, "min_p"_a,
        "scores (V,) float32, minus infinity for all but the likeliest, without sorting them.");
  m.def("likeliest", &mlk::graph::likeliest, "scores"_a,
        "The first of the largest scores (V,) float32 -> (1,) uint32.");
  m.def("draw", &mlk::graph::draw, "scores"_a, "key"_a,
        "The token that mx.random.categorical draws from a row of scores (V,) float32 with a key (2,) uint32\n"
        "-> (1,) uint32, but for rounding.");
  m.def("file_array", &mlk::graph::file_array, "path"_a, "offset"_a, "shape"_a, "dtype"_a,
        "A tensor that lies in a file, read when it is evaluated; RuntimeError where it cannot be.");
  m.def("join_rows", &mlk::graph::join_rows, "arrays"_a,
        "The arrays one below another; those of files that were not read yet are read into one.");
  m.def("least_squares", &mlk::graph::least_squares, "values"_a, nb::kw_only(), "group_size"_a, "bits"_a,
        "cut"_a, "rounds"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Pack values (out, in), evaluated: [words, scales, biases], searched for by least squares in so\n"
        "many rounds, from each group's range without `cut` steps. By the calling thread, at once.");
  m.def("product_scratch", &mlk::graph::product_scratch, "rows"_a, "columns"_a, "tokens"_a, "dtype"_a,
        nb::kw_only(), "group_size"_a = 0, "bits"_a = 0,
        "The bytes that so many rows of activations times a matrix hold beside MLX's arrays: for all threads\n"
        "together, and for each.");
  m.def("attention_scratch", &mlk::graph::attention_scratch, "heads"_a, "kv_heads"_a, "head_dim"_a,
        "tokens"_a, "rows"_a, "The same of attention and rotation: so many queries over rows of a cache.");
  m.def("scratch_bytes", &mlk::graph::scratch_bytes, "The bytes that are held so now.");
  m.def("instructions", [] { return std::string(mlk::chosen().name); },
        "Name the instruction set in use.");
  m.def("use_instructions", [](const std::string& name) { return mlk::choose(name.c_str()); },
        "name"_a, "Take another instruction set; False where this processor lacks it.");
  m.def("use_byte_activations", &mlk::graph::use_byte_activations, "asked"_a,
        "Whether packed matrices take activations as whole numbers of 8 bits, in what this thread puts into\n"
        "a graph from then on; at first they do not.");
  m.def("threads", [] { return mlk::Pool::shared().threads(); }, "Number of threads that work.");
  m.def("use_threads", [](size_t n) {
    nb::gil_scoped_release release;
    mlk::Pool::shared().resize(n);
  }, "n"_a, "Let so many threads work, the caller included.");
}
