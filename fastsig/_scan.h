/* _scan.h: one strict pass over the JSON text of a message that finds its envelope.
 *
 * What it is: `fs_scan` answers whether the bytes are a well-formed message (PROTOCOL §3 and §3.6) and where its fields
 * stand. `fs_utf8_is_valid`, `fs_utf8_goes_on` and `fs_escape` are what else the relay does with text. C11, libc only.
 *
 * What it must not know: Python, picows, rooms, which types of message exist, what a payload means.
 *
 * Invariants
 *  - Nothing outside [message, message + n) is read; no padding is assumed. No allocation, no recursion, no state
 *    between calls; time is linear in n (only the names of a list of at most 32 are compared in pairs).
 *  - Texts are borrowed: valid as long as the message and the envelope are, and the envelope must not be copied,
 *    because a text that was escaped points into its own `scratch`.
 *  - The verdict does not depend on the order of the fields: FS_BAD_UTF8, FS_BAD_JSON, FS_BAD_MESSAGE, FS_TOO_LARGE,
 *    the first that applies anywhere. So a fault is noted, and the pass goes on to the end.
 *
 * Read from the bottom: fs_scan, fs_read_object, fs_read_member. A scanner that works on 64-byte blocks of bit masks
 * may replace all that stands behind "The envelope"; tests/unit/test_scan.py holds for any of them. FASTSIG_PORTABLE
 * switches SSE2 off.
 */
#ifndef FASTSIG_SCAN_H
#define FASTSIG_SCAN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) && !defined(FASTSIG_PORTABLE)
#include <emmintrin.h>
#define FS_HAS_SSE2 1
#else
#define FS_HAS_SSE2 0
#endif

/* ---- The envelope ------------------------------------------------------------------------------------------------ */

#define FS_MAX_RECIPIENTS 32
#define FS_MAX_NAME_BYTES 128 /* room, sender, each recipient */
#define FS_MAX_TYPE_BYTES 64
#define FS_MAX_ID_BYTES 64
#define FS_MAX_DEPTH 64 /* the message object is 1 */
/* Every name at its longest, and one more that is decoded only to be refused. */
#define FS_SCRATCH_BYTES (FS_MAX_TYPE_BYTES + FS_MAX_ID_BYTES + (2 + FS_MAX_RECIPIENTS + 1) * FS_MAX_NAME_BYTES)

enum { FS_OK = 0, FS_BAD_UTF8, FS_BAD_JSON, FS_BAD_MESSAGE, FS_TOO_LARGE };

typedef struct {
    const char *p; /* NULL: absent */
    uint32_t n;
} fs_text;

typedef struct {
    fs_text type, room, sender, id; /* unescaped: in the message itself, or in `scratch` if it had escapes */
    fs_text payload;                /* the raw JSON text of the value; absent if the field is absent or null */
    fs_text recipient[FS_MAX_RECIPIENTS];
    uint32_t recipients; /* 0: no recipient was named */
    uint32_t recipient_is_list;
    uint32_t scratch_used;
    char scratch[FS_SCRATCH_BYTES];
} fs_envelope;

_Static_assert(sizeof(((fs_envelope *)0)->scratch) >=
                   FS_MAX_TYPE_BYTES + FS_MAX_ID_BYTES + (FS_MAX_RECIPIENTS + 3) * FS_MAX_NAME_BYTES,
               "scratch holds type, id, room, sender, all recipients, and one refused name");
_Static_assert(FS_MAX_DEPTH <= 64, "the kinds of the open containers are the bits of one uint64_t");

typedef struct {
    const char *begin, *end;
} fs_input;

typedef struct {
    const char *p, *end; /* between the quotes */
    int has_escape;
} fs_string;

/* ---- Blocks of bytes --------------------------------------------------------------------------------------------- */

