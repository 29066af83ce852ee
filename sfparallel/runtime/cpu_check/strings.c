/* String instructions: REP MOVS, STOS, LODS, CMPS and SCAS of all sizes in both directions, and PCMPxSTRx. */
#include "general.h"
#include "vector.h"

/* ---- general ones: RCX is up to 30, source and target overlap at times ---- */

static void few(struct state *s)
{
    s->r[RCX] = random64() % 31;
    s->r[RDI] = (uint64_t)general_memory + RSI_AT + 256 + random64() % 8;
    if (random64() % 3 == 0)
        s->r[RDI] = s->r[RSI] + random64() % 17 - 8;
    if (random64() & 1) /* with equal beginnings, so that comparisons go on for a while */
        memmove((void *)s->r[RDI], (const void *)s->r[RSI], random64() % 64);
    if (random64() & 1)
        memset((void *)s->r[RDI], (int)(s->r[RAX] & 0xff), random64() % 64);
}

static void few_backwards(struct state *s)
{
    few(s);
    s->flags |= DF;
}

#define STEP(type) (s->flags & DF ? -(int64_t)sizeof(type) : (int64_t)sizeof(type))
#define COMPARED(a, b, type)                                                                                               \
    do {                                                                                                                   \
        type x_ = (a), y_ = (b), d_ = (type)(x_ - y_);                                                                     \
        set_flags(s, ARITHMETIC, result_flags(d_, 8 * sizeof(type)) | (x_ < y_ ? CF : 0) | ((x_ ^ y_ ^ d_) & 16 ? AF : 0) |  \
                  (((x_ ^ y_) & (x_ ^ d_)) >> (8 * sizeof(type) - 1) & 1 ? OF : 0));                                       \
    } while (0)

#define MOVE(type) { AT(RDI, type) = AT(RSI, type); r[RSI] += (uint64_t)STEP(type); r[RDI] += (uint64_t)STEP(type); }
#define SET(type) { AT(RDI, type) = (type)r[RAX]; r[RDI] += (uint64_t)STEP(type); }
#define GET(type) { memcpy(&r[RAX], (void *)r[RSI], sizeof(type)); if (sizeof(type) == 4) r[RAX] = (uint32_t)r[RAX];       \
    r[RSI] += (uint64_t)STEP(type); }
#define SCAN(type) { COMPARED((type)r[RAX], AT(RDI, type), type); r[RDI] += (uint64_t)STEP(type); }
#define MATCH(type) { COMPARED(AT(RSI, type), AT(RDI, type), type); r[RSI] += (uint64_t)STEP(type);                        \
    r[RDI] += (uint64_t)STEP(type); }

