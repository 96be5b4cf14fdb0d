/*
 * What the stand-in's kernel asks of the file system, and what has to come of it.
 *
 * scripts/test-windows fills the directory that is served: data.vhdx, sub\deep.vhd and shrink.vhd of 64 MiB, of
 * which a child child.vhdx over base.vhdx, sealed.vhd without the right to write, broken.vhd of garbage, and many\
 * with 60 disks. What a disk holds in the end is also written to a file beside it, for others to compare.
 */

#include "standin.h"

#include <stdio.h>

#define MIB (1024 * 1024)
#define SIZE (64ull * MIB)
#define PIECE 65536
#define READ_DATA (FILE_READ_DATA | FILE_READ_ATTRIBUTES | SYNCHRONIZE)
#define WRITE_DATA (READ_DATA | FILE_WRITE_DATA | FILE_APPEND_DATA)

enum { SUPERSEDE, OPEN, CREATE, OPEN_IF, OVERWRITE, OVERWRITE_IF };

#define OP(name) (fs->Interface->name)

/* Bytes that depend on where they are, so that a mix-up shows. */
static void pattern(UINT64 *to, UINT64 offset, SIZE_T length, UINT64 seed)
{
    for (SIZE_T index = 0; index < length / 8; index++) {
        UINT64 word = (offset / 8 + index + 1) * 0x9e3779b97f4a7c15ull ^ seed * 0xc2b2ae3d27d4eb4full;
        to[index] = word ^ word >> 29;
    }
}

static NTSTATUS put(FSP_FILE_SYSTEM *fs, OPENED *disk, const void *data, UINT64 offset, ULONG length)
{
    ULONG done = ~0u;
    FSP_FSCTL_FILE_INFO info = {0};
    NTSTATUS status = OP(Write)(fs, disk->context, (PVOID)data, offset, length, FALSE, FALSE, &done, &info);
    if (status == STATUS_SUCCESS)
        /* What the driver believes of the file from then on. */
        CHECK(done == length && info.FileSize == disk->info.FileSize, "wrote %lu, size %llu", done, info.FileSize);
    return status;
}

static NTSTATUS get(FSP_FILE_SYSTEM *fs, OPENED *disk, void *data, UINT64 offset, ULONG length, ULONG *done)
{
    *done = ~0u;
    return OP(Read)(fs, disk->context, data, offset, length, done);
}

/* That a piece holds the pattern, or zeros for the seed 0. */
static void expect(FSP_FILE_SYSTEM *fs, OPENED *disk, UINT64 offset, UINT64 seed)
{
    UINT64 found[PIECE / 8], wanted[PIECE / 8] = {0};
    ULONG done;
    if (seed != 0)
        pattern(wanted, offset, PIECE, seed);
    STATUS(STATUS_SUCCESS, get(fs, disk, found, offset, PIECE, &done));
    CHECK(done == PIECE, "read %lu", done);
    CHECK(memcmp(found, wanted, PIECE) == 0, "at %llu not the pattern %llu", offset, seed);
}

/* Writes what the disk reads as to a file beside the directory. */
static void keep(FSP_FILE_SYSTEM *fs, OPENED *disk, PCWSTR name)
{
    WCHAR path[MAX_PATH];
    static __thread UINT64 piece[PIECE / 8];
    GetEnvironmentVariableW(L"VHDFS_EXPECTED", path, MAX_PATH - 32);
    wcscat(wcscat(path, L"\\"), name);
    HANDLE file = CreateFileW(path, GENERIC_WRITE, 0, NULL, CREATE_ALWAYS, 0, NULL);
    CHECK(file != INVALID_HANDLE_VALUE, "%ls: %lu", path, GetLastError());
    for (UINT64 offset = 0; offset < disk->info.FileSize; offset += PIECE) {
        ULONG done, written = 0;
        STATUS(STATUS_SUCCESS, get(fs, disk, piece, offset, PIECE, &done));
        CHECK(WriteFile(file, piece, done, &written, NULL) && written == done, "%ls: %lu", path, GetLastError());
    }
    CloseHandle(file);
}

