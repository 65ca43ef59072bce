/* What the scanner's fuzz target, its variants and its oracle say to each other. */
#ifndef FASTSIG_FUZZ_SCAN_H
#define FASTSIG_FUZZ_SCAN_H

#include <stddef.h>
#include <stdint.h>

#define MOST_RECIPIENTS 32
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

enum { OK = 0, BAD_UTF8, BAD_JSON, BAD_MESSAGE, TOO_LARGE }; /* as in _scan.h */

typedef struct {
    const char *p; /* NULL: absent */
    size_t n;
} text;

typedef struct {
    int verdict;
    text type, room, sender, id, payload, recipient[MOST_RECIPIENTS];
    unsigned recipients, is_list;
    const char *scratch; /* where texts that were escaped may lie */
    size_t scratch_size;
} found;

/* 0 if what it found breaks its own bounds. */
int scan_sse2(const char *message, size_t n, found *out);
int scan_portable(const char *message, size_t n, found *out);
/* Is it UTF-8, when it comes in pieces of that size? */
int scan_sse2_utf8(const char *p, size_t n, size_t piece);
int scan_portable_utf8(const char *p, size_t n, size_t piece);
size_t scan_sse2_escape(char *out, const char *p, size_t n);
size_t scan_portable_escape(char *out, const char *p, size_t n);

/* What both must find. Its texts are its own, until the next call. */
void judge(const char *message, size_t n, found *out);

#endif
