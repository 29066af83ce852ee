/* From the kernel's hand-over in the initramfs to the guest's root. Boot happens once, before the template is taken, so
   nothing here needs to be quick. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#define SEED "/sf"                                      /* our folder in the initramfs */
#define CHECK SEED "/cpu_check"
#define PACKAGE "/usr/lib/python3/dist-packages/sfparallel"

void power_off(void)
{
    tcdrain(STDERR_FILENO);
    reboot(RB_POWER_OFF);
    _exit(1); /* PID 1 that exits is a kernel panic, which the host sees as well */
}

void die(const char *what, int error)
{
    dprintf(STDERR_FILENO, "sfagent: %s: %s\n", what, strerror(error < 0 ? -error : error));
    power_off();
}

int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return -errno;
    size_t size = strlen(text);
    int result = write(fd, text, size) == (ssize_t)size ? 0 : -errno;
    close(fd);
    return result;
}

int make_folders(const char *path)
{
    char prefix[4096];
    size_t length = strlen(path);
    if (length >= sizeof prefix)
        return -ENAMETOOLONG;
    memcpy(prefix, path, length + 1);
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != 0)
            continue;
        prefix[i] = 0;
        if (mkdir(prefix, 0755) < 0 && errno != EEXIST)
            return -errno;
        prefix[i] = path[i];
    }
    return 0;
}

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *options)
{
    int result = make_folders(target);
    if (result == 0 && mount(source, target, type, flags, options) < 0)
        result = -errno;
    if (result < 0)
        die(target, result);
}

/* The console that the kernel gave us is the initramfs's; after devtmpfs is there we take the real one. */
static void open_console(void)
{
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        return;
    for (int i = 0; i < 3; i++)
        dup2(fd, i);
    if (fd > 2)
        close(fd);
}

static void load_module(const char *name)
{
    char path[300];
    snprintf(path, sizeof path, SEED "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST && errno != ENODEV))
        die(path, errno);
    close(fd);
    unlink(path); /* it lives in RAM, and RAM is what gets cloned */
}

/* The image's builder has listed the modules in the order in which they depend on each other. */
static void load_modules(void)
{
    FILE *list = fopen(SEED "/modules/order", "re");
    char name[256];
    if (!list)
        die(SEED "/modules/order", errno);
    while (fgets(name, sizeof name, list)) {
        name[strcspn(name, "\n")] = 0;
        if (name[0])
            load_module(name);
    }
    fclose(list);
}

static void copy_file(const char *from, const char *to)
{
    static char buffer[1 << 16];
    int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (in < 0 || out < 0)
        die(to, errno);
    ssize_t n;
    while ((n = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, (size_t)n) != n)
            die(to, errno);
    if (n < 0)
        die(from, errno);
    close(in);
    close(out);
}

static void move_tree(const char *from, const char *to)
{
    char source[600], target[600];
    int result = make_folders(to);
    if (result < 0)
        die(to, result);
    DIR *folder = opendir(from);
    if (!folder)
        die(from, errno);
    for (const struct dirent *entry; (entry = readdir(folder));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if ((size_t)snprintf(source, sizeof source, "%s/%s", from, entry->d_name) >= sizeof source ||
            (size_t)snprintf(target, sizeof target, "%s/%s", to, entry->d_name) >= sizeof target)
            die(from, ENAMETOOLONG);
        struct stat status;
        if (lstat(source, &status) < 0)
            die(source, errno);
        if (S_ISDIR(status.st_mode)) {
            move_tree(source, target);
        } else {
            copy_file(source, target);
            unlink(source);
        }
    }
    closedir(folder);
}

/* Like switch_root(8): rootfs cannot be unmounted or pivoted away from, so the new root is mounted over it. */
static void enter_root(void)
{
    static const char *const moved[] = { "/dev", "/proc", "/sys" };
    char target[32];
    for (size_t i = 0; i < 3; i++) {
        snprintf(target, sizeof target, "/new%s", moved[i]);
        if (mount(moved[i], target, NULL, MS_MOVE, NULL) < 0)
            die(target, errno);
    }
    if (chdir("/new") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        die("entering the root", errno);
}

static void mount_root(void)
{
    must_mount("/dev/vda", "/ro", "squashfs", MS_RDONLY, NULL);
    must_mount("rw", "/rw", "tmpfs", 0, "size=60%");
    if (make_folders("/rw/up") < 0 || make_folders("/rw/work") < 0)
        die("/rw", errno);
    must_mount("root", "/new", "overlay", 0, "lowerdir=/ro,upperdir=/rw/up,workdir=/rw/work");
}

static void mount_rest(void)
{
    must_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,ptmxmode=666");
    must_mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "size=60%,mode=1777");
    must_mount("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "size=60%,mode=755");
    must_mount("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=60%,mode=1777");
    must_mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, "nsdelegate");
    static const char *const links[][2] = {
        { "/proc/self/fd", "/dev/fd" }, { "fd/0", "/dev/stdin" }, { "fd/1", "/dev/stdout" }, { "fd/2", "/dev/stderr" },
    };
    for (size_t i = 0; i < 4; i++)
        if (symlink(links[i][0], links[i][1]) < 0 && errno != EEXIST)
            die(links[i][1], errno);
}

static void loopback_up(void)
{
    struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        die("lo", errno);
    close(fd);
}

/* Settings of the kernel; a missing one does not matter. */
static void set_kernel(void)
{
    static const char *const settings[][2] = {
        /* No autoconfiguration on eth0: it would wake every clone several times for an address that nobody uses. */
        { "/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1" },
        /* One message of 128 KiB must fit into the send buffer of the agent's local socket. */
        { "/proc/sys/net/core/wmem_default", "1048576" },
        { "/proc/sys/net/core/wmem_max", "8388608" },
        { "/proc/sys/net/core/rmem_max", "8388608" },
        /* A guest out of memory must lose the user's program, not time: without swap, the kernel evicts the code that it
           is running, reads it again from the root, and goes on so for minutes before it kills anybody. This makes it
           kill when it cannot keep what was used within the last second (Documentation/admin-guide/mm/multigen_lru.rst). */
        { "/sys/kernel/mm/lru_gen/enabled", "y" },
        { "/sys/kernel/mm/lru_gen/min_ttl_ms", "1000" },
        { "/proc/self/oom_score_adj", "-1000" },
        /* Work that the kernel does now and then in the background: each clone would begin its life with it. */
        { "/proc/sys/vm/stat_interval", "3600" },
        { "/proc/sys/vm/compaction_proactiveness", "0" },
    };
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
        write_file(settings[i][0], settings[i][1]);
}

static void check_processor(char *wrong, size_t room)
{
    int result = processor_check(CHECK, wrong, room);
    if (result < 0)
        die(CHECK, result);
    unlink(CHECK); /* as the modules */
}

void boot(char *wrong, size_t room)
{
    must_mount("dev", "/dev", "devtmpfs", MS_NOSUID, NULL);
    must_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    must_mount("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    open_console();
    check_processor(wrong, room);
    load_modules();
    mount_root();
    move_tree(SEED "/package", "/new" PACKAGE);
    enter_root();
    mount_rest();
    set_kernel();
    loopback_up();
}
