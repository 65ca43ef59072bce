/* PROTOCOL §3 and §3.6 once more, in other words: a recursive reader that decodes every code point. Slow and simple; it
 * shares nothing with _scan.h, knows no blocks of bytes and allocates what it keeps. */
#include "scan.h"

#include <stdlib.h>
#include <string.h>

#define DEEPEST 64

typedef struct {
    const unsigned char *p, *end;
    char *kept; /* all decoded strings of this message, one behind the other */
    size_t used;
    int depth;
} reader;

typedef struct {
    enum { STRING, NUL, LIST, OTHER } kind;
    text string;
    const char *from, *to; /* of the value in the message */
} value;

/* ---- UTF-8 */

/* The code point at *p, which moves on; -1 for none. */
static long code_point(const unsigned char **p, const unsigned char *end)
{
    static const long least[5] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char lead = *(*p)++;
    int n = lead < 0x80 ? 1 : (lead & 0xe0) == 0xc0 ? 2 : (lead & 0xf0) == 0xe0 ? 3 : (lead & 0xf8) == 0xf0 ? 4 : 0;
    if (n == 0) return -1;
    long code = n == 1 ? lead : lead & (0x7f >> n);
    for (int i = 1; i < n; i++) {
        if (*p == end || (**p & 0xc0) != 0x80) return -1;
        code = code * 64 + (*(*p)++ & 0x3f);
    }
    return code < least[n] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000) ? -1 : code;
}

static int is_utf8(const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + n;
    while (p < end)
        if (code_point(&p, end) < 0) return 0;
    return 1;
}

static void keep(reader *r, long code)
{
    char *out = r->kept + r->used;
    if (code < 0x80) {
        out[0] = (char)code;
        r->used += 1;
    } else if (code < 0x800) {
        out[0] = (char)(0xc0 + code / 64);
        out[1] = (char)(0x80 + code % 64);
        r->used += 2;
    } else if (code < 0x10000) {
        out[0] = (char)(0xe0 + code / 4096);
        out[1] = (char)(0x80 + code / 64 % 64);
        out[2] = (char)(0x80 + code % 64);
        r->used += 3;
    } else {
        out[0] = (char)(0xf0 + code / 262144);
        out[1] = (char)(0x80 + code / 4096 % 64);
        out[2] = (char)(0x80 + code / 64 % 64);
        out[3] = (char)(0x80 + code % 64);
        r->used += 4;
    }
}

/* ---- JSON: each reads one thing at r->p and answers whether it was there */

static int is_next(reader *r, char c)
{
    return r->p < r->end && *r->p == (unsigned char)c;
}

static int takes(reader *r, char c)
{
    return is_next(r, c) ? (r->p++, 1) : 0;
}

static void skip_space(reader *r)
{
    while (r->p < r->end && *r->p && strchr(" \t\r\n", *r->p)) r->p++;
}

static long read_hex(reader *r)
{
    long unit = 0;
    for (int i = 0; i < 4; i++) {
        static const char digits[] = "0123456789abcdefABCDEF";
        const char *digit = r->p < r->end && *r->p ? strchr(digits, *r->p) : NULL;
        if (!digit) return -1;
        const long at = digit - digits;
        unit = unit * 16 + (at < 16 ? at : at - 6);
        r->p++;
    }
    return unit;
}

