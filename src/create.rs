//! New disks: empty ones, and differencing ones that read as their parent.

use std::path::Path;

use crate::error::CreateError;
use crate::format::parent::{Identity, NewParent};
use crate::format::vhdx::{self, BLOCK_SIZES};
use crate::format::{DiskType, Format, vhd};
use crate::image;
use crate::storage::Storage;
use crate::storage::host::{HostFile, sync_directory_of};
use crate::units::{SECTOR_SIZE, u64_from_u32};

/// What disk to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The disk's size in bytes, a multiple of the logical sector size: for VHD at most 2040 GiB, for
    /// VHDX 64 TiB.
    pub size: u64,
    /// The format.
    pub format: Format,
    /// How the image stores its disk. [`DiskType::Differencing`] needs a [`Self::parent`].
    pub disk_type: DiskType,
    /// Bytes in a block, a power of two: for VHD from 512 KiB to 32 MiB, for VHDX from 1 to 256 MiB;
    /// `None`: [`Self::DEFAULT_BLOCK_SIZE`].
    pub block_size: Option<u32>,
    /// Bytes in a sector as the guest addresses them: 512, or for VHDX 4096.
    pub sector_size: u32,
    /// Bytes in a sector as the guest is advised to write them, for VHDX: 512 or 4096, not below
    /// [`Self::sector_size`].
    pub physical_sector_size: u32,
    /// The parent of a differencing disk. Its format is this disk's.
    pub parent: Option<NewParent>,
}

impl CreateOptions {
    /// 2 MiB for every format and type. For VHD every reader knows it, while Xen's and old ones
    /// read nothing larger.
    /// For VHDX it is what Hyper-V takes for differencing disks; for others Hyper-V takes 32 MiB,
    /// of which a single used sector keeps all: these disks are to stay small.
    pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;

    /// A dynamic VHD of `size` bytes.
    pub fn dynamic(size: u64) -> Self {
        Self::new(Format::Vhd, DiskType::Dynamic, size)
    }

    /// A disk of `size` bytes, the rest of it by default. A differencing one still needs a parent.
    pub fn new(format: Format, disk_type: DiskType, size: u64) -> Self {
        Self {
            size,
            format,
            disk_type,
            block_size: None,
            sector_size: 512,
            physical_sector_size: 4096,
            parent: None,
        }
    }

    /// A disk that reads as `parent`, of the same format, size and sector size.
    pub fn differencing(parent: NewParent) -> Self {
        let format = match parent.identity {
            Identity::Vhd(_) => Format::Vhd,
            Identity::Vhdx(_) => Format::Vhdx,
        };
        Self {
            sector_size: u32::try_from(parent.sector_size).unwrap_or(0),
            parent: Some(parent.clone()),
            ..Self::new(format, DiskType::Differencing, parent.disk_len)
        }
    }

    fn block_size(&self) -> u32 {
        self.block_size.unwrap_or(Self::DEFAULT_BLOCK_SIZE)
    }

    /// Why these options are not possible.
    fn problem(&self) -> Option<String> {
        self.size_problem()
            .or_else(|| self.sector_problem())
            .or_else(|| self.block_problem())
            .or_else(|| self.parent_problem())
    }

    fn size_problem(&self) -> Option<String> {
        let (name, most, most_text) = match self.format {
            Format::Vhd => ("VHD", vhd::MAX_DISK_LEN, "2040 GiB"),
            Format::Vhdx => ("VHDX", vhdx::MAX_DISK_LEN, "64 TiB"),
        };
        let unit = u64_from_u32(self.sector_size).max(SECTOR_SIZE);
        let possible = self.size != 0 && self.size.is_multiple_of(unit) && self.size <= most;
        (!possible).then(|| {
            format!(
                "a {name} of {} bytes is not possible; its size is a multiple of {unit}, at most \
                 {most} ({most_text})",
                self.size
            )
        })
    }

