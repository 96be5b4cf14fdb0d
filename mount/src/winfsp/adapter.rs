//! The driver's requests, one method each; see the parent module for what they mean.

use std::ffi::c_void;

use vhdfs::library::NodeKind;
use windows_sys::Win32::Foundation::{
    NTSTATUS, STATUS_ACCESS_DENIED, STATUS_BUFFER_OVERFLOW, STATUS_CANNOT_DELETE, STATUS_DISK_FULL,
    STATUS_END_OF_FILE, STATUS_FILE_IS_A_DIRECTORY, STATUS_INVALID_PARAMETER,
    STATUS_NOT_A_DIRECTORY, STATUS_OBJECT_NAME_COLLISION, STATUS_OBJECT_NAME_INVALID,
    STATUS_VOLUME_DISMOUNTED,
};
use windows_sys::Win32::Storage::FileSystem::{
    FILE_APPEND_DATA, FILE_EXECUTE, FILE_READ_DATA, FILE_WRITE_DATA, INVALID_FILE_ATTRIBUTES,
};
use winfsp::filesystem::{
    DirMarker, FileInfo, FileSecurity, FileSystemContext, ModificationDescriptor, OpenFileInfo,
    VolumeInfo,
};
use winfsp::{FspError, Result, U16CStr};

use super::{Opened, VhdFs, attributes, directory, names, raw, status};
use crate::front::{OpenFile, Reader};

/// `FILE_DIRECTORY_FILE`, `FILE_NON_DIRECTORY_FILE` and `FILE_DELETE_ON_CLOSE` of NtCreateFile.
const WANTS_DIRECTORY: u32 = 0x1;
const WANTS_FILE: u32 = 0x40;
const WANTS_DELETION: u32 = 0x1000;

fn failed<T>(status: NTSTATUS) -> Result<T> {
    Err(FspError::NTSTATUS(status))
}

fn library_failed(error: &vhdfs::library::LibraryError) -> FspError {
    FspError::NTSTATUS(status::of_library(error))
}

fn transferred(len: usize) -> Result<u32> {
    u32::try_from(len).map_err(|_| FspError::NTSTATUS(STATUS_INVALID_PARAMETER))
}

impl VhdFs {
    /// Does `work` with the open disk of a handle.
    fn with_file<T>(
        &self,
        opened: &Opened,
        work: impl FnOnce(&OpenFile) -> Result<T>,
    ) -> Result<T> {
        let Some(number) = opened.file else {
            return failed(match opened.kind {
                NodeKind::Directory => STATUS_FILE_IS_A_DIRECTORY,
                NodeKind::Disk => STATUS_ACCESS_DENIED,
            });
        };
        match self.files.get(number) {
            Some(file) => work(&file),
            // Which only happens at the end.
            None => failed(STATUS_VOLUME_DISMOUNTED),
        }
    }

    /// Tells about the node of a handle.
    fn tell(&self, opened: &Opened, info: &mut FileInfo) -> Result<()> {
        let found = self.library.attributes(opened.reference.node);
        attributes::fill(info, &found.map_err(|error| library_failed(&error))?);
        Ok(())
    }

    /// Owner, group and access control list of a node, in `buffer` if there is one and it is large
    /// enough. Their length.
    fn security(&self, opened: &super::Reference, buffer: Option<&mut [c_void]>) -> Result<usize> {
        let descriptor = (self.library.security_descriptor(opened.node))
            .map_err(|error| library_failed(&error))?;
        if let Some(buffer) = buffer {
            match raw::bytes(buffer).get_mut(..descriptor.len()) {
                Some(start) => start.copy_from_slice(&descriptor),
                None => return failed(STATUS_BUFFER_OVERFLOW),
            }
        }
        Ok(descriptor.len())
    }
}

impl FileSystemContext for VhdFs {
    type FileContext = Opened;

