/*
 * Windows' virtual disk functions, from vhdfs, on any host: libvhdfs.so, vhdfs.dll.
 *
 * A source written for Windows' <virtdisk.h> needs no change but this include, which brings the types and the
 * few functions of Windows that it needs beside them. Elsewhere than on Windows: WCHAR has 16 bits, so that a
 * path is UTF-16 (u"disk.vhdx", or L"disk.vhdx" where the compiler is told -fshort-wchar); the handles of this
 * library are not the system's; DWORD is an int, for printf.
 *
 * What is supported, and what differs from Windows, is said in the documentation of vhdfs::virtdisk (mod.rs).
 */
#ifndef VHDFS_VIRTDISK_H
#define VHDFS_VIRTDISK_H

/* A union or structure without a name, which C has since 2011. */
#ifdef __GNUC__
#define VHDFS_NAMELESS __extension__
#else
#define VHDFS_NAMELESS
#endif

#ifdef _WIN32

#include <windows.h>

#else /* The part of <windows.h> that is needed. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define WINAPI
#define VOID void
#define TRUE 1
#define FALSE 0
#define INFINITE 0xFFFFFFFF
#define WAIT_OBJECT_0 0x00000000
#define WAIT_TIMEOUT 0x00000102
#define WAIT_FAILED ((DWORD)0xFFFFFFFF)
#define STATUS_PENDING 0x00000103
#define INVALID_HANDLE_VALUE ((HANDLE)(intptr_t)-1)
#define FIELD_OFFSET(type, field) ((LONG)offsetof(type, field))
#define ZeroMemory(destination, length) memset((destination), 0, (length))

#ifndef _In_
#define _In_
#define _In_opt_
#define _Out_
#define _Out_opt_
#define _Inout_
#define _Inout_opt_
#endif

typedef int BOOL;
typedef int INT;
typedef unsigned int UINT;
typedef uint8_t BYTE, BOOLEAN, UCHAR;
typedef uint16_t WORD, USHORT;
typedef uint32_t DWORD, ULONG, UINT32, *PULONG, *PDWORD, *LPDWORD;
typedef int32_t LONG;
typedef long long LONGLONG;
typedef unsigned long long ULONGLONG;
typedef uint64_t ULONG64, UINT64;
typedef uintptr_t ULONG_PTR;
typedef size_t SIZE_T;
typedef void *PVOID, *LPVOID, *HANDLE, *PSECURITY_DESCRIPTOR;
typedef HANDLE *PHANDLE;

#if defined(__SIZEOF_WCHAR_T__) && __SIZEOF_WCHAR_T__ == 2
typedef wchar_t WCHAR;
#elif defined(__cplusplus)
typedef char16_t WCHAR;
#else
typedef uint16_t WCHAR;
#endif
typedef WCHAR *PWSTR, *LPWSTR;
typedef const WCHAR *PCWSTR, *LPCWSTR;

typedef struct _GUID {
    uint32_t Data1;
    uint16_t Data2;
    uint16_t Data3;
    uint8_t Data4[8];
} GUID;

typedef struct _SECURITY_ATTRIBUTES {
    DWORD nLength;
    LPVOID lpSecurityDescriptor;
    BOOL bInheritHandle;
} SECURITY_ATTRIBUTES, *PSECURITY_ATTRIBUTES, *LPSECURITY_ATTRIBUTES;

/* Internal: STATUS_PENDING until the operation has ended, then its outcome, one of ERROR_*. */
typedef struct _OVERLAPPED {
    ULONG_PTR Internal;
    ULONG_PTR InternalHigh;
    VHDFS_NAMELESS union {
        VHDFS_NAMELESS struct {
            DWORD Offset;
            DWORD OffsetHigh;
        };
        PVOID Pointer;
    };
    HANDLE hEvent;
} OVERLAPPED, *LPOVERLAPPED;

#define HasOverlappedIoCompleted(overlapped) \
    (*(volatile ULONG_PTR *)&(overlapped)->Internal != STATUS_PENDING)

#define CreateEvent CreateEventW

