//! What a handle may do.

use super::constants::*;
use super::error::{ERROR_INVALID_PARAMETER, Win32Error};

/// What [`super::open_virtual_disk`] is told beside the access mask (`OPEN_VIRTUAL_DISK_PARAMETERS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenParameters {
    /// `OPEN_VIRTUAL_DISK_VERSION_1`.
    Version1 {
        /// How many files of a chain, from the child on, are opened for writing. 0 for a
        /// differencing disk that is not to be written to; any more make no difference here, since
        /// parents are never written to.
        rw_depth: u32,
    },
    /// `OPEN_VIRTUAL_DISK_VERSION_2`, which wants a mask of [`VIRTUAL_DISK_ACCESS_NONE`]: the handle may
    /// do everything that these two leave it.
    Version2 {
        /// Only to ask what the disk is.
        get_info_only: bool,
        /// Not to write to the file.
        read_only: bool,
    },
}

/// What a handle may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rights {
    pub(super) attach: bool,
    pub(super) detach: bool,
    pub(super) get_info: bool,
    pub(super) metaops: bool,
    /// Whether the file is opened for writing.
    pub(super) writes: bool,
    /// How far a differencing disk may be written to.
    pub(super) rw_depth: u32,
}

impl Rights {
    /// # Errors
    /// `ERROR_INVALID_PARAMETER` for a mask with bits that mean nothing, and for one that is not
    /// [`VIRTUAL_DISK_ACCESS_NONE`] with parameters of version 2, as Windows has it.
    pub(super) fn new(mask: u32, parameters: Option<OpenParameters>) -> Result<Self, Win32Error> {
        if mask & !VIRTUAL_DISK_ACCESS_ALL != 0 {
            return Err(ERROR_INVALID_PARAMETER);
        }
        let version_2 = matches!(parameters, Some(OpenParameters::Version2 { .. }));
        let mask = match (version_2, mask) {
            (true, VIRTUAL_DISK_ACCESS_NONE) => VIRTUAL_DISK_ACCESS_ALL,
            (true, _) => return Err(ERROR_INVALID_PARAMETER),
            (false, mask) => mask,
        };
        let has = |right| mask & right != 0;
        let all = Self {
            attach: has(VIRTUAL_DISK_ACCESS_ATTACH_RO | VIRTUAL_DISK_ACCESS_ATTACH_RW),
            detach: has(VIRTUAL_DISK_ACCESS_DETACH),
            get_info: has(VIRTUAL_DISK_ACCESS_GET_INFO),
            metaops: has(VIRTUAL_DISK_ACCESS_METAOPS),
            writes: has(VIRTUAL_DISK_ACCESS_WRITABLE),
            rw_depth: OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT,
        };
        Ok(match parameters {
            None => all,
            Some(OpenParameters::Version1 { rw_depth }) => Self { rw_depth, ..all },
            Some(OpenParameters::Version2 {
                get_info_only,
                read_only,
            }) => Self {
                attach: all.attach && !get_info_only,
                detach: all.detach && !get_info_only,
                metaops: all.metaops && !get_info_only && !read_only,
                writes: all.writes && !get_info_only && !read_only,
                ..all
            },
        })
    }

    /// Whether others are kept off the disk.
    pub(super) fn owns(self) -> bool {
        self.attach || self.writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(mask: u32, parameters: Option<OpenParameters>) -> Rights {
        Rights::new(mask, parameters).unwrap()
    }

    #[test]
    fn a_mask_gives_what_it_names() {
        let none = of(VIRTUAL_DISK_ACCESS_NONE, None);
        assert!(!none.attach && !none.detach && !none.get_info && !none.metaops && !none.owns());
        let all = of(VIRTUAL_DISK_ACCESS_ALL, None);
        assert!(all.attach && all.detach && all.get_info && all.metaops && all.writes);
        let read = of(VIRTUAL_DISK_ACCESS_READ, None);
        assert!(read.attach && read.detach && read.get_info && !read.metaops && !read.writes);
        assert!(of(VIRTUAL_DISK_ACCESS_ATTACH_RW, None).writes);
        assert!(
            !of(
                VIRTUAL_DISK_ACCESS_GET_INFO | VIRTUAL_DISK_ACCESS_DETACH,
                None
            )
            .owns()
        );
        for bit in [1, 0x8000, 0x0040_0000, 0x8000_0000] {
            let mask = VIRTUAL_DISK_ACCESS_METAOPS | bit;
            assert_eq!(Rights::new(mask, None), Err(ERROR_INVALID_PARAMETER));
        }
    }

    #[test]
    fn no_mask_in_version_2_means_everything() {
        let version_2 = |get_info_only, read_only| {
            Some(OpenParameters::Version2 {
                get_info_only,
                read_only,
            })
        };
        let all = of(VIRTUAL_DISK_ACCESS_NONE, version_2(false, false));
        assert_eq!(all, of(VIRTUAL_DISK_ACCESS_ALL, None));
        let read_only = of(VIRTUAL_DISK_ACCESS_NONE, version_2(false, true));
        assert!(read_only.attach && read_only.get_info && read_only.detach);
        assert!(!read_only.metaops && !read_only.writes);
        let info = of(VIRTUAL_DISK_ACCESS_NONE, version_2(true, false));
        assert!(info.get_info && !info.attach && !info.detach && !info.metaops && !info.owns());
        let masked = Rights::new(VIRTUAL_DISK_ACCESS_METAOPS, version_2(false, false));
        assert_eq!(masked, Err(ERROR_INVALID_PARAMETER));
    }
}