    fn get_security_by_name(
        &self,
        path: &U16CStr,
        descriptor: Option<&mut [c_void]>,
        _: impl FnOnce(&U16CStr) -> Option<FileSecurity>,
    ) -> Result<FileSecurity> {
        let names = names::components(path.as_slice()).map_err(FspError::NTSTATUS)?;
        let (reference, found) = self.find(&names).map_err(FspError::NTSTATUS)?;
        let room = descriptor.as_ref().map(|buffer| buffer.len());
        let len = match self.security(&reference, descriptor) {
            // The crate cannot tell WinFsp how much room there should have been, so that it would ask
            // for ever.
            Err(FspError::NTSTATUS(STATUS_BUFFER_OVERFLOW)) => {
                let path = path.to_string_lossy();
                log::warn!("{path}: nobody may open it: its access control list is too long");
                return failed(STATUS_ACCESS_DENIED);
            }
            done => done?,
        };
        Ok(FileSecurity {
            reparse: false,
            // WinFsp goes on with a buffer of the size that this says; a descriptor knows its own.
            sz_security_descriptor: u64::try_from(room.unwrap_or(len)).unwrap_or(u64::MAX),
            attributes: attributes::flags(&found),
        })
    }

    fn open(
        &self,
        path: &U16CStr,
        options: u32,
        granted: u32,
        info: &mut OpenFileInfo,
    ) -> Result<Opened> {
        let names = names::components(path.as_slice()).map_err(FspError::NTSTATUS)?;
        let (reference, found) = self.find(&names).map_err(FspError::NTSTATUS)?;
        match found.kind {
            NodeKind::Directory if options & WANTS_FILE != 0 => {
                return failed(STATUS_FILE_IS_A_DIRECTORY);
            }
            NodeKind::Disk if options & WANTS_DIRECTORY != 0 => {
                return failed(STATUS_NOT_A_DIRECTORY);
            }
            _ if options & WANTS_DELETION != 0 => return failed(STATUS_CANNOT_DELETE),
            _ => {}
        }
        let write = granted & (FILE_WRITE_DATA | FILE_APPEND_DATA) != 0;
        let read = granted & (FILE_READ_DATA | FILE_EXECUTE) != 0;
        // Who asks for attributes alone, as every listing does, does not keep a disk open.
        let file = match found.kind {
            NodeKind::Disk if read || write => {
                if write && self.read_only {
                    return Err(self.refusal());
                }
                let user = raw::user(self).map_err(|error| {
                    log::error!("who opens a disk cannot be told: {error}");
                    FspError::NTSTATUS(STATUS_ACCESS_DENIED)
                })?;
                let opened = self.open_content(reference.node, write, &user);
                Some(opened.map_err(|error| library_failed(&error))?)
            }
            _ => None,
        };
        let opened = Opened {
            reference,
            kind: found.kind,
            file,
            reader: Reader::new(found.node),
        };
        // Its size is known for certain only now.
        if let Err(error) = self.tell(&opened, info.as_mut()) {
            self.close(opened);
            return Err(error);
        }
        let room = usize::from(info.normalized_name_size());
        if let Some(spelled) = self.spelled(&names)
            && !spelled.is_empty()
            && std::mem::size_of_val(spelled.as_slice()) <= room
        {
            info.set_normalized_name(&spelled, None);
        }
        Ok(opened)
    }

    fn close(&self, opened: Opened) {
        if let Some(number) = opened.file {
            self.files.remove(number);
        }
    }

    fn create(
        &self,
        path: &U16CStr,
        _: u32,
        _: u32,
        _: u32,
        _: Option<&[c_void]>,
        _: u64,
        _: Option<&[u8]>,
        _: bool,
        _: &mut OpenFileInfo,
    ) -> Result<Opened> {
        let names = names::components(path.as_slice()).map_err(FspError::NTSTATUS)?;
        match self.find(&names) {
            Ok(_) => failed(STATUS_OBJECT_NAME_COLLISION),
            Err(STATUS_OBJECT_NAME_INVALID) => failed(STATUS_OBJECT_NAME_INVALID),
            Err(_) => Err(self.refusal()),
        }
    }

    fn overwrite(
        &self,
        _: &Opened,
        _: u32,
        _: bool,
        _: u64,
        _: Option<&[u8]>,
        _: &mut FileInfo,
    ) -> Result<()> {
        Err(self.refusal())
    }

    fn read(&self, opened: &Opened, buffer: &mut [u8], offset: u64) -> Result<u32> {
        self.with_file(opened, |file| match file.read(buffer, offset)? {
            0 if !buffer.is_empty() => failed(STATUS_END_OF_FILE),
            len => transferred(len),
        })
    }

