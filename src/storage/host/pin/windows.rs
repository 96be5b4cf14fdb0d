//! Handles with the right to attributes alone, which take no part in the sharing of files.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::windows::ffi::{OsStrExt, OsStringExt};
use std::os::windows::fs::OpenOptionsExt;
use std::os::windows::io::{AsHandle, BorrowedHandle, OwnedHandle};
use std::path::{Component, Path, PathBuf, Prefix};
use std::time::{Duration, SystemTime};

use windows_sys::Wdk::Storage::FileSystem::{
    FILE_OPEN_REPARSE_POINT, FILE_SYNCHRONOUS_IO_NONALERT, FileFsFullSizeInformation,
};
use windows_sys::Win32::Foundation::{ERROR_ACCESS_DENIED, ERROR_NO_MORE_FILES};
use windows_sys::Win32::Storage::FileSystem::{
    FILE_ATTRIBUTE_ARCHIVE, FILE_ATTRIBUTE_COMPRESSED, FILE_ATTRIBUTE_DIRECTORY,
    FILE_ATTRIBUTE_HIDDEN, FILE_ATTRIBUTE_NORMAL, FILE_ATTRIBUTE_NOT_CONTENT_INDEXED,
    FILE_ATTRIBUTE_READONLY, FILE_ATTRIBUTE_RECALL_ON_DATA_ACCESS, FILE_ATTRIBUTE_RECALL_ON_OPEN,
    FILE_ATTRIBUTE_REPARSE_POINT, FILE_ATTRIBUTE_SPARSE_FILE, FILE_ATTRIBUTE_SYSTEM,
    FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_OPEN_REPARSE_POINT, FILE_LIST_DIRECTORY,
    FILE_READ_ATTRIBUTES, FILE_READ_DATA, FILE_SHARE_DELETE, FILE_SHARE_READ, FILE_SHARE_WRITE,
    FILE_TYPE_DISK, FileAttributeTagInfo, FileBasicInfo, FileCompressionInfo,
    FileFullDirectoryInfo, FileIdInfo, FileStandardInfo, READ_CONTROL, SYNCHRONIZE,
    VOLUME_NAME_DOS, VOLUME_NAME_GUID,
};
use windows_sys::Win32::System::Ioctl::FSCTL_GET_REPARSE_POINT;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{FileKey, Kind, Space, Stat};
use crate::error::OpenError;
use crate::storage::host::windows::reparse::{self, Tag};
use crate::storage::host::windows::{self, Descriptor, Token, sys};
use crate::storage::host::{HostFile, HostOptions, paths};
use crate::units::{u64_from_u32, usize_from_u32};

/// Whoever wants to may open the file meanwhile.
pub(crate) const SHARE_ALL: u32 = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;

/// The most that a reparse point holds.
const REPARSE_LEN: usize = 16 << 10;

/// A file or directory that is held in place.
#[derive(Debug)]
pub(crate) struct Pin(OwnedHandle);

impl Space {
    /// Of the file system that an open file lies on.
    pub(crate) fn of(file: BorrowedHandle<'_>) -> io::Result<Self> {
        let found: FullSize = sys::volume_information(file, FileFsFullSizeInformation)?;
        let number = |found: i64| u64::try_from(found).unwrap_or(0);
        Ok(Self {
            block_size: u64_from_u32(found.unit_sectors) * u64_from_u32(found.sector_size),
            blocks: number(found.units),
            blocks_free: number(found.free),
            blocks_available: number(found.available),
            files: 0,
            files_free: 0,
            name_max: 255,
        })
    }
}

