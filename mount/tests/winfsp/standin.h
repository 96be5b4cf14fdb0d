/* What the stand-in for WinFsp's library and its scenario share. */

#ifndef STANDIN_H
#define STANDIN_H

#include <assert.h>
#include <windows.h>
/* MinGW's takes no argument; WinFsp's headers give one. */
#undef _ReadWriteBarrier
#include <winfsp/winfsp.h>

/* A handle, as the kernel keeps one for each open. */
typedef struct {
    PVOID context;
    UINT32 granted;
    FSP_FSCTL_FILE_INFO info;
    /* As the file system spells it; empty where it did not say. */
    WCHAR spelled[512];
} OPENED;

/* Opens as the driver's dispatcher does: through WinFsp's own access check and rules for dispositions, as the
 * user who runs this. The disposition is NtCreateFile's. */
NTSTATUS open_as(FSP_FILE_SYSTEM *fs, PCWSTR path, UINT32 disposition, UINT32 options, UINT32 access, OPENED *opened);

/* Plays the kernel. Ends when nothing of the file system is open any more. */
void scenario(FSP_FILE_SYSTEM *fs, PCWSTR name);

/* Counts, and says what is wrong. */
void check_at(int line, BOOL holds, const char *format, ...) __attribute__((format(gnu_printf, 3, 4)));
#define CHECK(holds, ...) check_at(__LINE__, (holds), __VA_ARGS__)
#define STATUS(expected, call) status_at(__LINE__, (NTSTATUS)(expected), (call), #call)
void status_at(int line, NTSTATUS expected, NTSTATUS found, const char *call);

#endif
