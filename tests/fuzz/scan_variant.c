/* The scanner as one translation unit, compiled once for each way to read a block: with SSE2, and FASTSIG_PORTABLE.
 * VARIANT is the name of what it gives to scan.c. */
#include "scan.h"

#include "_scan.h"

static text text_of(fs_text t)
{
    return (text){t.p, t.n};
}

int VARIANT(const char *message, size_t n, found *out)
{
    static fs_envelope e; /* kept as the relay keeps its own: nothing of the message before may show */
    out->verdict = fs_scan(message, n, &e);
    out->type = text_of(e.type);
    out->room = text_of(e.room);
    out->sender = text_of(e.sender);
    out->id = text_of(e.id);
    out->payload = text_of(e.payload);
    out->recipients = e.recipients;
    out->is_list = e.recipient_is_list != 0;
    if (e.recipients > MOST_RECIPIENTS || e.scratch_used > sizeof e.scratch) return 0;
    for (uint32_t i = 0; i < e.recipients; i++) out->recipient[i] = text_of(e.recipient[i]);
    out->scratch = e.scratch;
    out->scratch_size = sizeof e.scratch;
    return 1;
}

int CAT(VARIANT, _utf8)(const char *p, size_t n, size_t piece)
{
    fs_utf8 open = {0, 0, 0};
    for (; n > piece; p += piece, n -= piece)
        if (!fs_utf8_goes_on(&open, p, piece)) return 0;
    return fs_utf8_goes_on(&open, p, n) && !open.missing;
}

size_t CAT(VARIANT, _escape)(char *out, const char *p, size_t n)
{
    return fs_escape(out, p, n);
}
