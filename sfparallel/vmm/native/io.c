/* System calls and kernel files, one wrapper each. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

uint64_t sf_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int sf_read_at(int fd, void *buffer, size_t bytes, uint64_t offset)
{
    char *at = buffer;
    while (bytes > 0) {
        ssize_t n = pread(fd, at, bytes, (off_t)offset);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (n == 0)
            return -ENODATA;
        at += n;
        bytes -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

int sf_write_at(int fd, const void *buffer, size_t bytes, uint64_t offset)
{
    const char *at = buffer;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, at, bytes, (off_t)offset);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (n == 0)
            return -EIO;
        at += n;
        bytes -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

int sf_regular_file(int fd, uint64_t *bytes)
{
    struct stat status;
    if (fstat(fd, &status) != 0)
        return -errno;
    if (!S_ISREG(status.st_mode))
        return -EINVAL;
    *bytes = (uint64_t)status.st_size;
    return 0;
}

/* Linux checks vm.max_map_count before MAP_FIXED removes what was there: on -ENOMEM the old mapping still stands. */
static int map_fixed(uint64_t address, uint64_t length, int flags, int fd, uint64_t offset)
{
    void *want = (void *)(uintptr_t)address;
    void *got = mmap(want, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | flags, fd, (off_t)offset);
    return got == MAP_FAILED ? -errno : 0;
}

int sf_map_file(uint64_t address, uint64_t length, int fd, uint64_t offset)
{
    return map_fixed(address, length, 0, fd, offset);
}

int sf_map_anonymous(uint64_t address, uint64_t length)
{
    return map_fixed(address, length, MAP_ANONYMOUS, -1, 0);
}

/* Private pages go; what the mapping shows then is its file, or zeros if it has none (madvise(2), MADV_DONTNEED). */
int sf_drop_pages(uint64_t address, uint64_t length)
{
    return madvise((void *)(uintptr_t)address, length, MADV_DONTNEED) != 0 ? -errno : 0;
}

int sf_check_range(const struct sfpage_request *request, uint32_t *step)
{
    const uint64_t mask = SFPAGE_PAGE_BYTES - 1;
    *step = SFPAGE_STEP_ARGUMENTS;
    if (request->address == 0 || request->length == 0 || ((request->address | request->length) & mask) != 0)
        return -EINVAL;
    if (request->address > UINTPTR_MAX - request->length || request->length / SFPAGE_PAGE_BYTES > UINT32_MAX)
        return -EINVAL;
    *step = SFPAGE_STEP_RANGE;
    /* MS_ASYNC does nothing since Linux 2.6.19 but to walk the range: -ENOMEM where a part of it is not mapped. */
    return msync((void *)(uintptr_t)request->address, request->length, MS_ASYNC) != 0 ? -errno : 0;
}

int sf_count_maps(uint64_t *count)
{
    char buffer[16384];
    int status = 0, fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    *count = 0;
    for (;;) {
        ssize_t n = read(fd, buffer, sizeof buffer);
        if (n < 0)
            status = -errno;
        if (n <= 0)
            break;
        for (const char *at = buffer; (at = memchr(at, '\n', (size_t)(buffer + n - at))) != NULL; at++)
            ++*count;
    }
    close(fd);
    return status;
}

/* Reads a small kernel file whole, as a string. */
static int read_text(const char *path, char *buffer, size_t size)
{
    size_t have = 0;
    int status = 0, fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    while (have + 1 < size) {
        ssize_t n = read(fd, buffer + have, size - 1 - have);
        if (n < 0)
            status = -errno;
        if (n <= 0)
            break;
        have += (size_t)n;
    }
    buffer[have] = 0;
    close(fd);
    return status;
}

int sf_read_max_maps(uint64_t *count)
{
    char text[64];
    int status = read_text("/proc/sys/vm/max_map_count", text, sizeof text);
    if (status == 0)
        *count = strtoull(text, NULL, 10);
    return status;
}

static uint64_t field_bytes(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at == NULL ? 0 : strtoull(at + strlen(name), NULL, 10) * 1024;
}

int sf_read_rollup(uint64_t *private_bytes, uint64_t *anonymous_bytes)
{
    char text[4096];
    int status = read_text("/proc/self/smaps_rollup", text, sizeof text);
    if (status != 0)
        return status;
    *private_bytes = field_bytes(text, "Private_Clean:") + field_bytes(text, "Private_Dirty:");
    *anonymous_bytes = field_bytes(text, "Anonymous:");
    return 0;
}

/* Counting mappings means to read /proc/self/maps, which takes milliseconds when there are many: an upper bound is carried
 * along (QEMU's own mappings drift by some hundreds) and the count is taken only when the bound comes near the limit. */
int sf_budget(struct sf_context *context, uint64_t extra)
{
    const uint64_t slack = 512;
    if (context->maps + extra + slack <= context->max_maps) {
        context->maps += extra;
        return 0;
    }
    int status = sf_count_maps(&context->maps);
    if (status != 0)
        return status;
    if (context->maps + extra + slack > context->max_maps)
        return -ENOMEM;
    context->maps += extra;
    return 0;
}
