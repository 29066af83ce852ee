/* Known answers of scalar floating point: the compiler has computed them, exactly and with one rounding (GCC folds constants
   with MPFR). The models of the other tests rest on these instructions. */
#include "check.h"

#include <string.h>

/* Every pair of these: moderate ones, ties, the largest and smallest, denormals. */
#define DOUBLE_PAIRS(pair)                                                                                                 \
    DOUBLE_ROW(pair, 1.0) DOUBLE_ROW(pair, -1.0000000000000002) DOUBLE_ROW(pair, 0x1.8p-53) DOUBLE_ROW(pair, 3.0)            \
    DOUBLE_ROW(pair, -0.1) DOUBLE_ROW(pair, 0x1.fffffffffffffp1023) DOUBLE_ROW(pair, 0x1p-1022)                            \
    DOUBLE_ROW(pair, 0x1.fffffffffffffp-1023) DOUBLE_ROW(pair, -0x1p-1074) DOUBLE_ROW(pair, 1e300) DOUBLE_ROW(pair, 6.02e23)
#define DOUBLE_ROW(pair, x)                                                                                                \
    pair(x, 1.0) pair(x, -1.0000000000000002) pair(x, 0x1.8p-53) pair(x, 3.0) pair(x, -0.1)                                 \
    pair(x, 0x1.fffffffffffffp1023) pair(x, 0x1p-1022) pair(x, 0x1.fffffffffffffp-1023) pair(x, -0x1p-1074)                 \
    pair(x, 1e300) pair(x, 6.02e23)
#define FLOAT_PAIRS(pair)                                                                                                  \
    FLOAT_ROW(pair, 1.0f) FLOAT_ROW(pair, -1.0000001f) FLOAT_ROW(pair, 0x1.8p-24f) FLOAT_ROW(pair, 3.0f) FLOAT_ROW(pair, -0.1f) \
    FLOAT_ROW(pair, 0x1.fffffep127f) FLOAT_ROW(pair, 0x1p-126f) FLOAT_ROW(pair, 0x1.fffffcp-127f) FLOAT_ROW(pair, -0x1p-149f) \
    FLOAT_ROW(pair, 1e30f) FLOAT_ROW(pair, 6.02e23f)
#define FLOAT_ROW(pair, x)                                                                                                 \
    pair(x, 1.0f) pair(x, -1.0000001f) pair(x, 0x1.8p-24f) pair(x, 3.0f) pair(x, -0.1f) pair(x, 0x1.fffffep127f)            \
    pair(x, 0x1p-126f) pair(x, 0x1.fffffcp-127f) pair(x, -0x1p-149f) pair(x, 1e30f) pair(x, 6.02e23f)

struct known_double { double x, y, sum, difference, product, quotient; };
struct known_float { float x, y, sum, difference, product, quotient; };

#define KNOWN(a, b) { a, b, (a) + (b), (a) - (b), (a) * (b), (a) / (b) },
static const struct known_double doubles[] = { DOUBLE_PAIRS(KNOWN) };
static const struct known_float singles[] = { FLOAT_PAIRS(KNOWN) };

/* Roots, and sums a * b - c that have lost all digits but the product's last ones. (GCC folds these only where nothing
   overflows.) */
struct root_double { double x, root; };
struct root_float { float x, root; };
#define ROOT(a) { a, __builtin_sqrt(a) },
#define ROOT_FLOAT(a) { a, __builtin_sqrtf(a) },
static const struct root_double double_roots[] = {
    ROOT(2.0) ROOT(3.0) ROOT(0.1) ROOT(1e300) ROOT(6.02e23) ROOT(0x1.fffffffffffffp1023) ROOT(0x1p-1022)
    ROOT(0x1.fffffffffffffp-1)
    ROOT(1.0000000000000002) ROOT(0.0) ROOT(-0.0) ROOT(144.0) ROOT(1e-300) ROOT(12345.678)
};
static const struct root_float float_roots[] = {
    ROOT_FLOAT(2.0f) ROOT_FLOAT(3.0f) ROOT_FLOAT(0.1f) ROOT_FLOAT(1e30f) ROOT_FLOAT(6.02e23f) ROOT_FLOAT(0x1.fffffep127f)
    ROOT_FLOAT(0x1p-126f) ROOT_FLOAT(0x1.fffffep-1f) ROOT_FLOAT(1.0000001f) ROOT_FLOAT(0.0f) ROOT_FLOAT(-0.0f) ROOT_FLOAT(144.0f)
};
struct fused_double { double a, b, c, result; };
struct fused_float { float a, b, c, result; };
#define FUSED(a, b, c) { a, b, c, __builtin_fma(a, b, c) },
#define FUSED_FLOAT(a, b, c) { a, b, c, __builtin_fmaf(a, b, c) },
static const struct fused_double double_fused[] = {
    FUSED(0.1, 10.0, -1.0) FUSED(1.0000000000000002, 1.0000000000000002, -1.0000000000000004) FUSED(3.0, 0.3333333333333333, -1.0)
    FUSED(1e200, 1e100, 1.0) FUSED(1e-200, 1e-100, 1.0) FUSED(0x1p-53, 1.0, 1.0) FUSED(0x1.8p-53, 1.0, 1.0) FUSED(-0.1, 0.7, 0.07)
    FUSED(0x1.fffffffffffffp1023, 0.5, -0x1.fffffffffffffp1022) FUSED(1e300, -1e-300, 1.0) FUSED(6.02e23, 1.66e-24, -0.99932)
};
static const struct fused_float float_fused[] = {
    FUSED_FLOAT(0.1f, 10.0f, -1.0f) FUSED_FLOAT(1.0000001f, 1.0000001f, -1.0000002f) FUSED_FLOAT(3.0f, 0.33333334f, -1.0f)
    FUSED_FLOAT(1e20f, 1e10f, 1.0f) FUSED_FLOAT(1e-20f, 1e-10f, 1.0f) FUSED_FLOAT(0x1p-24f, 1.0f, 1.0f)
    FUSED_FLOAT(0x1.8p-24f, 1.0f, 1.0f) FUSED_FLOAT(-0.1f, 0.7f, 0.07f) FUSED_FLOAT(1e30f, -1e-30f, 1.0f)
};

