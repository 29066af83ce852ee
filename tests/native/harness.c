/* Stands for QEMU in the tests of the paging layer, which is linked in: has "guest RAM" and does to it what it is told.
 *
 *   harness PAGES     PAGES pages of anonymous memory; prints "ram ADDRESS", then obeys lines on standard input:
 *   fill P N BYTE     writes N pages from P on, each byte BYTE
 *   touch P N         reads them (a read fault, no write)
 *   show P N          prints one number per page: the byte that fills it, or -1 if not uniform
 *   limit BYTES       RLIMIT_FSIZE: writes beyond fail with EFBIG
 *   files BYTES       RLIMIT_NOFILE
 *   refuse FLAGS      from here on, mmap with exactly these flags fails with ENOMEM
 *   environment       prints how many variables of the library are still set
 * Each command answers with one line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../sfparallel/vmm/native/sfpage.h"

static int uniform_byte(const unsigned char *page)
{
    for (size_t i = 1; i < SFPAGE_PAGE_BYTES; i++)
        if (page[i] != page[0])
            return -1;
    return page[0];
}

static void show(const unsigned char *at, uint64_t pages)
{
    for (uint64_t i = 0; i < pages; i++)
        printf("%d ", uniform_byte(at + i * SFPAGE_PAGE_BYTES));
}

static uint64_t touch(const volatile unsigned char *at, uint64_t pages)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < pages; i++)
        sum += at[i * SFPAGE_PAGE_BYTES];
    return sum;
}

/* A seccomp filter on all threads; nothing else makes mmap fail where mremap succeeds. */
static long refuse(uint32_t flags)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[3])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, flags, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOMEM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
}

static int variables(void)
{
    return (getenv("LD_PRELOAD") != NULL) + (getenv("SFPAGE_FD") != NULL) + (getenv("SFPAGE_PATH") != NULL);
}

static void obey(unsigned char *ram, const char *line)
{
    uint64_t page = 0, pages = 0;
    int byte = 0;
    struct rlimit limit;
    if (sscanf(line, "fill %" SCNu64 " %" SCNu64 " %d", &page, &pages, &byte) == 3)
        memset(ram + page * SFPAGE_PAGE_BYTES, byte, pages * SFPAGE_PAGE_BYTES);
    else if (sscanf(line, "touch %" SCNu64 " %" SCNu64, &page, &pages) == 2)
        printf("%" PRIu64, touch(ram + page * SFPAGE_PAGE_BYTES, pages));
    else if (sscanf(line, "show %" SCNu64 " %" SCNu64, &page, &pages) == 2)
        show(ram + page * SFPAGE_PAGE_BYTES, pages);
    else if (sscanf(line, "limit %" SCNu64, &page) == 1) {
        getrlimit(RLIMIT_FSIZE, &limit);
        limit.rlim_cur = page;
        setrlimit(RLIMIT_FSIZE, &limit);
    } else if (sscanf(line, "files %" SCNu64, &page) == 1) {
        getrlimit(RLIMIT_NOFILE, &limit);
        limit.rlim_cur = page;
        setrlimit(RLIMIT_NOFILE, &limit);
    } else if (sscanf(line, "refuse %" SCNu64, &page) == 1)
        printf("%ld", refuse((uint32_t)page));
    else if (strncmp(line, "environment", 11) == 0)
        printf("%d", variables());
    else
        printf("?");
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    char line[256];
    uint64_t pages = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    unsigned char *ram = mmap(NULL, pages * SFPAGE_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        return 1;
    printf("ram %" PRIuPTR "\n", (uintptr_t)ram);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL)
        obey(ram, line);
    return 2; /* the tests end it through the control socket */
}
