/* Fuzz target (libFuzzer): any bytes as a message. Each variant of the scanner must find just what the oracle finds,
 * in the message or in its own scratch, and what it finds must survive being written and read once more. */
#include "scan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *what, const char *variant)
{
    fprintf(stderr, "fastsig: %s (%s)\n", what, variant);
    abort();
}

static int is_same(text a, text b)
{
    return a.n == b.n && !a.p == !b.p && (!a.p || memcmp(a.p, b.p, a.n) == 0);
}

static int lies_within(text t, const char *from, size_t n)
{
    return t.p >= from && t.n <= n && (size_t)(t.p - from) <= n - t.n;
}

static void check_place(text t, const found *f, const char *message, size_t n, const char *variant)
{
    if (t.p && !lies_within(t, message, n) && !lies_within(t, f->scratch, f->scratch_size))
        fail("a text lies elsewhere", variant);
}

static void check_alike(const found *f, const found *expected, const char *message, size_t n, const char *variant)
{
    const text both[][2] = {{f->type, expected->type}, {f->room, expected->room}, {f->sender, expected->sender},
                            {f->id, expected->id}, {f->payload, expected->payload}};
    if (f->verdict != expected->verdict) fail("another verdict than the oracle's", variant);
    for (size_t i = 0; i < sizeof both / sizeof *both; i++) {
        if (!is_same(both[i][0], both[i][1])) fail("another text than the oracle's", variant);
        check_place(both[i][0], f, message, n, variant);
    }
    if (f->payload.p && !lies_within(f->payload, message, n)) fail("a payload is no part of its message", variant);
    if (f->recipients != expected->recipients || f->is_list != expected->is_list) fail("other recipients", variant);
    for (unsigned i = 0; i < f->recipients; i++) {
        if (!is_same(f->recipient[i], expected->recipient[i])) fail("another recipient", variant);
        check_place(f->recipient[i], f, message, n, variant);
    }
}

/* The text as a JSON string, in a message of its own: the same text comes out of it. */
static void check_escape(text t, size_t (*escape)(char *, const char *, size_t), const char *variant)
{
    static const char head[] = "{\"type\":\"x\",\"payload\":1,\"id\":";
    found again;
    char *const out = malloc(sizeof head + 6 * t.n + 2);
    char *const exact = malloc(6 * t.n + 2); /* ASan sees a byte too many */
    const size_t n = escape(exact, t.p, t.n);
    memcpy(out, head, sizeof head - 1);
    memcpy(out + sizeof head - 1, exact, n);
    out[sizeof head - 1 + n] = '}';
    judge(out, sizeof head + n, &again);
    if (again.verdict != OK || !is_same(again.id, t)) fail("what was escaped is not read as it was", variant);
    free(exact);
    free(out);
}

typedef struct {
    const char *name;
    int (*scan)(const char *, size_t, found *);
    int (*is_utf8)(const char *, size_t, size_t);
    size_t (*escape)(char *, const char *, size_t);
} variant;

static const variant variants[] = {
    {"sse2", scan_sse2, scan_sse2_utf8, scan_sse2_escape},
    {"portable", scan_portable, scan_portable_utf8, scan_portable_escape},
};

#define VARIANTS (sizeof variants / sizeof *variants)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const char *const message = (const char *)data;
    found expected, f;
    judge(message, n, &expected);
    for (size_t i = 0; i < VARIANTS; i++) {
        if (!variants[i].scan(message, n, &f)) fail("its own bounds are broken", variants[i].name);
        check_alike(&f, &expected, message, n, variants[i].name);
        if (variants[i].is_utf8(message, n, 1 + n % 23) != (expected.verdict != BAD_UTF8))
            fail("text in pieces is judged otherwise than the whole", variants[i].name);
    }
    if (f.id.p) /* still that of the last variant: the oracle's own texts do not outlive its next verdict */
        for (size_t i = 0; i < VARIANTS; i++) check_escape(f.id, variants[i].escape, variants[i].name);
    return 0;
}