impl Pin {
    /// The directory at `path`. Links are followed.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn directory(path: &Path) -> io::Result<Self> {
        Self::file(path)?.if_directory()
    }

    /// What is at `path`, whatever it is but a device. Links are followed.
    ///
    /// # Errors
    /// Where there is nothing.
    pub(crate) fn file(path: &Path) -> io::Result<Self> {
        Self::at(path, true)
    }

    /// The same; with `follow`, links are followed.
    pub(crate) fn at(path: &Path, follow: bool) -> io::Result<Self> {
        let device = || io::Error::new(io::ErrorKind::InvalidInput, "it is a device");
        // Opening some devices does something to them. `NUL` and the like are found out so, too.
        let absolute = std::path::absolute(path)?;
        if let Some(Component::Prefix(prefix)) = absolute.components().next()
            && matches!(prefix.kind(), Prefix::DeviceNS(_))
        {
            return Err(device());
        }
        let link = if follow {
            0
        } else {
            FILE_FLAG_OPEN_REPARSE_POINT
        };
        let file = OpenOptions::new()
            .access_mode(FILE_READ_ATTRIBUTES | SYNCHRONIZE)
            .share_mode(SHARE_ALL)
            .custom_flags(FILE_FLAG_BACKUP_SEMANTICS | link)
            .open(path)?;
        let pin = Self(file.into());
        match sys::file_type(pin.handle()) {
            FILE_TYPE_DISK => Ok(pin),
            _ => Err(device()),
        }
    }

    /// What `name` is in this directory; a link itself.
    ///
    /// # Errors
    /// Where there is nothing, [`io::ErrorKind::NotADirectory`] where this is none, and
    /// [`io::ErrorKind::InvalidFilename`] where `name` would be more than one name, a stream of a
    /// file, or a name that other programs cannot have meant.
    pub(crate) fn child(&self, name: &OsStr) -> io::Result<Self> {
        let name: Vec<u16> = name.encode_wide().collect();
        if !is_name(&name) {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        let options = FILE_OPEN_REPARSE_POINT | FILE_SYNCHRONOUS_IO_NONALERT;
        let access = FILE_READ_ATTRIBUTES | SYNCHRONIZE;
        sys::open_relative(self.handle(), &name, access, SHARE_ALL, options).map(Self)
    }

    /// The directory `name` in this one.
    ///
    /// # Errors
    /// As [`Self::child`], and [`io::ErrorKind::NotADirectory`] where it is none, but a link perhaps.
    pub(crate) fn subdirectory(&self, name: &OsStr) -> io::Result<Self> {
        self.child(name)?.if_directory()
    }

    fn if_directory(self) -> io::Result<Self> {
        match self.kind()? {
            Kind::Directory => Ok(self),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// The directory at `path` below this one, without following a link, and so without leaving the volume;
    /// the directory itself for the empty path. Never `None`.
    ///
    /// # Errors
    /// As [`Self::subdirectory`].
    pub(crate) fn directory_here(&self, path: &Path) -> io::Result<Option<Self>> {
        let walk = |directory: Self, name| directory.subdirectory(name);
        path.iter().try_fold(self.try_clone()?, walk).map(Some)
    }

    /// What `name` is in this directory; where it is a link, what that leads to.
    ///
    /// # Errors
    /// Where there is nothing, or the host does not say.
    pub(crate) fn followed(&self, name: &OsStr) -> io::Result<Self> {
        Self::file(&self.real_path()?.join(name))
    }

    /// What lies at `path` below this directory, as far as the host itself can tell: it cannot.
    #[expect(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "as on Linux, which can"
    )]
    pub(crate) fn beneath(&self, _path: &Path) -> io::Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Its attributes, also once its name is gone.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        stat(self.handle())
    }

    /// Attributes of an open file.
    pub(crate) fn stat_of(file: &File) -> io::Result<Stat> {
        stat(file.as_handle())
    }

    /// Attributes of what `name` is in this directory; of a link, its own.
    pub(crate) fn stat_child(&self, name: &OsStr) -> io::Result<Stat> {
        self.child(name)?.stat()
    }

    /// Calls `visit` with each name in this directory and what it is, until that breaks off; `.` and
    /// `..` left out, and names that [`Self::child`] does not take.
    pub(crate) fn each_name(
        &self,
        mut visit: impl FnMut(&OsStr, Kind) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let directory = self.reopen(FILE_LIST_DIRECTORY, SHARE_ALL)?;
        let mut names = Vec::new();
        let mut buffer = vec![0_u64; 8 << 10];
        loop {
            let more =
                sys::information_in(directory.as_handle(), FileFullDirectoryInfo, &mut buffer);
            match more {
                Ok(()) => entries(buffer.as_bytes(), &mut names),
                Err(error) if is(&error, ERROR_NO_MORE_FILES) => return Ok(()),
                Err(error) => return Err(error),
            }
            for (name, kind) in names.drain(..) {
                if visit(&name, kind).is_break() {
                    return Ok(());
                }
            }
        }
    }

    /// Where this link leads.
    pub(crate) fn link_target(&self) -> io::Result<PathBuf> {
        let mut data = vec![0; REPARSE_LEN];
        let len = sys::control(self.handle(), FSCTL_GET_REPARSE_POINT, &[], &mut data)?;
        let target = data.get(..len).and_then(reparse::target);
        let unknown = || io::Error::new(io::ErrorKind::InvalidData, "a link that leads nowhere");
        Ok(OsString::from_wide(&target.ok_or_else(unknown)?).into())
    }

    /// Where the host says that it is.
    pub(crate) fn real_path(&self) -> io::Result<PathBuf> {
        // A volume may have no letter.
        let path = sys::final_path(self.handle(), VOLUME_NAME_DOS)
            .or_else(|_| sys::final_path(self.handle(), VOLUME_NAME_GUID))?;
        Ok(paths::simplified(OsString::from_wide(&path).into()))
    }

    /// What else leads there: from the volume's GUID.
    pub(crate) fn other_paths(&self) -> Vec<PathBuf> {
        let path = sys::final_path(self.handle(), VOLUME_NAME_GUID);
        path.iter()
            .map(|path| OsString::from_wide(path).into())
            .collect()
    }

    /// Opens exactly this file.
    ///
    /// # Errors
    /// As [`HostFile::open`].
    pub(crate) fn open(&self, options: &HostOptions) -> Result<HostFile, OpenError> {
        HostFile::of(self, options)
            .map_err(|problem| OpenError::new(&self.real_path().unwrap_or_default(), problem))
    }

    /// Opens exactly this file to look at what it is, without keeping others from it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn glance(&self) -> Result<HostFile, OpenError> {
        self.open(&HostOptions {
            read_only: true,
            lock: false,
            no_follow: false,
        })
    }

    /// Opens exactly this file anew, for other rights, whatever it is called by now. What a file
    /// system puts in the place of the bytes that it stores for itself is seen.
    pub(crate) fn reopen(&self, access: u32, share: u32) -> io::Result<OwnedHandle> {
        self.reopen_as(access, share, 0)
    }

    /// The same, with further `options` of `NtCreateFile`.
    fn reopen_as(&self, access: u32, share: u32, options: u32) -> io::Result<OwnedHandle> {
        let options = options | FILE_SYNCHRONOUS_IO_NONALERT;
        let opened = sys::open_relative(self.handle(), &[], access | SYNCHRONIZE, share, options);
        match opened {
            Err(error) if windows::is_unsupported(&error) || is_missing(&error) => {
                self.reopen_by_path(access, share, options)
            }
            opened => self.if_same(opened?),
        }
    }

    /// `opened`, if that is this file: some hosts, Wine among them, go by the name that it had.
    fn if_same(&self, opened: OwnedHandle) -> io::Result<OwnedHandle> {
        match key(opened.as_handle())? == key(self.handle())? {
            true => Ok(opened),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The same where the file system wants a name: by the one that it has, if that still leads here.
    pub(in crate::storage::host) fn reopen_by_path(
        &self,
        access: u32,
        share: u32,
        options: u32,
    ) -> io::Result<OwnedHandle> {
        let link = match options & FILE_OPEN_REPARSE_POINT {
            0 => 0,
            _ => FILE_FLAG_OPEN_REPARSE_POINT,
        };
        let path = OsString::from_wide(&sys::final_path(self.handle(), VOLUME_NAME_DOS)?);
        let file = OpenOptions::new()
            .access_mode(access | FILE_READ_ATTRIBUTES | SYNCHRONIZE)
            .share_mode(share)
            .custom_flags(FILE_FLAG_BACKUP_SEMANTICS | link)
            .open(path)?;
        self.if_same(file.into())
    }

    /// Whether the file `name` in this directory, with these attributes, may be written: its owner
    /// wants it written at all, and permissions let this process. Not for a link.
    pub(crate) fn is_child_writable(&self, name: &OsStr, stat: &Stat) -> bool {
        let allowed = || {
            let descriptor = self.child(name)?.descriptor()?;
            Token::own()?.allows(&descriptor, windows::WRITING)
        };
        stat.kind == Kind::File
            && stat.attributes & FILE_ATTRIBUTE_READONLY == 0
            // Where the host cannot tell, opening it will.
            && allowed().unwrap_or_else(|error| !is(&error, ERROR_ACCESS_DENIED))
    }

    /// Whether its permissions let somebody read it.
    pub(crate) fn allows_reading(&self, who: &Token) -> io::Result<bool> {
        who.allows(&self.descriptor()?, FILE_READ_DATA)
    }

    /// Its owner, group and access control list.
    pub(crate) fn descriptor(&self) -> io::Result<Descriptor> {
        // Of a link, as of all else: its own.
        let file = self.reopen_as(READ_CONTROL, SHARE_ALL, FILE_OPEN_REPARSE_POINT)?;
        Descriptor::of(file.as_handle())
    }

    /// Sizes of the file system that it lies on.
    pub(crate) fn space(&self) -> io::Result<Space> {
        Space::of(self.handle())
    }

    fn kind(&self) -> io::Result<Kind> {
        kind_of(self.handle()).map(|(kind, _)| kind)
    }

    fn handle(&self) -> BorrowedHandle<'_> {
        self.0.as_handle()
    }
}