    fn write(
        &self,
        opened: &Opened,
        data: &[u8],
        offset: u64,
        to_end: bool,
        constrained: bool,
        info: &mut FileInfo,
    ) -> Result<u32> {
        let written = self.with_file(opened, |file| {
            let offset = if to_end { file.len } else { offset };
            let inside = file.inside(offset, data.len());
            match inside < data.len() {
                // Of the kernel, for pages that are mapped: what lies beyond the end is nothing.
                true if constrained => match inside {
                    0 => Ok(0),
                    _ => Ok(file.write(&data[..inside], offset)?),
                },
                true => {
                    file.for_writing()?;
                    failed(STATUS_DISK_FULL)
                }
                false => Ok(file.write(data, offset)?),
            }
        })?;
        self.tell(opened, info)?;
        transferred(written)
    }

    fn flush(&self, opened: Option<&Opened>, info: &mut FileInfo) -> Result<()> {
        match opened {
            Some(opened) => {
                if opened.file.is_some() {
                    self.with_file(opened, |file| Ok(file.flush()?))?;
                }
                self.tell(opened, info)
            }
            // The volume. All of it is tried, whatever fails.
            None => {
                let flushed = self.files.all().into_iter().map(|file| file.flush());
                let failures: Vec<_> = flushed.filter_map(std::result::Result::err).collect();
                match failures.into_iter().next() {
                    Some(refused) => Err(refused.into()),
                    None => Ok(()),
                }
            }
        }
    }

    fn get_file_info(&self, opened: &Opened, info: &mut FileInfo) -> Result<()> {
        self.tell(opened, info)
    }

    fn get_security(&self, opened: &Opened, descriptor: Option<&mut [c_void]>) -> Result<u64> {
        let len = self.security(&opened.reference, descriptor)?;
        Ok(u64::try_from(len).unwrap_or(u64::MAX))
    }

    fn set_security(&self, _: &Opened, _: u32, _: ModificationDescriptor) -> Result<()> {
        Err(self.refusal())
    }

    fn set_basic_info(
        &self,
        opened: &Opened,
        flags: u32,
        created: u64,
        accessed: u64,
        written: u64,
        changed: u64,
        info: &mut FileInfo,
    ) -> Result<()> {
        self.tell(opened, info)?;
        // Zero leaves a time as it is.
        let same_time = |wanted, is| wanted == 0 || wanted == is;
        let is_so = [INVALID_FILE_ATTRIBUTES, 0, info.file_attributes].contains(&flags)
            && same_time(created, info.creation_time)
            && same_time(accessed, info.last_access_time)
            && same_time(written, info.last_write_time)
            && same_time(changed, info.change_time);
        match is_so {
            true => Ok(()),
            false => Err(self.refusal()),
        }
    }

    fn set_file_size(
        &self,
        opened: &Opened,
        size: u64,
        _: bool,
        info: &mut FileInfo,
    ) -> Result<()> {
        self.tell(opened, info)?;
        match size {
            _ if size == info.file_size => Ok(()),
            _ if size > info.file_size && !self.read_only => failed(STATUS_DISK_FULL),
            _ => Err(self.refusal()),
        }
    }

    fn set_delete(&self, _: &Opened, _: &U16CStr, delete: bool) -> Result<()> {
        match delete {
            true => Err(self.refusal()),
            false => Ok(()),
        }
    }

    fn rename(&self, _: &Opened, _: &U16CStr, _: &U16CStr, _: bool) -> Result<()> {
        Err(self.refusal())
    }

    fn read_directory(
        &self,
        opened: &Opened,
        // The driver filters by it itself.
        _: Option<&U16CStr>,
        marker: DirMarker<'_>,
        buffer: &mut [u8],
    ) -> Result<u32> {
        let (library, reader) = (&self.library, &opened.reader);
        directory::fill(library, &self.listings, reader, marker.inner(), buffer)
            .map_err(|error| library_failed(&error))
    }

    fn get_volume_info(&self, info: &mut VolumeInfo) -> Result<()> {
        let space = self
            .library
            .space()
            .map_err(|error| library_failed(&error))?;
        info.total_size = space.blocks.saturating_mul(space.block_size);
        info.free_size = space.blocks_available.saturating_mul(space.block_size);
        info.set_volume_label(&self.label);
        Ok(())
    }

    fn set_volume_label(&self, _: &U16CStr, _: &mut VolumeInfo) -> Result<()> {
        Err(self.refusal())
    }
}