static void shut(FSP_FILE_SYSTEM *fs, OPENED *opened)
{
    OP(Cleanup)(fs, opened->context, NULL, 0);
    OP(Close)(fs, opened->context);
}

static void must_open(FSP_FILE_SYSTEM *fs, PCWSTR path, UINT32 access, OPENED *opened)
{
    NTSTATUS status = open_as(fs, path, OPEN, 0, access, opened);
    CHECK(status == STATUS_SUCCESS, "open %ls: %#lx", path, (ULONG)status);
}

/* ---- one part after the other ---- */

static void volume(FSP_FILE_SYSTEM *fs)
{
    FSP_FSCTL_VOLUME_INFO info = {0};
    STATUS(STATUS_SUCCESS, OP(GetVolumeInfo)(fs, &info));
    CHECK(info.TotalSize >= SIZE && info.FreeSize <= info.TotalSize, "%llu of %llu", info.FreeSize, info.TotalSize);
    CHECK(info.VolumeLabelLength == 10 && memcmp(info.VolumeLabel, L"disks", 10) == 0, "label");
    STATUS(STATUS_ACCESS_DENIED, OP(SetVolumeLabel)(fs, L"other", &info));
}

static void security(FSP_FILE_SYSTEM *fs)
{
    BYTE buffer[1024];
    SIZE_T size = sizeof buffer;
    UINT32 flags = 0;
    STATUS(STATUS_SUCCESS, OP(GetSecurityByName)(fs, L"\\data.vhdx.raw", &flags, buffer, &size));
    CHECK(!(flags & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_READONLY)), "flags %#x", flags);
    /* The driver goes on with a buffer of the size that it is told. */
    CHECK(size == sizeof buffer && IsValidSecurityDescriptor(buffer), "descriptor, size %llu", size);
    PSID owner = NULL;
    PACL list = NULL;
    BOOL there = FALSE, defaulted;
    CHECK(GetSecurityDescriptorOwner(buffer, &owner, &defaulted) && owner && IsValidSid(owner), "owner");
    CHECK(GetSecurityDescriptorDacl(buffer, &there, &list, &defaulted) && there && list, "no access control list");
    STATUS(STATUS_SUCCESS, OP(GetSecurityByName)(fs, L"\\DATA.VhdX.RAW", &flags, NULL, NULL));
    STATUS(STATUS_SUCCESS, OP(GetSecurityByName)(fs, L"\\", &flags, NULL, NULL));
    CHECK(flags & FILE_ATTRIBUTE_DIRECTORY, "flags %#x", flags);
    STATUS(STATUS_SUCCESS, OP(GetSecurityByName)(fs, L"\\sealed.vhd.raw", &flags, NULL, NULL));
    CHECK(flags & FILE_ATTRIBUTE_READONLY, "a sealed disk can be written: %#x", flags);
    /* Nothing else is shown, nothing leads elsewhere. */
    STATUS(STATUS_OBJECT_NAME_NOT_FOUND, OP(GetSecurityByName)(fs, L"\\nope", &flags, NULL, NULL));
    STATUS(STATUS_OBJECT_NAME_NOT_FOUND, OP(GetSecurityByName)(fs, L"\\data.vhdx", &flags, NULL, NULL));
    STATUS(STATUS_OBJECT_NAME_NOT_FOUND, OP(GetSecurityByName)(fs, L"\\notes.txt", &flags, NULL, NULL));
    STATUS(STATUS_OBJECT_PATH_NOT_FOUND, OP(GetSecurityByName)(fs, L"\\nope\\a.vhd.raw", &flags, NULL, NULL));
    STATUS(STATUS_OBJECT_PATH_NOT_FOUND, OP(GetSecurityByName)(fs, L"\\data.vhdx.raw\\a", &flags, NULL, NULL));
    static PCWSTR const invalid[] = { L"\\data.vhdx.raw:s", L"\\data.vhdx.raw::$DATA", L"\\..\\disks", L"\\sub\\..",
                                      L"\\C:\\x", L"\\sub/deep.vhd.raw", L"\\data.vhdx.raw.", L"\\*" };
    for (int index = 0; index < 8; index++)
        STATUS(STATUS_OBJECT_NAME_INVALID, OP(GetSecurityByName)(fs, (PWSTR)invalid[index], &flags, NULL, NULL));
}

