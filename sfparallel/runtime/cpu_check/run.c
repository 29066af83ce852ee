/* Executing stubs, and the operands that they get. */
#include "check.h"

#include <string.h>

/* void execute_with(const char *stub, struct state *state)
   Every register but RSP and RBP is the stub's; the state's address stays in RBP. */
#define EACH_GENERAL(text)                                                                                                 \
    text("0", "%rax") text("1", "%rcx") text("2", "%rdx") text("3", "%rbx") text("4", "%rsi") text("5", "%rdi")            \
    text("6", "%r8") text("7", "%r9") text("8", "%r10") text("9", "%r11") text("10", "%r12") text("11", "%r13")            \
    text("12", "%r14") text("13", "%r15")
#define EACH_VECTOR(text)                                                                                                  \
    text("0") text("1") text("2") text("3") text("4") text("5") text("6") text("7") text("8") text("9") text("10")         \
    text("11") text("12") text("13") text("14") text("15")
#define LOAD_GENERAL(i, name) "movq 512+8*" i "(%rbp)," name "\n"
#define STORE_GENERAL(i, name) "movq " name ",512+8*" i "(%rbp)\n"
#define LOAD_XMM(i) "movdqu 32*" i "(%rbp),%xmm" i "\n"
#define STORE_XMM(i) "movdqu %xmm" i ",32*" i "(%rbp)\n"
#define LOAD_YMM(i) "vmovdqu 32*" i "(%rbp),%ymm" i "\n"
#define STORE_YMM(i) "vmovdqu %ymm" i ",32*" i "(%rbp)\n"
#define TRAMPOLINE(name, load, store, end)                                                                                 \
    __asm__(".pushsection .text\n.globl " name "\n.hidden " name "\n" name ":\n"                                           \
            "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"                                     \
            "movq %rsi,%rbp\npushq %rdi\n"                                                                                 \
            "ldmxcsr 632(%rbp)\n" load                                                                                     \
            "pushq 624(%rbp)\n" EACH_GENERAL(LOAD_GENERAL) "popfq\n"                                                       \
            "call *(%rsp)\n"                                                                                               \
            "pushfq\ncld\n" EACH_GENERAL(STORE_GENERAL) "popq 624(%rbp)\n"                                                 \
            store "stmxcsr 632(%rbp)\n" end                                                                                \
            "popq %rdi\npopq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.popsection\n")

TRAMPOLINE("execute_sse", EACH_VECTOR(LOAD_XMM), EACH_VECTOR(STORE_XMM), "");
TRAMPOLINE("execute_avx", EACH_VECTOR(LOAD_YMM), EACH_VECTOR(STORE_YMM), "vzeroupper\n");
void execute_sse(const char *stub, struct state *state) __attribute__((visibility("hidden")));
void execute_avx(const char *stub, struct state *state) __attribute__((visibility("hidden")));

_Static_assert(offsetof(struct state, r) == 512 && offsetof(struct state, flags) == 624 && offsetof(struct state, mxcsr) == 632,
               "the trampolines know these offsets");

void execute(const char *stub, struct state *state)
{
    static const uint32_t usual = MXCSR_DEFAULT;
    const uint64_t known = ARITHMETIC | DF;
    state->flags = (state->flags & known) | 0x202; /* bit 1 is always set, and interrupts stay on */
    if (has(AVX))
        execute_avx(stub, state);
    else
        execute_sse(stub, state);
    __asm__ volatile("ldmxcsr %0" : : "m"(usual));
    state->flags &= known;
    checked();
}

/* splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators) */
static uint64_t random_state;

void random_seed(uint64_t seed)
{
    random_state = seed;
}

uint64_t random64(void)
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static const uint64_t patterns[] = {
    0, ~0ull, 0x8000000000000000u, 0x7fffffffffffffffu, 0x8000000080000000u, 0x7fffffff7fffffffu, 0x8000800080008000u,
    0x7fff7fff7fff7fffu, 0x8080808080808080u, 0x7f7f7f7f7f7f7f7fu, 0x0101010101010101u, 0x0001000200030004u, 0x0706050403020100u,
    1, 7, 31, 32, 63, 64, 0x0f0f0f0f0f0f0f0fu, 0x0000000500000003u, 0xff00ff00ff00ff00u,
};

/* Zero, one, halves to be rounded, the largest, denormals, infinity, NaN; of both signs. */
static const uint32_t floats[] = {
    0, 0x3f800000, 0x3f000000, 0x3fc00000, 0x40200000, 0x40490fdb, 0x7f7fffff, 0x00800000, 0x00000001, 0x007fffff, 0x7f800000,
    0x7fc01234, 0x4f000000, 0x4effffff, 0x5f000000, 0x4b000001, 0x33800000, 0x47800000, 0x387fe000, 0x38800000,
};
static const uint64_t doubles[] = {
    0, 0x3ff0000000000000u, 0x3fe0000000000000u, 0x3ff8000000000000u, 0x4004000000000000u, 0x400921fb54442d18u,
    0x7fefffffffffffffu, 0x0010000000000000u, 1, 0x000fffffffffffffu, 0x7ff0000000000000u, 0x7ff8000000001234u,
    0x41e0000000000000u, 0x41dfffffffc00000u, 0x43e0000000000000u, 0x43dfffffffffffffu, 0x3ca0000000000000u,
    0x47efffffe0000000u, 0x36a0000000000000u, 0x3ff0000010000000u,
};

static uint64_t floats_of(uint64_t bits)
{
    uint32_t half[2];
    for (unsigned i = 0; i < 2; i++, bits >>= 32) {
        uint32_t chosen = floats[(bits & 0xff) % COUNT(floats)];
        /* Else a number of moderate size: of random bits most sums are those of a huge and a tiny number. */
        uint32_t moderate = (uint32_t)(bits & 0x007fffff) | (uint32_t)(120 + (bits >> 23 & 15)) << 23;
        half[i] = (bits >> 30 & 1 ? chosen : moderate) ^ (uint32_t)(bits & 0x80000000u);
    }
    return half[0] | (uint64_t)half[1] << 32;
}

static uint64_t double_of(uint64_t bits)
{
    uint64_t chosen = doubles[(bits & 0xff) % COUNT(doubles)];
    uint64_t moderate = (bits & 0x000fffffffffffffu) | (1010 + (bits >> 52 & 31)) << 52;
    return (bits >> 60 & 1 ? chosen : moderate) ^ (bits & 0x8000000000000000u);
}

void operand(union lane *lane, enum operand kind, unsigned index, unsigned which)
{
    for (unsigned i = 0; i < 2; i++) {
        uint64_t bits = random64();
        if (kind == BITS && index % 3 != 2)
            bits = patterns[(index * (3 + 4 * which) + 5 * i + which) % COUNT(patterns)];
        if (kind == FLOATS)
            bits = floats_of(bits);
        if (kind == DOUBLES)
            bits = double_of(bits);
        lane->u64[i] = bits;
    }
}
