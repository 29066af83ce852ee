/* Usage: cpu_check [--quick] [--list]
   Prints a line for each instruction that was found wrong (its first operands that were), or, with --list, one for each that
   was tested. Exit status: 0 all were right, 1 some were wrong, 2 usage. */
#include "check.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

extern const struct check __start_checks[], __stop_checks[];

bool quick;
static unsigned long executions;
static unsigned findings; /* of the row that is being tested */

void checked(void)
{
    executions++;
}

unsigned rounds(unsigned all)
{
    return quick ? (all + 7) / 8 : all;
}

const char *text(const char *format, ...)
{
    static char buffers[8][600];
    static unsigned next;
    char *buffer = buffers[next++ % 8];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffers[0], format, arguments);
    va_end(arguments);
    return buffer;
}

const char *hex(const void *value, size_t size)
{
    static char buffers[16][80];
    static unsigned next;
    char *buffer = buffers[next++ % 16];
    const uint8_t *bytes = value;
    for (size_t i = 0; i < size && i < 32; i++)
        snprintf(buffer + 2 * i, 3, "%02x", bytes[size - 1 - i]);
    return buffer;
}

void wrong(const char *name, const char *form, const char *operands, const char *got, const char *wanted)
{
    if (findings++ == 0)
        printf("%s %s: %s: got %s, wanted %s\n", name, form, operands, got, wanted);
}

static const struct check *running;

/* The processor does not know what its CPUID says it does (SIGILL), or the test itself was led astray by what it computed. */
static void fatal(int number)
{
    dprintf(STDOUT_FILENO, "%s: ended by signal %d (%s)\n", running->name, number, sigdescr_np(number));
    _exit(1);
}

static void catch_signals(void)
{
    static const int fatal_ones[] = { SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP };
    for (size_t i = 0; i < COUNT(fatal_ones); i++)
        signal(fatal_ones[i], fatal);
}

static unsigned run_all(bool list)
{
    unsigned rows = 0, skipped = 0, bad = 0;
    for (const struct check *check = __start_checks; check < __stop_checks; check++) {
        if (!has(check->feature)) {
            skipped++;
            continue;
        }
        unsigned long before = executions;
        running = check;
        findings = 0;
        random_seed(1);
        check->run(check);
        rows++;
        bad += findings > 0;
        if (list)
            printf("%-24s %-10s %6lu executed%s\n", check->name, feature_names[check->feature], executions - before,
                   findings ? ", wrong" : "");
    }
    if (list) {
        printf("without:");
        for (unsigned feature = 0; feature < NEVER; feature++)
            if (!has(feature))
                printf(" %s", feature_names[feature]);
        printf("\n%u instructions tested, %u not offered, %lu executed, %u wrong\n", rows, skipped, executions, bad);
    }
    return bad;
}

int main(int argc, char **argv)
{
    bool list = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            quick = true;
        } else if (strcmp(argv[i], "--list") == 0) {
            list = true;
        } else {
            fprintf(stderr, "usage: cpu_check [--quick] [--list]\n");
            return 2;
        }
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    catch_signals();
    features_find();
    return run_all(list) > 0;
}
