#define MLK_ISA dotprod
#define MLK_LANES 4
#define MLK_NAME table_dotprod
#include "table.inc"
