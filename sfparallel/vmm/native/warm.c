/* WARM: QEMU is given memory beforehand that it will write to as soon as its guest runs: the first part of the buffer for
 * translated code (TCG). A clone fills 8 MiB of it until it has answered, page fault by page fault; a shell has the time. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

enum { LEAST_BUFFER_BYTES = 1 << 20 }; /* far less than QEMU takes, far more than other code that is made at run time */

static bool is_code_buffer(const char *line, uint64_t *begin, uint64_t *bytes)
{
    uint64_t end, offset, inode;
    char access[5], device[16];
    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %15s %" SCNu64, begin, &end, access, &offset, device, &inode) != 6)
        return false;
    *bytes = end - *begin;
    return strcmp(access, "rwxp") == 0 && inode == 0 && *bytes >= LEAST_BUFFER_BYTES;
}

static bool find_code_buffer(uint64_t *begin, uint64_t *bytes)
{
    char line[512];
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (maps == NULL)
        return false;
    while (!found && fgets(line, sizeof line, maps) != NULL)
        found = is_code_buffer(line, begin, bytes);
    fclose(maps);
    return found;
}

void sf_warm(const struct sf_message *message, struct sfpage_reply *reply)
{
    uint64_t begin, bytes, wanted = message->request.length;
    reply->flags = SFPAGE_INTACT;
    if (wanted == 0 || wanted % SFPAGE_PAGE_BYTES != 0) {
        sf_fail(reply, -EINVAL, SFPAGE_STEP_ARGUMENTS);
        return;
    }
    if (!find_code_buffer(&begin, &bytes))
        return;
    if (wanted > bytes)
        wanted = bytes;
    if (madvise((void *)(uintptr_t)begin, wanted, MADV_POPULATE_WRITE) != 0)
        sf_fail(reply, -errno, SFPAGE_STEP_POPULATE);
    else
        reply->value[SFPAGE_V_WARMED_BYTES] = wanted;
}
