// Matrices of random numbers, packed or dense.
#pragma once

#include "values.h"

namespace mlk {

constexpr int BITS[] = {0, 2, 3, 4, 5, 6, 8};

// Random numbers of a matrix, packed or dense, and what they are exactly.
struct Numbers {
  Matrix matrix{};
  Values dense, scales, biases;
  std::vector<uint32_t> words;
  std::vector<double> exact, size;  // of the second: scale and bias without their signs

  Numbers(int bits, int group, Type type, size_t rows, size_t columns)
      : dense(type, normals(bits ? 0 : rows * columns)),
        scales(type, normals(bits ? rows * columns / group : 0)),
        biases(type, normals(bits ? rows * columns / group : 0)),
        words(bits ? rows * columns * bits / 32 : 0) {
    for (auto& word : words) word = random_bits();
    matrix = {bits ? (void*)words.data() : dense.bytes.data(), type, rows, columns};
    if (bits) {
      matrix.bits = bits, matrix.group = group;
      matrix.scales = scales.bytes.data(), matrix.biases = biases.bytes.data();
    }
    for (size_t i = 0; i < rows * columns; ++i) {
      if (!bits) {
        exact.push_back(dense.exact[i]);
        size.push_back(std::abs(dense.exact[i]));
        continue;
      }
      uint32_t q = 0;
      for (int b = 0; b < bits; ++b) q |= (words[(i * bits + b) / 32] >> (i * bits + b) % 32 & 1) << b;
      double scale = scales.exact[i / group], bias = biases.exact[i / group];
      exact.push_back(scale * q + bias);
      size.push_back(std::abs(scale) * q + std::abs(bias));
    }
  }
};

}  // namespace mlk
