#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define USER_GROUP "/sys/fs/cgroup/user"

int cgroup_open(struct cgroup *cgroup)
{
    int result = make_folders(USER_GROUP);
    if (result < 0)
        return result;
    cgroup->freeze = open(USER_GROUP "/cgroup.freeze", O_RDWR | O_CLOEXEC);
    cgroup->events = open(USER_GROUP "/cgroup.events", O_RDONLY | O_CLOEXEC);
    return cgroup->freeze < 0 || cgroup->events < 0 ? -errno : 0;
}

int cgroup_set(struct cgroup *cgroup, bool frozen)
{
    if (cgroup->frozen == frozen)
        return 0;
    if (pwrite(cgroup->freeze, frozen ? "1" : "0", 1, 0) != 1)
        return -errno;
    cgroup->frozen = frozen;
    return 0;
}

bool cgroup_is_frozen(const struct cgroup *cgroup)
{
    char text[256];
    ssize_t n = pread(cgroup->events, text, sizeof text - 1, 0);
    if (n < 0)
        return false;
    text[n] = 0;
    return strstr(text, "frozen 1") != NULL;
}

int64_t oom_kills(int vmstat)
{
    static const char key[] = "\noom_kill ";
    char text[16384]; /* the whole file: about 4 KiB */
    size_t have = 0;
    for (;;) {
        ssize_t n = pread(vmstat, text + have, sizeof text - 1 - have, (off_t)have);
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        have += (size_t)n;
    }
    text[have] = 0;
    const char *found = strstr(text, key);
    return found ? strtoll(found + sizeof key - 1, NULL, 10) : 0;
}