static void expect(const struct check *check, const char *operation, const void *x, const void *y, const void *got,
                   const void *wanted, size_t size)
{
    checked();
    if (memcmp(got, wanted, size) != 0)
        wrong(check->name, operation, text("%s, %s", hex(x, size), hex(y, size)), hex(got, size), hex(wanted, size));
}

#define ARITHMETIC_ROW(insn, result)                                                                                       \
    do {                                                                                                                   \
        __typeof__(known->x + 0) got_ = known->x;                                                                              \
        __asm__ volatile(insn " %1,%0" : "+x"(got_) : "x"(known->y));                                                      \
        expect(check, insn, &known->x, &known->y, &got_, &known->result, sizeof got_);                                     \
    } while (0)
#define ROOT_ROW(insn)                                                                                                     \
    do {                                                                                                                   \
        __typeof__(known->x + 0) got_;                                                                                         \
        __asm__ volatile(insn " %1,%0" : "=x"(got_) : "x"(known->x));                                                      \
        expect(check, insn, &known->x, &known->x, &got_, &known->root, sizeof got_);                                       \
    } while (0)
#define FUSED_ROW(insn)                                                                                                    \
    do {                                                                                                                   \
        __typeof__(known->a + 0) got_ = known->a;                                                                              \
        __asm__ volatile(insn " %2,%1,%0" : "+x"(got_) : "x"(known->b), "x"(known->c));                                    \
        expect(check, insn, &known->a, &known->b, &got_, &known->result, sizeof got_);                                     \
    } while (0)
#define FOR_ALL(table) for (__typeof__(&table[0]) known = table; known < table + COUNT(table); known++)

static void run(const struct check *check)
{
    FOR_ALL(doubles) {
        ARITHMETIC_ROW("addsd", sum);
        ARITHMETIC_ROW("subsd", difference);
        ARITHMETIC_ROW("mulsd", product);
        ARITHMETIC_ROW("divsd", quotient);
    }
    FOR_ALL(singles) {
        ARITHMETIC_ROW("addss", sum);
        ARITHMETIC_ROW("subss", difference);
        ARITHMETIC_ROW("mulss", product);
        ARITHMETIC_ROW("divss", quotient);
    }
    FOR_ALL(double_roots)
        ROOT_ROW("sqrtsd");
    FOR_ALL(float_roots)
        ROOT_ROW("sqrtss");
}
CHECK(known, "arithmetic, exact", SSE2, run, NULL);

static void run_fused(const struct check *check)
{
    FOR_ALL(double_fused)
        FUSED_ROW("vfmadd213sd");
    FOR_ALL(float_fused)
        FUSED_ROW("vfmadd213ss");
}
CHECK(known_fused, "fused arithmetic, exact", FMA, run_fused, NULL);

/* ---- rounding modes, denormals, NaN, flags: a few of each ---- */

struct known_mode {
    const char *name;
    uint32_t mxcsr;          /* without the masks */
    uint64_t x, y, sum, product, quotient;
    uint32_t flags;          /* of the sum */
};

enum { ROUND_DOWN = 0x2000, ROUND_UP = 0x4000, TO_ZERO = 0x6000, DAZ = 0x40, FTZ = 0x8000 };
enum { INVALID = 1, DIVISION = 4, OVERFLOW = 8, UNDERFLOW = 16, INEXACT = 32 };

#define ONE 0x3ff0000000000000u
#define THREE 0x4008000000000000u
#define TINY 0x0000000000000001u
#define NORMAL 0x0010000000000000u
#define LARGEST 0x7fefffffffffffffu
#define INFINITE 0x7ff0000000000000u
#define NEGATIVE 0x8000000000000000u
#define QUIET 0x7ff8000000000123u
#define SIGNALING 0x7ff0000000000123u
#define DEFAULT_NAN 0xfff8000000000000u

