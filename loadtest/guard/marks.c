/* Between which marks callgrind counts: client requests, which cost six instructions and do nothing outside valgrind. */
#include <valgrind/callgrind.h>

void guard_begin(void)
{
    CALLGRIND_TOGGLE_COLLECT;
}

/* Ends with a file of figures, with `name` in its head. */
void guard_end(const char *name)
{
    CALLGRIND_TOGGLE_COLLECT;
    CALLGRIND_DUMP_STATS_AT(name);
}
