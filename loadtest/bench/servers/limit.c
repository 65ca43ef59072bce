/*
 * limit - the "physical limit" peer: a single-threaded epoll signaling server in C that does only what
 * the protocol needs. Frames are unmasked in place in the receive buffer, the envelope is scanned as far
 * as needed (a direct message stops at its recipient), the payload bytes are relayed verbatim, output is
 * coalesced per connection: one send() per connection and loop iteration.
 *
 * Build: cc -O2 -I.. -o limit limit.c        Run: ./limit PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>
#include "wsutil.h"

#define RXCAP (1u << 20)
#define MAXMSG (256u << 10)
#define MAXOUT (64u << 20)

typedef struct room room;
typedef struct conn {
    int fd;
    uint8_t up, closing, dead, dirty, want_out;
    uint32_t hash; uint8_t idlen; char id[64];
    room *rm; struct conn *next;               /* chain in the member table */
    uint32_t pos;                              /* index in room->m */
    uint8_t *rb; size_t rlen, rcap;            /* partial frame */
    uint8_t *ob; size_t olen, ooff, ocap;
    struct conn *dnext;
} conn;
struct room { uint32_t hash, len, n, cap; char *name; conn **m; room *next; };

typedef struct { const char *p; uint32_t n; } str;

static room *rooms[1 << 14];
static conn *members[1 << 18];                 /* hash of (room pointer, member id) */
static int ep, lfd;
static uint8_t *rx;
static conn *dirty, *graves;

static uint32_t hash_bytes(const char *p, size_t n, uint32_t h)
{
    uint64_t x = 0x9E3779B97F4A7C15ull ^ h ^ (n << 32);
    while (n >= 8) { uint64_t v; memcpy(&v, p, 8); x = (x ^ v) * 0xff51afd7ed558ccdull; x ^= x >> 32; p += 8; n -= 8; }
    uint64_t v = 0; memcpy(&v, p, n); x = (x ^ v) * 0xff51afd7ed558ccdull;
    return (uint32_t)(x ^ (x >> 29) ^ (x >> 47));
}

