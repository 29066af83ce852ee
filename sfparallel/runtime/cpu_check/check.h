/* A test of the processor that this program runs on: every instruction of a table is executed with given operands, and what
   it leaves behind is compared with a model of it in plain C, or with known answers.

   An instruction is a row of a table: its name, what the processor must have for it, pieces of machine code ("stubs": the
   instruction and a RET, one for each form of its operands) and a model. Rows lie in a section of their own (the linker's
   __start_checks and __stop_checks), so that a file of instructions needs no list. */
#ifndef SF_CHECK_H
#define SF_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- features.c: what the processor and its kernel offer ---- */

enum feature {
    SSE2, SSE3, SSSE3, SSE41, SSE42, AVX, AVX2, FMA, F16C, AES, PCLMUL, SHA, VAES, VPCLMUL,
    AES_AVX, PCLMUL_AVX, /* their VEX.128 forms */
    POPCNT, LZCNT, BMI1, BMI2, ADX,
    MOVBE, CX16, NEVER,
    FEATURES
};

extern const char *const feature_names[FEATURES];
void features_find(void);
bool has(enum feature feature);

/* ---- the state of the processor around a stub ---- */

union lane { /* 128 bits */
    uint8_t u8[16];
    int8_t i8[16];
    uint16_t u16[8];
    int16_t i16[8];
    uint32_t u32[4];
    int32_t i32[4];
    uint64_t u64[2];
    int64_t i64[2];
    float f32[4];
    double f64[2];
};

struct vector { /* a YMM register */
    union lane lane[2];
};

enum reg { RAX, RCX, RDX, RBX, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, REGS };

struct state { /* run.c knows the offsets */
    struct vector v[16];
    uint64_t r[REGS];
    uint64_t flags;          /* the arithmetic ones and DF */
    uint32_t mxcsr;
};

#define CF 0x001u
#define PF 0x004u
#define AF 0x010u
#define ZF 0x040u
#define SF 0x080u
#define DF 0x400u
#define OF 0x800u
#define ARITHMETIC (CF | PF | AF | ZF | SF | OF)

#define MXCSR_DEFAULT 0x1f80u
#define MXCSR_STATUS 0x3fu

/* Execute a stub between loading and storing a state; the upper halves of registers only with AVX. */
void execute(const char *stub, struct state *state);

/* ---- operands and findings (run.c, main.c) ---- */

extern bool quick;           /* fewer operands: at boot */
unsigned rounds(unsigned all);

/* Operand number `index` of a row: first all kinds of extremes, then random bits; the same in every run. */
enum operand { BITS, FLOATS, DOUBLES };
void operand(union lane *lane, enum operand kind, unsigned index, unsigned which);
uint64_t random64(void);
void random_seed(uint64_t seed);

/* An instruction was executed with these operands. */
void checked(void);

/* It computed something else than it should; the text says which operands, and both results. */
void wrong(const char *name, const char *form, const char *operands, const char *got, const char *wanted);

/* Hexadecimal text of a value as a number, the most significant byte first; one of a few static buffers. */
const char *hex(const void *value, size_t size);
const char *text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- rows ---- */

struct check {
    const char *name;
    enum feature feature;
    void (*run)(const struct check *check);
    const void *of;          /* what `run` needs */
};

#define CHECK(id, name_, feature_, run_, of_)                                                                              \
    static const struct check check_##id __attribute__((used, section("checks"), aligned(8))) = {                          \
        .name = name_, .feature = feature_, .run = run_, .of = of_ }

/* Machine code: each stub begins at a multiple of 16 bytes, so that number i of a table lies at 16 * i. */
#define STUB_BYTES 16
#define STUB(code) ".balign 16\n" code "\nret\n"
#define STUBS(id, code)                                                                                                    \
    __asm__(".pushsection .text.stubs." #id ",\"ax\",@progbits\n.balign 16\nstubs_" #id ":\n" code "\n.popsection\n");      \
    extern const char stubs_##id[] __attribute__((visibility("hidden")))

#define COUNT(array) (sizeof(array) / sizeof *(array))

#endif
