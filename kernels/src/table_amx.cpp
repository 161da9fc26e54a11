#define MLK_ISA amx
#define MLK_LANES 16
#define MLK_NAME table_amx
#include "table.inc"