/* A mask has FS_MASK_UNIT bits for each byte of a block, the first byte lowest, and is exact for every byte. */
#if FS_HAS_SSE2
#define FS_BLOCK 16
#define FS_WIDE 64
#define FS_MASK_UNIT 1

/* Where a string cannot simply go on: quote, backslash, control character. */
static inline uint64_t fs_special_block(const char *p)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    const __m128i quote = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('"'));
    const __m128i backslash = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'));
    const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(0x1f)), bytes);
    return (uint32_t)_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(quote, backslash), control));
}

/* 64 at once: the lines of an SDP are mostly shorter, so the branch on "none" is predicted (a loop over 16 is not). */
static inline uint64_t fs_special_wide(const char *p)
{
    return fs_special_block(p) | fs_special_block(p + 16) << 16 | fs_special_block(p + 32) << 32 |
           fs_special_block(p + 48) << 48;
}

static inline uint64_t fs_high_block(const char *p)
{
    return (uint32_t)_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)p));
}

static inline int fs_is_ascii_wide(const char *p)
{
    const __m128i *const at = (const __m128i *)p;
    const __m128i low = _mm_or_si128(_mm_loadu_si128(at), _mm_loadu_si128(at + 1));
    const __m128i high = _mm_or_si128(_mm_loadu_si128(at + 2), _mm_loadu_si128(at + 3));
    return _mm_movemask_epi8(_mm_or_si128(low, high)) == 0;
}

#else
#define FS_BLOCK 8
#define FS_WIDE 8
#define FS_MASK_UNIT 8
#define fs_special_wide fs_special_block
#endif

#define FS_EACH(byte) (UINT64_C(0x0101010101010101) * (byte))