#ifdef __cplusplus
extern "C" {
#endif

DWORD WINAPI GetLastError(void);
VOID WINAPI Sleep(DWORD dwMilliseconds);
/* Of an event or a virtual disk. An operation that runs on the disk is cancelled, and has ended on return. */
BOOL WINAPI CloseHandle(HANDLE hObject);
/* Without a name: lpName is NULL. */
HANDLE WINAPI CreateEventW(LPSECURITY_ATTRIBUTES lpEventAttributes, BOOL bManualReset, BOOL bInitialState,
                           LPCWSTR lpName);
BOOL WINAPI SetEvent(HANDLE hEvent);
BOOL WINAPI ResetEvent(HANDLE hEvent);
/* For an event, or until no operation runs on a virtual disk. */
DWORD WINAPI WaitForSingleObject(HANDLE hHandle, DWORD dwMilliseconds);
BOOL WINAPI CancelIoEx(HANDLE hFile, LPOVERLAPPED lpOverlapped);
BOOL WINAPI GetOverlappedResult(HANDLE hFile, LPOVERLAPPED lpOverlapped, LPDWORD lpNumberOfBytesTransferred,
                                BOOL bWait);

#ifdef __cplusplus
}
#endif

#define ERROR_SUCCESS 0L
#define ERROR_FILE_NOT_FOUND 2L
#define ERROR_PATH_NOT_FOUND 3L
#define ERROR_ACCESS_DENIED 5L
#define ERROR_INVALID_HANDLE 6L
#define ERROR_NOT_ENOUGH_MEMORY 8L
#define ERROR_WRITE_PROTECT 19L
#define ERROR_NOT_READY 21L
#define ERROR_SHARING_VIOLATION 32L
#define ERROR_NOT_SUPPORTED 50L
#define ERROR_INVALID_PARAMETER 87L
#define ERROR_DISK_FULL 112L
#define ERROR_INSUFFICIENT_BUFFER 122L
#define ERROR_INVALID_NAME 123L
#define ERROR_FILENAME_EXCED_RANGE 206L
#define ERROR_OPERATION_ABORTED 995L
#define ERROR_IO_INCOMPLETE 996L
#define ERROR_IO_PENDING 997L
#define ERROR_IO_DEVICE 1117L
#define ERROR_NOT_FOUND 1168L
#define ERROR_INTERNAL_ERROR 1359L
#define ERROR_FILE_CORRUPT 1392L

#endif

#ifndef ERROR_VHD_DRIVE_FOOTER_MISSING
#define ERROR_VHD_DRIVE_FOOTER_MISSING ((DWORD)0xC03A0001)
#define ERROR_VHD_DRIVE_FOOTER_CHECKSUM_MISMATCH ((DWORD)0xC03A0002)
#define ERROR_VHD_DRIVE_FOOTER_CORRUPT ((DWORD)0xC03A0003)
#define ERROR_VHD_FORMAT_UNKNOWN ((DWORD)0xC03A0004)
#define ERROR_VHD_FORMAT_UNSUPPORTED_VERSION ((DWORD)0xC03A0005)
#define ERROR_VHD_SPARSE_HEADER_CHECKSUM_MISMATCH ((DWORD)0xC03A0006)
#define ERROR_VHD_SPARSE_HEADER_UNSUPPORTED_VERSION ((DWORD)0xC03A0007)
#define ERROR_VHD_SPARSE_HEADER_CORRUPT ((DWORD)0xC03A0008)
#define ERROR_VHD_BLOCK_ALLOCATION_FAILURE ((DWORD)0xC03A0009)
#define ERROR_VHD_BLOCK_ALLOCATION_TABLE_CORRUPT ((DWORD)0xC03A000A)
#define ERROR_VHD_INVALID_BLOCK_SIZE ((DWORD)0xC03A000B)
#define ERROR_VHD_BITMAP_MISMATCH ((DWORD)0xC03A000C)
#define ERROR_VHD_PARENT_VHD_NOT_FOUND ((DWORD)0xC03A000D)
#define ERROR_VHD_CHILD_PARENT_ID_MISMATCH ((DWORD)0xC03A000E)
#define ERROR_VHD_CHILD_PARENT_TIMESTAMP_MISMATCH ((DWORD)0xC03A000F)
#define ERROR_VHD_METADATA_READ_FAILURE ((DWORD)0xC03A0010)
#define ERROR_VHD_METADATA_WRITE_FAILURE ((DWORD)0xC03A0011)
#define ERROR_VHD_INVALID_SIZE ((DWORD)0xC03A0012)
#define ERROR_VHD_INVALID_FILE_SIZE ((DWORD)0xC03A0013)
#define ERROR_VIRTDISK_PROVIDER_NOT_FOUND ((DWORD)0xC03A0014)
#define ERROR_VIRTDISK_NOT_VIRTUAL_DISK ((DWORD)0xC03A0015)
#define ERROR_VHD_PARENT_VHD_ACCESS_DENIED ((DWORD)0xC03A0016)
#define ERROR_VHD_CHILD_PARENT_SIZE_MISMATCH ((DWORD)0xC03A0017)
#define ERROR_VHD_DIFFERENCING_CHAIN_CYCLE_DETECTED ((DWORD)0xC03A0018)
#define ERROR_VHD_DIFFERENCING_CHAIN_ERROR_IN_PARENT ((DWORD)0xC03A0019)
#define ERROR_VIRTUAL_DISK_LIMITATION ((DWORD)0xC03A001A)
#define ERROR_VHD_INVALID_TYPE ((DWORD)0xC03A001B)
#define ERROR_VHD_INVALID_STATE ((DWORD)0xC03A001C)
#define ERROR_VIRTDISK_UNSUPPORTED_DISK_SECTOR_SIZE ((DWORD)0xC03A001D)
#define ERROR_VIRTDISK_DISK_ALREADY_OWNED ((DWORD)0xC03A001E)
#define ERROR_VIRTDISK_DISK_ONLINE_AND_WRITABLE ((DWORD)0xC03A001F)
#endif