static void opening(FSP_FILE_SYSTEM *fs)
{
    OPENED one, other;
    STATUS(STATUS_SUCCESS, open_as(fs, L"\\SUB\\Deep.VHD.raw", OPEN, FILE_NON_DIRECTORY_FILE, READ_DATA, &one));
    CHECK(wcscmp(one.spelled, L"\\sub\\deep.vhd.raw") == 0, "spelled %ls", one.spelled);
    CHECK(one.info.FileSize == SIZE && one.info.IndexNumber != 0, "size %llu", one.info.FileSize);
    CHECK(one.info.CreationTime != 0 && one.info.LastWriteTime > 116444736000000000ull, "times");
    must_open(fs, L"\\sub\\deep.vhd.raw", FILE_READ_ATTRIBUTES, &other);
    CHECK(other.info.IndexNumber == one.info.IndexNumber, "one file, two numbers");
    ULONG done;
    BYTE byte;
    STATUS(STATUS_ACCESS_DENIED, get(fs, &other, &byte, 0, 1, &done));
    SIZE_T size = 0;
    STATUS(STATUS_SUCCESS, OP(GetSecurity)(fs, one.context, NULL, &size));
    CHECK(size >= 20 && size < 1024, "descriptor of %llu", size);
    BYTE small[8];
    size = sizeof small;
    STATUS(STATUS_BUFFER_OVERFLOW, OP(GetSecurity)(fs, one.context, small, &size));
    shut(fs, &other);
    UINT64 number = one.info.IndexNumber;
    shut(fs, &one);
    /* A number that nobody refers to any more is never used again. */
    must_open(fs, L"\\sub\\deep.vhd.raw", FILE_READ_ATTRIBUTES, &one);
    CHECK(one.info.IndexNumber != number, "a reference was not given back");
    shut(fs, &one);
    must_open(fs, L"\\sub", FILE_READ_ATTRIBUTES, &one);
    number = one.info.IndexNumber;
    CHECK(one.info.FileAttributes & FILE_ATTRIBUTE_DIRECTORY, "flags %#x", one.info.FileAttributes);
    STATUS(STATUS_FILE_IS_A_DIRECTORY, get(fs, &one, &byte, 0, 1, &done));
    shut(fs, &one);
    must_open(fs, L"\\sub", FILE_READ_ATTRIBUTES, &one);
    CHECK(one.info.IndexNumber != number, "a reference to a directory was not given back");
    shut(fs, &one);
    STATUS(STATUS_FILE_IS_A_DIRECTORY, open_as(fs, L"\\sub", OPEN, FILE_NON_DIRECTORY_FILE, READ_DATA, &one));
    STATUS(STATUS_NOT_A_DIRECTORY, open_as(fs, L"\\data.vhdx.raw", OPEN, FILE_DIRECTORY_FILE, READ_DATA, &one));
    STATUS(STATUS_OBJECT_NAME_NOT_FOUND, open_as(fs, L"\\nope.vhd.raw", OPEN, 0, READ_DATA, &one));
    STATUS(STATUS_FILE_CORRUPT_ERROR, open_as(fs, L"\\broken.vhd.raw", OPEN, 0, READ_DATA, &one));
    for (int turn = 0; turn < 50; turn++) {
        must_open(fs, L"\\many\\disk-07.vhd.raw", READ_DATA, &one);
        shut(fs, &one);
    }
}

