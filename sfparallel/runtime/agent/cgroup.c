#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define USER_GROUP "/sys/fs/cgroup/user"
#define KEEPER_GROUP "/sys/fs/cgroup/keeper"

int cgroup_open(struct cgroup *cgroup)
{
    int result = make_folders(USER_GROUP);
    if (result == 0)
        result = make_folders(KEEPER_GROUP);
    if (result < 0)
        return result;
    cgroup->freeze = open(USER_GROUP "/cgroup.freeze", O_RDWR | O_CLOEXEC);
    cgroup->events = open(USER_GROUP "/cgroup.events", O_RDONLY | O_CLOEXEC);
    return cgroup->freeze < 0 || cgroup->events < 0 ? -errno : 0;
}

/* The mount option nsdelegate (boot.c) makes the namespace a boundary: whoever is in it, root too, can move nothing out of its
   root, by whatever mount it reaches the files (kernel/cgroup/cgroup.c, cgroup_procs_write_permission), nor thaw it. That is for accidents: root
   that joins the namespace of another process first (setns(2)) can, as it can take over process 1; see SECURITY.md. */
int cgroup_enter(void)
{
    int result = write_file(USER_GROUP "/cgroup.procs", "0");
    if (result < 0)
        return result;
    return unshare(CLONE_NEWCGROUP) < 0 ? -errno : 0;
}

int cgroup_put_keeper(pid_t keeper, bool inside)
{
    char text[16];
    snprintf(text, sizeof text, "%d", (int)keeper);
    return write_file(inside ? USER_GROUP "/cgroup.procs" : KEEPER_GROUP "/cgroup.procs", text);
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