#define BOTH_WAYS(id, code, ...)                                                                                           \
    GENERAL(id, code, SSE2, ARITHMETIC, BITS, few, __VA_ARGS__);                                                           \
    GENERAL(id##_backwards, "std; " code "; cld", SSE2, ARITHMETIC, BITS, few_backwards, __VA_ARGS__ s->flags &= ~(uint64_t)DF;)
#define SIZES(id, code, repeat, body)                                                                                      \
    BOTH_WAYS(id##b, code "b", repeat body(uint8_t)); BOTH_WAYS(id##w, code "w", repeat body(uint16_t));                   \
    BOTH_WAYS(id##l, code "l", repeat body(uint32_t)); BOTH_WAYS(id##q, code "q", repeat body(uint64_t))
#define REPEAT for (; r[RCX] > 0; r[RCX]--)
/* The count is taken down before the flag is looked at. */
#define WHILE(condition) for (bool go_ = true; r[RCX] > 0 && go_; r[RCX]--, go_ = (condition))
SIZES(movs, "movs", , MOVE);
SIZES(stos, "stos", , SET);
SIZES(lods, "lods", , GET);
SIZES(scas, "scas", , SCAN);
SIZES(cmps, "cmps", , MATCH);
SIZES(rep_movs, "rep movs", REPEAT, MOVE);
SIZES(rep_stos, "rep stos", REPEAT, SET);
SIZES(rep_lods, "rep lods", REPEAT, GET);
SIZES(repe_scas, "repe scas", WHILE(s->flags & ZF), SCAN);
SIZES(repne_scas, "repne scas", WHILE(!(s->flags & ZF)), SCAN);
SIZES(repe_cmps, "repe cmps", WHILE(s->flags & ZF), MATCH);
SIZES(repne_cmps, "repne cmps", WHILE(!(s->flags & ZF)), MATCH);

/* ---- PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM: all immediates ----
   Bit 0: words; bit 1: signed; bits 3:2: any of a set, ranges, each, a part; bits 5:4: polarity; bit 6: last index, or mask of
   elements. The legacy and the VEX form; operands are texts of few letters, so that they have something in common. */

enum { IMMEDIATES_ALL = 128, FORMS = 2 };
#define FOR_ALL(insn)                                                                                                      \
    ".set i_,0\n.rept 128\n" STUB(insn " $i_,%xmm2,%xmm1") STUB(insn " $i_,(%rsi),%xmm1") ".set i_,i_+1\n.endr\n"
STUBS(pcmpestri, FOR_ALL("pcmpestri"));
STUBS(pcmpestrm, FOR_ALL("pcmpestrm"));
STUBS(pcmpistri, FOR_ALL("pcmpistri"));
STUBS(pcmpistrm, FOR_ALL("pcmpistrm"));
STUBS(vpcmpestri, FOR_ALL("vpcmpestri"));
STUBS(vpcmpestrm, FOR_ALL("vpcmpestrm"));
STUBS(vpcmpistri, FOR_ALL("vpcmpistri"));
STUBS(vpcmpistrm, FOR_ALL("vpcmpistrm"));

struct text_check {
    const char *stubs;
    bool lengths;            /* in EAX and EDX; else texts end with a 0 */
    bool mask;               /* the result is XMM0, not ECX */
    bool vex;
};

struct words { /* a text as numbers */
    int32_t value[16];
    unsigned room, length;
};

static struct words words_of(const union lane *lane, unsigned imm, bool explicit, uint32_t given)
{
    struct words words = { .room = imm & 1 ? 8 : 16 };
    for (unsigned i = 0; i < words.room; i++)
        words.value[i] = imm & 1 ? (imm & 2 ? lane->i16[i] : lane->u16[i]) : (imm & 2 ? lane->i8[i] : lane->u8[i]);
    if (explicit) { /* its absolute value, and no more than there is room */
        uint64_t length = (int32_t)given < 0 ? -(uint64_t)(int32_t)given : given;
        words.length = length > words.room ? words.room : (unsigned)length;
    } else {
        while (words.length < words.room && words.value[words.length] != 0)
            words.length++;
    }
    return words;
}

/* Whether element j of `b` is one that is sought, before polarity. What lies behind one end equals what lies behind the other. */
static bool sought(const struct words *a, const struct words *b, unsigned j, unsigned how)
{
    switch (how) {
    case 0:
        for (unsigned i = 0; i < a->length && j < b->length; i++)
            if (a->value[i] == b->value[j])
                return true;
        return false;
    case 1:
        for (unsigned i = 0; i + 1 < a->length && j < b->length; i += 2)
            if (a->value[i] <= b->value[j] && b->value[j] <= a->value[i + 1])
                return true;
        return false;
    case 2:
        return j < a->length && j < b->length ? a->value[j] == b->value[j] : j >= a->length && j >= b->length;
    default:
        for (unsigned i = 0; i < a->length && i + j < a->room; i++)
            if (i + j >= b->length || a->value[i] != b->value[i + j])
                return false;
        return true;
    }
}

static void expect(const struct text_check *row, struct state *s, const union lane *second, unsigned imm)
{
    struct words a = words_of(&s->v[1].lane[0], imm, row->lengths, (uint32_t)s->r[RAX]);
    struct words b = words_of(second, imm, row->lengths, (uint32_t)s->r[RDX]);
    uint32_t found = 0, all = (1u << a.room) - 1;
    for (unsigned j = 0; j < a.room; j++)
        found |= (uint32_t)sought(&a, &b, j, imm >> 2 & 3) << j;
    if ((imm >> 4 & 3) == 1)
        found ^= all;
    if ((imm >> 4 & 3) == 3)
        found ^= (1u << b.length) - 1;
    s->flags = (found ? CF : 0) | (b.length < b.room ? ZF : 0) | (a.length < a.room ? SF : 0) | (found & 1 ? OF : 0);
    if (!row->mask) {
        s->r[RCX] = found == 0 ? a.room : imm & 0x40 ? 31 - (unsigned)__builtin_clz(found) : (unsigned)__builtin_ctz(found);
        return;
    }
    union lane *out = &s->v[0].lane[0];
    memset(out, 0, sizeof *out);
    if (imm & 0x40)
        for (unsigned j = 0; j < a.room; j++)
            memset(&out->u8[j * 16 / a.room], found >> j & 1 ? 0xff : 0, 16 / a.room);
    else
        out->u32[0] = found;
    if (row->vex)
        clear_above(s, 0);
}

static void fill_text(union lane *lane, unsigned imm)
{
    static const char letters[] = "aabbcdz\xfe";
    for (unsigned i = 0; i < 16; i++)
        lane->u8[i] = (uint8_t)letters[random64() % 8];
    if (imm & 1)
        for (unsigned i = 0; i < 8; i++)
            lane->u16[i] = (uint16_t)((int8_t)lane->u8[2 * i]);
    if (random64() % 3)
        memset(&lane->u8[random64() % 8 * 2], 0, 2);
}

static void text_run(const struct check *check)
{
    const struct text_check *row = check->of;
    for (unsigned n = 0; n < IMMEDIATES_ALL * FORMS; n++)
        for (unsigned round = 0; round < rounds(6); round++) {
            struct state before = { .mxcsr = MXCSR_DEFAULT }, got, wanted;
            union lane *second = n % FORMS ? (union lane *)(void *)(general_memory + RSI_AT) : &before.v[2].lane[0];
            unsigned imm = n / FORMS;
            fill_text(&before.v[1].lane[0], imm);
            fill_text(second, imm);
            if (random64() % 4 == 0)
                memcpy(second, &before.v[1].lane[0], 1 + random64() % 16);
            before.r[RSI] = (uint64_t)general_memory + RSI_AT;
            /* The upper halves of the registers say nothing: the lengths are in EAX and EDX. */
            before.r[RAX] = (uint32_t)(random64() % 40 - 20) | random64() << 32;
            before.r[RDX] = (uint32_t)(random64() % 40 - 20) | random64() << 32;
            got = wanted = before;
            execute(row->stubs + STUB_BYTES * n, &got);
            expect(row, &wanted, second, imm);
            const char *operands = text("imm %#x, %s, %s, eax %d, edx %d", imm, hex(&before.v[1], 16), hex(second, 16),
                (int)before.r[RAX], (int)before.r[RDX]);
            if (got.r[RCX] != wanted.r[RCX])
                wrong(check->name, "ecx", operands, hex(&got.r[RCX], 8), hex(&wanted.r[RCX], 8));
            if (got.flags != wanted.flags)
                wrong(check->name, "flags", operands, text("%#lx", got.flags), text("%#lx", wanted.flags));
            if (memcmp(&got.v[0], &wanted.v[0], sizeof got.v[0]) != 0)
                wrong(check->name, "xmm0", operands, hex(&got.v[0], 32), hex(&wanted.v[0], 32));
        }
}

#define TEXT(id, feature, lengths_, mask_, vex_)                                                                           \
    static const struct text_check text_##id = { .stubs = stubs_##id, .lengths = lengths_, .mask = mask_, .vex = vex_ };   \
    CHECK(id, #id, feature, text_run, &text_##id)
TEXT(pcmpestri, SSE42, true, false, false);
TEXT(pcmpestrm, SSE42, true, true, false);
TEXT(pcmpistri, SSE42, false, false, false);
TEXT(pcmpistrm, SSE42, false, true, false);
TEXT(vpcmpestri, AVX, true, false, true);
TEXT(vpcmpestrm, AVX, true, true, true);
TEXT(vpcmpistri, AVX, false, false, true);
TEXT(vpcmpistrm, AVX, false, true, true);