static void read_only(FSP_FILE_SYSTEM *fs)
{
    static PCWSTR const names[] = { L"\\base.vhdx.raw", L"\\sealed.vhd.raw" };
    for (int index = 0; index < 2; index++) {
        OPENED disk;
        BYTE byte = 1;
        ULONG done;
        FSP_FSCTL_FILE_INFO info = {0};
        STATUS(STATUS_ACCESS_DENIED, open_as(fs, names[index], OPEN, 0, WRITE_DATA, &disk));
        must_open(fs, names[index], READ_DATA, &disk);
        /* That a disk has children is known for certain once somebody wanted to write it. */
        CHECK(disk.info.FileAttributes & FILE_ATTRIBUTE_READONLY, "%ls: %#x", names[index], disk.info.FileAttributes);
        STATUS(STATUS_SUCCESS, get(fs, &disk, &byte, 0, 1, &done));
        STATUS(STATUS_ACCESS_DENIED, put(fs, &disk, &byte, 0, 1));
        STATUS(STATUS_ACCESS_DENIED, put(fs, &disk, &byte, SIZE, 1));
        STATUS(STATUS_SUCCESS, OP(Flush)(fs, disk.context, &info));
        shut(fs, &disk);
    }
    OPENED child;
    must_open(fs, L"\\child.vhdx.raw", WRITE_DATA, &child);
    UINT64 piece[PIECE / 8];
    pattern(piece, 3 * MIB, PIECE, 5);
    STATUS(STATUS_SUCCESS, put(fs, &child, piece, 3 * MIB, PIECE));
    expect(fs, &child, 3 * MIB, 5);
    keep(fs, &child, L"child.raw");
    shut(fs, &child);
}

static void ends(FSP_FILE_SYSTEM *fs)
{
    OPENED disk;
    BYTE bytes[1024], zero[1024] = {0};
    ULONG done;
    FSP_FSCTL_FILE_INFO info = {0};
    must_open(fs, L"\\sub\\deep.vhd.raw", WRITE_DATA, &disk);
    memset(bytes, 7, sizeof bytes);
    STATUS(STATUS_SUCCESS, put(fs, &disk, bytes, SIZE - 512, 512));
    STATUS(STATUS_SUCCESS, get(fs, &disk, bytes, SIZE - 512, 1024, &done));
    CHECK(done == 512, "read %lu at the end", done);
    STATUS(STATUS_END_OF_FILE, get(fs, &disk, bytes, SIZE, 512, &done));
    STATUS(STATUS_END_OF_FILE, get(fs, &disk, bytes, ~0ull - 4095, 512, &done));
    /* A file of fixed size: what does not fit is not written at all. */
    STATUS(STATUS_DISK_FULL, put(fs, &disk, zero, SIZE, 1));
    STATUS(STATUS_DISK_FULL, put(fs, &disk, zero, SIZE - 512, 1024));
    STATUS(STATUS_DISK_FULL, put(fs, &disk, zero, ~0ull - 4095, 512));
    STATUS(STATUS_DISK_FULL, OP(Write)(fs, disk.context, zero, 0, 512, TRUE, FALSE, &done, &info));
    STATUS(STATUS_SUCCESS, get(fs, &disk, bytes, SIZE - 512, 512, &done));
    CHECK(bytes[0] == 7 && bytes[511] == 7, "a write that was refused was done");
    STATUS(STATUS_SUCCESS, get(fs, &disk, bytes, 0, 512, &done));
    CHECK(memcmp(bytes, zero, 512) == 0, "a write to the end went to the start");
    /* Of the kernel for mapped pages: cut at the end, without an error. */
    memset(bytes, 8, sizeof bytes);
    STATUS(STATUS_SUCCESS, OP(Write)(fs, disk.context, bytes, SIZE - 512, 1024, FALSE, TRUE, &done, &info));
    CHECK(done == 512 && info.FileSize == SIZE, "wrote %lu", done);
    STATUS(STATUS_SUCCESS, OP(Write)(fs, disk.context, bytes, SIZE, 512, FALSE, TRUE, &done, &info));
    CHECK(done == 0 && info.FileSize == SIZE, "wrote %lu", done);
    STATUS(STATUS_SUCCESS, get(fs, &disk, zero, SIZE - 512, 512, &done));
    CHECK(zero[0] == 8 && zero[511] == 8, "a constrained write was not done");
    shut(fs, &disk);
}

