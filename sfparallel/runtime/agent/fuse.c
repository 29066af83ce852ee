/* Host folders: FUSE requests are relayed to the host as they are, so this file knows of the protocol only which
   requests have an answer (linux/fuse.h). */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOUNTS AGENT_FOLDER "/mnt"

static int mount_fuse(struct exports *exports, uint16_t tag, const char **step)
{
    char path[64], options[128];
    static const char *const folders[] = { "low", "up", "work" };
    *step = "make the folders of a host folder";
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, MOUNTS "/%u/%s", (unsigned)tag, folders[2 - i]);
        int result = make_folders(path);
        if (result < 0)
            return result;
    }
    *step = "open /dev/fuse";
    int fd = open("/dev/fuse", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    *step = "mount a host folder";
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,max_read=131072", fd);
    if (mount("sf", path, "fuse", MS_NODEV, options) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    exports->list[exports->count].fd = fd;
    exports->list[exports->count].tag = tag;
    exports->count++;
    return 0;
}

static int mount_overlay(const struct export *export)
{
    char options[256];
    unsigned tag = export->tag;
    int result = make_folders(export->mountpoint);
    if (result < 0)
        return result;
    /* No redirects: a renamed folder is then a copy, which is what copying back to the host understands. */
    snprintf(options, sizeof options,
             "lowerdir=" MOUNTS "/%u/low,upperdir=" MOUNTS "/%u/up,workdir=" MOUNTS "/%u/work,redirect_dir=off,index=off", tag,
             tag, tag);
    return mount("sf", export->mountpoint, "overlay", 0, options) < 0 ? -errno : 0;
}

/* In the child: mounting an overlay asks the lower file system for its root, and the parent relays that question. */
static void make_overlays(const struct thaw *thaw, int errors)
{
    for (size_t i = 0; i < thaw->mounts->size; i++) {
        struct export export;
        int result = thaw_export(thaw, i, &export);
        if (result == 0)
            result = mount_overlay(&export);
        if (result < 0) {
            dprintf(errors, "cannot mount the host folder %.3000s: %s", export.mountpoint, strerror(-result));
            _exit(1);
        }
    }
    _exit(0);
}

int exports_mount(struct exports *exports, const struct thaw *thaw, const char **step)
{
    int ends[2];
    *step = "read the list of host folders";
    if (thaw->mounts->size > MAX_EXPORTS - exports->count)
        return -E2BIG;
    for (size_t i = 0; i < thaw->mounts->size; i++) {
        struct export export;
        *step = "read the list of host folders";
        int result = thaw_export(thaw, i, &export);
        if (result < 0 || (result = mount_fuse(exports, export.tag, step)) < 0)
            return result;
    }
    *step = "start mounting host folders";
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    exports->child = fork();
    if (exports->child == 0)
        make_overlays(thaw, ends[1]);
    int error = errno;
    close(ends[1]);
    exports->child_errors = ends[0];
    return exports->child < 0 ? -error : 0;
}

int exports_child_done(struct exports *exports, int status, char *text, size_t room)
{
    exports->child = 0;
    ssize_t n = read(exports->child_errors, text, room - 1);
    text[n > 0 ? n : 0] = 0;
    close(exports->child_errors);
    if (status == 0)
        return 0;
    if (n <= 0)
        snprintf(text, room, "mounting host folders ended with wait status %d", status);
    return -EIO;
}

static bool has_answer(uint32_t opcode)
{
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT && opcode != FUSE_NOTIFY_REPLY;
}

int exports_event(struct exports *exports, size_t i, struct port *port)
{
    struct fuse_in_header header;
    if (exports->list[i].fd < 0)
        return 0;
    uint8_t *payload = port_payload(port);
    ssize_t n = read(exports->list[i].fd, payload, FRAME_MAX_PAYLOAD);
    if (n < 0 && errno == ENODEV) { /* unmounted */
        close(exports->list[i].fd);
        exports->list[i].fd = -1;
        return 0;
    }
    if (n < (ssize_t)sizeof header) /* EAGAIN, EINTR, or ENOENT: the request was interrupted before it was read */
        return 0;
    memcpy(&header, payload, sizeof header);
    if (has_answer(header.opcode))
        exports->unanswered++;
    return port_send_prepared(port, FRAME_FUSE, exports->list[i].tag, (size_t)n);
}

void exports_reply(struct exports *exports, uint16_t tag, const uint8_t *data, size_t size)
{
    struct fuse_out_header header;
    if (size < sizeof header)
        return;
    memcpy(&header, data, sizeof header);
    /* Bit 0 marks the answer to an interrupt, unique 0 a notification (fs/fuse/dev.c): neither was counted. */
    if (header.unique != 0 && !(header.unique & 1) && exports->unanswered > 0)
        exports->unanswered--;
    for (size_t i = 0; i < exports->count; i++) {
        if (exports->list[i].tag != tag || exports->list[i].fd < 0)
            continue;
        /* An error means that nobody waits for this answer any more. */
        ssize_t ignored = write(exports->list[i].fd, data, size);
        (void)ignored;
    }
}