#ifndef OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT
#define OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT 1
#endif

#if !defined(VIRT_DISK_API_DEF) && !defined(_INC_VIRTDISK)
/* What Windows' own header, and MinGW's, are known by. */
#define VIRT_DISK_API_DEF
#define _INC_VIRTDISK

#define VIRTUAL_STORAGE_TYPE_DEVICE_UNKNOWN 0
#define VIRTUAL_STORAGE_TYPE_DEVICE_ISO 1
#define VIRTUAL_STORAGE_TYPE_DEVICE_VHD 2
#define VIRTUAL_STORAGE_TYPE_DEVICE_VHDX 3
#define VIRTUAL_STORAGE_TYPE_DEVICE_VHDSET 4

static const GUID VIRTUAL_STORAGE_TYPE_VENDOR_UNKNOWN = {0, 0, 0, {0, 0, 0, 0, 0, 0, 0, 0}};
static const GUID VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT = {
    0xEC984AEC, 0xA0F9, 0x47E9, {0x90, 0x1F, 0x71, 0x41, 0x5A, 0x66, 0x34, 0x5B}};

typedef enum _VIRTUAL_DISK_ACCESS_MASK {
    VIRTUAL_DISK_ACCESS_NONE = 0x00000000,
    VIRTUAL_DISK_ACCESS_ATTACH_RO = 0x00010000,
    VIRTUAL_DISK_ACCESS_ATTACH_RW = 0x00020000,
    VIRTUAL_DISK_ACCESS_DETACH = 0x00040000,
    VIRTUAL_DISK_ACCESS_GET_INFO = 0x00080000,
    VIRTUAL_DISK_ACCESS_CREATE = 0x00100000,
    VIRTUAL_DISK_ACCESS_METAOPS = 0x00200000,
    VIRTUAL_DISK_ACCESS_READ = 0x000d0000,
    VIRTUAL_DISK_ACCESS_ALL = 0x003f0000,
    VIRTUAL_DISK_ACCESS_WRITABLE = 0x00320000
} VIRTUAL_DISK_ACCESS_MASK;

