// Every operation of every instruction set against float64, over random shapes; prints what it did.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "checks.h"
#include "values.h"

using namespace mlk;

int main(int argc, char** argv) {
  int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  check_pool();
  check_likeliest();
  for (const char* name :
       {"baseline", "neon", "dotprod", "i8mm", "avx2", "avxvnni", "avx512", "vnni", "vbmi", "amx"}) {
    if (!choose(name)) {
      std::printf("%s: not on this processor\n", name);
      continue;
    }
    for (size_t threads : {1, 3}) {
      Pool pool(threads);
      for (int round = 0; round < rounds; ++round) {
        check_product(pool, chosen());
        check_rows(pool, chosen());
        check_rotation(pool, chosen());
        check_append(pool, chosen());
        check_append_packed(pool, chosen());
        check_attention(pool, chosen());
        check_token(pool, chosen());
        check_packing(pool, chosen());
        check_least_squares(chosen());
      }
      for (float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) check_not_finite(pool, chosen(), bad);
    }
    check_registers(chosen());
    check_sharing(chosen());
    std::printf("%s: as float64 says\n", name);
  }
  std::printf("%ld numbers checked\n", checks);
}
