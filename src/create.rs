//! New, empty disks.

use std::path::Path;

use crate::error::CreateError;
use crate::format::DiskType;
use crate::format::vhd::{MAX_BLOCKS, MAX_DISK_LEN};
use crate::image::vhd;
use crate::storage::host::{HostFile, sync_directory_of};
use crate::units::{SECTOR_SIZE, u64_from_u32};

/// What disk to create.
#[derive(Clone, Copy, Debug)]
pub struct CreateOptions {
    /// The disk's size in bytes: a multiple of 512, at most 2040 GiB.
    pub size: u64,
    /// [`DiskType::Fixed`] or [`DiskType::Dynamic`].
    pub disk_type: DiskType,
    /// Bytes in a block of a dynamic disk: a power of two from 512 KiB to 32 MiB. 2 MiB is what
    /// every program reads; Xen's and old ones read nothing larger.
    pub block_size: u32,
}

impl CreateOptions {
    /// The block size that every reader of VHDs knows.
    pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;

    /// A dynamic disk of `size` bytes in blocks of 2 MiB.
    pub fn dynamic(size: u64) -> Self {
        Self {
            size,
            disk_type: DiskType::Dynamic,
            block_size: Self::DEFAULT_BLOCK_SIZE,
        }
    }

    /// Why these options are not possible.
    fn problem(&self) -> Option<String> {
        const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512 << 10..=32 << 20;
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) || self.size > MAX_DISK_LEN {
            return Some(format!(
                "a VHD of {} bytes is not possible; its size is a multiple of 512, at most \
                 {MAX_DISK_LEN} (2040 GiB)",
                self.size
            ));
        }
        match self.disk_type {
            DiskType::Fixed => None,
            DiskType::Differencing => Some(
                "differencing disks cannot be created by this version; create a dynamic one".into(),
            ),
            DiskType::Dynamic => {
                let sound =
                    self.block_size.is_power_of_two() && BLOCK_SIZES.contains(&self.block_size);
                let fits = sound && self.size.div_ceil(u64_from_u32(self.block_size)) <= MAX_BLOCKS;
                (!fits).then(|| {
                    format!(
                        "a block size of {} bytes is not possible; it is a power of two from \
                         512 KiB to 32 MiB",
                        self.block_size
                    )
                })
            }
        }
    }
}

/// Creates an empty VHD at `path`, durable on return. A fixed one takes its space on the host only
/// as it is written.
///
/// # Errors
/// [`CreateError::Invalid`] for impossible options; [`CreateError::Io`] where the host refuses, an
/// existing file included. Nothing is left behind.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), CreateError> {
    if let Some(reason) = options.problem() {
        return Err(CreateError::Invalid {
            path: path.to_owned(),
            reason,
        });
    }
    let failed = |action, source| CreateError::Io {
        path: path.to_owned(),
        action,
        source,
    };
    let file = HostFile::create_new(path).map_err(|source| failed("create it", source))?;
    vhd::create(&file, options.disk_type, options.size, options.block_size)
        .and_then(|()| sync_directory_of(path))
        .map_err(|source| {
            // The first failure is the one to tell.
            let _ = std::fs::remove_file(path);
            failed("write it", source)
        })
}
