#if defined(__aarch64__)
#define MLK_ISA neon
#else
#define MLK_ISA baseline
#endif
#define MLK_LANES 4
#define MLK_NAME table_baseline
#include "table.inc"
