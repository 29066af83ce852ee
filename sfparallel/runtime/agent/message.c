#include "message.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

static const msgpack_object *find(const msgpack_object *map, const char *key)
{
    if (map->type != MSGPACK_OBJECT_MAP)
        return NULL;
    size_t length = strlen(key);
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_kv *entry = &map->via.map.ptr[i];
        if (entry->key.type == MSGPACK_OBJECT_STR && entry->key.via.str.size == length &&
            memcmp(entry->key.via.str.ptr, key, length) == 0)
            return &entry->val;
    }
    return NULL;
}

static int as_integer(const msgpack_object *object, int64_t lowest, int64_t highest, int64_t *value)
{
    if (!object)
        return -EPROTO;
    if (object->type == MSGPACK_OBJECT_POSITIVE_INTEGER && object->via.u64 <= INT64_MAX)
        *value = (int64_t)object->via.u64;
    else if (object->type == MSGPACK_OBJECT_NEGATIVE_INTEGER)
        *value = object->via.i64;
    else
        return -EPROTO;
    return *value >= lowest && *value <= highest ? 0 : -EPROTO;
}

/* A string of 1 .. limit bytes without NUL, copied to `out` (limit + 1 bytes). */
static int as_text(const msgpack_object *object, size_t limit, char *out)
{
    if (!object || object->type != MSGPACK_OBJECT_STR)
        return -EPROTO;
    size_t length = object->via.str.size;
    if (length == 0 || length > limit || memchr(object->via.str.ptr, 0, length))
        return -EPROTO;
    memcpy(out, object->via.str.ptr, length);
    out[length] = 0;
    return 0;
}

static const uint8_t *as_bytes(const msgpack_object *object, size_t size)
{
    if (!object || object->type != MSGPACK_OBJECT_BIN || object->via.bin.size != size)
        return NULL;
    return (const uint8_t *)object->via.bin.ptr;
}

static int as_address(const msgpack_object *object, struct in_addr *address)
{
    char text[INET_ADDRSTRLEN];
    if (as_text(object, sizeof text - 1, text) < 0 || inet_pton(AF_INET, text, address) != 1)
        return -EPROTO;
    return 0;
}

static int as_mac(const msgpack_object *object, uint8_t *mac)
{
    const uint8_t *bytes = as_bytes(object, MAC_SIZE);
    if (!bytes)
        return -EPROTO;
    memcpy(mac, bytes, MAC_SIZE);
    return 0;
}

const char *role_name(enum role role)
{
    static const char *const names[] = { [ROLE_PARENT] = "parent", [ROLE_CLONE] = "clone", [ROLE_RANK] = "rank" };
    return names[role];
}

static int as_role(const msgpack_object *object, enum role *role)
{
    char text[8];
    if (as_text(object, sizeof text - 1, text) < 0)
        return -EPROTO;
    for (enum role known = ROLE_PARENT; known <= ROLE_RANK; known++) {
        if (strcmp(text, role_name(known)) == 0) {
            *role = known;
            return 0;
        }
    }
    return -EPROTO;
}

/* A pair in a list of pairs, or NULL. */
static const msgpack_object *as_pair(const msgpack_object_array *list, size_t i)
{
    if (i >= list->size || list->ptr[i].type != MSGPACK_OBJECT_ARRAY || list->ptr[i].via.array.size != 2)
        return NULL;
    return list->ptr[i].via.array.ptr;
}

int thaw_neighbour(const struct identity *identity, size_t i, struct neighbour *neighbour)
{
    const msgpack_object *pair = as_pair(identity->neighbours, i);
    if (!pair || as_address(&pair[0], &neighbour->address) < 0)
        return -EPROTO;
    return as_mac(&pair[1], neighbour->mac);
}

int thaw_export(const struct thaw *thaw, size_t i, struct export *export)
{
    const msgpack_object *pair = as_pair(thaw->mounts, i);
    int64_t tag;
    if (!pair || as_integer(&pair[0], 0, UINT16_MAX, &tag) < 0 ||
        as_text(&pair[1], sizeof export->mountpoint - 1, export->mountpoint) < 0 || export->mountpoint[0] != '/')
        return -EPROTO;
    export->tag = (uint16_t)tag;
    return 0;
}

static int decode_address(const msgpack_object *map, struct identity *identity, const char **what)
{
    int64_t prefix, mtu;
    *what = "mac";
    if (as_mac(find(map, "mac"), identity->mac) < 0)
        return -EPROTO;
    *what = "address";
    if (as_address(find(map, "address"), &identity->address) < 0)
        return -EPROTO;
    *what = "prefix";
    if (as_integer(find(map, "prefix"), 1, 32, &prefix) < 0)
        return -EPROTO;
    *what = "mtu";
    if (as_integer(find(map, "mtu"), 68, 65535, &mtu) < 0)
        return -EPROTO;
    identity->prefix = (uint8_t)prefix;
    identity->mtu = (uint32_t)mtu;
    *what = "neighbours";
    const msgpack_object *list = find(map, "neighbours");
    if (!list || list->type != MSGPACK_OBJECT_ARRAY)
        return -EPROTO;
    identity->neighbours = &list->via.array;
    return 0;
}

