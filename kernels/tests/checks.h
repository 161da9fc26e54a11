// What is checked: a random case of each operation, unless said otherwise. Exits where it fails.
#pragma once

#include "operations.h"

namespace mlk {

void check_product(Pool&, const Table&);
// What is not finite stays in its row of activations, and shows there.
void check_not_finite(Pool&, const Table&, float bad);
void check_rows(Pool&, const Table&);
void check_rotation(Pool&, const Table&);
void check_append(Pool&, const Table&);
void check_append_packed(Pool&, const Table&);
void check_attention(Pool&, const Table&);
// One query over a long cache keeps every thread busy, however many parts the rows are cut into.
void check_sharing(const Table&);
// Words, scales and biases bit for bit as MLX's CPU operations make them.
void check_packing(Pool&, const Table&);
// Words, scales and biases bit for bit as one number after the other gives them.
void check_least_squares(const Table&);
// A model's way with one token at once: the same numbers as by one operation after the other.
void check_token(Pool&, const Table&);
// After each operation the thread's vector registers must be as narrow code expects them.
void check_registers(const Table&);
void check_likeliest();
void check_pool();

}  // namespace mlk