static void refused(FSP_FILE_SYSTEM *fs, NTSTATUS refusal)
{
    OPENED disk, made;
    FSP_FSCTL_FILE_INFO info = {0};
    STATUS(refusal, open_as(fs, L"\\new.vhd.raw", CREATE, 0, READ_DATA, &made));
    STATUS(refusal, open_as(fs, L"\\new.vhd.raw", OPEN_IF, 0, READ_DATA, &made));
    STATUS(refusal, open_as(fs, L"\\new", CREATE, FILE_DIRECTORY_FILE, FILE_LIST_DIRECTORY, &made));
    STATUS(STATUS_OBJECT_NAME_COLLISION, open_as(fs, L"\\data.vhdx.raw", CREATE, 0, READ_DATA, &made));
    NTSTATUS status = open_as(fs, L"\\data.vhdx.raw", OPEN, FILE_DELETE_ON_CLOSE, DELETE, &made);
    CHECK(status == (NTSTATUS)STATUS_CANNOT_DELETE, "delete on close: %#lx", (ULONG)status);
    must_open(fs, L"\\data.vhdx.raw", refusal == STATUS_ACCESS_DENIED ? WRITE_DATA : READ_DATA, &disk);
    STATUS(refusal, OP(Overwrite) ? OP(Overwrite)(fs, disk.context, 0, FALSE, 0, &info)
                                  : OP(OverwriteEx)(fs, disk.context, 0, FALSE, 0, NULL, 0, &info));
    STATUS(refusal, OP(Rename)(fs, disk.context, L"\\data.vhdx.raw", L"\\b.vhdx.raw", TRUE));
    STATUS(refusal, OP(SetDelete)(fs, disk.context, L"\\data.vhdx.raw", TRUE));
    STATUS(STATUS_SUCCESS, OP(SetDelete)(fs, disk.context, L"\\data.vhdx.raw", FALSE));
    STATUS(refusal, OP(SetSecurity)(fs, disk.context, DACL_SECURITY_INFORMATION, NULL));
    STATUS(STATUS_SUCCESS, OP(SetFileSize)(fs, disk.context, SIZE, FALSE, &info));
    CHECK(info.FileSize == SIZE, "size %llu", info.FileSize);
    STATUS(STATUS_SUCCESS, OP(SetFileSize)(fs, disk.context, SIZE, TRUE, &info));
    STATUS(refusal, OP(SetFileSize)(fs, disk.context, SIZE / 2, FALSE, &info));
    STATUS(refusal, OP(SetFileSize)(fs, disk.context, 0, TRUE, &info));
    STATUS(refusal == STATUS_ACCESS_DENIED ? STATUS_DISK_FULL : refusal,
           OP(SetFileSize)(fs, disk.context, SIZE + 512, FALSE, &info));
    STATUS(STATUS_SUCCESS, OP(SetBasicInfo)(fs, disk.context, INVALID_FILE_ATTRIBUTES, 0, 0, 0, 0, &info));
    STATUS(STATUS_SUCCESS, OP(SetBasicInfo)(fs, disk.context, info.FileAttributes, info.CreationTime, 0,
                                            info.LastWriteTime, 0, &info));
    STATUS(refusal, OP(SetBasicInfo)(fs, disk.context, FILE_ATTRIBUTE_HIDDEN, 0, 0, 0, 0, &info));
    STATUS(refusal, OP(SetBasicInfo)(fs, disk.context, INVALID_FILE_ATTRIBUTES, 0, 0, 1, 0, &info));
    shut(fs, &disk);
}