typedef enum _OPEN_VIRTUAL_DISK_FLAG {
    OPEN_VIRTUAL_DISK_FLAG_NONE = 0x00000000,
    OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS = 0x00000001,
    OPEN_VIRTUAL_DISK_FLAG_BLANK_FILE = 0x00000002,
    OPEN_VIRTUAL_DISK_FLAG_BOOT_DRIVE = 0x00000004,
    OPEN_VIRTUAL_DISK_FLAG_CACHED_IO = 0x00000008,
    OPEN_VIRTUAL_DISK_FLAG_CUSTOM_DIFF_CHAIN = 0x00000010,
    OPEN_VIRTUAL_DISK_FLAG_PARENT_CACHED_IO = 0x00000020,
    OPEN_VIRTUAL_DISK_FLAG_VHDSET_FILE_ONLY = 0x00000040,
    OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR = 0x00000080,
    OPEN_VIRTUAL_DISK_FLAG_NO_WRITE_HARDENING = 0x00000100,
    OPEN_VIRTUAL_DISK_FLAG_SUPPORT_COMPRESSED_VOLUMES = 0x00000200,
    OPEN_VIRTUAL_DISK_FLAG_SUPPORT_SPARSE_FILES_ANY_FS = 0x00000400,
    OPEN_VIRTUAL_DISK_FLAG_SUPPORT_ENCRYPTED_FILES = 0x00000800
} OPEN_VIRTUAL_DISK_FLAG;

typedef enum _OPEN_VIRTUAL_DISK_VERSION {
    OPEN_VIRTUAL_DISK_VERSION_UNSPECIFIED = 0,
    OPEN_VIRTUAL_DISK_VERSION_1 = 1,
    OPEN_VIRTUAL_DISK_VERSION_2 = 2,
    OPEN_VIRTUAL_DISK_VERSION_3 = 3
} OPEN_VIRTUAL_DISK_VERSION;

typedef enum _ATTACH_VIRTUAL_DISK_FLAG {
    ATTACH_VIRTUAL_DISK_FLAG_NONE = 0x00000000,
    ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY = 0x00000001,
    ATTACH_VIRTUAL_DISK_FLAG_NO_DRIVE_LETTER = 0x00000002,
    ATTACH_VIRTUAL_DISK_FLAG_PERMANENT_LIFETIME = 0x00000004,
    ATTACH_VIRTUAL_DISK_FLAG_NO_LOCAL_HOST = 0x00000008,
    ATTACH_VIRTUAL_DISK_FLAG_NO_SECURITY_DESCRIPTOR = 0x00000010,
    ATTACH_VIRTUAL_DISK_FLAG_BYPASS_DEFAULT_ENCRYPTION_POLICY = 0x00000020,
    ATTACH_VIRTUAL_DISK_FLAG_NON_PNP = 0x00000040,
    ATTACH_VIRTUAL_DISK_FLAG_RESTRICTED_RANGE = 0x00000080,
    ATTACH_VIRTUAL_DISK_FLAG_SINGLE_PARTITION = 0x00000100,
    ATTACH_VIRTUAL_DISK_FLAG_REGISTER_VOLUME = 0x00000200,
    ATTACH_VIRTUAL_DISK_FLAG_AT_BOOT = 0x00000400
} ATTACH_VIRTUAL_DISK_FLAG;

typedef enum _ATTACH_VIRTUAL_DISK_VERSION {
    ATTACH_VIRTUAL_DISK_VERSION_UNSPECIFIED = 0,
    ATTACH_VIRTUAL_DISK_VERSION_1 = 1,
    ATTACH_VIRTUAL_DISK_VERSION_2 = 2
} ATTACH_VIRTUAL_DISK_VERSION;

typedef enum _DETACH_VIRTUAL_DISK_FLAG {
    DETACH_VIRTUAL_DISK_FLAG_NONE = 0x00000000
} DETACH_VIRTUAL_DISK_FLAG;

typedef enum _COMPACT_VIRTUAL_DISK_FLAG {
    COMPACT_VIRTUAL_DISK_FLAG_NONE = 0x00000000,
    COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN = 0x00000001,
    COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES = 0x00000002
} COMPACT_VIRTUAL_DISK_FLAG;

typedef enum _COMPACT_VIRTUAL_DISK_VERSION {
    COMPACT_VIRTUAL_DISK_VERSION_UNSPECIFIED = 0,
    COMPACT_VIRTUAL_DISK_VERSION_1 = 1
} COMPACT_VIRTUAL_DISK_VERSION;