    fn sector_problem(&self) -> Option<String> {
        let (logical, physical) = (self.sector_size, self.physical_sector_size);
        match self.format {
            Format::Vhd => (logical != 512).then(|| {
                format!("a VHD with sectors of {logical} bytes is not possible; they have 512")
            }),
            Format::Vhdx => {
                let known = [logical, physical]
                    .iter()
                    .all(|size| matches!(size, 512 | 4096));
                (!known || physical < logical).then(|| {
                    format!(
                        "sectors of {logical} bytes, physically {physical}, are not possible; both \
                         are 512 or 4096, the physical one not the smaller"
                    )
                })
            }
        }
    }

    fn block_problem(&self) -> Option<String> {
        let size = self.block_size();
        let (possible, text) = match self.format {
            Format::Vhd => {
                let sizes = 512 << 10..=32 << 20;
                let is_flat = self.disk_type == DiskType::Fixed;
                let fits = self.size.div_ceil(u64_from_u32(size.max(1))) <= vhd::MAX_BLOCKS;
                (
                    is_flat || sizes.contains(&size) && fits,
                    "512 KiB to 32 MiB",
                )
            }
            Format::Vhdx => (BLOCK_SIZES.contains(&size), "1 MiB to 256 MiB"),
        };
        let possible = possible && size.is_power_of_two();
        (!possible).then(|| {
            format!(
                "a block size of {size} bytes is not possible; it is a power of two from {text}"
            )
        })
    }

    fn parent_problem(&self) -> Option<String> {
        let Some(parent) = &self.parent else {
            return (self.disk_type == DiskType::Differencing)
                .then(|| "a differencing disk needs a parent".to_owned());
        };
        let same_format = matches!(
            (self.format, parent.identity),
            (Format::Vhd, Identity::Vhd(_)) | (Format::Vhdx, Identity::Vhdx(_))
        );
        if self.disk_type != DiskType::Differencing {
            return Some(format!("a {} disk has no parent", self.disk_type));
        }
        if !same_format {
            return Some(format!(
                "the parent of a {} is a {0}: create the child in its format",
                self.format
            ));
        }
        if parent.identity.is_nil() {
            return Some("the parent's identity is nil, which any disk could have".to_owned());
        }
        (parent.sector_size != u64_from_u32(self.sector_size)).then(|| {
            format!(
                "sectors of {} bytes over a parent with sectors of {} are not possible; they are \
                 the same",
                self.sector_size, parent.sector_size
            )
        })
    }
}

/// Creates a disk at `path`, durable on return. A fixed one takes its space on the host only as it
/// is written.
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
    let done = write(&file, options).and_then(|()| sync_directory_of(path));
    // Windows removes nothing that is open.
    drop(file);
    done.map_err(|source| {
        // The first failure is the one to tell.
        let _ = std::fs::remove_file(path);
        failed("write it", source)
    })
}

/// Creates a disk in the empty file `storage`, durable on return.
///
/// # Errors
/// [`std::io::ErrorKind::InvalidInput`] for impossible options; what the host answers.
pub fn create_in(storage: &dyn Storage, options: &CreateOptions) -> std::io::Result<()> {
    match options.problem() {
        Some(reason) => Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            reason,
        )),
        None => write(storage, options),
    }
}