impl Stat {
    /// Attributes of what is at `path`, wherever that is; of a link, its own.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        Pin::at(path, false)?.stat()
    }

    /// The attributes to show of it.
    pub(crate) fn shown_attributes(&self, is_directory: bool, is_read_only: bool) -> u32 {
        const KEPT: u32 = FILE_ATTRIBUTE_HIDDEN
            | FILE_ATTRIBUTE_SYSTEM
            | FILE_ATTRIBUTE_ARCHIVE
            | FILE_ATTRIBUTE_NOT_CONTENT_INDEXED;
        let directory = if is_directory {
            FILE_ATTRIBUTE_DIRECTORY
        } else {
            0
        };
        let read_only = if is_read_only {
            FILE_ATTRIBUTE_READONLY
        } else {
            0
        };
        match self.attributes & KEPT | directory | read_only {
            0 => FILE_ATTRIBUTE_NORMAL,
            some => some,
        }
    }
}

/// Whether `error` is the host's with that number.
pub(crate) fn is(error: &io::Error, code: u32) -> bool {
    error
        .raw_os_error()
        .is_some_and(|found| u32::try_from(found) == Ok(code))
}

fn is_missing(error: &io::Error) -> bool {
    let kind = error.kind();
    matches!(
        kind,
        io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename
    )
}

