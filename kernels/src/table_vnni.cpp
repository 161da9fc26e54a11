#define MLK_ISA vnni
#define MLK_LANES 16
#define MLK_NAME table_vnni
#include "table.inc"
