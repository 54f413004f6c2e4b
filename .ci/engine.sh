# Start Docker's engine where no service manager does, and stop it again. To be sourced.
ENGINE_LOG="${ENGINE_LOG:-/tmp/dockerd.log}"
ENGINE_PID=

# Control groups, if nobody has mounted them: version 2 where the kernel offers memory limits there, version 1 elsewhere.
mount_cgroups() {
    if mountpoint -q /sys/fs/cgroup; then return; fi
    if mount -t cgroup2 none /sys/fs/cgroup 2>/dev/null; then
        if grep -qw memory /sys/fs/cgroup/cgroup.controllers; then return; fi
        umount /sys/fs/cgroup
    fi
    mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
    local name
    for name in $(awk 'NR > 1 && $4 == 1 {print $1}' /proc/cgroups); do
        mkdir -p "/sys/fs/cgroup/$name"
        mount -t cgroup -o "$name" cgroup "/sys/fs/cgroup/$name" || rmdir "/sys/fs/cgroup/$name"
    done
}

# One attempt: does an engine with these options answer?
try_engine() {
    echo "starting dockerd $*"
    dockerd "$@" >"$ENGINE_LOG" 2>&1 </dev/null &
    ENGINE_PID=$!
    local second
    for second in $(seq 60); do
        if docker info >/dev/null 2>&1; then echo "engine ready after $second s"; return 0; fi
        if ! kill -0 "$ENGINE_PID" 2>/dev/null; then break; fi
        sleep 1
    done
    tail -n 3 "$ENGINE_LOG" >&2
    stop_engine
    return 1
}

start_engine() {
    if docker info >/dev/null 2>&1; then return; fi
    mount_cgroups || true
    local closed="--iptables=false --ip6tables=false --bridge=none"    # sandboxes have no network anyway
    # shellcheck disable=SC2086
    if try_engine || try_engine $closed || try_engine $closed --storage-driver=vfs; then return; fi
    echo ".ci/run: no container engine can be started on this machine (see above and $ENGINE_LOG), and the container tests" \
         "must run. They need root with CAP_SYS_ADMIN and control groups with memory, pids and cpu." >&2
    exit 1
}

stop_engine() {
    if [ -n "$ENGINE_PID" ] && kill "$ENGINE_PID" 2>/dev/null; then wait "$ENGINE_PID" 2>/dev/null || true; fi
    ENGINE_PID=
}