typedef enum _GET_VIRTUAL_DISK_INFO_VERSION {
    GET_VIRTUAL_DISK_INFO_UNSPECIFIED = 0,
    GET_VIRTUAL_DISK_INFO_SIZE = 1,
    GET_VIRTUAL_DISK_INFO_IDENTIFIER = 2,
    GET_VIRTUAL_DISK_INFO_PARENT_LOCATION = 3,
    GET_VIRTUAL_DISK_INFO_PARENT_IDENTIFIER = 4,
    GET_VIRTUAL_DISK_INFO_PARENT_TIMESTAMP = 5,
    GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE = 6,
    GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE = 7,
    GET_VIRTUAL_DISK_INFO_IS_4K_ALIGNED = 8,
    GET_VIRTUAL_DISK_INFO_PHYSICAL_DISK = 9,
    GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE = 10,
    GET_VIRTUAL_DISK_INFO_SMALLEST_SAFE_VIRTUAL_SIZE = 11,
    GET_VIRTUAL_DISK_INFO_FRAGMENTATION = 12,
    GET_VIRTUAL_DISK_INFO_IS_LOADED = 13,
    GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID = 14,
    GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE = 15
} GET_VIRTUAL_DISK_INFO_VERSION;

typedef struct _VIRTUAL_STORAGE_TYPE {
    ULONG DeviceId;
    GUID VendorId;
} VIRTUAL_STORAGE_TYPE, *PVIRTUAL_STORAGE_TYPE;

typedef struct _OPEN_VIRTUAL_DISK_PARAMETERS {
    OPEN_VIRTUAL_DISK_VERSION Version;
    VHDFS_NAMELESS union {
        struct {
            ULONG RWDepth;
        } Version1;
        struct {
            BOOL GetInfoOnly;
            BOOL ReadOnly;
            GUID ResiliencyGuid;
        } Version2;
        struct {
            BOOL GetInfoOnly;
            BOOL ReadOnly;
            GUID ResiliencyGuid;
            GUID SnapshotId;
        } Version3;
    };
} OPEN_VIRTUAL_DISK_PARAMETERS, *POPEN_VIRTUAL_DISK_PARAMETERS;

typedef struct _ATTACH_VIRTUAL_DISK_PARAMETERS {
    ATTACH_VIRTUAL_DISK_VERSION Version;
    VHDFS_NAMELESS union {
        struct {
            ULONG Reserved;
        } Version1;
        struct {
            ULONGLONG RestrictedOffset;
            ULONGLONG RestrictedLength;
        } Version2;
    };
} ATTACH_VIRTUAL_DISK_PARAMETERS, *PATTACH_VIRTUAL_DISK_PARAMETERS;

typedef struct _COMPACT_VIRTUAL_DISK_PARAMETERS {
    COMPACT_VIRTUAL_DISK_VERSION Version;
    VHDFS_NAMELESS union {
        struct {
            ULONG Reserved;
        } Version1;
    };
} COMPACT_VIRTUAL_DISK_PARAMETERS, *PCOMPACT_VIRTUAL_DISK_PARAMETERS;

typedef struct _VIRTUAL_DISK_PROGRESS {
    DWORD OperationStatus;
    ULONGLONG CurrentValue;
    ULONGLONG CompletionValue;
} VIRTUAL_DISK_PROGRESS, *PVIRTUAL_DISK_PROGRESS;

typedef struct _GET_VIRTUAL_DISK_INFO {
    GET_VIRTUAL_DISK_INFO_VERSION Version;
    VHDFS_NAMELESS union {
        struct {
            ULONGLONG VirtualSize;
            ULONGLONG PhysicalSize;
            ULONG BlockSize;
            ULONG SectorSize;
        } Size;
        GUID Identifier;
        struct {
            BOOL ParentResolved;
            WCHAR ParentLocationBuffer[1];
        } ParentLocation;
        GUID ParentIdentifier;
        ULONG ParentTimestamp;
        VIRTUAL_STORAGE_TYPE VirtualStorageType;
        ULONG ProviderSubtype;
        BOOL Is4kAligned;
        BOOL IsLoaded;
        struct {
            ULONG LogicalSectorSize;
            ULONG PhysicalSectorSize;
            BOOL IsRemote;
        } PhysicalDisk;
        ULONG VhdPhysicalSectorSize;
        ULONGLONG SmallestSafeVirtualSize;
        ULONG FragmentationPercentage;
        GUID VirtualDiskId;
        struct {
            BOOL Enabled;
            BOOL NewerChanges;
            WCHAR MostRecentId[1];
        } ChangeTrackingState;
    };
} GET_VIRTUAL_DISK_INFO, *PGET_VIRTUAL_DISK_INFO;