/// Whether Windows takes it for one name, and this very one.
fn is_name(name: &[u16]) -> bool {
    const NO: [u16; 4] = [0, 0x2f, 0x5c, 0x3a];
    let ends_so = |c: &u16| matches!(*c, 0x2e | 0x20);
    !name.iter().any(|c| NO.contains(c)) && name.last().is_some_and(|last| !ends_so(last))
}

/// `FILE_BASIC_INFO`
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Basic {
    created: i64,
    accessed: i64,
    modified: i64,
    changed: i64,
    attributes: u32,
    _padding: u32,
}

/// `FILE_STANDARD_INFO`
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Standard {
    allocated: i64,
    len: i64,
    links: u32,
    flags: [u8; 4],
}

/// `FILE_COMPRESSION_INFO`
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Compression {
    stored: i64,
    method: [u8; 8],
}

/// `FILE_ID_INFO`
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Id {
    volume: u64,
    file: [u8; 16],
}

/// `FILE_ATTRIBUTE_TAG_INFO`
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Tagged {
    attributes: u32,
    tag: u32,
}

/// `FILE_FS_FULL_SIZE_INFORMATION`
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct FullSize {
    units: i64,
    available: i64,
    free: i64,
    unit_sectors: u32,
    sector_size: u32,
}

/// What kind of file it is, and its attributes.
fn kind_of(file: BorrowedHandle<'_>) -> io::Result<(Kind, u32)> {
    let found: Tagged = sys::information(file, FileAttributeTagInfo)?;
    Ok((kind(found.attributes, found.tag), found.attributes))
}