/* All names of a directory, read into a buffer of that size at a time, going on behind the last name. */
static int list(FSP_FILE_SYSTEM *fs, OPENED *directory, ULONG room, WCHAR names[][64], int most, int stop_after)
{
    static __thread BYTE buffer[65536];
    WCHAR marker[64];
    int count = 0;
    for (BOOL begun = FALSE;; begun = TRUE) {
        ULONG length = 0;
        NTSTATUS status = OP(ReadDirectory)(fs, directory->context, NULL, begun ? marker : NULL, buffer, room, &length);
        STATUS(STATUS_SUCCESS, status);
        if (status != STATUS_SUCCESS || length == 0) {
            CHECK(FALSE, "a listing without an end, after %d", count);
            return count;
        }
        for (ULONG at = 0; at + sizeof(UINT16) <= length;) {
            FSP_FSCTL_DIR_INFO *entry = (FSP_FSCTL_DIR_INFO *)(buffer + at);
            /* An entry without a size is the end. */
            if (entry->Size == 0)
                return count;
            SIZE_T bytes = entry->Size - sizeof *entry;
            if (count >= most || bytes >= sizeof marker) {
                CHECK(FALSE, "too many names, or one of %llu bytes", bytes);
                return count;
            }
            memset(names[count], 0, sizeof names[count]);
            memcpy(names[count], entry->FileNameBuf, bytes);
            memcpy(marker, names[count], sizeof marker);
            BOOL is_disk = !(entry->FileInfo.FileAttributes & FILE_ATTRIBUTE_DIRECTORY);
            if (is_disk && wcsncmp(marker, L"disk-", 5) == 0)
                CHECK(entry->FileInfo.FileSize == MIB * 8 && entry->FileInfo.AllocationSize < MIB * 8,
                      "%ls: %llu, stored %llu", marker, entry->FileInfo.FileSize, entry->FileInfo.AllocationSize);
            count++;
            if (count == stop_after)
                return count;
            at += (entry->Size + 7) & ~7u;
        }
    }
}

static void listing(FSP_FILE_SYSTEM *fs)
{
    static WCHAR names[100][64];
    OPENED directory;
    STATUS(STATUS_SUCCESS, open_as(fs, L"\\many", OPEN, FILE_DIRECTORY_FILE, FILE_LIST_DIRECTORY, &directory));
    static const ULONG rooms[] = { 65536, 4096, 512, 176 };
    for (int index = 0; index < 4; index++) {
        int count = list(fs, &directory, rooms[index], names, 100, -1);
        CHECK(count == 62, "%d names with room for %lu bytes", count, rooms[index]);
        CHECK(wcscmp(names[0], L".") == 0 && wcscmp(names[1], L"..") == 0, "%ls %ls", names[0], names[1]);
        for (int name = 2; name < count; name++) {
            WCHAR wanted[64];
            swprintf(wanted, 64, L"disk-%02d.vhd.raw", name - 2);
            CHECK(wcscmp(names[name], wanted) == 0, "%ls, not %ls", names[name], wanted);
        }
    }
    /* Left in the middle, and begun anew. */
    CHECK(list(fs, &directory, 512, names, 100, 10) == 10, "not begun");
    CHECK(list(fs, &directory, 512, names, 100, -1) == 62, "not begun anew");
    shut(fs, &directory);
    STATUS(STATUS_SUCCESS, open_as(fs, L"\\", OPEN, FILE_DIRECTORY_FILE, FILE_LIST_DIRECTORY, &directory));
    int count = list(fs, &directory, 65536, names, 100, -1);
    static PCWSTR const wanted[] = { L"base.vhdx.raw", L"broken.vhd.raw", L"child.vhdx.raw", L"data.vhdx.raw", L"many",
                                     L"sealed.vhd.raw", L"shrink.vhd.raw", L"sub" };
    CHECK(count == 8, "%d names in the root", count);
    for (int name = 0; name < count && name < 8; name++)
        CHECK(wcscmp(names[name], wanted[name]) == 0, "%ls, not %ls", names[name], wanted[name]);
    shut(fs, &directory);
}

/* ---- many at once ---- */

#define THREADS 6

typedef struct {
    FSP_FILE_SYSTEM *fs;
    int number;
} WORKER;