static int read_escape(reader *r)
{
    static const char letters[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    if (takes(r, 'u')) {
        long unit = read_hex(r);
        if (unit < 0 || (unit >= 0xdc00 && unit <= 0xdfff)) return 0;
        if (unit >= 0xd800 && unit <= 0xdbff) {
            if (!takes(r, '\\') || !takes(r, 'u')) return 0;
            const long low = read_hex(r);
            if (low < 0xdc00 || low > 0xdfff) return 0;
            unit = 0x10000 + (unit - 0xd800) * 1024 + low - 0xdc00;
        }
        keep(r, unit);
        return 1;
    }
    const char *letter = r->p < r->end && *r->p ? strchr(letters, *r->p) : NULL;
    if (!letter) return 0;
    r->p++;
    keep(r, meant[letter - letters]);
    return 1;
}

static int read_string(reader *r, text *out)
{
    if (!takes(r, '"')) return 0;
    out->p = r->kept + r->used;
    const size_t before = r->used;
    while (!takes(r, '"')) {
        if (r->p == r->end) return 0;
        if (takes(r, '\\')) {
            if (!read_escape(r)) return 0;
            continue;
        }
        const long code = code_point(&r->p, r->end);
        if (code < 0x20) return 0;
        keep(r, code);
    }
    out->n = r->used - before;
    return 1;
}

static int read_digits(reader *r)
{
    int n = 0;
    for (; r->p < r->end && *r->p >= '0' && *r->p <= '9'; r->p++) n++;
    return n;
}

static int read_number(reader *r)
{
    takes(r, '-');
    if (!takes(r, '0') && !read_digits(r)) return 0;
    if (takes(r, '.') && !read_digits(r)) return 0;
    if (!takes(r, 'e') && !takes(r, 'E')) return 1;
    if (!takes(r, '+')) takes(r, '-');
    return read_digits(r) > 0;
}

static int read_word(reader *r, const char *word)
{
    const size_t n = strlen(word);
    if ((size_t)(r->end - r->p) < n || memcmp(r->p, word, n) != 0) return 0;
    r->p += n;
    return 1;
}

static int read_value(reader *r, value *out);

/* What is to be done with each member of an object, and with each item of a list (`key` is NULL). */
typedef void (*visitor)(void *context, const text *key, const value *item);

static int read_container(reader *r, int is_object, visitor visit, void *context)
{
    const char close = is_object ? '}' : ']';
    text key;
    value item;
    r->p++;
    if (++r->depth > DEEPEST) return 0;
    skip_space(r);
    if (takes(r, close)) return r->depth--, 1;
    do {
        skip_space(r);
        if (is_object) {
            if (!read_string(r, &key)) return 0;
            skip_space(r);
            if (!takes(r, ':')) return 0;
            skip_space(r);
        }
        if (!read_value(r, &item)) return 0;
        if (visit) visit(context, is_object ? &key : NULL, &item);
        skip_space(r);
    } while (takes(r, ','));
    r->depth--;
    return takes(r, close);
}

static int read_value(reader *r, value *out)
{
    out->from = (const char *)r->p;
    out->kind = OTHER;
    int is_good;
    if (is_next(r, '"')) {
        out->kind = STRING;
        is_good = read_string(r, &out->string);
    } else if (is_next(r, '{')) {
        is_good = read_container(r, 1, NULL, NULL);
    } else if (is_next(r, '[')) {
        out->kind = LIST;
        is_good = read_container(r, 0, NULL, NULL);
    } else if (is_next(r, 'n')) {
        out->kind = NUL;
        is_good = read_word(r, "null");
    } else {
        is_good = read_word(r, "true") || read_word(r, "false") || read_number(r);
    }
    out->to = (const char *)r->p;
    return is_good;
}

/* ---- the message */

enum { TYPE, ROOM, SENDER, ID, RECIPIENT, PAYLOAD, FIELDS };

typedef struct {
    reader *r;
    found *out;
    text *field[FIELDS];
    int times[FIELDS];
    int is_bad, is_large;
} message_state;

typedef struct {
    message_state *m;
    size_t listed;
} list_state;

static int equals(const text *a, const char *b)
{
    return a->n == strlen(b) && memcmp(a->p, b, a->n) == 0;
}

static int has_control(const text *t)
{
    const unsigned char *p = (const unsigned char *)t->p, *end = p + t->n;
    while (p < end) {
        const long code = code_point(&p, end);
        if (code < 0x20 || (code >= 0x7f && code < 0xa0)) return 1;
    }
    return 0;
}

static int is_type(const text *t)
{
    if (t->n > 64) return 0;
    for (size_t i = 0; i < t->n; i++)
        if (!t->p[i] || !strchr("abcdefghijklmnopqrstuvwxyz0123456789._-", t->p[i])) return 0;
    return 1;
}

/* Is the text fit for that field? Notes what is wrong with it. */
static int is_fit(message_state *m, int field, const text *t)
{
    const size_t limit = field == TYPE || field == ID ? 64 : 128;
    int is_bad = t->n == 0, is_large = t->n > limit;
    if (field == TYPE)
        is_bad |= !is_type(t);
    else if (field != ID)
        is_bad |= has_control(t);
    m->is_bad |= is_bad;
    m->is_large |= is_large;
    return !is_bad && !is_large;
}

static void on_recipient(void *context, const text *key, const value *item)
{
    list_state *list = context;
    (void)key;
    list->listed += item->kind == STRING;
    if (item->kind != STRING)
        list->m->is_bad = 1;
    else if (is_fit(list->m, RECIPIENT, &item->string) && list->listed <= MOST_RECIPIENTS)
        list->m->out->recipient[list->m->out->recipients++] = item->string;
}

static void on_list(message_state *m, const value *list)
{
    reader again = *m->r; /* its strings are kept behind those of the whole */
    list_state state = {m, 0};
    again.p = (const unsigned char *)list->from;
    again.depth = 1;
    read_container(&again, 0, on_recipient, &state);
    m->r->used = again.used;
    found *out = m->out;
    out->is_list = 1;
    m->is_bad |= state.listed == 0;
    if (state.listed > MOST_RECIPIENTS) {
        m->is_large = 1;
        return;
    }
    for (unsigned i = 0; i < out->recipients; i++)
        for (unsigned j = 0; j < i; j++)
            m->is_bad |= out->recipient[i].n == out->recipient[j].n &&
                         memcmp(out->recipient[i].p, out->recipient[j].p, out->recipient[i].n) == 0;
}

static void on_member(void *context, const text *key, const value *item)
{
    static const char *const names[FIELDS] = {"type", "room", "sender", "id", "recipient", "payload"};
    message_state *m = context;
    for (int field = 0; field < FIELDS; field++) {
        if (!equals(key, names[field])) continue;
        if (++m->times[field] > 1) {
            m->is_bad = 1;
        } else if (field == PAYLOAD) {
            if (item->kind != NUL) m->out->payload = (text){item->from, (size_t)(item->to - item->from)};
        } else if (field == RECIPIENT && item->kind == LIST) {
            on_list(m, item);
        } else if (item->kind == STRING) {
            if (is_fit(m, field, &item->string)) *m->field[field] = item->string;
        } else if (item->kind != NUL) {
            m->is_bad = 1;
        }
    }
}

static void refuse(found *out, int verdict, const message_state *m)
{
    const text absent = {NULL, 0};
    const found before = *out;
    memset(out, 0, sizeof *out);
    out->verdict = verdict;
    out->room = verdict >= BAD_MESSAGE && m->times[ROOM] == 1 ? before.room : absent;
    out->id = verdict >= BAD_MESSAGE && m->times[ID] == 1 ? before.id : absent;
}

void judge(const char *message, size_t n, found *out)
{
    static char *kept;
    free(kept);
    kept = malloc(2 * n + 1); /* a list of recipients is decoded twice */
    const unsigned char *const p = (const unsigned char *)message;
    reader r = {p, p + n, kept, 0, 0};
    text recipient = {NULL, 0};
    message_state m = {&r, out, {&out->type, &out->room, &out->sender, &out->id, &recipient, NULL}, {0}, 0, 0};
    memset(out, 0, sizeof *out);
    if (!is_utf8(message, n)) {
        out->verdict = BAD_UTF8;
        return;
    }
    skip_space(&r);
    value whole;
    const int is_object = is_next(&r, '{');
    int is_good = is_object ? read_container(&r, 1, on_member, &m) : read_value(&r, &whole);
    skip_space(&r);
    if (!is_good || r.p != r.end) {
        refuse(out, BAD_JSON, &m);
        return;
    }
    if (recipient.p) out->recipient[out->recipients++] = recipient;
    if (!is_object || !out->type.p || m.is_bad)
        refuse(out, BAD_MESSAGE, &m);
    else if (m.is_large)
        refuse(out, TOO_LARGE, &m);
}
