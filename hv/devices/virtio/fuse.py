"""The FUSE protocol on the wire: opcodes, flags, structures (include/uapi/linux/fuse.h, version 7.38).

A request is a header, the operation's structure, then names (each ends with a zero byte) or data; a reply is a header
and a structure or data. Numbers are the guest's byte order: little-endian. Only what fs_host.py and its like use stands
here; DAX mappings, ioctl, poll, notifications and security contexts are left out on purpose.
"""

from __future__ import annotations

from struct import Struct

MAJOR, MINOR, OLDEST_MINOR = 7, 38, 31      # virtio-fs came with 7.31
ROOT_ID = 1

# enum fuse_opcode
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 8, 9, 10, 11, 12, 13
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 14, 15, 16, 17, 18, 20
SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT = 21, 22, 23, 24, 25, 26
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW = 27, 28, 29, 30, 31, 32, 33
ACCESS, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 34, 35, 36, 38, 42, 43
READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE, SYNCFS = 44, 45, 46, 47, 50

# INIT flags
ASYNC_READ, POSIX_LOCKS, ATOMIC_O_TRUNC, BIG_WRITES = 1 << 0, 1 << 1, 1 << 3, 1 << 5
FLOCK_LOCKS, AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 10, 1 << 12, 1 << 13, 1 << 14
ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS = 1 << 15, 1 << 18, 1 << 22, 1 << 23
HANDLE_KILLPRIV_V2 = 1 << 28

# fuse_setattr_in.valid
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME = 1, 2, 4, 8, 16, 32
FATTR_FH, FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_KILL_SUIDGID = 1 << 6, 1 << 7, 1 << 8, 1 << 11

FOPEN_KEEP_CACHE = 1 << 1
GETATTR_FH = 1 << 0
LK_FLOCK = 1 << 0
WRITE_CACHE, WRITE_KILL_SUIDGID = 1 << 0, 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
FSYNC_FDATASYNC = 1 << 0
RELEASE_FLOCK_UNLOCK = 1 << 1

IN_HEADER = Struct("<IIQQIIIHxx")       # len, opcode, unique, nodeid, uid, gid, pid, total_extlen
OUT_HEADER = Struct("<IiQ")             # len, error, unique
ATTR = Struct("<6Q10I")                 # ino size blocks atime mtime ctime, their ns, mode nlink uid gid rdev blksize 0
ENTRY_OUT = Struct("<QQQQII")           # nodeid, generation, entry_valid, attr_valid, and their ns; ATTR behind it
ATTR_OUT = Struct("<QII")               # attr_valid, its ns, 0; ATTR behind it
ENTRY_BYTES = ENTRY_OUT.size + ATTR.size

INIT_IN = Struct("<IIII")               # major, minor, max_readahead, flags; more in 7.36, of no use here
INIT_OUT = Struct("<IIIIHHIIHHI28x")    # major minor readahead flags, background congestion, write gran, pages 0 0
FORGET_IN = Struct("<Q")                # nlookup
BATCH_FORGET_IN = Struct("<II")         # count, 0
FORGET_ONE = Struct("<QQ")              # nodeid, nlookup
GETATTR_IN = Struct("<IIQ")             # getattr_flags, 0, fh
SETATTR_IN = Struct("<IIQQQQQQIIIIIIII")    # valid 0 fh size owner, a/m/ctime, their ns, mode 0 uid gid 0
MKNOD_IN = Struct("<IIII")              # mode, rdev, umask, 0
MKDIR_IN = Struct("<II")                # mode, umask
RENAME_IN = Struct("<Q")                # newdir
RENAME2_IN = Struct("<QII")             # newdir, flags, 0
LINK_IN = Struct("<Q")                  # oldnodeid
OPEN_IN = Struct("<II")                 # flags, open_flags
CREATE_IN = Struct("<IIII")             # flags, mode, umask, open_flags
OPEN_OUT = Struct("<QII")               # fh, open_flags, 0
RELEASE_IN = Struct("<QIIQ")            # fh, flags, release_flags, lock_owner
FLUSH_IN = Struct("<QIIQ")              # fh, 0, 0, lock_owner
READ_IN = Struct("<QQIIQII")            # fh, offset, size, read_flags, lock_owner, flags, 0
WRITE_IN = READ_IN                      # with write_flags
WRITE_OUT = Struct("<II")               # size, 0
STATFS_OUT = Struct("<QQQQQIII28x")     # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
FSYNC_IN = Struct("<QII")               # fh, fsync_flags, 0
SETXATTR_IN = Struct("<II")             # size, flags (without FUSE_SETXATTR_EXT)
GETXATTR_IN = Struct("<II")             # size, 0
GETXATTR_OUT = Struct("<II")            # size, 0
LK_IN = Struct("<QQQQIIII")             # fh, owner, start, end, type, pid, lk_flags, 0
LK_OUT = Struct("<QQII")                # start, end, type, pid
INTERRUPT_IN = Struct("<Q")             # unique
FALLOCATE_IN = Struct("<QQQII")         # fh, offset, length, mode, 0
LSEEK_IN = Struct("<QQII")              # fh, offset, whence, 0
LSEEK_OUT = Struct("<Q")                # offset
COPY_FILE_RANGE_IN = Struct("<QQQQQQQ")     # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
DIRENT = Struct("<QQII")                # ino, off, namelen, type; the name behind it, padded to 8