fn write(storage: &dyn Storage, options: &CreateOptions) -> std::io::Result<()> {
    let (size, block_size) = (options.size, options.block_size());
    match (options.format, &options.parent) {
        (Format::Vhd, Some(parent)) => {
            image::vhd::create_differencing(storage, size, block_size, parent)
        }
        (Format::Vhd, None) => image::vhd::create(storage, options.disk_type, size, block_size),
        (Format::Vhdx, parent) => {
            let disk = image::vhdx::NewDisk {
                disk_type: options.disk_type,
                disk_len: size,
                block_size,
                sector_size: options.sector_size,
                physical_sector_size: options.physical_sector_size,
                parent: parent.as_ref(),
            };
            image::vhdx::create(storage, &disk)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::check::{CheckOptions, CheckReport, check_storage};
    use crate::storage::sim::SimStorage;

    const SIZE: u64 = 100 << 20;

    fn parent(identity: Identity) -> NewParent {
        NewParent {
            identity,
            disk_len: SIZE,
            sector_size: 512,
            mtime: UNIX_EPOCH,
            relative: ".\\base".to_owned(),
            absolute: "D:\\base".to_owned(),
        }
    }

    const IN_VHD: Identity = Identity::Vhd([7; 16]);
    const IN_VHDX: Identity = Identity::Vhdx(uuid::Uuid::from_bytes([7; 16]));

    #[test]
    fn new_disks_are_sound() {
        let mut all = vec![
            CreateOptions::differencing(parent(IN_VHD)),
            CreateOptions::differencing(parent(IN_VHDX)),
        ];
        for format in [Format::Vhd, Format::Vhdx] {
            for disk_type in [DiskType::Fixed, DiskType::Dynamic] {
                all.push(CreateOptions::new(format, disk_type, SIZE));
            }
        }
        for options in all {
            let sim = SimStorage::new();
            create_in(&sim, &options).unwrap();
            let report = check_storage(&sim, &CheckOptions::default()).unwrap();
            assert_eq!(report, CheckReport::default(), "{options:?}");
            assert_eq!(sim.unsynced_len(), 0, "durable");
            let probe = image::probe(&sim, Path::new("")).unwrap();
            assert_eq!(
                (probe.format, probe.disk_type),
                (options.format, options.disk_type)
            );
            assert_eq!(probe.virtual_size, SIZE);
            let identities = probe.parent.map(|link| link.identities);
            assert_eq!(
                identities,
                options.parent.map(|parent| vec![parent.identity])
            );
        }
    }

    /// Why `options`, changed, are refused.
    fn refused(options: CreateOptions, change: impl Fn(&mut CreateOptions)) -> String {
        let mut options = options;
        assert_eq!(options.problem(), None);
        change(&mut options);
        options.problem().expect("impossible")
    }

    #[test]
    fn impossible_disks_are_refused() {
        let vhd = || CreateOptions::dynamic(SIZE);
        let vhdx = || CreateOptions::new(Format::Vhdx, DiskType::Dynamic, SIZE);
        for size in [0, 100, vhd::MAX_DISK_LEN + 512] {
            assert!(refused(vhd(), |new| new.size = size).contains("2040 GiB"));
        }
        for size in [0, 100, (64 << 40) + 512] {
            assert!(refused(vhdx(), |new| new.size = size).contains("64 TiB"));
        }
        for size in [0, 4096, 3 << 20, 512 << 20] {
            refused(vhd(), |new| new.block_size = Some(size));
            refused(vhdx(), |new| new.block_size = Some(size));
        }
        refused(vhd(), |new| new.sector_size = 4096);
        refused(vhdx(), |new| new.sector_size = 1024);
        refused(vhdx(), |new| new.physical_sector_size = 8192);
        refused(vhdx(), |new| {
            new.sector_size = 4096;
            new.physical_sector_size = 512;
        });
        let odd = refused(vhdx(), |new| {
            new.size += 512;
            new.sector_size = 4096;
        });
        assert!(odd.contains("a multiple of 4096"), "{odd}");
    }

    #[test]
    fn impossible_parents_are_refused() {
        let child = || CreateOptions::differencing(parent(IN_VHDX));
        refused(child(), |new| new.parent = None);
        refused(child(), |new| new.parent = Some(parent(IN_VHD)));
        refused(child(), |new| new.disk_type = DiskType::Dynamic);
        let nil = Identity::Vhdx(uuid::Uuid::nil());
        refused(child(), |new| new.parent = Some(parent(nil)));
        let sectors = refused(child(), |new| new.sector_size = 4096);
        assert!(sectors.contains("sectors of 512"), "{sectors}");
    }
}