/* ------------------------------------------------------------------ output */
static void reserve(conn *c, size_t n)
{
    if (c->olen + n <= c->ocap) return;
    if (c->ooff) { memmove(c->ob, c->ob + c->ooff, c->olen - c->ooff); c->olen -= c->ooff; c->ooff = 0; }
    if (c->olen > MAXOUT) c->closing = 1;      /* a reader this slow is dropped */
    while (c->olen + n > c->ocap) c->ocap = c->ocap ? c->ocap * 2 : 1024;
    c->ob = realloc(c->ob, c->ocap);
    if (!c->ob) abort();
}
static inline void queue(conn *c, int op, const void *p, size_t n)
{
    if (c->dead || !c->up) return;
    reserve(c, n + 10);
    uint8_t *d = c->ob + c->olen;
    d[0] = (uint8_t)(0x80 | op);
    if (n < 126) { d[1] = (uint8_t)n; d += 2; }
    else if (n < 65536) { d[1] = 126; d[2] = (uint8_t)(n >> 8); d[3] = (uint8_t)n; d += 4; }
    else { d[1] = 127; for (int i = 0; i < 8; i++) d[2 + i] = (uint8_t)((uint64_t)n >> (56 - 8 * i)); d += 10; }
    memcpy(d, p, n);
    c->olen = (size_t)(d - c->ob) + n;
    if (!c->dirty) { c->dirty = 1; c->dnext = dirty; dirty = c; }
}
static void mod(conn *c, int want)
{
    if (c->want_out == want) return;
    c->want_out = (uint8_t)want;
    struct epoll_event e = {.events = EPOLLIN | (want ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
}
static void drop(conn *c);
static void flush(conn *c)
{
    if (c->dead) return;
    while (c->ooff < c->olen) {
        ssize_t r = send(c->fd, c->ob + c->ooff, c->olen - c->ooff, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (r < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK) mod(c, 1); else drop(c);
            return;
        }
        c->ooff += (size_t)r;
    }
    c->olen = c->ooff = 0;
    mod(c, 0);
    if (c->closing) drop(c);
}

/* ------------------------------------------------------------------ rooms */
static room *room_find(str s, int create)
{
    uint32_t h = hash_bytes(s.p, s.n, 0);
    room **b = &rooms[h & (sizeof rooms / sizeof *rooms - 1)];
    for (room *r = *b; r; r = r->next) if (r->hash == h && r->len == s.n && !memcmp(r->name, s.p, s.n)) return r;
    if (!create) return NULL;
    room *r = calloc(1, sizeof *r);
    r->name = malloc(s.n + 1); memcpy(r->name, s.p, s.n);
    r->hash = h; r->len = s.n; r->next = *b; *b = r;
    return r;
}
static inline conn **member_bucket(const room *r, str id, uint32_t *hp)
{
    uint32_t h = hash_bytes(id.p, id.n, r->hash);
    *hp = h;
    return &members[h & (sizeof members / sizeof *members - 1)];
}
static conn *member_find(const room *r, str id)
{
    uint32_t h;
    for (conn *c = *member_bucket(r, id, &h); c; c = c->next)
        if (c->hash == h && c->rm == r && c->idlen == id.n && !memcmp(c->id, id.p, id.n)) return c;
    return NULL;
}
static size_t note(char *b, const char *type, const room *r, const conn *c)
{
    return (size_t)sprintf(b, "{\"type\":\"%s\",\"room\":\"%.*s\",\"sender\":\"%.*s\"}", type, (int)(r->len > 200 ? 200 : r->len), r->name, c->idlen, c->id);
}
static void leave(conn *c)
{
    room *r = c->rm;
    if (!r) return;
    char b[512]; size_t n = note(b, "peer-left", r, c);
    conn **q = &members[c->hash & (sizeof members / sizeof *members - 1)];
    while (*q != c) q = &(*q)->next;
    *q = c->next;
    r->m[c->pos] = r->m[--r->n]; r->m[c->pos]->pos = c->pos;
    c->rm = NULL;
    for (uint32_t i = 0; i < r->n; i++) queue(r->m[i], 1, b, n);
    if (!r->n) {
        room **p = &rooms[r->hash & (sizeof rooms / sizeof *rooms - 1)];
        while (*p != r) p = &(*p)->next;
        *p = r->next;
        free(r->m); free(r->name); free(r);
    }
}
static void join(conn *c, str name, str id)
{
    if (!id.n || id.n > sizeof c->id || !name.n || name.n > 200) return;
    leave(c);
    room *r = room_find(name, 1);
    conn *old = member_find(r, id);
    if (old) { old->closing = 1; if (!old->dirty) { old->dirty = 1; old->dnext = dirty; dirty = old; } leave(old); r = room_find(name, 1); }
    memcpy(c->id, id.p, id.n); c->idlen = (uint8_t)id.n;
    conn **b = member_bucket(r, id, &c->hash);
    c->next = *b; *b = c; c->rm = r;
    if (r->n == r->cap) r->m = realloc(r->m, sizeof(conn *) * (r->cap = r->cap ? r->cap * 2 : 2));
    c->pos = r->n; r->m[r->n++] = c;
    char t[512]; size_t n = note(t, "joined", r, c);
    queue(c, 1, t, n);
    n = note(t, "peer-joined", r, c);
    for (uint32_t i = 0; i + 1 < r->n; i++) queue(r->m[i], 1, t, n);
}
static void drop(conn *c)
{
    if (c->dead) return;
    leave(c);
    c->dead = 1; close(c->fd);
    if (!c->dirty) { c->dirty = 1; c->dnext = graves; graves = c; }   /* freed at the end of the iteration */
}

/* ------------------------------------------------------------------ envelope scan */
static const char *skip_string(const char *p, const char *e)          /* p just after the opening quote */
{
    for (;;) {
        const char *q = memchr(p, '"', (size_t)(e - p));
        if (!q) return NULL;
        const char *b = q;
        while (b > p && b[-1] == '\\') b--;
        if (!((q - b) & 1)) return q;
        p = q + 1;
    }
}
static const char *skip_value(const char *p, const char *e)
{
    int depth = 0;
    for (; p < e; p++) {
        switch (*p) {
        case '"': if (!(p = skip_string(p + 1, e))) return NULL; if (!depth) return p + 1; break;
        case '{': case '[': depth++; break;
        case '}': case ']': if (!depth) return p; if (!--depth) return p + 1; break;
        case ',': if (!depth) return p; break;
        }
    }
    return NULL;
}
typedef struct { str type, room, sender, to; } env;
/* top-level keys only; stops early once a recipient is known */
static int scan(const char *p, const char *e, env *v)
{
    #define WS while (p < e && (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r')) p++
    WS; if (p == e || *p != '{') return 0;
    p++;
    for (;;) {
        WS; if (p == e) return 0;
        if (*p == '}') return 1;
        if (*p == ',') { p++; continue; }
        if (*p != '"') return 0;
        const char *k = p + 1, *ke = skip_string(k, e);
        if (!ke) return 0;
        p = ke + 1; WS; if (p == e || *p != ':') return 0;
        p++; WS; if (p == e) return 0;
        size_t kn = (size_t)(ke - k);
        str *t = NULL;
        if (kn == 4 && !memcmp(k, "type", 4)) t = &v->type;
        else if (kn == 4 && !memcmp(k, "room", 4)) t = &v->room;
        else if (kn == 6 && !memcmp(k, "sender", 6)) t = &v->sender;
        else if (kn == 9 && !memcmp(k, "recipient", 9)) t = &v->to;
        if (t && *p == '"') {
            const char *q = skip_string(p + 1, e);
            if (!q) return 0;
            t->p = p + 1; t->n = (uint32_t)(q - p - 1); p = q + 1;
            if (v->to.p && v->type.p && v->room.p) return 1;
        } else if (!(p = skip_value(p, e))) return 0;
    }
}
static void on_text(conn *c, uint8_t *m, size_t n)
{
    env v; memset(&v, 0, sizeof v);
    if (!scan((char *)m, (char *)m + n, &v) || !v.type.p || !v.room.p) return;
    if (v.type.n == 4 && !memcmp(v.type.p, "join", 4)) { if (v.sender.p) join(c, v.room, v.sender); return; }
    room *r = c->rm;
    if (!r || r->len != v.room.n || memcmp(r->name, v.room.p, v.room.n)) return;   /* not a member of that room */
    if (v.type.n == 5 && !memcmp(v.type.p, "leave", 5)) { leave(c); return; }
    if (v.to.p) {
        conn *t = member_find(r, v.to);
        if (t) queue(t, 1, m, n);
    } else for (uint32_t i = 0; i < r->n; i++) if (r->m[i] != c) queue(r->m[i], 1, m, n);
}

/* ------------------------------------------------------------------ input */
static size_t handshake(conn *c, uint8_t *p, size_t n)
{
    uint8_t *e = memmem(p, n, "\r\n\r\n", 4);
    if (!e) { if (n > 8192) c->closing = 1; return 0; }
    for (uint8_t *q = p; q < e; q = (uint8_t *)memchr(q, '\n', (size_t)(e + 2 - q)) + 1)
        if (e - q > 18 && !strncasecmp((char *)q, "sec-websocket-key:", 18)) {
            q += 18; while (*q == ' ') q++;
            uint8_t *z = memchr(q, '\r', (size_t)(e + 1 - q));
            char acc[40], b[256];
            ws_accept_key((char *)q, (size_t)(z - q), acc);
            size_t k = (size_t)sprintf(b, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", acc);
            reserve(c, k); memcpy(c->ob + c->olen, b, k); c->olen += k;
            if (!c->dirty) { c->dirty = 1; c->dnext = dirty; dirty = c; }
            c->up = 1;
            return (size_t)(e + 4 - p);
        }
    c->closing = 1;
    return n;
}
static size_t frames(conn *c, uint8_t *p, size_t n)
{
    size_t off = 0;
    while (n - off >= 6 && !c->closing && !c->dead) {
        uint8_t *f = p + off;
        uint64_t len = f[1] & 127; size_t h = 2;
        if (len == 126) { len = (uint64_t)f[2] << 8 | f[3]; h = 4; }
        else if (len == 127) { if (n - off < 14) break; len = 0; for (int i = 0; i < 8; i++) len = len << 8 | f[2 + i]; h = 10; }
        if (!(f[1] & 0x80) || (f[0] & 0x70) || !(f[0] & 0x80) || len > MAXMSG) { c->closing = 1; break; }
        if (n - off < h + 4 + len) break;
        uint8_t *m = f + h + 4;
        ws_mask(m, m, (size_t)len, f + h);
        switch (f[0] & 15) {
        case 1: on_text(c, m, (size_t)len); break;
        case 9: queue(c, 10, m, (size_t)len); break;
        case 8: leave(c); queue(c, 8, m, len >= 2 ? 2 : 0); c->closing = 1; break;
        }
        off += h + 4 + (size_t)len;
    }
    return c->closing ? n : off;
}
static void on_readable(conn *c)
{
    size_t have = c->rlen;
    if (have) memcpy(rx, c->rb, have);
    ssize_t r = recv(c->fd, rx + have, RXCAP - have, MSG_DONTWAIT);
    if (r <= 0) { if (r == 0 || (errno != EAGAIN && errno != EINTR)) drop(c); return; }
    size_t n = have + (size_t)r, off = 0;
    if (!c->up) off = handshake(c, rx, n);
    if (c->up) off += frames(c, rx + off, n - off);
    c->rlen = n - off;
    if (c->rlen) {
        if (c->rlen > c->rcap) { c->rcap = c->rlen; c->rb = realloc(c->rb, c->rcap); if (!c->rb) abort(); }
        memcpy(c->rb, rx + off, c->rlen);
    } else if (c->rcap) { free(c->rb); c->rb = NULL; c->rcap = 0; }
    if (c->closing && !c->dirty && !c->dead) { c->dirty = 1; c->dnext = dirty; dirty = c; }
}
int main(int argc, char **argv)
{
    int one = 1, port = argc > 1 ? atoi(argv[1]) : 8080;
    struct rlimit rl; getrlimit(RLIMIT_NOFILE, &rl); rl.rlim_cur = rl.rlim_max; setrlimit(RLIMIT_NOFILE, &rl);
    signal(SIGPIPE, SIG_IGN);
    rx = aligned_alloc(4096, RXCAP + MAXMSG + 4096);
    lfd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(lfd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(lfd, (struct sockaddr *)&a, sizeof a) || listen(lfd, 4096)) { perror("listen"); return 1; }
    ep = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL}, ev[512];
    epoll_ctl(ep, EPOLL_CTL_ADD, lfd, &e);
    for (;;) {
        int n = epoll_wait(ep, ev, 512, -1);
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            if (!c) {
                int fd;
                for (int k = 0; k < 256 && (fd = accept4(lfd, NULL, NULL, SOCK_NONBLOCK)) >= 0; k++) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    conn *x = calloc(1, sizeof *x);
                    x->fd = fd;
                    struct epoll_event y = {.events = EPOLLIN, .data.ptr = x};
                    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &y);
                }
                continue;
            }
            if (c->dead) continue;
            if (ev[i].events & EPOLLOUT) flush(c);
            if (!c->dead && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(c);
        }
        while (dirty) {
            conn *c = dirty; dirty = c->dnext; c->dirty = 0;
            if (c->dead) { c->dirty = 1; c->dnext = graves; graves = c; continue; }
            flush(c);
        }
        while (graves) { conn *c = graves; graves = c->dnext; free(c->ob); free(c->rb); free(c); }
    }
}
