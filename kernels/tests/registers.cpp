#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "checks.h"
#include "values.h"

namespace mlk {

namespace {

// Whether the upper parts of vector registers are in use, where the processor tells.
bool is_wide_in_use() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(0xd, 1, &a, &b, &c, &d) || !(a & 4)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1));
  return a & (1 << 2 | 1 << 6);  // upper halves of ymm0-15, of zmm0-15
#else
  return false;
#endif
}

}  // namespace

void check_registers(const Table& table) {
  Pool pool(1);
  auto left = [&](auto check) {
    check(pool, table);
    require(is_wide_in_use(), 0, 0, "wide registers in use");
  };
  for (int round = 0; round < 20; ++round) left(check_product), left(check_rows);
  for (int round = 0; round < 20; ++round) left(check_rotation), left(check_attention);
  for (int round = 0; round < 20; ++round) left([](Pool&, const Table& t) { check_least_squares(t); });
  for (int round = 0; round < 20; ++round) left(check_packing), left(check_append_packed);
}

}  // namespace mlk
