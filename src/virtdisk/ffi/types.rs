//! The structures of the header, as far as they are read or written here.

use std::ffi::c_void;
use std::mem::offset_of;

/// What `OVERLAPPED.Internal` holds until an operation has ended.
pub(super) const STATUS_PENDING: usize = 0x103;

/// `GUID`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Guid {
    pub(super) data1: u32,
    pub(super) data2: u16,
    pub(super) data3: u16,
    pub(super) data4: [u8; 8],
}

/// `OVERLAPPED`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Overlapped {
    pub(super) internal: usize,
    pub(super) internal_high: usize,
    pub(super) offset: u32,
    pub(super) offset_high: u32,
    pub(super) event: *mut c_void,
}

/// `VIRTUAL_STORAGE_TYPE`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct StorageType {
    pub(super) device_id: u32,
    pub(super) vendor_id: Guid,
}

/// What every version of `OPEN_VIRTUAL_DISK_PARAMETERS` begins with.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct OpenParametersHead {
    pub(super) version: u32,
}

/// `OPEN_VIRTUAL_DISK_PARAMETERS` of version 1.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct OpenParameters1 {
    pub(super) version: u32,
    pub(super) rw_depth: u32,
}

/// `OPEN_VIRTUAL_DISK_PARAMETERS` of version 2.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct OpenParameters2 {
    pub(super) version: u32,
    pub(super) get_info_only: i32,
    pub(super) read_only: i32,
    pub(super) resiliency_guid: Guid,
}

/// What every version of `ATTACH_VIRTUAL_DISK_PARAMETERS` begins with.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttachParametersHead {
    pub(super) version: u32,
}

/// `ATTACH_VIRTUAL_DISK_PARAMETERS` of version 2.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttachParameters2 {
    pub(super) version: u32,
    pub(super) restricted_offset: u64,
    pub(super) restricted_length: u64,
}

/// `COMPACT_VIRTUAL_DISK_PARAMETERS` of version 1.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CompactParameters {
    pub(super) version: u32,
    pub(super) reserved: u32,
}

/// `VIRTUAL_DISK_PROGRESS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Progress {
    pub(super) operation_status: u32,
    pub(super) current_value: u64,
    pub(super) completion_value: u64,
}

/// `GET_VIRTUAL_DISK_INFO` with its `Size`, the largest of its fixed members.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GetInfoSize {
    pub(super) version: u32,
    pub(super) virtual_size: u64,
    pub(super) physical_size: u64,
    pub(super) block_size: u32,
    pub(super) sector_size: u32,
}

/// Where the members of `GET_VIRTUAL_DISK_INFO` begin, its `Version` aside.
pub(super) const INFO_AT: usize = offset_of!(GetInfoSize, virtual_size);

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Guid>() == 16 && align_of::<Guid>() == 4);
    assert!(size_of::<Overlapped>() == 32 && offset_of!(Overlapped, event) == 24);
    assert!(size_of::<StorageType>() == 20 && offset_of!(StorageType, vendor_id) == 4);
    assert!(size_of::<OpenParameters1>() == 8 && size_of::<OpenParameters2>() == 28);
    assert!(offset_of!(OpenParameters2, resiliency_guid) == 12);
    assert!(size_of::<AttachParameters2>() == 24);
    assert!(offset_of!(AttachParameters2, restricted_offset) == 8);
    assert!(size_of::<CompactParameters>() == 8);
    assert!(size_of::<Progress>() == 24 && offset_of!(Progress, current_value) == 8);
    assert!(size_of::<GetInfoSize>() == 32 && INFO_AT == 8);
};