static int decode_identity(const msgpack_object *map, struct identity *identity, const char **what)
{
    *what = "role";
    if (as_role(find(map, "role"), &identity->role) < 0)
        return -EPROTO;
    *what = "time_ns";
    if (as_integer(find(map, "time_ns"), 0, INT64_MAX, &identity->time_ns) < 0)
        return -EPROTO;
    *what = "entropy";
    identity->entropy = as_bytes(find(map, "entropy"), ENTROPY_SIZE);
    if (!identity->entropy)
        return -EPROTO;
    *what = "hostname";
    if (as_text(find(map, "hostname"), HOSTNAME_SIZE, identity->hostname) < 0)
        return -EPROTO;
    *what = "machine_id";
    if (as_text(find(map, "machine_id"), MACHINE_ID_SIZE, identity->machine_id) < 0 ||
        strspn(identity->machine_id, "0123456789abcdef") != MACHINE_ID_SIZE)
        return -EPROTO;
    return decode_address(map, identity, what);
}

static int decode_reply(const msgpack_object *map, struct thaw *thaw, const char **what)
{
    const msgpack_object *channel = find(map, "channel"), *reply = find(map, "reply");
    int64_t number = 0;
    *what = "channel";
    if (channel && channel->type != MSGPACK_OBJECT_NIL && as_integer(channel, 0, UINT16_MAX, &number) < 0)
        return -EPROTO;
    thaw->channel = (uint16_t)number;
    if (!reply || reply->type == MSGPACK_OBJECT_NIL)
        return 0;
    *what = "reply";
    if (reply->type != MSGPACK_OBJECT_BIN)
        return -EPROTO;
    thaw->reply = (const uint8_t *)reply->via.bin.ptr;
    thaw->reply_size = reply->via.bin.size;
    return 0;
}

static int decode_thaw(const msgpack_object *map, struct thaw *thaw, const char **what)
{
    static const msgpack_object_array nothing;
    *what = "map";
    if (map->type != MSGPACK_OBJECT_MAP)
        return -EPROTO;
    const msgpack_object *identity = find(map, "identity"), *mounts = find(map, "mounts"), *now = find(map, "time_ns");
    if (identity && identity->type != MSGPACK_OBJECT_NIL) {
        if (decode_identity(identity, &thaw->identity, what) < 0)
            return -EPROTO;
        thaw->has_identity = true;
    }
    *what = "time_ns";
    if (now && as_integer(now, 0, INT64_MAX, &thaw->time_ns) < 0)
        return -EPROTO;
    thaw->mounts = &nothing;
    *what = "mounts";
    if (mounts && mounts->type != MSGPACK_OBJECT_NIL) {
        if (mounts->type != MSGPACK_OBJECT_ARRAY)
            return -EPROTO;
        thaw->mounts = &mounts->via.array;
    }
    return decode_reply(map, thaw, what);
}

int thaw_decode(const uint8_t *payload, size_t size, struct thaw *thaw, const char **what)
{
    memset(thaw, 0, sizeof *thaw);
    msgpack_unpacked_init(&thaw->unpacked);
    *what = "msgpack";
    size_t offset = 0;
    if (msgpack_unpack_next(&thaw->unpacked, (const char *)payload, size, &offset) == MSGPACK_UNPACK_SUCCESS &&
        decode_thaw(&thaw->unpacked.data, thaw, what) == 0)
        return 0;
    thaw_free(thaw);
    return -EPROTO;
}

void thaw_free(struct thaw *thaw)
{
    msgpack_unpacked_destroy(&thaw->unpacked);
}

int message_integer(const uint8_t *data, size_t size, const char *key, int64_t *value)
{
    msgpack_unpacked unpacked;
    size_t offset = 0;
    msgpack_unpacked_init(&unpacked);
    int result = -ENOENT;
    if (msgpack_unpack_next(&unpacked, (const char *)data, size, &offset) == MSGPACK_UNPACK_SUCCESS &&
        as_integer(find(&unpacked.data, key), INT64_MIN, INT64_MAX, value) == 0)
        result = 0;
    msgpack_unpacked_destroy(&unpacked);
    return result;
}

int report_decode(const uint8_t *data, size_t size, struct report *report)
{
    if (message_integer(data, size, "pid", &report->pid) == 0) {
        report->kind = REPORT_PID;
        return 0;
    }
    report->kind = REPORT_EXITED;
    if (message_integer(data, size, "exited", &report->pid) < 0 || message_integer(data, size, "status", &report->status) < 0)
        return -EPROTO;
    return 0;
}