/* Each thread has every sixth piece of the disk, its own handle, and looks at what the others have done. */
static DWORD WINAPI work(LPVOID argument)
{
    WORKER *self = argument;
    FSP_FILE_SYSTEM *fs = self->fs;
    static __thread UINT64 piece[PIECE / 8];
    OPENED disk;
    must_open(fs, L"\\data.vhdx.raw", WRITE_DATA, &disk);
    for (UINT64 at = self->number * PIECE; at < SIZE / 2; at += THREADS * PIECE) {
        pattern(piece, at, PIECE, 1);
        /* In pieces that do not end where blocks or sectors do. */
        STATUS(STATUS_SUCCESS, put(fs, &disk, piece, at, 5000));
        STATUS(STATUS_SUCCESS, put(fs, &disk, (BYTE *)piece + 5000, at + 5000, PIECE - 5000));
        expect(fs, &disk, at, 1);
        if (at % (MIB * 2) < PIECE) {
            FSP_FSCTL_FILE_INFO info = {0};
            STATUS(STATUS_SUCCESS, OP(Flush)(fs, disk.context, &info));
            CHECK(info.FileSize == SIZE, "size %llu", info.FileSize);
            STATUS(STATUS_SUCCESS, OP(GetFileInfo)(fs, disk.context, &info));
            OPENED other;
            must_open(fs, L"\\sub\\deep.vhd.raw", READ_DATA, &other);
            shut(fs, &other);
        }
    }
    shut(fs, &disk);
    return 0;
}

static void together(FSP_FILE_SYSTEM *fs)
{
    HANDLE threads[THREADS];
    WORKER workers[THREADS];
    for (int number = 0; number < THREADS; number++) {
        workers[number] = (WORKER){ fs, number };
        threads[number] = CreateThread(NULL, 0, work, &workers[number], 0, NULL);
    }
    WaitForMultipleObjects(THREADS, threads, TRUE, INFINITE);
    OPENED disk, other;
    FSP_FSCTL_FILE_INFO info = {0};
    /* Two handles see one disk. */
    must_open(fs, L"\\data.vhdx.raw", READ_DATA, &disk);
    must_open(fs, L"\\Data.vhdx.raw", WRITE_DATA, &other);
    for (UINT64 at = 0; at < SIZE; at += PIECE)
        expect(fs, &disk, at, at < SIZE / 2 ? 1 : 0);
    UINT64 piece[PIECE / 8];
    pattern(piece, SIZE - PIECE, PIECE, 2);
    STATUS(STATUS_SUCCESS, put(fs, &other, piece, SIZE - PIECE, PIECE));
    expect(fs, &disk, SIZE - PIECE, 2);
    shut(fs, &other);
    expect(fs, &disk, SIZE - PIECE, 2);
    /* The whole volume. */
    STATUS(STATUS_SUCCESS, OP(Flush)(fs, NULL, &info));
    keep(fs, &disk, L"data.raw");
    shut(fs, &disk);
}

static UINT64 length_of(PCWSTR name)
{
    WCHAR path[MAX_PATH];
    WIN32_FILE_ATTRIBUTE_DATA found = {0};
    GetEnvironmentVariableW(L"VHDFS_SERVED", path, MAX_PATH - 32);
    wcscat(wcscat(path, L"\\"), name);
    CHECK(GetFileAttributesExW(path, GetFileExInfoStandard, &found), "%ls: %lu", path, GetLastError());
    return (UINT64)found.nFileSizeHigh << 32 | found.nFileSizeLow;
}

