//! What a virtual disk is: `GetVirtualDiskInformation`.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use super::constants::*;
use super::disk::VirtualDisk;
use super::error::*;
use crate::disk::{Disk, OpenOptions};
use crate::format::parent::{Identity, ParentLink};
use crate::format::{DiskType, Format};
use crate::image::{self, Geometry, Image, ImageOptions};
use crate::storage::Storage;

/// What [`super::get_virtual_disk_information`] tells (`GET_VIRTUAL_DISK_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VirtualDiskInfo {
    /// Sizes in bytes.
    Size {
        /// The disk's size.
        virtual_size: u64,
        /// The file's length.
        physical_size: u64,
        /// A block; 0 of a fixed VHD, which has none.
        block_size: u32,
        /// A sector, as a guest addresses them.
        sector_size: u32,
    },
    /// Which disk it is, as its children name it: a VHD's `UniqueID`, a VHDX's `DataWriteGuid`.
    Identifier(Uuid),
    /// Where the parent is.
    ParentLocation {
        /// Whether it was found: then there is one location.
        resolved: bool,
        /// Its path; else every place where the file says that it may be.
        locations: Vec<String>,
    },
    /// Which disk the parent is.
    ParentIdentifier(Uuid),
    /// The format.
    StorageType(VirtualStorageType),
    /// 2: fixed, 3: dynamic, 4: differencing.
    ProviderSubtype(u32),
    /// Bytes in a sector, as the guest is advised to write them.
    PhysicalSectorSize(u32),
    /// Whether it is attached, by whichever process.
    IsLoaded(bool),
}

/// What there is to ask.
enum Look {
    /// All of a chain.
    Disk(Arc<Disk>),
    /// A file without its parents.
    Image(Box<dyn Image>),
}

impl Look {
    fn geometry(&self) -> &Geometry {
        match self {
            Self::Disk(disk) => disk.geometry(),
            Self::Image(image) => image.geometry(),
        }
    }

    fn file_len(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.file_len(),
            Self::Image(image) => image.file_len(),
        }
    }

    fn identity(&self) -> Identity {
        match self {
            Self::Disk(disk) => disk.identity(),
            Self::Image(image) => image.identity(),
        }
    }

    fn parent_link(&self) -> Option<&ParentLink> {
        match self {
            Self::Disk(disk) => disk.parent_link(),
            Self::Image(image) => image.parent(),
        }
    }
}

impl VirtualDisk {
    /// A look at the disk as it is now.
    fn look_now(&self) -> Result<Look, Win32Error> {
        let file = self.file()?;
        if let Some(disk) = self.open_disk() {
            return Ok(Look::Disk(disk));
        }
        let file: Arc<dyn Storage> = file;
        if self.opening.is_alone {
            let options = ImageOptions {
                read_only: true,
                punch_holes: false,
            };
            let opened = image::open(file, &self.path, options);
            let opened = opened.map_err(|problem| Win32Error::from(&problem))?;
            return Ok(Look::Image(opened.image));
        }
        let options = OpenOptions {
            read_only: true,
            lock: false,
            punch_holes: false,
        };
        let parents = self.opening.parents(&self.path);
        let disk = Disk::open_storage_with(file, &self.path, &options, &parents);
        let disk = disk.map_err(|error| Win32Error::from(&error))?;
        Ok(Look::Disk(disk))
    }

    /// Fails where the disk cannot be told of.
    pub(super) fn look(&self) -> Result<(), Win32Error> {
        self.look_now().map(|_| ())
    }

    pub(super) fn information(&self, version: u32) -> Result<VirtualDiskInfo, Win32Error> {
        if !self.rights.get_info {
            return Err(ERROR_ACCESS_DENIED);
        }
        match version {
            GET_VIRTUAL_DISK_INFO_UNSPECIFIED => return Err(ERROR_INVALID_PARAMETER),
            GET_VIRTUAL_DISK_INFO_PARENT_TIMESTAMP
            | GET_VIRTUAL_DISK_INFO_IS_4K_ALIGNED
            | GET_VIRTUAL_DISK_INFO_PHYSICAL_DISK
            | GET_VIRTUAL_DISK_INFO_SMALLEST_SAFE_VIRTUAL_SIZE
            | GET_VIRTUAL_DISK_INFO_FRAGMENTATION
            | GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID
            | GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE => return Err(ERROR_NOT_SUPPORTED),
            _ => {}
        }
        let look = self.look_now()?;
        let geometry = look.geometry();
        // Sector and block sizes are checked against the formats' when a file is opened.
        let small = |size: u64| u32::try_from(size).map_err(|_| ERROR_FILE_CORRUPT);
        Ok(match version {
            GET_VIRTUAL_DISK_INFO_SIZE => VirtualDiskInfo::Size {
                virtual_size: geometry.disk_len,
                physical_size: look.file_len(),
                block_size: match geometry.is_flat {
                    true => 0,
                    false => small(geometry.block_size)?,
                },
                sector_size: small(geometry.sector_size)?,
            },
            GET_VIRTUAL_DISK_INFO_IDENTIFIER => VirtualDiskInfo::Identifier(id(look.identity())),
            GET_VIRTUAL_DISK_INFO_PARENT_LOCATION => parent_location(&look)?,
            GET_VIRTUAL_DISK_INFO_PARENT_IDENTIFIER => {
                let link = look.parent_link().ok_or(ERROR_VHD_INVALID_TYPE)?;
                let first = link.identities.first().ok_or(ERROR_FILE_CORRUPT)?;
                VirtualDiskInfo::ParentIdentifier(id(*first))
            }
            GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE => {
                VirtualDiskInfo::StorageType(match geometry.format {
                    Format::Vhd => VirtualStorageType::VHD,
                    Format::Vhdx => VirtualStorageType::VHDX,
                })
            }
            GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE => {
                VirtualDiskInfo::ProviderSubtype(match geometry.disk_type {
                    DiskType::Fixed => 2,
                    DiskType::Dynamic => 3,
                    DiskType::Differencing => 4,
                })
            }
            GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE => {
                VirtualDiskInfo::PhysicalSectorSize(small(geometry.physical_sector_size)?)
            }
            GET_VIRTUAL_DISK_INFO_IS_LOADED => VirtualDiskInfo::IsLoaded(self.is_attached()?),
            _ => return Err(ERROR_INVALID_PARAMETER),
        })
    }
}

fn parent_location(look: &Look) -> Result<VirtualDiskInfo, Win32Error> {
    let link = look.parent_link().ok_or(ERROR_VHD_INVALID_TYPE)?;
    let found: Option<PathBuf> = match look {
        Look::Disk(disk) => disk.parent().map(|parent| parent.path().to_owned()),
        Look::Image(_) => None,
    };
    Ok(match found {
        Some(path) => VirtualDiskInfo::ParentLocation {
            resolved: true,
            locations: vec![path.to_string_lossy().into_owned()],
        },
        None => VirtualDiskInfo::ParentLocation {
            resolved: false,
            locations: link.paths.iter().map(|path| path.text.clone()).collect(),
        },
    })
}

fn id(identity: Identity) -> Uuid {
    match identity {
        Identity::Vhd(bytes) => Uuid::from_bytes(bytes),
        Identity::Vhdx(id) => id,
    }
}