static inline uint64_t fs_load8(const char *p)
{
    uint64_t word;
    memcpy(&word, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

#if !FS_HAS_SSE2
/* No carry crosses a byte: 0x7f + 0x7f and 0x7f + 0x60 stay below 0x100. */
static inline uint64_t fs_special_block(const char *p)
{
    const uint64_t word = fs_load8(p), low = word & FS_EACH(0x7f);
    const uint64_t not_quote = (low ^ FS_EACH('"')) + FS_EACH(0x7f);
    const uint64_t not_backslash = (low ^ FS_EACH('\\')) + FS_EACH(0x7f);
    const uint64_t not_control = low + FS_EACH(0x60);
    return ~((not_quote & not_backslash & not_control) | word) & FS_EACH(0x80);
}

static inline uint64_t fs_high_block(const char *p)
{
    return fs_load8(p) & FS_EACH(0x80);
}

static inline int fs_is_ascii_wide(const char *p)
{
    return fs_high_block(p) == 0;
}
#endif

static inline size_t fs_first(uint64_t mask)
{
    return (size_t)__builtin_ctzll(mask) / FS_MASK_UNIT;
}

/* The first quote, backslash or control character at or after p, else the end. The rest that fills no block is read as
 * the last block of the input, shifted; only an input shorter than one block is read byte by byte. */
static inline const char *fs_next_special(fs_input in, const char *p)
{
    for (; in.end - p >= FS_WIDE; p += FS_WIDE) {
        const uint64_t mask = fs_special_wide(p);
        if (mask) return p + fs_first(mask);
    }
    for (; in.end - p >= FS_BLOCK; p += FS_BLOCK) {
        const uint64_t mask = fs_special_block(p);
        if (mask) return p + fs_first(mask);
    }
    if (p < in.end && in.end - in.begin >= FS_BLOCK) {
        const uint64_t mask = fs_special_block(in.end - FS_BLOCK) >> (FS_MASK_UNIT * (FS_BLOCK - (in.end - p)));
        return mask ? p + fs_first(mask) : in.end;
    }
    while (p < in.end && (unsigned char)*p >= 0x20 && *p != '"' && *p != '\\') p++;
    return p;
}

/* ---- UTF-8 ------------------------------------------------------------------------------------------------------- */

static inline int fs_is_continuation(char c)
{
    return ((unsigned char)c & 0xc0) == 0x80;
}

/* Past the sequence of 2 to 4 bytes at p, or NULL (RFC 3629 §4: the second byte is what overlong forms, surrogates and
 * code points beyond U+10FFFF are known by). */
static inline const char *fs_utf8_sequence_end(const char *p, const char *end)
{
    const unsigned char lead = (unsigned char)*p;
    const ptrdiff_t n = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (lead < 0xc2 || lead > 0xf4 || end - p < n || !fs_is_continuation(p[1])) return NULL;
    if (n == 2) return p + 2;
    const unsigned char second = (unsigned char)p[1];
    if (lead == 0xe0 && second < 0xa0) return NULL;
    if (lead == 0xed && second > 0x9f) return NULL;
    if (!fs_is_continuation(p[2])) return NULL;
    if (n == 3) return p + 3;
    if (lead == 0xf0 && second < 0x90) return NULL;
    if (lead == 0xf4 && second > 0x8f) return NULL;
    return fs_is_continuation(p[3]) ? p + 4 : NULL;
}

static inline const char *fs_skip_ascii(const char *p, const char *end)
{
    while (end - p >= FS_WIDE && fs_is_ascii_wide(p)) p += FS_WIDE;
    for (; end - p >= FS_BLOCK; p += FS_BLOCK) {
        const uint64_t mask = fs_high_block(p);
        if (mask) return p + fs_first(mask);
    }
    while (p < end && (unsigned char)*p < 0x80) p++;
    return p;
}

/* Strict: no surrogates, nothing overlong, at most U+10FFFF. */
static inline int fs_utf8_is_valid(const char *p, size_t n)
{
    const char *const end = p + n;
    while ((p = fs_skip_ascii(p, end)) < end) {
        do { /* scripts other than Latin come in runs */
            p = fs_utf8_sequence_end(p, end);
            if (!p) return 0;
        } while (p < end && (unsigned char)*p >= 0x80);
    }
    return 1;
}

/* Text that comes in pieces: so many bytes of a sequence are to come, the next of them from low to high. Zeros at first;
 * at the end of the text nothing may be missing. */
typedef struct {
    unsigned char missing, low, high;
} fs_utf8;

/* Whether the next piece can stand behind those before it: what no piece could make good is refused at once. */
static inline int fs_utf8_goes_on(fs_utf8 *open, const char *p, size_t n)
{
    const char *const end = p + n;
    for (;;) {
        for (; open->missing && p < end; p++, open->missing--) {
            if ((unsigned char)*p < open->low || (unsigned char)*p > open->high) return 0;
            open->low = 0x80;
            open->high = 0xbf;
        }
        if (!open->missing) p = fs_skip_ascii(p, end);
        if (p == end) return 1;
        const unsigned char lead = (unsigned char)*p++;
        if (lead < 0xc2 || lead > 0xf4) return 0;
        open->missing = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        open->low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        open->high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    }
}

/* ---- Strings ----------------------------------------------------------------------------------------------------- */

/* What a short escape means; 0: there is no such escape. */
static const char fs_short_escape[256] = {['"'] = '"',  ['\\'] = '\\', ['/'] = '/',  ['b'] = '\b',
                                          ['f'] = '\f', ['n'] = '\n',  ['r'] = '\r', ['t'] = '\t'};

static inline int fs_is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static inline int32_t fs_hex_digit(char c)
{
    const unsigned digit = (unsigned char)c - '0', letter = ((unsigned char)c | 0x20u) - 'a';
    return digit < 10 ? (int32_t)digit : letter < 6 ? (int32_t)letter + 10 : -1;
}

/* The value of the four digits behind \u, or -1. */
static inline int32_t fs_hex4(const char *p)
{
    const int32_t a = fs_hex_digit(p[0]), b = fs_hex_digit(p[1]), c = fs_hex_digit(p[2]), d = fs_hex_digit(p[3]);
    return (a | b | c | d) < 0 ? -1 : (a * 16 + b) * 256 + c * 16 + d;
}

/* Past the \u escape at p, which is two of them for a code point beyond U+FFFF; NULL for a lone surrogate. */
static const char *fs_unicode_escape_end(const char *p, const char *end)
{
    if (end - p < 6) return NULL;
    const int32_t unit = fs_hex4(p + 2);
    if (unit < 0) return NULL;
    if (unit < 0xd800 || unit > 0xdfff) return p + 6;
    if (unit > 0xdbff || end - p < 12 || p[6] != '\\' || p[7] != 'u') return NULL;
    const int32_t low = fs_hex4(p + 8);
    return low >= 0xdc00 && low <= 0xdfff ? p + 12 : NULL;
}

/* Reads the string whose quote is at p; past its closing quote, or NULL. */
static inline const char *fs_read_string(fs_input in, const char *p, fs_string *string)
{
    string->p = ++p;
    string->has_escape = 0;
    if (in.end - p >= FS_BLOCK) { /* most strings are names and keys, shorter than a block */
        const uint64_t mask = fs_special_block(p);
        p = mask ? p + fs_first(mask) : fs_next_special(in, p + FS_BLOCK);
    } else {
        p = fs_next_special(in, p);
    }
    while (p < in.end && *p == '\\') {
        string->has_escape = 1;
        do { /* the \r\n of an SDP is one turn of the outer loop */
            if (in.end - p < 2) return NULL;
            p = fs_short_escape[(unsigned char)p[1]] ? p + 2 : p[1] == 'u' ? fs_unicode_escape_end(p, in.end) : NULL;
            if (!p) return NULL;
        } while (p < in.end && *p == '\\');
        p = fs_next_special(in, p);
    }
    if (p == in.end || *p != '"') return NULL;
    string->end = p;
    return p + 1;
}

/* Decodes the escape at *p, which was found valid, to 1 to 4 bytes of UTF-8. */
static inline unsigned fs_decode_escape(const char **p, char out[4])
{
    const char *const at = *p;
    *p = at + 2;
    if (at[1] != 'u') {
        out[0] = fs_short_escape[(unsigned char)at[1]];
        return 1;
    }
    uint32_t code = (uint32_t)fs_hex4(at + 2);
    *p = at + 6;
    if (code >= 0xd800 && code <= 0xdfff) {
        code = 0x10000 + ((code - 0xd800) << 10) + ((uint32_t)fs_hex4(at + 8) - 0xdc00);
        *p = at + 12;
    }
    const unsigned n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char lead[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (unsigned i = n - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)(lead[n] | code);
    return n;
}

/* One byte of valid UTF-8 after `previous`: does it end a control character (U+0000-001F, U+007F-009F)? */
static inline int fs_ends_control(unsigned char previous, unsigned char c)
{
    return c < 0x20 || c == 0x7f || (previous == 0xc2 && c < 0xa0);
}

/* The text in UTF-8: writes at most `size` bytes of it, returns how many there are. */
static size_t fs_unescape(const fs_string *string, char *out, size_t size, int *has_control)
{
    size_t n = 0;
    unsigned char previous = 0;
    for (const char *p = string->p; p < string->end;) {
        char decoded[4];
        const unsigned count = *p == '\\' ? fs_decode_escape(&p, decoded) : (decoded[0] = *p++, 1u);
        for (unsigned i = 0; i < count; i++, n++) {
            const unsigned char c = (unsigned char)decoded[i];
            *has_control |= fs_ends_control(previous, c);
            if (n < size) out[n] = (char)c;
            previous = c;
        }
    }
    return n;
}

static inline int fs_has_control(const char *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= 8; i += 8) { /* all of 0x20..0x7e: no carry, no borrow, no high bit */
        const uint64_t word = fs_load8(p + i);
        if ((word | (word + FS_EACH(0x01)) | (word - FS_EACH(0x20))) & FS_EACH(0x80)) break;
    }
    for (unsigned char previous = 0; i < n; i++) { /* what is before i is ASCII */
        if (fs_ends_control(previous, (unsigned char)p[i])) return 1;
        previous = (unsigned char)p[i];
    }
    return 0;
}

/* ---- Well-formed values ------------------------------------------------------------------------------------------ */

static inline const char *fs_skip_space(fs_input in, const char *p)
{
    while (p < in.end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

static inline const char *fs_literal_end(fs_input in, const char *p, const char *word, size_t n)
{
    return (size_t)(in.end - p) >= n && memcmp(p, word, n) == 0 ? p + n : NULL;
}

/* Past the digits at p, of which there must be one. */
static inline const char *fs_digits_end(fs_input in, const char *p)
{
    const char *const start = p;
    while (p < in.end && fs_is_digit(*p)) p++;
    return p > start ? p : NULL;
}

/* A number of any size, `1e999` too: it is text to us. */
static inline const char *fs_number_end(fs_input in, const char *p)
{
    if (*p == '-') p++;
    if (p < in.end && *p == '0')
        p++;
    else if (!(p = fs_digits_end(in, p)))
        return NULL;
    if (p < in.end && *p == '.' && !(p = fs_digits_end(in, p + 1))) return NULL;
    if (p < in.end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < in.end && (*p == '+' || *p == '-')) p++;
        p = fs_digits_end(in, p);
    }
    return p;
}

/* Past the value at p if it is no container, else NULL. */
static inline const char *fs_scalar_end(fs_input in, const char *p)
{
    fs_string ignored;
    if (*p == '"') return fs_read_string(in, p, &ignored);
    if (*p == 't') return fs_literal_end(in, p, "true", 4);
    if (*p == 'f') return fs_literal_end(in, p, "false", 5);
    if (*p == 'n') return fs_literal_end(in, p, "null", 4);
    return fs_number_end(in, p);
}

/* Reads the key at p and its colon; at the value, or NULL. */
static inline const char *fs_read_key(fs_input in, const char *p, fs_string *key)
{
    if (p == in.end || *p != '"') return NULL;
    p = fs_read_string(in, p, key);
    if (!p) return NULL;
    p = fs_skip_space(in, p);
    if (p == in.end || *p != ':') return NULL;
    return fs_skip_space(in, p + 1);
}

/* Past the value at p, which stands inside `outer` containers; NULL if it is malformed or too deep. */
static const char *fs_value_end(fs_input in, const char *p, unsigned outer)
{
    uint64_t kinds = 0; /* of the open containers, the innermost lowest; 1: object */
    unsigned depth = outer;
    fs_string key;
    for (;;) {
        if (p == in.end) return NULL;
        if (*p == '{' || *p == '[') {
            const unsigned is_object = *p == '{';
            if (depth == FS_MAX_DEPTH) return NULL;
            p = fs_skip_space(in, p + 1);
            if (p == in.end) return NULL;
            if (*p != (is_object ? '}' : ']')) { /* not empty: go in */
                depth++;
                kinds = kinds << 1 | is_object;
                if (is_object && !(p = fs_read_key(in, p, &key))) return NULL;
                continue;
            }
            p++;
        } else if (!(p = fs_scalar_end(in, p))) {
            return NULL;
        }
        for (;; p++) { /* behind a value: the next one, or the end of the container, which is a value itself */
            if (depth == outer) return p;
            p = fs_skip_space(in, p);
            if (p == in.end) return NULL;
            if (*p == ',') break;
            if (*p != ((kinds & 1) ? '}' : ']')) return NULL;
            depth--;
            kinds >>= 1;
        }
        p = fs_skip_space(in, p + 1);
        if ((kinds & 1) && !(p = fs_read_key(in, p, &key))) return NULL;
    }
}

/* ---- The message ------------------------------------------------------------------------------------------------- */

enum {
    FS_FIELD_TYPE,
    FS_FIELD_ROOM,
    FS_FIELD_SENDER,
    FS_FIELD_ID,
    FS_FIELD_RECIPIENT,
    FS_FIELD_PAYLOAD,
    FS_FIELD_UNKNOWN
};
enum { FS_FAULT_MESSAGE = 1, FS_FAULT_LARGE = 2 };

typedef struct {
    unsigned seen, twice; /* a bit for each FS_FIELD */
    unsigned faults;
} fs_progress;

static inline unsigned fs_field_named(const fs_string *key)
{
    char decoded[16] = {0};
    const char *p = key->p;
    size_t n = (size_t)(key->end - p);
    int ignored = 0;
    if (key->has_escape) {
        n = fs_unescape(key, decoded, sizeof decoded, &ignored);
        p = decoded;
    }
    switch (n) {
    case 2: return memcmp(p, "id", 2) == 0 ? FS_FIELD_ID : FS_FIELD_UNKNOWN;
    case 4:
        if (memcmp(p, "type", 4) == 0) return FS_FIELD_TYPE;
        return memcmp(p, "room", 4) == 0 ? FS_FIELD_ROOM : FS_FIELD_UNKNOWN;
    case 6: return memcmp(p, "sender", 6) == 0 ? FS_FIELD_SENDER : FS_FIELD_UNKNOWN;
    case 7: return memcmp(p, "payload", 7) == 0 ? FS_FIELD_PAYLOAD : FS_FIELD_UNKNOWN;
    case 9: return memcmp(p, "recipient", 9) == 0 ? FS_FIELD_RECIPIENT : FS_FIELD_UNKNOWN;
    default: return FS_FIELD_UNKNOWN;
    }
}

static inline int fs_is_type(const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const char c = p[i];
        if (!((c >= 'a' && c <= 'z') || fs_is_digit(c) || c == '-' || c == '.' || c == '_')) return 0;
    }
    return 1;
}

static inline size_t fs_limit(unsigned field)
{
    return field == FS_FIELD_TYPE ? FS_MAX_TYPE_BYTES : field == FS_FIELD_ID ? FS_MAX_ID_BYTES : FS_MAX_NAME_BYTES;
}

/* Sets *text if the string is fit for the field; the faults otherwise. `scratch` grows only by what is accepted. */
static inline unsigned fs_take(fs_envelope *out, const fs_string *string, unsigned field, fs_text *text)
{
    const size_t limit = fs_limit(field);
    const int is_name = field != FS_FIELD_TYPE && field != FS_FIELD_ID;
    const char *p = string->p;
    size_t n = (size_t)(string->end - p);
    int has_control = 0;
    if (string->has_escape) {
        p = out->scratch + out->scratch_used;
        n = fs_unescape(string, out->scratch + out->scratch_used, limit, &has_control);
    } else if (is_name) {
        has_control = fs_has_control(p, n);
    }
    unsigned faults = n > limit ? FS_FAULT_LARGE : 0;
    if (n == 0 || (is_name && has_control)) faults |= FS_FAULT_MESSAGE;
    if (field == FS_FIELD_TYPE && (n > limit || !fs_is_type(p, n))) faults |= FS_FAULT_MESSAGE;
    if (faults) return faults;
    if (string->has_escape) out->scratch_used += (uint32_t)n;
    text->p = p;
    text->n = (uint32_t)n;
    return 0;
}

/* A string or null at p. */
static inline const char *fs_read_text(fs_input in, const char *p, unsigned field, fs_envelope *out, fs_text *text,
                                       unsigned *faults)
{
    fs_string string;
    if (p < in.end && *p == '"') {
        const char *const end = fs_read_string(in, p, &string);
        if (end) *faults |= fs_take(out, &string, field, text);
        return end;
    }
    const char *const end = fs_value_end(in, p, 1);
    if (end && *p != 'n') *faults |= FS_FAULT_MESSAGE;
    return end;
}

static inline int fs_has_name_twice(const fs_envelope *out)
{
    for (uint32_t i = 1; i < out->recipients; i++)
        for (uint32_t j = 0; j < i; j++)
            if (out->recipient[i].n == out->recipient[j].n &&
                memcmp(out->recipient[i].p, out->recipient[j].p, out->recipient[i].n) == 0)
                return 1;
    return 0;
}

/* The list at p. Whether a name comes twice is asked only of good names and of at most 32: it is quadratic. */
static const char *fs_read_recipients(fs_input in, const char *p, fs_envelope *out, unsigned *faults)
{
    size_t listed = 0;
    fs_string string;
    out->recipient_is_list = 1;
    p = fs_skip_space(in, p + 1);
    if (p < in.end && *p == ']') {
        *faults |= FS_FAULT_MESSAGE;
        return p + 1;
    }
    for (;; p++) {
        p = fs_skip_space(in, p);
        if (p == in.end) return NULL;
        if (*p == '"') {
            fs_text name;
            if (!(p = fs_read_string(in, p, &string))) return NULL;
            const uint32_t scratch_used = out->scratch_used;
            const unsigned fault = fs_take(out, &string, FS_FIELD_RECIPIENT, &name);
            *faults |= fault;
            if (++listed > FS_MAX_RECIPIENTS)
                out->scratch_used = scratch_used;
            else if (!fault)
                out->recipient[out->recipients++] = name;
        } else {
            *faults |= FS_FAULT_MESSAGE;
            if (!(p = fs_value_end(in, p, 2))) return NULL;
        }
        p = fs_skip_space(in, p);
        if (p == in.end || (*p != ',' && *p != ']')) return NULL;
        if (*p == ']') break;
    }
    if (listed > FS_MAX_RECIPIENTS)
        *faults |= FS_FAULT_LARGE;
    else if (fs_has_name_twice(out))
        *faults |= FS_FAULT_MESSAGE;
    return p + 1;
}

static inline const char *fs_read_recipient(fs_input in, const char *p, fs_envelope *out, unsigned *faults)
{
    if (p < in.end && *p == '[') return fs_read_recipients(in, p, out, faults);
    out->recipient[0].p = NULL;
    p = fs_read_text(in, p, FS_FIELD_RECIPIENT, out, &out->recipient[0], faults);
    out->recipients = out->recipient[0].p != NULL;
    return p;
}

static inline const char *fs_read_payload(fs_input in, const char *p, fs_envelope *out)
{
    const char *const end = fs_value_end(in, p, 1);
    if (end && *p != 'n') out->payload = (fs_text){p, (uint32_t)(end - p)};
    return end;
}

/* The value at p of the known or unknown field; past it, or NULL. */
static inline const char *fs_read_member(fs_input in, const char *p, unsigned field, fs_envelope *out,
                                         fs_progress *progress)
{
    const unsigned bit = 1u << field;
    if (field == FS_FIELD_UNKNOWN) return fs_value_end(in, p, 1);
    if (progress->seen & bit) {
        progress->twice |= bit;
        return fs_value_end(in, p, 1);
    }
    progress->seen |= bit;
    switch (field) {
    case FS_FIELD_TYPE: return fs_read_text(in, p, field, out, &out->type, &progress->faults);
    case FS_FIELD_ROOM: return fs_read_text(in, p, field, out, &out->room, &progress->faults);
    case FS_FIELD_SENDER: return fs_read_text(in, p, field, out, &out->sender, &progress->faults);
    case FS_FIELD_ID: return fs_read_text(in, p, field, out, &out->id, &progress->faults);
    case FS_FIELD_RECIPIENT: return fs_read_recipient(in, p, out, &progress->faults);
    default: return fs_read_payload(in, p, out);
    }
}

/* The object at p; past it, or NULL. */
static inline const char *fs_read_object(fs_input in, const char *p, fs_envelope *out, fs_progress *progress)
{
    fs_string key;
    p = fs_skip_space(in, p + 1);
    if (p < in.end && *p == '}') return p + 1;
    for (;; p++) {
        p = fs_read_key(in, fs_skip_space(in, p), &key);
        if (!p) return NULL;
        p = fs_read_member(in, p, fs_field_named(&key), out, progress);
        if (!p) return NULL;
        p = fs_skip_space(in, p);
        if (p == in.end || (*p != ',' && *p != '}')) return NULL;
        if (*p == '}') return p + 1;
    }
}

/* All absent but for room and id where they are given. */
static inline int fs_refuse(fs_envelope *out, int verdict, fs_text room, fs_text id)
{
    const fs_text absent = {NULL, 0};
    out->type = out->sender = out->payload = absent;
    out->room = room;
    out->id = id;
    out->recipients = out->recipient_is_list = 0;
    return verdict;
}

/* One of the verdicts, for text that is known to be UTF-8. With FS_BAD_MESSAGE and FS_TOO_LARGE `room` and `id` are there
 * if they themselves were good, so that the error can name them; all else is absent unless the verdict is FS_OK. */
static inline int fs_scan_utf8(const char *message, size_t n, fs_envelope *out)
{
    const fs_text absent = {NULL, 0};
    const fs_input in = {message, message + n};
    fs_progress progress = {0, 0, 0};
    out->scratch_used = 0;
    fs_refuse(out, FS_OK, absent, absent);
    if (n > UINT32_MAX) return FS_TOO_LARGE; /* a text could not say its length; real messages are limited before */

    const char *p = fs_skip_space(in, message);
    const int is_object = p < in.end && *p == '{';
    p = is_object ? fs_read_object(in, p, out, &progress) : fs_value_end(in, p, 0);
    if (!p || fs_skip_space(in, p) != in.end) return fs_refuse(out, FS_BAD_JSON, absent, absent);
    if (progress.twice & 1u << FS_FIELD_ROOM) out->room = absent;
    if (progress.twice & 1u << FS_FIELD_ID) out->id = absent;
    if (!is_object || progress.twice || !out->type.p || progress.faults & FS_FAULT_MESSAGE)
        return fs_refuse(out, FS_BAD_MESSAGE, out->room, out->id);
    if (progress.faults) return fs_refuse(out, FS_TOO_LARGE, out->room, out->id);
    return FS_OK;
}

/* The same for any bytes. */
static inline int fs_scan(const char *message, size_t n, fs_envelope *out)
{
    const fs_text absent = {NULL, 0};
    return fs_utf8_is_valid(message, n) ? fs_scan_utf8(message, n, out) : fs_refuse(out, FS_BAD_UTF8, absent, absent);
}

/* Writes valid UTF-8 as a JSON string with its quotes; `out` has room for 6 * n + 2 bytes; the length. */
static inline size_t fs_escape(char *out, const char *p, size_t n)
{
    static const char hex[] = "0123456789abcdef", letters[0x20] = {
        ['\b'] = 'b', ['\t'] = 't', ['\n'] = 'n', ['\f'] = 'f', ['\r'] = 'r'};
    const fs_input in = {p, p + n};
    char *to = out;
    *to++ = '"';
    for (;; p++) {
        const char *const stop = fs_next_special(in, p);
        memcpy(to, p, (size_t)(stop - p));
        to += stop - p;
        p = stop;
        if (p == in.end) break;
        const unsigned char c = (unsigned char)*p;
        const char letter = c < 0x20 ? letters[c] : (char)c;
        *to++ = '\\';
        if (letter) {
            *to++ = letter;
        } else {
            memcpy(to, (const char[5]){'u', '0', '0', hex[c >> 4], hex[c & 15]}, 5);
            to += 5;
        }
    }
    *to++ = '"';
    return (size_t)(to - out);
}

#endif