#ifdef __cplusplus

#ifndef DEFINE_ENUM_FLAG_OPERATORS
#define DEFINE_ENUM_FLAG_OPERATORS(type)                                                      \
    inline type operator|(type a, type b) { return type((unsigned)a | (unsigned)b); }         \
    inline type operator&(type a, type b) { return type((unsigned)a & (unsigned)b); }         \
    inline type operator^(type a, type b) { return type((unsigned)a ^ (unsigned)b); }         \
    inline type operator~(type a) { return type(~(unsigned)a); }                              \
    inline type &operator|=(type &a, type b) { return a = a | b; }                            \
    inline type &operator&=(type &a, type b) { return a = a & b; }                            \
    inline type &operator^=(type &a, type b) { return a = a ^ b; }
#endif
DEFINE_ENUM_FLAG_OPERATORS(VIRTUAL_DISK_ACCESS_MASK)
DEFINE_ENUM_FLAG_OPERATORS(OPEN_VIRTUAL_DISK_FLAG)
DEFINE_ENUM_FLAG_OPERATORS(ATTACH_VIRTUAL_DISK_FLAG)
DEFINE_ENUM_FLAG_OPERATORS(DETACH_VIRTUAL_DISK_FLAG)
DEFINE_ENUM_FLAG_OPERATORS(COMPACT_VIRTUAL_DISK_FLAG)

extern "C" {
#endif

DWORD WINAPI OpenVirtualDisk(PVIRTUAL_STORAGE_TYPE VirtualStorageType, PCWSTR Path,
                             VIRTUAL_DISK_ACCESS_MASK VirtualDiskAccessMask, OPEN_VIRTUAL_DISK_FLAG Flags,
                             POPEN_VIRTUAL_DISK_PARAMETERS Parameters, PHANDLE Handle);

DWORD WINAPI AttachVirtualDisk(HANDLE VirtualDiskHandle, PSECURITY_DESCRIPTOR SecurityDescriptor,
                               ATTACH_VIRTUAL_DISK_FLAG Flags, ULONG ProviderSpecificFlags,
                               PATTACH_VIRTUAL_DISK_PARAMETERS Parameters, LPOVERLAPPED Overlapped);

DWORD WINAPI DetachVirtualDisk(HANDLE VirtualDiskHandle, DETACH_VIRTUAL_DISK_FLAG Flags,
                               ULONG ProviderSpecificFlags);

DWORD WINAPI CompactVirtualDisk(HANDLE VirtualDiskHandle, COMPACT_VIRTUAL_DISK_FLAG Flags,
                                PCOMPACT_VIRTUAL_DISK_PARAMETERS Parameters, LPOVERLAPPED Overlapped);

DWORD WINAPI GetVirtualDiskOperationProgress(HANDLE VirtualDiskHandle, LPOVERLAPPED Overlapped,
                                             PVIRTUAL_DISK_PROGRESS Progress);

DWORD WINAPI GetVirtualDiskInformation(HANDLE VirtualDiskHandle, PULONG VirtualDiskInfoSize,
                                       PGET_VIRTUAL_DISK_INFO VirtualDiskInfo, PULONG SizeUsed);

#ifdef __cplusplus
}
#endif

#endif

#ifdef _WIN32
/* The kernel does not know what to do with the handles of this library; these pass on all others. */
#ifdef __cplusplus
extern "C" {
#endif
BOOL WINAPI VhdfsCloseHandle(HANDLE hObject);
BOOL WINAPI VhdfsCancelIoEx(HANDLE hFile, LPOVERLAPPED lpOverlapped);
#ifdef __cplusplus
}
#endif
#define CloseHandle VhdfsCloseHandle
#define CancelIoEx VhdfsCancelIoEx
#endif

#endif
