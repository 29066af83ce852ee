#include "check.h"

#include <cpuid.h>

const char *const feature_names[FEATURES] = {
    [SSE2] = "sse2", [SSE3] = "sse3", [SSSE3] = "ssse3", [SSE41] = "sse4.1", [SSE42] = "sse4.2", [AVX] = "avx",
    [AVX2] = "avx2", [FMA] = "fma", [F16C] = "f16c", [AES] = "aes", [PCLMUL] = "pclmulqdq", [SHA] = "sha", [VAES] = "vaes",
    [VPCLMUL] = "vpclmulqdq", [AES_AVX] = "aes+avx", [PCLMUL_AVX] = "pclmulqdq+avx", [POPCNT] = "popcnt",
        [LZCNT] = "lzcnt", [BMI1] = "bmi1", [BMI2] = "bmi2", [ADX] = "adx",
    [MOVBE] = "movbe", [CX16] = "cx16", [NEVER] = "never",
};

static bool found[FEATURES];

struct leaf {
    unsigned eax, ebx, ecx, edx;
};

static struct leaf cpuid(unsigned number, unsigned sub)
{
    struct leaf leaf = { 0 };
    __get_cpuid_count(number, sub, &leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx);
    return leaf;
}

/* The kernel must have switched on XMM and YMM state (bits 1 and 2 of XCR0), else VEX instructions are undefined. */
static bool vector_state_is_on(const struct leaf *one)
{
    if (!(one->ecx & bit_OSXSAVE))
        return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}

void features_find(void)
{
    struct leaf one = cpuid(1, 0), seven = cpuid(7, 0), extended = cpuid(0x80000001, 0);
    bool wide = vector_state_is_on(&one);
    found[SSE2] = one.edx & bit_SSE2;
    found[SSE3] = one.ecx & bit_SSE3;
    found[SSSE3] = one.ecx & bit_SSSE3;
    found[SSE41] = one.ecx & bit_SSE4_1;
    found[SSE42] = one.ecx & bit_SSE4_2;
    found[AVX] = wide && (one.ecx & bit_AVX);
    found[AVX2] = found[AVX] && (seven.ebx & bit_AVX2);
    found[FMA] = found[AVX] && (one.ecx & bit_FMA);
    found[F16C] = found[AVX] && (one.ecx & bit_F16C);
    found[AES] = one.ecx & bit_AES;
    found[PCLMUL] = one.ecx & bit_PCLMUL;
    found[SHA] = seven.ebx & bit_SHA;
    found[VAES] = found[AVX] && (seven.ecx & bit_VAES);
    found[VPCLMUL] = found[AVX] && (seven.ecx & bit_VPCLMULQDQ);
    found[AES_AVX] = found[AES] && found[AVX];
    found[PCLMUL_AVX] = found[PCLMUL] && found[AVX];
    found[POPCNT] = one.ecx & bit_POPCNT;
    found[LZCNT] = extended.ecx & bit_LZCNT;
    found[BMI1] = seven.ebx & bit_BMI;
    found[BMI2] = seven.ebx & bit_BMI2;
    found[ADX] = seven.ebx & bit_ADX;
    found[MOVBE] = one.ecx & bit_MOVBE;
    found[CX16] = one.ecx & bit_CMPXCHG16B;
}

bool has(enum feature feature)
{
    return found[feature];
}