static const struct known_mode modes[] = {
    { "nearest", 0, ONE, THREE, 0x4010000000000000u, THREE, 0x3fd5555555555555u, 0 },
    { "down", ROUND_DOWN, ONE, THREE, 0x4010000000000000u, THREE, 0x3fd5555555555555u, 0 },
    { "up", ROUND_UP, ONE, THREE, 0x4010000000000000u, THREE, 0x3fd5555555555556u, 0 },
    { "to zero", TO_ZERO, ONE, THREE | NEGATIVE, 0xc000000000000000u, THREE | NEGATIVE, 0xbfd5555555555555u, 0 },
    { "down", ROUND_DOWN, ONE, THREE | NEGATIVE, 0xc000000000000000u, THREE | NEGATIVE, 0xbfd5555555555556u, 0 },
    { "nearest", 0, ONE, TINY, ONE, TINY, INFINITE, INEXACT },
    { "up", ROUND_UP, ONE, TINY, ONE + 1, TINY, INFINITE, INEXACT },
    { "to zero", TO_ZERO, ONE, TINY | NEGATIVE, ONE - 1, TINY | NEGATIVE, LARGEST | NEGATIVE, INEXACT },
    { "nearest", 0, LARGEST, LARGEST, INFINITE, INFINITE, ONE, OVERFLOW | INEXACT },
    { "to zero", TO_ZERO, LARGEST, LARGEST, LARGEST, LARGEST, ONE, OVERFLOW | INEXACT },
    { "down, cancelled", ROUND_DOWN, ONE, ONE | NEGATIVE, NEGATIVE, ONE | NEGATIVE, ONE | NEGATIVE, 0 },
    { "nearest, denormals", 0, TINY, TINY, 2, 0, ONE, 0 },
    { "denormal operands are zeros", DAZ, TINY, ONE, ONE, 0, 0, 0 },
    { "denormal results are zeros", FTZ, NORMAL, (NORMAL + 1) | NEGATIVE, NEGATIVE, NEGATIVE, 0xbfeffffffffffffeu,
        UNDERFLOW | INEXACT },
    { "infinity less infinity", 0, INFINITE, INFINITE | NEGATIVE, DEFAULT_NAN, INFINITE | NEGATIVE, DEFAULT_NAN, INVALID },
    { "quiet NaN", 0, ONE, QUIET, QUIET, QUIET, QUIET, 0 },
    { "quiet NaN first", 0, QUIET, ONE, QUIET, QUIET, QUIET, 0 },
    { "signaling NaN", 0, ONE, SIGNALING, QUIET, QUIET, QUIET, INVALID },
    { "zero by zero", 0, 0, 0, 0, 0, DEFAULT_NAN, 0 },
    { "one by zero", 0, ONE, 0, ONE, 0, INFINITE, 0 },
};

static uint64_t in_mode(const char *operation, const struct known_mode *mode, uint32_t *flags)
{
    const uint32_t usual = MXCSR_DEFAULT;
    uint32_t wanted = MXCSR_DEFAULT | mode->mxcsr;
    uint64_t result = mode->x, y = mode->y;
    __asm__ volatile("ldmxcsr %0" : : "m"(wanted));
    switch (operation[0]) {
    case 'a':
        __asm__ volatile("movq %0,%%xmm0\nmovq %1,%%xmm1\naddsd %%xmm1,%%xmm0\nmovq %%xmm0,%0" : "+r"(result) : "r"(y)
            : "xmm0", "xmm1");
        break;
    case 'm':
        __asm__ volatile("movq %0,%%xmm0\nmovq %1,%%xmm1\nmulsd %%xmm1,%%xmm0\nmovq %%xmm0,%0" : "+r"(result) : "r"(y)
            : "xmm0", "xmm1");
        break;
    default:
        __asm__ volatile("movq %0,%%xmm0\nmovq %1,%%xmm1\ndivsd %%xmm1,%%xmm0\nmovq %%xmm0,%0" : "+r"(result) : "r"(y)
            : "xmm0", "xmm1");
    }
    __asm__ volatile("stmxcsr %0\nldmxcsr %1" : "=m"(*flags) : "m"(usual));
    *flags &= INVALID | DIVISION | OVERFLOW | UNDERFLOW | INEXACT; /* "denormal operand": see vector.c */
    return result;
}

static void run_modes(const struct check *check)
{
    for (const struct known_mode *mode = modes; mode < modes + COUNT(modes); mode++) {
        uint32_t flags, ignored;
        const char *name = text("addsd, %s", mode->name);
        uint64_t got = in_mode("addsd", mode, &flags);
        expect(check, name, &mode->x, &mode->y, &got, &mode->sum, sizeof got);
        expect(check, text("%s, flags", name), &mode->x, &mode->y, &flags, &mode->flags, sizeof flags);
        got = in_mode("mulsd", mode, &ignored);
        expect(check, text("mulsd, %s", mode->name), &mode->x, &mode->y, &got, &mode->product, sizeof got);
        got = in_mode("divsd", mode, &ignored);
        expect(check, text("divsd, %s", mode->name), &mode->x, &mode->y, &got, &mode->quotient, sizeof got);
    }
}
CHECK(known_modes, "rounding, NaN, flags", SSE2, run_modes, NULL);
