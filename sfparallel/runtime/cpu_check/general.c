#include "general.h"

uint8_t general_memory[MEMORY_BYTES] __attribute__((aligned(64)));

static const char *const names[REGS] = {
    "rax", "rcx", "rdx", "rbx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"
};

static void fill(struct state *state, const struct general_check *row, unsigned round)
{
    union lane lane;
    for (unsigned i = 0; i < MEMORY_BYTES / sizeof lane; i++) {
        operand(&lane, row->operand, round + i, i % 4);
        memcpy(general_memory + i * sizeof lane, &lane, sizeof lane);
    }
    for (unsigned i = 0; i < 16; i++)
        for (unsigned k = 0; k < 2; k++)
            operand(&state->v[i].lane[k], row->operand, round + k, i % 4);
    for (unsigned i = 0; i < REGS; i++) {
        operand(&lane, BITS, round, i);
        state->r[i] = lane.u64[i % 2];
    }
    state->r[RSI] = state->r[R13] = (uint64_t)general_memory + RSI_AT;
    state->r[RDI] = state->r[R14] = (uint64_t)general_memory + RDI_AT;
    state->flags = random64() & ARITHMETIC;
    state->mxcsr = MXCSR_DEFAULT;
}

static const char *operands(const struct state *s)
{
    return text("rax %s rcx %s rdx %s flags %#lx", hex(&s->r[RAX], 8), hex(&s->r[RCX], 8), hex(&s->r[RDX], 8), s->flags);
}

static void compare(const struct check *check, const struct state *before, const struct state *got, const struct state *wanted,
                    const uint8_t *memory)
{
    const struct general_check *row = check->of;
    for (unsigned i = 0; i < REGS; i++)
        if (got->r[i] != wanted->r[i]) {
            wrong(check->name, names[i], operands(before), hex(&got->r[i], 8), hex(&wanted->r[i], 8));
            return;
        }
    if ((got->flags ^ wanted->flags) & row->flags) {
        wrong(check->name, "flags", operands(before), text("%#lx", got->flags & row->flags), text("%#lx",
            wanted->flags & row->flags));
        return;
    }
    for (unsigned i = 0; i < 16; i++)
        if (memcmp(&got->v[i], &wanted->v[i], sizeof got->v[i]) != 0) {
            const char *vectors = text("%s, registers 1, 2: %s, %s", operands(before), hex(&before->v[1], 32),
                hex(&before->v[2], 32));
            wrong(check->name, text("register %u", i), vectors, hex(&got->v[i], 32), hex(&wanted->v[i], 32));
            return;
        }
    for (unsigned i = 0; i < MEMORY_BYTES; i += 8)
        if (memcmp(memory + i, general_memory + i, 8) != 0) {
            wrong(check->name, text("memory at rsi%+d", (int)i - RSI_AT), operands(before), hex(memory + i, 8),
                hex(general_memory + i, 8));
            return;
        }
}

void general_run(const struct check *check)
{
    const struct general_check *row = check->of;
    static uint8_t original[MEMORY_BYTES], after[MEMORY_BYTES];
    for (unsigned round = 0; round < rounds(40); round++) {
        struct state before = { .mxcsr = MXCSR_DEFAULT }, got, wanted;
        fill(&before, row, round);
        if (row->prepare)
            row->prepare(&before);
        got = wanted = before;
        memcpy(original, general_memory, MEMORY_BYTES);
        execute(row->stub, &got);
        memcpy(after, general_memory, MEMORY_BYTES);
        memcpy(general_memory, original, MEMORY_BYTES);
        row->model(&wanted);
        compare(check, &before, &got, &wanted, after);
    }
}