fn kind(attributes: u32, tag: u32) -> Kind {
    /// Reading it makes another program fetch it first, from a tape or over the network.
    const RECALLED: u32 = FILE_ATTRIBUTE_RECALL_ON_DATA_ACCESS | FILE_ATTRIBUTE_RECALL_ON_OPEN;
    let is_directory = attributes & FILE_ATTRIBUTE_DIRECTORY != 0;
    if attributes & FILE_ATTRIBUTE_REPARSE_POINT != 0 {
        match reparse::tag(tag) {
            Tag::Link => return Kind::Link,
            Tag::Stored => {}
            Tag::Unknown => return Kind::Other("a reparse point of an unknown kind"),
        }
    }
    match is_directory {
        true => Kind::Directory,
        false if attributes & RECALLED != 0 => {
            Kind::Other("a placeholder for a file that is stored elsewhere")
        }
        false => Kind::File,
    }
}

/// Numbers like those of the host, and zero for none.
fn stat(file: BorrowedHandle<'_>) -> io::Result<Stat> {
    let (kind, attributes) = kind_of(file)?;
    let basic: Basic = sys::information(file, FileBasicInfo)?;
    let standard: Standard = sys::information(file, FileStandardInfo)?;
    let number = |found: i64| u64::try_from(found).unwrap_or(0);
    Ok(Stat {
        key: key(file)?,
        born: (basic.created != 0).then(|| system_time(basic.created)),
        kind,
        len: number(standard.len),
        allocated: match attributes & (FILE_ATTRIBUTE_SPARSE_FILE | FILE_ATTRIBUTE_COMPRESSED) {
            0 => number(standard.allocated),
            // What else counts the holes.
            _ => sys::information(file, FileCompressionInfo)
                .map_or(number(standard.allocated), |found: Compression| {
                    number(found.stored)
                }),
        },
        accessed: system_time(basic.accessed),
        modified: system_time(basic.modified),
        // Some file systems do not have it.
        changed: system_time(if basic.changed == 0 {
            basic.modified
        } else {
            basic.changed
        }),
        attributes,
    })
}

fn key(file: BorrowedHandle<'_>) -> io::Result<FileKey> {
    if let Ok(id) = sys::information::<Id>(file, FileIdInfo) {
        return Ok(FileKey {
            device: id.volume,
            inode: u128::from_le_bytes(id.file),
        });
    }
    let (volume, index) = sys::file_index(file)?;
    Ok(FileKey {
        device: volume.into(),
        inode: index.into(),
    })
}

/// Takes a buffer of `FILE_FULL_DIR_INFO` apart.
fn entries(mut bytes: &[u8], names: &mut Vec<(OsString, Kind)>) {
    const NAME: usize = 68;
    let number = |bytes: &[u8], at: usize| {
        let found = bytes
            .get(at..at + 4)
            .and_then(|found| found.try_into().ok());
        found.map_or(0, |found| usize_from_u32(u32::from_le_bytes(found)))
    };
    loop {
        let name = bytes
            .get(NAME..NAME + number(bytes, 60))
            .unwrap_or_default();
        let name: Vec<u16> = name
            .as_chunks()
            .0
            .iter()
            .map(|unit| u16::from_le_bytes(*unit))
            .collect();
        if is_name(&name) {
            let attributes = u32::try_from(number(bytes, 56)).unwrap_or(0);
            // Of a reparse point its tag stands where others have the size of their attributes.
            let tag = u32::try_from(number(bytes, 64)).unwrap_or(0);
            names.push((OsString::from_wide(&name), kind(attributes, tag)));
        }
        match (number(bytes, 0), bytes.len()) {
            (next, len) if next > 0 && next < len => bytes = &bytes[next..],
            _ => return,
        }
    }
}

/// A time of the host, in units of 100 ns since 1601. One that cannot be expressed becomes 1970.
fn system_time(time: i64) -> SystemTime {
    const TO_1970: i64 = 116_444_736_000_000_000;
    let from_1970 = time.saturating_sub(TO_1970);
    let distance = Duration::from_nanos(from_1970.unsigned_abs().saturating_mul(100));
    let time = if from_1970 < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}