/* Zeros over every other block: the file gets shorter. */
static void compaction(FSP_FILE_SYSTEM *fs)
{
    static __thread UINT64 piece[PIECE / 8];
    OPENED disk;
    must_open(fs, L"\\shrink.vhd.raw", WRITE_DATA, &disk);
    for (UINT64 at = 0; at < 40 * MIB; at += PIECE) {
        pattern(piece, at, PIECE, 3);
        STATUS(STATUS_SUCCESS, put(fs, &disk, piece, at, PIECE));
    }
    UINT64 before = length_of(L"shrink.vhd");
    CHECK(before > 40 * MIB, "%llu bytes long", before);
    memset(piece, 0, PIECE);
    for (UINT64 at = 0; at < 40 * MIB; at += PIECE)
        if (at / (2 * MIB) % 2 == 0)
            STATUS(STATUS_SUCCESS, put(fs, &disk, piece, at, PIECE));
    /* Reads in between send it back to waiting, and must see nothing of it; then it is left in peace. */
    UINT64 after = before, at = 0;
    for (int turn = 0; turn < 20 && after > 21 * MIB; turn++) {
        for (int pieces = 0; pieces < 4; pieces++, at = (at + 11 * PIECE) % (40 * MIB))
            expect(fs, &disk, at, at / (2 * MIB) % 2 == 0 ? 0 : 3);
        Sleep(200);
        after = length_of(L"shrink.vhd");
    }
    for (int turn = 0; turn < 100 && after > 21 * MIB; turn++) {
        Sleep(100);
        after = length_of(L"shrink.vhd");
    }
    CHECK(after <= 21 * MIB, "from %llu to %llu, not less than 21 MiB", before, after);
    printf("standin: compacted from %llu to %llu bytes\n", before, after);
    for (at = 0; at < 40 * MIB; at += PIECE)
        expect(fs, &disk, at, at / (2 * MIB) % 2 == 0 ? 0 : 3);
    keep(fs, &disk, L"shrink.raw");
    shut(fs, &disk);
}

/* Writes until the volume goes, and leaves everything open, as the driver does then. */
static void busy(FSP_FILE_SYSTEM *fs)
{
    static __thread UINT64 piece[PIECE / 8];
    OPENED disk;
    NTSTATUS status = STATUS_SUCCESS;
    must_open(fs, L"\\shrink.vhd.raw", WRITE_DATA, &disk);
    printf("standin: busy\n");
    fflush(stdout);
    for (UINT64 turn = 0; status == STATUS_SUCCESS && turn < 100000; turn++) {
        UINT64 at = turn * PIECE % SIZE;
        pattern(piece, at, PIECE, 4);
        status = put(fs, &disk, piece, at, PIECE);
        Sleep(1);
    }
    CHECK(status == (NTSTATUS)STATUS_VOLUME_DISMOUNTED, "ended with %#lx", (ULONG)status);
    STATUS(STATUS_VOLUME_DISMOUNTED, open_as(fs, L"\\data.vhdx.raw", OPEN, 0, READ_DATA, &disk));
}

/* A whole volume that can only be read. */
static void protected(FSP_FILE_SYSTEM *fs)
{
    OPENED disk;
    BYTE byte = 1;
    /* The driver refuses such an open itself; here it comes through. */
    NTSTATUS status = open_as(fs, L"\\data.vhdx.raw", OPEN, 0, WRITE_DATA, &disk);
    CHECK(status == (NTSTATUS)STATUS_ACCESS_DENIED || status == (NTSTATUS)STATUS_MEDIA_WRITE_PROTECTED,
          "open for writing: %#lx", (ULONG)status);
    must_open(fs, L"\\data.vhdx.raw", READ_DATA, &disk);
    for (UINT64 at = 0; at < SIZE / 2; at += PIECE)
        expect(fs, &disk, at, 1);
    STATUS(STATUS_ACCESS_DENIED, put(fs, &disk, &byte, 0, 1));
    shut(fs, &disk);
    refused(fs, STATUS_MEDIA_WRITE_PROTECTED);
}

void scenario(FSP_FILE_SYSTEM *fs, PCWSTR name)
{
    if (wcscmp(name, L"busy") == 0) {
        busy(fs);
    } else if (wcscmp(name, L"read-only") == 0) {
        protected(fs);
        listing(fs);
    } else if (wcscmp(name, L"compaction") == 0) {
        compaction(fs);
    } else if (wcscmp(name, L"idle") != 0) {
        volume(fs);
        security(fs);
        opening(fs);
        read_only(fs);
        ends(fs);
        refused(fs, STATUS_ACCESS_DENIED);
        listing(fs);
        together(fs);
        compaction(fs);
    }
}
